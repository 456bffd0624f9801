//! E4M3 codes with a scale per weight, output channel or block.
//!
//! A weight is about `code * scale`; `m` is the largest magnitude of those that share the scale.
//! `e4m3` rounds to nearest, ties to even, and `r` to the source's element type:
//!
//! ```text
//! compressed-tensors  scale = r(m / 448), the type's epsilon where that is 0
//!                     q = e4m3(clamp(r(x / scale)))
//! transformers        s = (1 / m) * 448, 1 where m is 0; scale = 1 / s; all in f32
//!                     q = e4m3(clamp(x * s))
//!   ue8m0             scale = 2^ceil(log2(1 / s)), at least 2^-126; s = 1 / scale
//! ```
//!
//! What shares a scale with a NaN or an infinity has the scale NaN or infinity, and is NaN itself
//! wherever it comes out as NaN; with one scale per weight, that is all of it. A power of two can't be infinite; there it is NaN as well.
//!
//! Codes have nearly the same relative error at every scale, so there is little to find: a search is
//! made at best quality alone, for the scale with the least squared error among some up to twice as
//! large, as if the largest magnitude were another. Powers of two, and the one scale of a weight, are
//! always those of the reference.

use crate::dtype::Dtype;

use super::extremes::{Bits, magnitudes_of_groups};
use super::fp8_search::Histogram;
use super::grid::Grid;
use super::int::MODERATE;
use super::isa::{Isa, Kernel};
use super::lanes::{LANES, sum};
use super::minifloat::{
    E4M3_MAX, E4M3_NAN, E8M0_NAN, e4m3, e4m3_rounded, e4m3_value, e8m0_ceil, e8m0_value, within,
};
use super::shape::{bands, matrix, part};
use super::survey::Survey;
use super::tile::{Element, F32, NAN, Tile, for_element};
use super::{Part, Quality, Role};

/// Which weights share a scale.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fp8Grain {
    /// All of a weight.
    Tensor,
    /// All input features of an output feature.
    Channel,
    /// A square of that many output and input features, cut off at the edges.
    Block(u32),
}

/// How scales are chosen and stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fp8Scale {
    /// compressed-tensors: in the source's element type.
    Source,
    /// transformers: in F32.
    Inverse,
    /// transformers: a power of two, in E8M0.
    Power,
}

/// E4M3 codes with a scale per weight, channel or block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fp8Scheme {
    /// Which weights share a scale.
    pub grain: Fp8Grain,
    /// How scales are chosen and stored.
    pub scale: Fp8Scale,
    /// Whether weights that are not whole blocks are refused.
    pub whole_blocks: bool,
    /// How the scales of channels and blocks are chosen.
    pub quality: Quality,
}

impl Fp8Scale {
    /// The element type of scales, for weights of type `source`.
    fn dtype(self, source: Dtype) -> Dtype {
        match self {
            Self::Source => source,
            Self::Inverse => Dtype::F32,
            Self::Power => Dtype::F8_E8M0,
        }
    }
}

