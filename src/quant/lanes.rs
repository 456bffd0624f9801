//! What error searches share: sums over fixed lanes, rounding by addition.

/// Sums run over this many lanes, whatever the instruction set.
pub(super) const LANES: usize = 16;

/// The sum of the lanes, halves onto one another.
#[inline(always)]
pub(super) fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Added to an f32 of a magnitude below 2^22, leaves the nearest integer, ties to even, in the lowest
/// bits: 1.5 * 2^23, near which numbers are 1 apart.
pub(super) const ROUNDING: f32 = 12_582_912.0;

/// The nearest integer, ties to even, of a magnitude below 2^22.
#[inline(always)]
pub(super) fn round(x: f32) -> f32 {
    (x + ROUNDING) - ROUNDING
}

/// `x` within 0 and `high`.
#[inline(always)]
pub(super) fn clamp(x: f32, high: f32) -> f32 {
    let x = if x < 0.0 { 0.0 } else { x };
    if x > high { high } else { x }
}
