//! Integer codes with a scale, and perhaps a zero point, per group or channel.
//!
//! With `b` bits, codes `q` run from `-2^(b-1)` to `2^(b-1) - 1`; a weight is about
//! `(q - zero_point) * scale`. In the formulas `r` rounds to the source's element type, as every
//! intermediate of compressed-tensors is, and `rint` to the nearest integer, ties to even. Over a
//! group, `min` and `max` are widened to include zero:
//!
//! ```text
//! symmetric   scale = r(max(-min, max) / ((2^b - 1) / 2))
//!             q = rint(clamp(r(x / scale)))
//! asymmetric  scale = r(r(max - min) / (2^b - 1))
//!             zero_point = rint(clamp(r(-2^(b-1) - r(min / scale))))
//!             q = rint(clamp(r(r(x / scale) + zero_point)))
//! ```
//!
//! A zero point of 0/0 is 0, and then a scale of zero is the type's epsilon. A group with a NaN has
//! scale NaN, one with an infinity an infinite scale; whatever comes out as NaN has code 0. Either
//! way such a group dequantizes to nothing finite that could be mistaken for weights.

use crate::dtype::Dtype;

use super::chunks::Rows;
use super::extremes::Extremes;
use super::grid::Grid;
use super::isa::{Isa, Kernel};
use super::lanes::{ROUNDING, round};
use super::nearest::{Divided, Nearest, Tool};
use super::pack::{pack, pack_down, packed_len, unpack, word_of};
use super::refine::{Refiner, Refining};
use super::search::Search;
use super::shape::{bands, grouped, matrix, part};
use super::tile::{Element, Tile, for_element, widen};
use super::{Part, Quality, Role};

/// Which weights share a scale.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Granularity {
    /// This many consecutive input features of an output feature.
    Group(u32),
    /// All input features of an output feature.
    Channel,
}

impl std::str::FromStr for Granularity {
    type Err = String;

    /// Reads a number of weights, or `channel`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<u32>() {
            _ if text == "channel" => Ok(Self::Channel),
            Ok(size) if size > 0 => Ok(Self::Group(size)),
            _ => Err("neither a number of weights nor `channel`".to_owned()),
        }
    }
}

/// How codes lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Packing {
    /// `q + 2^(b-1)` in `b` bits, each row a dense stream, lowest bit first, padded to 32-bit
    /// words. Zero points likewise, down the rows.
    Packed32,
    /// `q` in a signed byte. Zero points likewise.
    Int8,
}

/// Integers with a scale per group or channel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IntScheme {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Which weights share a scale.
    pub granularity: Granularity,
    /// Whether there are no zero points.
    pub symmetric: bool,
    /// How codes lie in memory.
    pub packing: Packing,
    /// How scales are chosen.
    pub quality: Quality,
}