impl Fp8Scheme {
    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        let (rows, cols) = matrix(dtype, shape)?;
        match self.grain {
            Fp8Grain::Block(0) => Err("block size 0".to_owned()),
            Fp8Grain::Block(size) if self.whole_blocks => {
                let is_whole = |dim: u64| dim.is_multiple_of(size.into());
                if is_whole(rows) && is_whole(cols) {
                    Ok(())
                } else {
                    Err(format!("shape {shape:?} is not in whole blocks of {size} x {size}"))
                }
            }
            _ => Ok(()),
        }
    }

    pub(super) fn parts(&self, dtype: Dtype, shape: &[u64]) -> Vec<Part> {
        let (rows, cols) = (shape[0], shape[1]);
        let codes = part(Role::Codes, Dtype::F8_E4M3, [rows, cols]);
        let scales = match self.grain {
            Fp8Grain::Tensor => return vec![codes],
            Fp8Grain::Channel => [rows, 1],
            Fp8Grain::Block(size) => [rows.div_ceil(size.into()), cols.div_ceil(size.into())],
        };
        vec![codes, part(Role::Scale, self.scale.dtype(dtype), scales)]
    }

    pub(super) fn scalar(&self, dtype: Dtype) -> Option<Part> {
        let is_scalar = self.grain == Fp8Grain::Tensor;
        is_scalar.then(|| part(Role::Scale, self.scale.dtype(dtype), [1]))
    }

    pub(super) fn scalar_bytes(&self, dtype: Dtype, survey: &Survey) -> Vec<u8> {
        let mut bytes = vec![0; self.scale.dtype(dtype).bitsize() / 8];
        for_element!(dtype, E => Factor::new::<E>(self.scale, survey.magnitude(), &mut bytes));
        bytes
    }

    /// Whether scales are searched for.
    pub(super) fn is_searched(&self) -> bool {
        self.quality == Quality::Best
            && self.grain != Fp8Grain::Tensor
            && self.scale != Fp8Scale::Power
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        let (rows, _) = self.block(shape[1]);
        bands(dtype, shape, rows, |shape| self.parts(dtype, shape), source_bytes)
    }

    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, survey: &Survey, out: &mut [&mut [u8]]) {
        let dtype = tile.data.dtype();
        let (codes, scales) = out.split_first_mut().expect("there are codes");
        let block = self.block(tile.cols as u64);
        for_element!(dtype, E => isa.run(Encode::<E> {
            rule: self.scale,
            block: (block.0 as usize, block.1 as usize),
            source: E::split(tile.data.bytes()),
            cols: tile.cols,
            stride: tile.stride,
            counts: self.is_searched().then(|| match tile.importance {
                Some(importance) => importance.of_row(tile.cols),
                None => vec![1.0; tile.cols],
            }),
            codes,
            scales: match scales.first_mut() {
                Some(scales) => Scales::Stored(scales),
                None => Scales::Surveyed(survey.magnitude()),
            },
        }));
    }

    pub(super) fn decode(
        &self,
        dtype: Dtype,
        (rows, cols): (usize, usize),
        parts: &[&[u8]],
        out: &mut [f32],
    ) {
        let &[codes, scales] = parts else { unreachable!("two parts") };
        let (high, wide) = match self.grain {
            Fp8Grain::Tensor => (rows as u64, cols as u64),
            _ => self.block(cols as u64),
        };
        let across = cols.div_ceil(wide as usize);
        for_element!(dtype, E => for (i, out) in out.iter_mut().enumerate() {
            let (row, col) = (i / cols / high as usize, i % cols / wide as usize);
            let at = row * across + col;
            let scale = match self.scale {
                Fp8Scale::Source => E::widen(E::split(scales)[at]),
                Fp8Scale::Inverse => F32::widen(F32::split(scales)[at]),
                Fp8Scale::Power => e8m0_value(scales[at]),
            };
            *out = E::round(e4m3_value(codes[i]) * scale);
        });
    }

    /// Rows and columns of what can be encoded apart, in rows of `cols`.
    pub(super) fn block(&self, cols: u64) -> (u64, u64) {
        match self.grain {
            Fp8Grain::Tensor | Fp8Grain::Channel => (1, cols),
            Fp8Grain::Block(size) => (size.into(), size.into()),
        }
    }
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    rule: Fp8Scale,
    block: (usize, usize),
    source: &'a [E::Raw],
    cols: usize,
    stride: usize,
    /// What the errors of a row count for in a search; `None` where there is none.
    counts: Option<Vec<f32>>,
    codes: &'a mut [u8],
    scales: Scales<'a>,
}

