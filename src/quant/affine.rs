//! MLX's affine codes: a scale and a bias per group.
//!
//! With `b` bits, codes `q` run from 0 to `n = 2^b - 1`; a weight is about `q * scale + bias`. All
//! arithmetic is in f32, whatever the source; `min` and `max` are those of the group itself:
//!
//! ```text
//! s = max((max - min) / n, 1e-7), negative unless |min| > |max|
//! e = min if |min| > |max|, else max
//! k = rint(e / s)
//! scale, bias = e / k, e if k is not 0, else s, 0
//! q = clamp(rint((x - bias) / scale))
//! ```
//!
//! So the largest magnitude is exact, and so is zero. Scale and bias are rounded to the source's
//! element type when they are stored, after the codes were made with them. A group with a NaN or an
//! infinity has the scale NaN, and the code 0 wherever it comes out as NaN.

use crate::dtype::Dtype;

use super::affine_refine::Refiner;
use super::affine_search::Search;
use super::chunks::{Chunks, Rows};
use super::extremes::{Extremes, GroupExtremes, range};
use super::grid::Grid;
use super::int::MODERATE;
use super::isa::{Isa, Kernel};
use super::lanes::{ROUNDING, round};
use super::pack::{pack, packed_len, unpack, word_of};
use super::refine::Refining;
use super::shape::{bands, grouped, part};
use super::tile::{Element, NAN, Tile, for_element, widen};
use super::{Part, Quality, Role};

/// Unsigned codes with a scale and a bias per group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AffineScheme {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Input features that share a scale, a multiple of 32.
    pub group_size: u32,
    /// How scales and biases are chosen.
    pub quality: Quality,
}

impl AffineScheme {
    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        if !matches!(self.bits, 2..=6 | 8) {
            return Err(format!("{} bits are not among 2, 3, 4, 5, 6, 8", self.bits));
        }
        if !self.group_size.is_multiple_of(32) {
            return Err(format!("group size {} is not a multiple of 32", self.group_size));
        }
        grouped(dtype, shape, self.group_size.into())
    }

    pub(super) fn parts(&self, dtype: Dtype, shape: &[u64]) -> Vec<Part> {
        let (rows, cols) = (shape[0], shape[1]);
        let groups = cols / u64::from(self.group_size);
        vec![
            part(Role::Codes, Dtype::U32, [rows, cols * u64::from(self.bits) / 32]),
            part(Role::Scale, dtype, [rows, groups]),
            part(Role::Bias, dtype, [rows, groups]),
        ]
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        bands(dtype, shape, 1, |shape| self.parts(dtype, shape), source_bytes)
    }

    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, out: &mut [&mut [u8]]) {
        let dtype = tile.data.dtype();
        let [codes, scales, biases] = out else { unreachable!("three parts") };
        for_element!(dtype, E => isa.run(Encode::<E> {
            scheme: self,
            source: E::split(tile.data.bytes()),
            cols: tile.cols,
            stride: tile.stride,
            refining: Refining::new(isa, self.quality, tile),
            codes,
            scales,
            biases,
        }));
    }

    pub(super) fn decode(&self, dtype: Dtype, cols: usize, parts: &[&[u8]], out: &mut [f32]) {
        let &[codes, scales, biases] = parts else { unreachable!("three parts") };
        let group = self.group_size as usize;
        let row_len = packed_len(cols, self.bits);
        for_element!(dtype, E => {
            let (scales, biases) = (E::split(scales), E::split(biases));
            for (i, out) in out.iter_mut().enumerate() {
                let codes = &codes[i / cols * row_len..][..row_len];
                let code = unpack(self.bits, i % cols, |w| word_of(codes, w));
                let (scale, bias) = (E::widen(scales[i / group]), E::widen(biases[i / group]));
                // Two operations of that type.
                *out = E::round(E::round(f32::from(code) * scale) + bias);
            }
        });
    }
}

/// Scale and bias of a group.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Line {
    pub(super) scale: f32,
    pub(super) bias: f32,
}

/// The scale and bias that MLX chooses for codes up to `high`, before they are rounded.
#[inline(always)]
pub(super) fn fit(high: f32, Extremes { min, max }: Extremes) -> Line {
    let is_finite = (max - min).is_finite();
    let step = (max - min) / high;
    let step = if step > 1e-7 { step } else { 1e-7 };
    let from_min = min.abs() > max.abs();
    let edge = if from_min { min } else { max };
    let step = if from_min { step } else { -step };
    let codes = round(edge / step);
    // Divided at any rate, and all chosen by selection, for the compiler to do many groups at a time.
    let exact = edge / codes;
    let scale = if codes == 0.0 { step } else { exact };
    let bias = if codes == 0.0 { 0.0 } else { edge };
    Line { scale: if is_finite { scale } else { NAN }, bias: if is_finite { bias } else { NAN } }
}