impl IntScheme {
    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        if !(2..=8).contains(&self.bits) {
            return Err(format!("{} bits are not among 2 to 8", self.bits));
        }
        match self.granularity {
            Granularity::Group(size) => grouped(dtype, shape, size.into()),
            Granularity::Channel => matrix(dtype, shape).map(drop),
        }
    }

    pub(super) fn parts(&self, dtype: Dtype, shape: &[u64]) -> Vec<Part> {
        let (rows, cols) = (shape[0], shape[1]);
        let groups = cols / self.group(cols);
        let words = |codes: u64| (codes * u64::from(self.bits)).div_ceil(32);
        let (codes, zero_points) = match self.packing {
            Packing::Packed32 => {
                ((Dtype::I32, [rows, words(cols)]), (Dtype::I32, [words(rows), groups]))
            }
            Packing::Int8 => ((Dtype::I8, [rows, cols]), (Dtype::I8, [rows, groups])),
        };
        let mut parts =
            vec![part(Role::Codes, codes.0, codes.1), part(Role::Scale, dtype, [rows, groups])];
        if !self.symmetric {
            parts.push(part(Role::ZeroPoint, zero_points.0, zero_points.1));
        }
        parts
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        bands(dtype, shape, self.rows_of_unit(), |shape| self.parts(dtype, shape), source_bytes)
    }

    /// Rows whose bytes are whole in every part: `b` words of packed zero points hold those of 32.
    pub(super) fn rows_of_unit(&self) -> u64 {
        if self.symmetric || self.packing == Packing::Int8 { 1 } else { 32 }
    }

    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, out: &mut [&mut [u8]]) {
        let dtype = tile.data.dtype();
        let (codes, rest) = out.split_first_mut().expect("codes are a part");
        let (scales, rest) = rest.split_first_mut().expect("scales are a part");
        let zero_points = rest.first_mut().map_or(&mut [][..], |z| &mut **z);
        let group = self.group(tile.cols as u64) as usize;
        for_element!(dtype, E => isa.run(Encode::<E> {
            isa,
            scheme: self,
            source: E::split(tile.data.bytes()),
            cols: tile.cols,
            stride: tile.stride,
            group,
            refining: Refining::new(isa, self.quality, tile),
            codes,
            scales,
            zero_points,
        }));
    }

    pub(super) fn decode(
        &self,
        dtype: Dtype,
        (rows, cols): (usize, usize),
        parts: &[&[u8]],
        out: &mut [f32],
    ) {
        for_element!(dtype, E => self.decode_as::<E>((rows, cols), parts, out));
    }

    /// Elements that share a scale, in rows of `cols`.
    fn group(&self, cols: u64) -> u64 {
        match self.granularity {
            Granularity::Group(size) => u64::from(size),
            Granularity::Channel => cols,
        }
    }

    fn decode_as<E: Element>(
        &self,
        (rows, cols): (usize, usize),
        parts: &[&[u8]],
        out: &mut [f32],
    ) {
        let group = self.group(cols as u64) as usize;
        let groups = cols / group;
        let code_at = |bytes: &[u8], index: usize, word: &dyn Fn(usize) -> usize| match self.packing
        {
            Packing::Packed32 => {
                let code = unpack(self.bits, index, |w| word_of(bytes, word(w)));
                i32::from(code) - (1 << (self.bits - 1))
            }
            Packing::Int8 => i32::from(bytes[word(index)].cast_signed()),
        };
        let row_len = parts[0].len() / rows;
        for (r, out) in out.chunks_exact_mut(cols).enumerate() {
            let codes = &parts[0][r * row_len..][..row_len];
            for (c, out) in out.iter_mut().enumerate() {
                let g = c / group;
                let scale = E::widen(E::split(parts[1])[r * groups + g]);
                let zero = match (self.symmetric, self.packing) {
                    (true, _) => 0,
                    (false, Packing::Packed32) => code_at(parts[2], r, &|w| w * groups + g),
                    (false, Packing::Int8) => code_at(parts[2], r * groups + g, &|i| i),
                };
                *out = E::round((code_at(codes, c, &|w| w) - zero) as f32 * scale);
            }
        }
    }
}

/// The codes of a scheme.
#[derive(Clone, Copy, Debug)]
pub(super) struct Codes {
    /// The smallest, `-2^(b-1)`.
    pub(super) low: f32,
    /// The largest.
    pub(super) high: f32,
    /// What is added to a code when it is stored.
    pub(super) offset: f32,
}

impl Codes {
    fn new(bits: u8, packing: Packing) -> Self {
        let half = f32::from(1u8 << (bits - 1));
        let offset = if packing == Packing::Packed32 { half } else { 0.0 };
        Self { low: -half, high: half - 1.0, offset }
    }

    /// Those of `bits` bits, stored without a sign.
    pub(super) fn offset(bits: u8) -> Self {
        Self::new(bits, Packing::Packed32)
    }

    /// The number of steps from lowest to highest.
    pub(super) fn steps(self) -> f32 {
        self.high - self.low
    }

    /// The smallest and largest, less a zero point.
    #[inline(always)]
    pub(super) fn less(self, zero_point: f32) -> (f32, f32) {
        (self.low - zero_point, self.high - zero_point)
    }

    #[inline(always)]
    pub(super) fn clamp(self, x: f32) -> f32 {
        let x = if x < self.low { self.low } else { x };
        if x > self.high { self.high } else { x }
    }

    /// The stored byte of `rint(x)`, for `x` within the codes.
    #[inline(always)]
    pub(super) fn byte(self, x: f32) -> u8 {
        // Modulo 256. The offset is even, so ties stay even.
        (x + (ROUNDING + self.offset)).to_bits() as u8
    }
}