/// Where scales come from.
enum Scales<'a> {
    /// They are found, and stored here.
    Stored(&'a mut [u8]),
    /// There is one, of this largest magnitude.
    Surveyed(f32),
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        let Self { rule, block: (high, wide), source, cols, stride, counts, mut scales, .. } = self;
        let across = cols.div_ceil(wide);
        let size = match rule {
            Fp8Scale::Source => E::SIZE,
            Fp8Scale::Inverse => 4,
            Fp8Scale::Power => 1,
        };
        let mut bits = vec![E::Bits::ZERO; across];
        let mut of_row = vec![0.0; across];
        let mut magnitudes = vec![0.0f32; across];
        let mut factors = vec![Factor::Multiply(1.0); across];
        // Row by row: those of one block lie a power of two apart, where the cache has few places for them.
        for (band, codes) in self.codes.chunks_mut(high * cols).enumerate() {
            let row = |r: usize| &source[(band * high + r) * stride..][..cols];
            let rows = codes.len() / cols;
            match &mut scales {
                Scales::Surveyed(magnitude) => {
                    factors[0] = Factor::new::<E>(rule, *magnitude, &mut [0; 4]);
                }
                Scales::Stored(scales) => {
                    magnitudes.fill(0.0);
                    for r in 0..rows {
                        magnitudes_of_groups::<E>(row(r), wide, &mut bits, &mut of_row);
                        for (all, of_row) in magnitudes.iter_mut().zip(&of_row) {
                            // Bit patterns of magnitudes order as integers, NaNs last.
                            *all = f32::from_bits(all.to_bits().max(of_row.to_bits()));
                        }
                    }
                    let stored = scales[band * across * size..].chunks_mut(size);
                    for (b, (factor, stored)) in factors.iter_mut().zip(stored).enumerate() {
                        let cut = b * wide..cols.min((b + 1) * wide);
                        let magnitude = match &counts {
                            Some(counts) if MODERATE.contains(&magnitudes[b]) => {
                                let rows = || (0..rows).map(|r| &row(r)[cut.clone()]);
                                searched::<E, _>(rule, magnitudes[b], rows, &counts[cut.clone()])
                            }
                            _ => magnitudes[b],
                        };
                        *factor = Factor::new::<E>(rule, magnitude, stored);
                    }
                }
            }
            for (r, codes) in codes.chunks_exact_mut(cols).enumerate() {
                let blocks = row(r).chunks(wide).zip(codes.chunks_mut(wide));
                for (factor, (row, codes)) in factors.iter().zip(blocks) {
                    factor.apply::<E>(row, codes);
                }
            }
        }
    }
}

/// Scales between the largest magnitude's and twice that which are nominated from.
const SHIFTS: u8 = 31;

/// The magnitude, near the largest of some rows, as whose scale makes the least of their errors.
#[inline(always)]
fn searched<'a, E: Element<Raw: 'a>, R: Iterator<Item = &'a [E::Raw]>>(
    rule: Fp8Scale,
    magnitude: f32,
    rows: impl Fn() -> R,
    counts: &[f32],
) -> f32 {
    let factor = |magnitude| Factor::new::<E>(rule, magnitude, &mut [0; 4]);
    let histogram = Histogram::new::<E>(rows(), counts, magnitude);
    let mut nominee = (magnitude, f32::INFINITY);
    for shift in 1..=SHIFTS {
        let shifted = magnitude * (1.0 + f32::from(shift) / f32::from(SHIFTS + 1));
        let error = histogram.error(factor(shifted).inverse());
        nominee = if error < nominee.1 { (shifted, error) } else { nominee };
    }
    let error = |magnitude| {
        let factor = factor(magnitude);
        rows().map(|row| factor.error::<E>(row, counts)).sum::<f32>()
    };
    // Not so for a NaN. A sum's own rounding must not prefer what is worse.
    let is_better = error(nominee.0) < error(magnitude) * (1.0 - 1.0 / 65536.0);
    if is_better { nominee.0 } else { magnitude }
}

/// What a code is made with, for a largest magnitude.
#[inline(always)]
fn inverse(magnitude: f32) -> f32 {
    if magnitude.is_nan() {
        NAN
    } else if magnitude > 0.0 {
        (1.0 / magnitude) * E4M3_MAX
    } else {
        1.0
    }
}

