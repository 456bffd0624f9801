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

/// Between every two entries; a code is the number of midpoints below.
static MIDPOINTS: [f32; 256] = {
    let mut midpoints = [f32::INFINITY; 256];
    let mut i = 0;
    while i < 255 {
        midpoints[i] = (TABLE[i] + TABLE[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

/// Magnitudes are binned by their upper 16 bits, those below 2^-21 all in the first bin, and those from
/// 1 on in the last. No bin has more than one midpoint.
const BINS: usize = 2 + 21 * 128;

/// The upper bits of the second bin.
const FIRST: u32 = (127 - 21) << 7;

/// The number of midpoints below every number in a bin: of positive ones, and then of negative ones.
static FLOORS: [u8; 2 * BINS] = {
    let mut floors = [0; 2 * BINS];
    let (mut bin, mut below, mut below_negative) = (0, 0, 0);
    while bin < BINS {
        let smallest = if bin == 0 { 0.0 } else { f32::from_bits((FIRST + bin as u32 - 1) << 16) };
        while MIDPOINTS[below] < smallest {
            below += 1;
        }
        floors[bin] = below as u8;
        // The bins of negative numbers rise from the last to the first.
        let last = BINS - 1 - bin;
        let lowest = if bin == 0 {
            f32::NEG_INFINITY
        } else {
            -f32::from_bits(((FIRST + last as u32) << 16) - 1)
        };
        while MIDPOINTS[below_negative] < lowest {
            below_negative += 1;
        }
        floors[BINS + last] = below_negative as u8;
        bin += 1;
    }
    floors
};

/// The position of `y` in [`FLOORS`]; a NaN is among what is below all midpoints.
#[inline(always)]
fn bin_of(y: f32) -> u32 {
    const LAST: u32 = BINS as u32 - 1;
    let bits = y.to_bits();
    let bin = ((bits & (u32::MAX >> 1)) >> 16).saturating_sub(FIRST - 1).min(LAST);
    let bin = if bits >> 31 == 0 { bin } else { bin + LAST + 1 };
    if y.is_nan() { 2 * LAST + 1 } else { bin }
}

/// The code of the entry nearest to `y`, of that bin; of two, the lower one's. That of a NaN is 0.
#[inline(always)]
fn code_in(bin: u32, y: f32) -> u8 {
    let floor = FLOORS[bin as usize];
    floor.wrapping_add(u8::from(MIDPOINTS[usize::from(floor)] < y))
}

/// Codes of up to 256 scales with the mean `offset`; returns their `n`, NaN if there is any.
#[inline(always)]
pub(super) fn encode(scales: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let distances = scales.iter().map(|scale| (scale - offset).abs());
    // Bit patterns of magnitudes order as integers, NaNs last.
    let largest = F32::round(f32::from_bits(distances.map(f32::to_bits).fold(0, u32::max)));
    let reciprocal = 1.0 / if largest < 1e-38 { 1e-38 } else { largest };
    // What can be done for many at a time first.
    let (mut ys, mut bins) = ([0.0; SCALES], [0; SCALES]);
    for ((y, bin), scale) in ys.iter_mut().zip(&mut bins).zip(scales) {
        *y = (scale - offset) * reciprocal;
        *bin = bin_of(*y);
    }
    for ((code, y), bin) in codes[..scales.len()].iter_mut().zip(ys).zip(bins) {
        *code = code_in(bin, y);
    }
    largest
}

/// The scale that a code stands for.
#[inline(always)]
pub(super) fn value(code: u8, largest: f32, offset: f32) -> f32 {
    TABLE[usize::from(code)] * largest + offset
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_counts_the_midpoints_below() {
        let bins = (0..=BINS as u32).map(|bin| f32::from_bits((FIRST + bin) << 16));
        let edges = MIDPOINTS.into_iter().chain(bins).chain([0.0, 2.0, f32::MAX, f32::INFINITY]);
        for edge in edges {
            for bits in [edge.to_bits().saturating_sub(1), edge.to_bits(), edge.to_bits() + 1] {
                for y in [f32::from_bits(bits), -f32::from_bits(bits)] {
                    let below = MIDPOINTS[..255].iter().filter(|midpoint| **midpoint < y).count();
                    assert_eq!(usize::from(code_in(bin_of(y), y)), below, "{y:e}");
                }
            }
        }
        assert_eq!(code_in(bin_of(f32::NAN), f32::NAN), 0);
        assert_eq!(code_in(bin_of(-f32::NAN), -f32::NAN), 0);
    }
}