/// The scale and zero point of a group, both as stored.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Fit {
    pub(super) scale: f32,
    pub(super) zero_point: f32,
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    isa: Isa,
    scheme: &'a IntScheme,
    source: &'a [E::Raw],
    cols: usize,
    stride: usize,
    group: usize,
    refining: Option<Refining>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    zero_points: &'a mut [u8],
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        let IntScheme { bits, symmetric, packing, quality, .. } = *self.scheme;
        let range = Codes::new(bits, packing);
        let groups = self.cols / self.group;
        let row_len = match packing {
            Packing::Packed32 => packed_len(self.cols, bits),
            Packing::Int8 => self.cols,
        };
        let mut row_codes = vec![0; self.cols.next_multiple_of(8)];
        let mut row_zeros = vec![0; groups];
        let mut row_fits = vec![Fit { scale: 0.0, zero_point: 0.0 }; groups];
        let mut nearest = Nearest::<E>::new(self.isa, range, symmetric, self.group, self.cols);
        let mut search = match quality {
            Quality::Reference => None,
            Quality::Search | Quality::Best => Some(Search::new(range, symmetric, self.group)),
        };
        let mut refining = self.refining.map(|refining| {
            (Refiner::new(range, symmetric, self.group, refining.is_weighed), refining)
        });
        self.zero_points.fill(0);
        let rows = self.codes.chunks_exact_mut(row_len);
        let scales = self.scales.chunks_exact_mut(groups * E::SIZE);
        for (r, (codes, scales)) in rows.zip(scales).enumerate() {
            let pair = Rows::new(self.source, (self.cols, self.stride), r);
            let row = pair.row;
            if let Some(search) = &mut search {
                let codes = &mut row_codes[..self.cols];
                search.encode_row::<E, CompressedTensors>(row, codes, &mut row_fits);
                if let Some((refiner, refining)) = &mut refining {
                    let Refining { isa, row: xs, importance, .. } = refining;
                    widen::<E>(row, xs);
                    let stored = CompressedTensors::stored::<E>;
                    refiner.refine_row(*isa, xs, importance, stored, codes, &mut row_fits);
                }
            } else {
                let codes = &mut row_codes[..self.cols];
                nearest.encode_row::<CompressedTensors>(pair, codes, &mut row_fits);
            }
            for ((fit, scale), zero) in
                row_fits.iter().zip(scales.chunks_exact_mut(E::SIZE)).zip(&mut row_zeros)
            {
                E::store(fit.scale, scale);
                *zero = range.byte(fit.zero_point);
            }
            match packing {
                Packing::Packed32 => pack(bits, &row_codes, codes),
                Packing::Int8 => codes.copy_from_slice(&row_codes[..self.cols]),
            }
            if !symmetric {
                match packing {
                    Packing::Packed32 => pack_down(bits, r, &row_zeros, self.zero_points),
                    Packing::Int8 => {
                        self.zero_points[r * groups..][..groups].copy_from_slice(&row_zeros);
                    }
                }
            }
        }
    }
}

/// How compressed-tensors rounds to nearest.
#[derive(Clone, Copy, Debug)]
struct CompressedTensors;

impl Tool for CompressedTensors {
    #[inline(always)]
    fn fit<E: Element>(range: Codes, symmetric: bool, extremes: Extremes) -> Fit {
        let (scale, zero_point) = if symmetric {
            (E::round(extremes.magnitude() / (range.steps() / 2.0)), 0.0)
        } else {
            let Extremes { min, max } = extremes;
            let scale = E::round(E::round(max - min) / range.steps());
            let zero = E::round(range.low - E::round(min / scale));
            (scale, if zero.is_nan() { 0.0 } else { round(range.clamp(zero)) })
        };
        Fit { scale: if scale == 0.0 { E::EPSILON } else { scale }, zero_point }
    }

    #[inline(always)]
    fn divisor<E: Element>(scale: f32) -> f32 {
        E::divisor(scale)
    }

    #[inline(always)]
    fn code<E: Element>(range: Codes, symmetric: bool, divided: Divided, x: f32) -> u8 {
        let x = E::quotient(x, divided.by);
        let x = if symmetric { x } else { E::round_moderate(x + divided.zero_point) };
        range.byte(range.clamp(x))
    }

    #[inline(always)]
    fn code_at_any<E: Element>(range: Codes, symmetric: bool, fit: Fit, x: f32) -> u8 {
        let x = E::round(x / fit.scale);
        let x = if symmetric { x } else { E::round(x + fit.zero_point) };
        range.byte(if x.is_nan() { 0.0 } else { range.clamp(x) })
    }

    #[inline(always)]
    fn stored<E: Element>(scale: f32) -> f32 {
        E::round(scale)
    }
}

/// Scales, 2^-100 to 2^100, whose reciprocal is as precise as they are. A scale of infinity or NaN
/// is not among them, so neither is the weight that made it.
pub(super) const MODERATE: std::ops::RangeInclusive<f32> =
    f32::from_bits(27 << 23)..=f32::from_bits(227 << 23);