/// What weights are divided or multiplied by.
#[derive(Clone, Copy, Debug)]
enum Factor {
    Divide(f32),
    Multiply(f32),
}

impl Factor {
    /// Stores the scale for a largest magnitude at the start of `out`.
    #[inline(always)]
    fn new<E: Element>(rule: Fp8Scale, magnitude: f32, out: &mut [u8]) -> Self {
        match rule {
            Fp8Scale::Source => {
                let scale = E::round(magnitude / E4M3_MAX);
                let scale = if scale == 0.0 { E::EPSILON } else { scale };
                E::store(scale, out);
                Self::Divide(scale)
            }
            Fp8Scale::Inverse => {
                let factor = inverse(magnitude);
                F32::store(F32::round(1.0 / factor), out);
                Self::Multiply(factor)
            }
            Fp8Scale::Power => {
                let scale = 1.0 / inverse(magnitude);
                let code = if scale < f32::MIN_POSITIVE { 1 } else { e8m0_ceil(scale) };
                out[0] = if magnitude < f32::INFINITY { code } else { E8M0_NAN };
                Self::Multiply(1.0 / e8m0_value(out[0]))
            }
        }
    }

    /// One over the scale, about.
    #[inline(always)]
    fn inverse(self) -> f32 {
        match self {
            Self::Divide(scale) => 1.0 / scale,
            Self::Multiply(factor) => factor,
        }
    }

    /// What the squared errors of a row count for; NaN where a scale is too small or large for it.
    #[inline(always)]
    fn error<E: Element>(self, row: &[E::Raw], counts: &[f32]) -> f32 {
        let reciprocal = self.inverse();
        let scale = match self {
            Self::Divide(scale) => scale,
            Self::Multiply(factor) => F32::round(1.0 / factor),
        };
        if !MODERATE.contains(&scale) || !MODERATE.contains(&reciprocal) {
            return f32::NAN;
        }
        let error = |raw: E::Raw, count: f32| {
            let x = E::widen(raw);
            let y = match self {
                Self::Divide(scale) => E::quotient(x, E::divisor(scale)),
                Self::Multiply(factor) => x * factor,
            };
            let error = x.abs() * reciprocal - e4m3_rounded(within(y.abs(), E4M3_MAX));
            error * error * count
        };
        let mut sums = [0.0; LANES];
        let (rows, counts) = (row.chunks(LANES), counts.chunks(LANES));
        for (xs, counts) in rows.zip(counts) {
            for ((sum, &raw), &count) in sums.iter_mut().zip(xs).zip(counts) {
                *sum += error(raw, count);
            }
        }
        sum(sums) * scale * scale
    }

    #[inline(always)]
    fn apply<E: Element>(self, row: &[E::Raw], out: &mut [u8]) {
        match self {
            Self::Divide(scale) if MODERATE.contains(&scale) => {
                let divisor = E::divisor(scale);
                for (&raw, out) in row.iter().zip(out) {
                    *out = e4m3(clamp(E::quotient(E::widen(raw), divisor)));
                }
            }
            Self::Multiply(factor) if MODERATE.contains(&factor) => {
                for (&raw, out) in row.iter().zip(out) {
                    *out = e4m3(clamp(E::widen(raw) * factor));
                }
            }
            _ => {
                for (&raw, out) in row.iter().zip(out) {
                    let x = match self {
                        Self::Divide(scale) => E::round(E::widen(raw) / scale),
                        Self::Multiply(factor) => E::widen(raw) * factor,
                    };
                    *out = if x.is_nan() { E4M3_NAN } else { e4m3(clamp(x)) };
                }
            }
        }
    }
}

#[inline(always)]
fn clamp(x: f32) -> f32 {
    let x = if x < -E4M3_MAX { -E4M3_MAX } else { x };
    if x > E4M3_MAX { E4M3_MAX } else { x }
}
