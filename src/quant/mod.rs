//! Numerics: reals to codes. Pure functions on slices; no names, no files.
//!
//! A [`Scheme`] says how one weight becomes codes: its parts, their shapes, how the work is cut
//! ([`Grid`]), and the arithmetic. It returns no errors: what it can't take is refused beforehand
//! by [`Scheme::accepts`]. Its bytes depend on the source bytes and the scheme alone, never on the
//! [`Isa`] or on how a weight is cut.

mod affine;
mod affine_refine;
mod affine_search;
mod cast;
mod chunks;
mod codebook;
mod codebook_codes;
mod codebook_refine;
mod codebook_search;
mod examples;
mod experts;
mod extremes;
mod fp8;
mod fp8_search;
mod grid;
mod importance;
mod int;
mod lanes;
mod llm_int8;
mod micro;
mod micro_search;
mod minifloat;
mod nearest;
mod nested;
mod pack;
mod refine;
mod search;
mod shape;
mod simulate;
mod spoilt;
mod survey;
#[cfg(test)]
mod tests;
mod thresholds;
mod tile;
mod transposed;
mod weighed;

use crate::dtype::{Dtype, byte_len};
use crate::isa;
use shape::assert_lengths;

pub use affine::AffineScheme;
pub use cast::CastScheme;
pub use codebook::{Codebook, CodebookScheme, Storage};
pub use examples::examples;
pub use experts::ExpertsScheme;
pub use fp8::{Fp8Grain, Fp8Scale, Fp8Scheme};
pub use grid::{Axis, Grid, PartBytes, Window};
pub use importance::Importance;
pub use int::{Granularity, IntScheme, Packing};
pub use isa::Isa;
pub use llm_int8::LlmInt8Scheme;
pub use micro::{MicroDialect, MicroFloat, MicroScheme};
pub use survey::Survey;
pub use tile::{Real, Reals, Tile};
pub use transposed::{TransposedOrder, TransposedScheme};

/// How much work goes into the choice of a scale. Never changes shapes or layout.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Quality {
    /// What the format's own tool does, byte for byte.
    Reference,
    /// The scale, and zero point, with the least squared error that a search finds.
    Search,
    /// No worse than that, of any group: what up to about ten times as much work finds.
    Best,
}

