//! MXFP4 of stacked experts, transposed, as gpt-oss stores them.
//!
//! A weight `[E, in, out]` is `E` matrices of input rows. A group is 32 inputs of one output. With
//! its largest magnitude `m`:
//!
//! ```text
//! e = floor(log2(m)) - 2
//! scale = 2^e
//! ```
//!
//! and the E2M1 code nearest to `x / scale`, clamped to 6, ties to even; a negative number that
//! rounds to zero is -0. A group of zeros has the scale 1. One with a NaN or an infinity has the scale NaN
//! and codes 0. The search tries the neighbouring scales for the least squared error.
//!
//! Codes are `[E, out, in / 32, 16]`, two to a byte, the even input in the lower half; scales, in
//! E8M0, `[E, out, in / 32]`.

use crate::dtype::Dtype;

use super::extremes::Bits;
use super::grid::{Axis, Grid, PartBytes};
use super::importance::Importance;
use super::isa::{Isa, Kernel, prefetch};
use super::micro::{EVEN, MIDPOINTS, signed};
use super::minifloat::{E2M1_MAX, E8M0_NAN, e2m1_rounded, e2m1_value, e8m0_value, within};
use super::shape::{is_real, stripe_bytes};
use super::tile::{Element, Tile, for_element, widen};
use super::{Part, Quality, Role};

/// Inputs of a group.
const GROUP: usize = 32;

/// Outputs that go through the kernel together: their groups fit in the first-level cache.
const LANES: usize = 128;

/// Elements of 16 bits that fill a line of the cache.
const LINE: usize = 32;

/// MXFP4 codes of stacked experts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExpertsScheme {
    /// How scales are chosen.
    pub quality: Quality,
}