/// `x` within 0 and `high`, as the nearest integer, ties to even.
#[inline(always)]
pub(super) fn code(x: f32, high: f32) -> u8 {
    let x = if x < 0.0 { 0.0 } else { x };
    let x = if x > high { high } else { x };
    // The sum has a spacing of 1.
    (x + ROUNDING).to_bits() as u8
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    scheme: &'a AffineScheme,
    source: &'a [E::Raw],
    cols: usize,
    stride: usize,
    refining: Option<Refining>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    biases: &'a mut [u8],
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        let AffineScheme { bits, group_size, quality } = *self.scheme;
        let high = ((1u32 << bits) - 1) as f32;
        let group = group_size as usize;
        let groups = self.cols / group;
        let mut row_codes = vec![0; self.cols];
        let mut lines = vec![Line::default(); groups];
        let mut chunks = Chunks::new(group, self.cols);
        let mut ranges = GroupExtremes::<E::Bits>::new(group, self.cols);
        let [mut row_mins, mut row_maxs] = [(); 2].map(|()| vec![0.0; groups]);
        let [mut row_scales, mut row_biases] = [(); 2].map(|()| vec![0.0; groups]);
        let mut search = match quality {
            Quality::Reference => None,
            Quality::Search | Quality::Best => Some(Search::new(bits, group)),
        };
        let mut refining = self.refining.map(|refining| {
            let thorough = quality == Quality::Best;
            (Refiner::new(bits, group, refining.is_weighed, thorough), refining)
        });
        let rows = self.codes.chunks_exact_mut(packed_len(self.cols, bits));
        let scales = self.scales.chunks_exact_mut(groups * E::SIZE);
        let biases = self.biases.chunks_exact_mut(groups * E::SIZE);
        for (r, ((codes, scales), biases)) in rows.zip(scales).zip(biases).enumerate() {
            let pair = Rows::new(self.source, (self.cols, self.stride), r);
            let row = pair.row;
            match &mut search {
                Some(search) => {
                    let lines = (&mut row_scales[..], &mut row_biases[..]);
                    search.encode_row::<E>(row, &mut row_codes, lines);
                    if let Some((refiner, refining)) = &mut refining {
                        let Refining { isa, row: xs, importance, .. } = refining;
                        widen::<E>(row, xs);
                        let lines = (&mut row_scales[..], &mut row_biases[..]);
                        refiner.refine_row(*isa, xs, importance, E::round, &mut row_codes, lines);
                    }
                }
                None => {
                    ranges.find_ranges::<E>(row);
                    // One thing after the other, for the compiler to do many groups at a time.
                    let extremes = row_mins.iter_mut().zip(&mut row_maxs);
                    for (bits, (min, max)) in ranges.iter().zip(extremes) {
                        Extremes { min: *min, max: *max } = bits.values::<E>();
                    }
                    let extremes = row_mins.iter().zip(&row_maxs);
                    let found = row_scales.iter_mut().zip(&mut row_biases);
                    for ((&min, &max), (scale, bias)) in extremes.zip(found) {
                        Line { scale: *scale, bias: *bias } = fit(high, Extremes { min, max });
                    }
                    let found = row_scales.iter().zip(&row_biases);
                    for (line, (&scale, &bias)) in lines.iter_mut().zip(found) {
                        *line = Line { scale, bias };
                    }
                    chunks.encode::<E>(pair, &lines, &mut row_codes, |x, Line { scale, bias }| {
                        code((x - bias) / scale, high)
                    });
                    let is_odd = |line: &Line| !MODERATE.contains(&line.scale.abs());
                    if lines.iter().fold(false, |any, line| any | is_odd(line)) {
                        let groups = row.chunks_exact(group).zip(row_codes.chunks_exact_mut(group));
                        for ((group, out), line) in groups.zip(&lines) {
                            encode_with::<E>(high, *line, group, out);
                        }
                    }
                }
            }
            for (values, stored) in [(&row_scales, scales), (&row_biases, biases)] {
                for (value, stored) in values.iter().zip(stored.chunks_exact_mut(E::SIZE)) {
                    E::store(E::round(*value), stored);
                }
            }
            pack(bits, &row_codes, codes);
        }
    }
}

/// Encodes a group as MLX does.
#[inline(always)]
pub(super) fn encode_group<E: Element>(high: f32, group: &[E::Raw], out: &mut [u8]) -> Line {
    let line = fit(high, range::<E>(group).values::<E>());
    encode_with::<E>(high, line, group, out);
    line
}

/// Codes of a group, as MLX computes them.
#[inline(always)]
fn encode_with<E: Element>(
    high: f32,
    Line { scale, bias }: Line,
    group: &[E::Raw],
    out: &mut [u8],
) {
    if MODERATE.contains(&scale.abs()) {
        for (&raw, out) in group.iter().zip(out) {
            *out = code((E::widen(raw) - bias) / scale, high);
        }
    } else {
        for (&raw, out) in group.iter().zip(out) {
            let x = (E::widen(raw) - bias) / scale;
            *out = if x.is_nan() { 0 } else { code(x, high) };
        }
    }
}
