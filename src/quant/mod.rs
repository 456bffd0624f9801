//! Numerics: reals to codes. Pure functions on slices; no names, no files.
//!
//! A [`Scheme`] says how one weight becomes codes: its parts, their shapes, how the work is cut
//! ([`Grid`]), and the arithmetic. It returns no errors: what it can't take is refused beforehand
//! by [`Scheme::accepts`]. Its bytes depend on the source bytes and the scheme alone, never on the
//! [`Isa`] or on how a weight is cut.

mod grid;
mod int;
mod isa;
mod pack;
mod search;
#[cfg(test)]
mod tests;
mod tile;

use crate::dtype::{Dtype, byte_len};

pub use grid::{Axis, Grid, PartBytes, Window};
pub use int::{Granularity, IntScheme, Packing};
pub use isa::Isa;
pub use tile::{Reals, Tile};

/// How much work goes into the choice of a scale. Never changes shapes or layout.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Quality {
    /// What the format's own tool does, byte for byte.
    Reference,
    /// The scale, and zero point, with the least squared error that a search finds.
    Search,
}

/// How a weight becomes codes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scheme {
    /// Integers with a scale per group or channel.
    Int(IntScheme),
}

/// What a part of a quantized weight holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// The elements.
    Codes,
    /// What a code is multiplied by.
    Scale,
    /// The code that stands for zero.
    ZeroPoint,
}

/// One of the tensors that a weight becomes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// What it holds.
    pub role: Role,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
}

impl Part {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        byte_len(self.dtype, &self.shape).expect("a part is not larger than its weight's f32s")
    }
}

impl Scheme {
    /// Whether a weight can be encoded.
    ///
    /// # Errors
    ///
    /// What is in the way, for a person to read: "group size 128 does not divide 200 input
    /// features".
    pub fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        match self {
            Self::Int(scheme) => scheme.accepts(dtype, shape),
        }
    }

    /// The tensors that an accepted weight becomes, codes first.
    pub fn parts(&self, dtype: Dtype, shape: &[u64]) -> Vec<Part> {
        match self {
            Self::Int(scheme) => scheme.parts(dtype, shape),
        }
    }

    /// How an accepted weight is cut into chunks of about `source_bytes`.
    pub fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        match self {
            Self::Int(scheme) => scheme.grid(dtype, shape, source_bytes),
        }
    }

    /// Encodes the window of one chunk: all parts, in the order of [`parts`](Self::parts), in one
    /// pass over the tile. `out` has the lengths that the grid gives; every byte is written.
    ///
    /// # Panics
    ///
    /// If the tile or an output has another size.
    pub fn encode(&self, isa: Isa, tile: &Tile<'_>, out: &mut [&mut [u8]]) {
        match self {
            Self::Int(scheme) => scheme.encode(isa, tile, out),
        }
    }

    /// Dequantizes one chunk of `rows` x `cols` elements, as a loader of element type `dtype` does:
    /// every value is one of that type.
    ///
    /// # Panics
    ///
    /// If a part or `out` has another size than the chunk's.
    pub fn decode(
        &self,
        dtype: Dtype,
        (rows, cols): (usize, usize),
        parts: &[&[u8]],
        out: &mut [f32],
    ) {
        match self {
            Self::Int(scheme) => scheme.decode(dtype, (rows, cols), parts, out),
        }
    }
}

impl std::fmt::Display for Scheme {
    /// As `int4, groups of 128, symmetric, search`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self::Int(IntScheme { bits, granularity, symmetric, quality, .. }) = self;
        write!(f, "int{bits}, ")?;
        match granularity {
            Granularity::Group(size) => write!(f, "groups of {size}, ")?,
            Granularity::Channel => f.write_str("per channel, ")?,
        }
        let symmetry = if *symmetric { "symmetric" } else { "asymmetric" };
        let quality = match quality {
            Quality::Reference => "reference",
            Quality::Search => "search",
        };
        write!(f, "{symmetry}, {quality}")
    }
}