impl ExpertsScheme {
    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        is_real(dtype)?;
        let &[_, inputs, _] = shape else {
            return Err(format!("shape {shape:?} is not one of stacked matrices"));
        };
        if shape.contains(&0) {
            Err(format!("shape {shape:?} has no elements"))
        } else if inputs % GROUP as u64 != 0 {
            Err(format!("groups of 32 do not divide {inputs} input features"))
        } else {
            Ok(())
        }
    }

    /// `shape` ends in inputs and outputs.
    pub(super) fn parts(&self, shape: &[u64]) -> Vec<Part> {
        let [above @ .., inputs, outputs] = shape else {
            unreachable!("`accepts` refuses what has no rows")
        };
        let groups = [*outputs, inputs / GROUP as u64];
        let scales = [above, &groups].concat();
        let codes = [&scales[..], &[GROUP as u64 / 2]].concat();
        let part = |role, shape| Part { role, dtype: Dtype::U8, shape };
        vec![part(Role::Codes, codes), part(Role::Scale, scales)]
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        let (experts, inputs, outputs) = (shape[0], shape[1], shape[2]);
        let bytes = |outputs| self.parts(&[inputs, outputs]).into_iter().map(|part| part.bytes());
        let parts: Vec<_> =
            bytes(1).zip(bytes(outputs)).map(|(unit, slab)| PartBytes { unit, slab }).collect();
        let element = dtype.bitsize() as u64 / 8;
        let source_bytes = stripe_bytes(source_bytes);
        Grid::new((experts, inputs, outputs), Axis::Cols, 1, &parts, element, source_bytes)
    }

    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, out: &mut [&mut [u8]]) {
        let [codes, scales] = out else { unreachable!("two parts") };
        for_element!(tile.data.dtype(), E => isa.run(Encode::<E> {
            searched: self.quality != Quality::Reference,
            source: E::split(tile.data.bytes()),
            rows: tile.rows,
            cols: tile.cols,
            stride: tile.stride,
            importance: tile.importance,
            codes,
            scales,
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
        for_element!(dtype, E => for (i, out) in out.iter_mut().enumerate() {
            // The place of the element in the transpose.
            let at = i % cols * rows + i / cols;
            let code = codes[at / 2] >> (at % 2 * 4) & 15;
            *out = E::round(e2m1_value(code) * e8m0_value(scales[at / GROUP]));
        });
    }
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    searched: bool,
    source: &'a [E::Raw],
    rows: usize,
    cols: usize,
    stride: usize,
    importance: Option<Importance<'a>>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        let groups = self.rows / GROUP;
        let (codes, _) = self.codes.as_chunks_mut::<{ GROUP / 2 }>();
        let importance = self.importance.map(|importance| importance.of_row(self.rows));
        let mut bits = [[0; LANES]; GROUP];
        let mut weights = [[0.0; LANES]; GROUP];
        for first in (0..self.cols).step_by(LANES) {
            let cols = LANES.min(self.cols - first);
            for g in 0..groups {
                for (r, bits) in bits.iter_mut().enumerate() {
                    let row = &self.source[(g * GROUP + r) * self.stride + first..][..cols];
                    // What scales and codes depend on is which side of powers of two, and of midpoints
                    // times one, a weight is on: numbers of three bits.
                    for (bits, &raw) in bits.iter_mut().zip(row) {
                        *bits = E::short(raw);
                    }
                    if self.searched {
                        widen::<E>(row, &mut weights[r]);
                    }
                    let next = self.source.get((g * GROUP + GROUP + r) * self.stride + first..);
                    for line in
                        next.unwrap_or_default().as_chunks::<LINE>().0.iter().take(LANES / LINE)
                    {
                        prefetch(line);
                    }
                }
                let scales = match (self.searched, &importance) {
                    (false, _) => reference::<E::Short>(&bits),
                    (true, None) => searched(&weights, reference::<E::Short>(&bits), |_| 1.0),
                    (true, Some(importance)) => {
                        let importance = &importance[g * GROUP..][..GROUP];
                        searched(&weights, reference::<E::Short>(&bits), |row| importance[row])
                    }
                };
                let words = words::<E::Short>(&bits, &scales);
                for lane in 0..cols {
                    let at = (first + lane) * groups + g;
                    self.scales[at] = scales[lane] as u8;
                    let out = codes[at].as_chunks_mut::<4>().0;
                    for (out, words) in out.iter_mut().zip(&words) {
                        *out = words[lane].to_le_bytes();
                    }
                }
            }
        }
    }
}

/// A group's scale in E8M0 by definition, for each lane.
#[inline(always)]
fn reference<E: Element<Bits = i16>>(bits: &[[i16; LANES]; GROUP]) -> [u32; LANES] {
    let mut largest = [0; LANES];
    for row in bits {
        for (largest, bits) in largest.iter_mut().zip(row) {
            *largest = bits.magnitude().max(*largest);
        }
    }
    let mut scales = [0; LANES];
    for (scale, largest) in scales.iter_mut().zip(largest) {
        let bits = E::value(largest).to_bits();
        let exponent = (bits >> 23).saturating_sub(2);
        let exponent = if bits == 0 { 127 } else { exponent };
        *scale = if bits < f32::INFINITY.to_bits() { exponent } else { u32::from(E8M0_NAN) };
    }
    scales
}

/// The best of that scale and its neighbours, for each lane. The errors of a row count for what `count`
/// says.
#[inline(always)]
fn searched(
    weights: &[[f32; LANES]; GROUP],
    reference: [u32; LANES],
    count: impl Fn(usize) -> f32 + Copy,
) -> [u32; LANES] {
    let mut best = (reference, errors(weights, &reference, count));
    for step in [1, u32::MAX] {
        let mut candidates = reference;
        for scale in &mut candidates {
            // Errors at these scales are numbers, and not zero for want of smaller ones.
            let open = (64..190).contains(scale);
            *scale = if open { scale.wrapping_add(step) } else { *scale };
        }
        let found = errors(weights, &candidates, count);
        for lane in 0..LANES {
            let better = found[lane] < best.1[lane];
            best.0[lane] = if better { candidates[lane] } else { best.0[lane] };
            best.1[lane] = if better { found[lane] } else { best.1[lane] };
        }
    }
    best.0
}

/// One over a scale.
#[inline(always)]
fn one_over(scale: u32) -> f32 {
    // Of a scale that isn't a number, infinity.
    f32::from_bits((254u32.wrapping_sub(scale) & 0xff) << 23)
}

/// The squared errors of groups with those scales.
#[inline(always)]
fn errors(
    weights: &[[f32; LANES]; GROUP],
    scales: &[u32; LANES],
    count: impl Fn(usize) -> f32,
) -> [f32; LANES] {
    let mut reciprocals = [0.0; LANES];
    for (reciprocal, scale) in reciprocals.iter_mut().zip(scales) {
        *reciprocal = one_over(*scale);
    }
    let mut sums = [0.0; LANES];
    for (row, xs) in weights.iter().enumerate() {
        let count = count(row);
        for lane in 0..LANES {
            let a = xs[lane].abs() * reciprocals[lane];
            let error = a - e2m1_rounded(within(a, E2M1_MAX));
            sums[lane] += error * error * count;
        }
    }
    for lane in 0..LANES {
        let scale = f32::from_bits(scales[lane] << 23);
        sums[lane] = sums[lane] * scale * scale;
    }
    sums
}

/// The codes of groups, eight to a word.
#[inline(always)]
fn words<E: Element<Bits = i16>>(
    bits: &[[i16; LANES]; GROUP],
    scales: &[u32; LANES],
) -> [[u32; LANES]; GROUP / 8] {
    let mut thresholds = [[0; LANES]; MIDPOINTS.len()];
    for (k, thresholds) in thresholds.iter_mut().enumerate() {
        for (threshold, &scale) in thresholds.iter_mut().zip(scales) {
            let reciprocal = one_over(scale);
            let scale = e8m0_value(scale as u8);
            let found = EVEN.threshold::<E>(k, scale, |x| x * reciprocal);
            *threshold = found as i16;
        }
    }
    // Four rows' codes to a half of a word.
    let mut halves = [[0u16; LANES]; GROUP / 4];
    for (rows, halves) in bits.as_chunks::<4>().0.iter().zip(&mut halves) {
        for (i, row) in rows.iter().enumerate() {
            for lane in 0..LANES {
                let bits = row[lane];
                let mut rank = 0;
                for thresholds in &thresholds {
                    rank += u16::from(bits.magnitude() > thresholds[lane]);
                }
                halves[lane] |= signed(bits < 0, bits.magnitude() > 0, rank) << (4 * i);
            }
        }
    }
    let mut words = [[0; LANES]; GROUP / 8];
    for ([low, high], words) in halves.as_chunks::<2>().0.iter().zip(&mut words) {
        for (((word, low), high), scale) in words.iter_mut().zip(low).zip(high).zip(scales) {
            let codes = u32::from(*low) | u32::from(*high) << 16;
            *word = if *scale == u32::from(E8M0_NAN) { 0 } else { codes };
        }
    }
    words
}
