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

use super::grid::{Axis, Grid, PartBytes};
use super::importance::Importance;
use super::isa::{Isa, Kernel, prefetch};
use super::minifloat::{E2M1_MAX, E8M0_NAN, e2m1, e2m1_rounded, e2m1_value, e8m0_value, within};
use super::shape::{is_real, stripe_bytes};
use super::tile::{Element, Tile, for_element};
use super::{Part, Quality, Role};

/// Inputs of a group.
const GROUP: usize = 32;

/// Outputs that go through the kernel together: their groups fit in the first-level cache.
const LANES: usize = 128;

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
        // Elements that fill a line of the cache; those of a lane lie apart.
        let width = LANES * E::PER_LANE;
        let mut parts = [[[0.0; LANES]; GROUP]; 2];
        for first in (0..self.cols).step_by(width) {
            let cols = width.min(self.cols - first);
            for g in 0..groups {
                for r in 0..GROUP {
                    let row = &self.source[(g * GROUP + r) * self.stride + first..][..cols];
                    load::<E>(row, parts.each_mut().map(|part| &mut part[r]));
                    if let Some(next) =
                        self.source.get((g * GROUP + GROUP + r) * self.stride + first..)
                        && let Some(next) = next.first_chunk::<LANES>()
                    {
                        prefetch(next);
                    }
                }
                for (part, weights) in parts[..E::PER_LANE].iter().enumerate() {
                    let scales = match (self.searched, &importance) {
                        (false, _) => reference(weights),
                        (true, None) => searched(weights, |_| 1.0),
                        (true, Some(importance)) => {
                            let importance = &importance[g * GROUP..][..GROUP];
                            searched(weights, |row| importance[row])
                        }
                    };
                    let words = words(weights, &scales);
                    for (lane, col) in (part..cols).step_by(E::PER_LANE).enumerate() {
                        let at = (first + col) * groups + g;
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
}

/// Takes in a row of a group: of those in pairs, the first ones and the second ones.
#[inline(always)]
fn load<E: Element>(row: &[E::Raw], [firsts, seconds]: [&mut [f32; LANES]; 2]) {
    if E::PER_LANE == 2 {
        let (pairs, rest) = row.as_chunks::<2>();
        if let Ok(pairs) = <&[[E::Raw; 2]; LANES]>::try_from(pairs) {
            for ((first, second), &pair) in firsts.iter_mut().zip(seconds).zip(pairs) {
                [*first, *second] = E::widen_pair(pair);
            }
        } else {
            for ((first, second), &pair) in firsts.iter_mut().zip(seconds).zip(pairs) {
                [*first, *second] = E::widen_pair(pair);
            }
            if let Some(&last) = rest.first() {
                firsts[pairs.len()] = E::widen(last);
            }
        }
    } else {
        for (x, &raw) in firsts.iter_mut().zip(row) {
            *x = E::widen(raw);
        }
    }
}

/// A group's scale in E8M0 by definition, for each lane.
#[inline(always)]
fn reference(weights: &[[f32; LANES]; GROUP]) -> [u32; LANES] {
    let mut largest = [0u32; LANES];
    for xs in weights {
        for (largest, x) in largest.iter_mut().zip(xs) {
            *largest = (x.to_bits() & 0x7fff_ffff).max(*largest);
        }
    }
    largest.map(|bits| {
        let exponent = (bits >> 23).saturating_sub(2);
        let exponent = if bits == 0 { 127 } else { exponent };
        if bits < f32::INFINITY.to_bits() { exponent } else { u32::from(E8M0_NAN) }
    })
}

/// The best of that scale and its neighbours, for each lane. The errors of a row count for what `count`
/// says.
#[inline(always)]
fn searched(weights: &[[f32; LANES]; GROUP], count: impl Fn(usize) -> f32 + Copy) -> [u32; LANES] {
    let reference = reference(weights);
    let mut best = (reference, errors(weights, &reference, count));
    for step in [1, u32::MAX] {
        // Errors at these scales are numbers, and not zero for want of smaller ones.
        let candidates = reference.map(|scale| {
            let open = (64..190).contains(&scale);
            if open { scale.wrapping_add(step) } else { scale }
        });
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
fn reciprocal(scale: u32) -> f32 {
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
    let reciprocals = scales.map(reciprocal);
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
fn words(weights: &[[f32; LANES]; GROUP], scales: &[u32; LANES]) -> [[u32; LANES]; GROUP / 8] {
    let reciprocals = scales.map(reciprocal);
    let mut words = [[0; LANES]; GROUP / 8];
    for (xs, words) in weights.as_chunks::<8>().0.iter().zip(&mut words) {
        for (i, xs) in xs.iter().enumerate() {
            for lane in 0..LANES {
                let x = xs[lane];
                let sign = if x < 0.0 { 8 } else { 0 };
                let magnitude = within(x.abs() * reciprocals[lane], E2M1_MAX);
                let code = (e2m1(magnitude) | sign) & 15;
                words[lane] |= code << (4 * i);
            }
        }
        for (word, scale) in words.iter_mut().zip(scales) {
            *word = if *scale == u32::from(E8M0_NAN) { 0 } else { *word };
        }
    }
    words
}