/// How a weight becomes codes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scheme {
    /// Integers with a scale per group or channel.
    Int(IntScheme),
    /// Integers with a scale and a bias per group.
    Affine(AffineScheme),
    /// Small floats with a one-byte scale per group.
    Micro(MicroScheme),
    /// 8-bit floats with a scale per weight, channel or block.
    Fp8(Fp8Scheme),
    /// Entries of a table with a scale per block of the flattened weight.
    Codebook(CodebookScheme),
    /// Signed bytes with the largest magnitude of a row.
    LlmInt8(LlmInt8Scheme),
    /// The same numbers in another type.
    Cast(CastScheme),
    /// Integers, transposed, with a scale and a zero point per group or channel.
    Transposed(TransposedScheme),
    /// Small floats of stacked experts, transposed.
    Experts(ExpertsScheme),
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
    /// What code zero stands for.
    Bias,
    /// Plain numbers.
    Reals,
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
            Self::Affine(scheme) => scheme.accepts(dtype, shape),
            Self::Micro(scheme) => scheme.accepts(dtype, shape),
            Self::Fp8(scheme) => scheme.accepts(dtype, shape),
            Self::Codebook(scheme) => scheme.accepts(dtype, shape),
            Self::LlmInt8(scheme) => scheme.accepts(dtype, shape),
            Self::Cast(scheme) => scheme.accepts(dtype, shape),
            Self::Transposed(scheme) => scheme.accepts(dtype, shape),
            Self::Experts(scheme) => scheme.accepts(dtype, shape),
        }
    }

    /// The tensors that an accepted weight becomes, codes first.
    pub fn parts(&self, dtype: Dtype, shape: &[u64]) -> Vec<Part> {
        match self {
            Self::Int(scheme) => scheme.parts(dtype, shape),
            Self::Affine(scheme) => scheme.parts(dtype, shape),
            Self::Micro(scheme) => scheme.parts(dtype, shape),
            Self::Fp8(scheme) => scheme.parts(dtype, shape),
            Self::Codebook(scheme) => scheme.parts(dtype, shape),
            Self::LlmInt8(scheme) => scheme.parts(shape),
            Self::Cast(scheme) => scheme.parts(shape),
            Self::Transposed(scheme) => scheme.parts(dtype, shape),
            Self::Experts(scheme) => scheme.parts(shape),
        }
    }

    /// How an accepted weight is cut into chunks of about `source_bytes`.
    pub fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        match self {
            Self::Int(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Affine(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Micro(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Fp8(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Codebook(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::LlmInt8(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Cast(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Transposed(scheme) => scheme.grid(dtype, shape, source_bytes),
            Self::Experts(scheme) => scheme.grid(dtype, shape, source_bytes),
        }
    }

    /// The one number that is stored for a whole weight beside its parts; none where the scheme needs
    /// no [`survey`](Self::survey).
    pub fn scalar(&self, dtype: Dtype) -> Option<Part> {
        match self {
            Self::Micro(scheme) => scheme.scalar(),
            Self::Fp8(scheme) => scheme.scalar(dtype),
            Self::Codebook(scheme) => scheme.scalar(),
            _ => None,
        }
    }

    /// The bytes of [`scalar`](Self::scalar); none where there is none.
    pub fn scalar_bytes(&self, dtype: Dtype, survey: &Survey) -> Vec<u8> {
        match self {
            Self::Micro(scheme) => scheme.scalar_bytes(dtype, survey),
            Self::Fp8(scheme) => scheme.scalar_bytes(dtype, survey),
            Self::Codebook(scheme) => scheme.scalar_bytes(survey),
            _ => Vec::new(),
        }
    }

    /// Whether every window of a weight must have been surveyed before the first can be encoded.
    pub fn is_surveyed(&self) -> bool {
        self.scalar(Dtype::F32).is_some() || self.is_surveyed_by_row()
    }

    /// Whether what is surveyed are rows, of which chunks hold parts. Whole rows, as those of
    /// [`decoded_grid`](Self::decoded_grid), are encoded without.
    pub fn is_surveyed_by_row(&self) -> bool {
        matches!(self, Self::Transposed(scheme) if scheme.granularity == Granularity::Channel)
    }

    /// How an accepted weight is cut into windows of about `source_bytes` to be surveyed.
    pub fn survey_grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        if self.is_surveyed_by_row() {
            let element = (dtype.bitsize() / 8) as u64;
            return Grid::new((1, shape[0], shape[1]), Axis::Rows, 1, &[], element, source_bytes);
        }
        self.grid(dtype, shape, source_bytes)
    }

    /// Adds one window of [`survey_grid`](Self::survey_grid) to what is known of a weight. Windows
    /// come in its order.
    pub fn survey(&self, isa: Isa, tile: &Tile<'_>, survey: &mut Survey) {
        match self {
            _ if !self.is_surveyed() => {}
            Self::Transposed(scheme) => scheme.survey(isa, tile, survey),
            Self::Codebook(scheme) => survey.add_blocks(isa, tile, scheme.block_size as usize),
            _ => survey.add_magnitudes(isa, tile),
        }
    }

    /// Whether what errors count for has a say in what an accepted weight is encoded to.
    pub fn is_searched(&self) -> bool {
        let quality = match self {
            Self::Int(scheme) => scheme.quality,
            Self::Affine(scheme) => scheme.quality,
            Self::Micro(MicroScheme { float: MicroFloat::E2m1, quality, .. }) => *quality,
            Self::Codebook(scheme) => scheme.quality,
            Self::Transposed(scheme) => scheme.quality,
            Self::Experts(scheme) => scheme.quality,
            Self::Fp8(scheme) => return scheme.is_searched(),
            Self::Micro(_) | Self::LlmInt8(_) | Self::Cast(_) => Quality::Reference,
        };
        quality != Quality::Reference
    }

    /// Number of input features of an accepted weight.
    pub fn inputs(&self, shape: &[u64]) -> u64 {
        match self {
            Self::Experts(_) => shape[shape.len() - 2],
            _ => shape[shape.len() - 1],
        }
    }

    /// The matrix of stacked ones, and the input feature there, that the first element of a window
    /// belongs to: of a chunk of an accepted weight, be it shown decoded or not.
    pub fn first_input(&self, shape: &[u64], window: &Window) -> (u64, u64) {
        let inputs = self.inputs(shape);
        match self {
            Self::Experts(_) => (window.first_row / inputs, window.first_row % inputs),
            // Of a run of rows as well.
            _ => (0, window.first_col % inputs),
        }
    }

    /// Encodes the window of one chunk: all parts, in the order of [`parts`](Self::parts), in one
    /// pass over the tile. `survey` is that of the whole weight, any where the scheme needs none.
    /// `out` has the lengths that the grid gives; every byte is written.
    ///
    /// # Panics
    ///
    /// If the tile or an output has another size.
    pub fn encode(&self, isa: Isa, tile: &Tile<'_>, survey: &Survey, out: &mut [&mut [u8]]) {
        let mut parts = self.parts(tile.data.dtype(), &[tile.rows as u64, tile.cols as u64]);
        // Of the stripes of a weight that is surveyed by row, the first alone has scales to write.
        if survey.bytes_of_rows() > 0 && out[1..].iter().all(|part| part.is_empty()) {
            parts.truncate(1);
            assert_lengths(&parts, out[..1].iter().map(|out| out.len()));
        } else {
            assert_lengths(&parts, out.iter().map(|out| out.len()));
        }
        match self {
            Self::Int(scheme) => scheme.encode(isa, tile, out),
            Self::Affine(scheme) => scheme.encode(isa, tile, out),
            Self::Micro(scheme) => scheme.encode(isa, tile, survey, out),
            Self::Fp8(scheme) => scheme.encode(isa, tile, survey, out),
            Self::Codebook(scheme) => scheme.encode(isa, tile, survey, out),
            Self::LlmInt8(scheme) => scheme.encode(isa, tile, out),
            Self::Cast(scheme) => scheme.encode(isa, tile, out),
            Self::Transposed(scheme) => scheme.encode(isa, tile, survey, out),
            Self::Experts(scheme) => scheme.encode(isa, tile, out),
        }
    }

    /// Dequantizes one chunk of `rows` x `cols` elements, as a loader of element type `dtype` does:
    /// every value is one of that type. After the parts comes the [`scalar`](Self::scalar), where
    /// there is one.
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
        assert_eq!(out.len(), rows * cols, "number of elements");
        let mut specs = self.parts(dtype, &[rows as u64, cols as u64]);
        specs.extend(self.scalar(dtype));
        assert_lengths(&specs, parts.iter().map(|part| part.len()));
        match self {
            Self::Int(scheme) => scheme.decode(dtype, (rows, cols), parts, out),
            Self::Affine(scheme) => scheme.decode(dtype, cols, parts, out),
            Self::Micro(scheme) => scheme.decode(dtype, parts, out),
            Self::Fp8(scheme) => scheme.decode(dtype, (rows, cols), parts, out),
            Self::Codebook(scheme) => scheme.decode(dtype, parts, out),
            Self::LlmInt8(scheme) => scheme.decode(dtype, cols, parts, out),
            Self::Cast(scheme) => scheme.decode(dtype, parts, out),
            Self::Transposed(scheme) => scheme.decode(dtype, (rows, cols), parts, out),
            Self::Experts(scheme) => scheme.decode(dtype, (rows, cols), parts, out),
        }
    }
}

impl std::fmt::Display for Scheme {
    /// As `int4, groups of 128, symmetric, search`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let quality = match self {
            Self::Int(IntScheme { bits, granularity, symmetric, quality, .. })
            | Self::Transposed(TransposedScheme {
                bits, granularity, symmetric, quality, ..
            }) => {
                write!(f, "int{bits}, ")?;
                match granularity {
                    Granularity::Group(size) => write!(f, "groups of {size}, ")?,
                    Granularity::Channel => f.write_str("per channel, ")?,
                }
                f.write_str(if *symmetric { "symmetric" } else { "asymmetric" })?;
                Some(quality)
            }
            Self::Affine(AffineScheme { bits, group_size, quality }) => {
                write!(f, "affine {bits}-bit, groups of {group_size}")?;
                Some(quality)
            }
            Self::Micro(scheme) => {
                f.write_str(match scheme.float {
                    MicroFloat::E2m1 => "E2M1",
                    MicroFloat::E4m3 => "E4M3",
                })?;
                write!(f, ", groups of {}", scheme.group_size())?;
                (scheme.float == MicroFloat::E2m1).then_some(&scheme.quality)
            }
            Self::Fp8(scheme) => {
                match scheme.grain {
                    Fp8Grain::Tensor => f.write_str("E4M3, per tensor")?,
                    Fp8Grain::Channel => f.write_str("E4M3, per channel")?,
                    Fp8Grain::Block(size) => write!(f, "E4M3, blocks of {size} x {size}")?,
                }
                scheme.is_searched().then_some(&scheme.quality)
            }
            Self::Codebook(CodebookScheme { codebook, block_size, double, quality, .. }) => {
                f.write_str(match codebook {
                    Codebook::Nf4 => "NF4",
                    Codebook::Fp4 => "FP4",
                })?;
                write!(f, ", flat blocks of {block_size}")?;
                if *double {
                    f.write_str(", scales quantized")?;
                }
                Some(quality)
            }
            Self::Experts(scheme) => {
                f.write_str("E2M1, groups of 32")?;
                Some(&scheme.quality)
            }
            Self::LlmInt8(_) => {
                f.write_str("int8, per channel")?;
                None
            }
            Self::Cast(CastScheme { to }) => {
                write!(f, "as {}", to.dtype())?;
                None
            }
        };
        match quality {
            Some(Quality::Reference) => f.write_str(", reference"),
            Some(Quality::Search) => f.write_str(", search"),
            Some(Quality::Best) => f.write_str(", best"),
            None => Ok(()),
        }
    }
}
