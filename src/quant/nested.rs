//! bitsandbytes' double quantization: scales of blocks as codes of their own.
//!
//! With `o` the mean of all scales of a weight and `n` the largest of `|m - o|` among 256 of them in a
//! row, all in f32, the scale `m` has the code of the table's entry nearest to `(m - o) / n`, and is
//! about `table[code] * n + o`.

use super::tile::{Element, F32};

/// Scales that share an `n`.
pub(super) const SCALES: usize = 256;

/// The entries by rising codes: 127 magnitudes of either sign, in seven decades of 1, 2, 4 … 64
/// evenly spaced ones, and 0 and 1.
pub(super) static TABLE: [f32; 256] = {
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut table = [0.0; 256];
    table[255] = 1.0;
    let mut decade = 0;
    while decade < 7 {
        let count = 1 << decade;
        let mut i = 0;
        while i < count {
            let mean = (boundary(i, count) + boundary(i + 1, count)) / 2.0;
            let magnitude = DECADES[decade] * mean;
            // Behind the zero, and all smaller magnitudes.
            table[127 + count + i] = magnitude;
            table[127 - count - i] = -magnitude;
            i += 1;
        }
        decade += 1;
    }
    table
};

/// Boundary `i` of `count` equal pieces from 0.1 to 1, as PyTorch computes it: from the nearer end,
/// and rounded once.
const fn boundary(i: usize, count: usize) -> f32 {
    let step = ((1.0f32 - 0.1f32) / count as f32) as f64;
    if i < count.div_ceil(2) {
        (0.1f32 as f64 + step * i as f64) as f32
    } else {
        (1.0 - step * (count - i) as f64) as f32
    }
}

static MIDPOINTS: [f32; 255] = {
    let mut midpoints = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        midpoints[i] = (TABLE[i] + TABLE[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

/// Scales whose codes are looked for together, for their steps to overlap.
const LANES: usize = 8;

/// Codes of up to 256 scales with the mean `offset`; returns their `n`, NaN if there is any.
pub(super) fn encode(scales: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let distances = scales.iter().map(|scale| (scale - offset).abs());
    // Bit patterns of magnitudes order as integers, NaNs last.
    let largest = F32::round(f32::from_bits(distances.map(f32::to_bits).fold(0, u32::max)));
    let reciprocal = 1.0 / if largest < 1e-38 { 1e-38 } else { largest };
    for (scales, codes) in scales.chunks(LANES).zip(codes.chunks_mut(LANES)) {
        let mut y = [0.0; LANES];
        for (y, scale) in y.iter_mut().zip(scales) {
            *y = (scale - offset) * reciprocal;
        }
        // A midpoint belongs to the lower entry. A NaN is beyond none.
        let mut below = [0; LANES];
        for bit in (0..8).rev() {
            for (below, y) in below.iter_mut().zip(&y) {
                *below += usize::from(MIDPOINTS[*below + (1 << bit) - 1] < *y) << bit;
            }
        }
        for (code, below) in codes.iter_mut().zip(&below) {
            *code = *below as u8;
        }
    }
    largest
}

/// The scale that a code stands for.
#[inline(always)]
pub(super) fn value(code: u8, largest: f32, offset: f32) -> f32 {
    TABLE[usize::from(code)] * largest + offset
}
