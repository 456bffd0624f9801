//! FP8 scales nominated for an error search.
//!
//! A weight is `p m`, a power of two and a significand from 1 to 2, and one over a scale is `q n`
//! likewise. E4M3 rounds their product, unless it is subnormal or clipped, by `p q e(m n)`, so the
//! weight's error is `p e(m n) / n`, where `e` is what E4M3 rounds a number from 1 to 4 by. One pass
//! that adds up `p p` by the upper bits of `m` thus tells the error of every scale, more or less.

use super::lanes::{LANES, sum};
use super::tile::Element;

/// Significands of weights that are told apart: all there are in BF16.
const SIGNIFICANDS: usize = 128;

/// Significands of inverses of scales that are told apart.
const INVERSES: usize = 64;

/// What a weight of each significand adds to the squared error at each inverse, in units of its power of
/// two, squared.
static ERRORS: [[f32; SIGNIFICANDS]; INVERSES] = {
    let mut errors = [[0.0; SIGNIFICANDS]; INVERSES];
    let mut inverse = 0;
    while inverse < INVERSES {
        let n = 1.0 + (inverse as f32 + 0.5) / INVERSES as f32;
        let mut significand = 0;
        while significand < SIGNIFICANDS {
            let product = (1.0 + significand as f32 / SIGNIFICANDS as f32) * n;
            let spacing = if product < 2.0 { 0.125 } else { 0.25 };
            let steps = product / spacing;
            let above = steps - steps as u32 as f32;
            let nearest = if above > 0.5 { 1.0 - above } else { above };
            let error = nearest * spacing / n;
            errors[inverse][significand] = error * error;
            significand += 1;
        }
        inverse += 1;
    }
    errors
};

/// The squares of weights' powers of two, times what their errors count for, by significand.
#[derive(Debug)]
pub(super) struct Histogram([f32; SIGNIFICANDS]);

impl Histogram {
    /// Of some rows of a block with that largest magnitude, a moderate one, given what the errors of a
    /// row count for.
    #[inline(always)]
    pub(super) fn new<'a, E: Element<Raw: 'a>>(
        rows: impl Iterator<Item = &'a [E::Raw]>,
        counts: &[f32],
        magnitude: f32,
    ) -> Self {
        let reciprocal = 1.0 / magnitude;
        let mut sums = [0.0; SIGNIFICANDS];
        for row in rows {
            for (&raw, count) in row.iter().zip(counts) {
                let bits = E::widen(raw).to_bits();
                let power = f32::from_bits(bits & 0x7f80_0000) * reciprocal;
                sums[(bits >> 16) as usize % SIGNIFICANDS] += power * power * count;
            }
        }
        Self(sums)
    }

    /// About what the squared errors count for, in some unit, at the scale whose inverse this is.
    #[inline(always)]
    pub(super) fn error(&self, inverse: f32) -> f32 {
        let errors = &ERRORS[(inverse.to_bits() >> 17) as usize % INVERSES];
        let mut sums = [0.0; LANES];
        let lanes = self.0.as_chunks::<LANES>().0.iter().zip(errors.as_chunks::<LANES>().0);
        for (weights, errors) in lanes {
            for i in 0..LANES {
                sums[i] += weights[i] * errors[i];
            }
        }
        sum(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::minifloat::e4m3_rounded;
    use super::super::tile::F32;
    use super::*;

    #[test]
    fn what_is_nominated_by_is_near_the_error_itself() {
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let xs: Vec<f32> = (0..4096).map(|_| (uniform() + uniform() - 1.0) * 0.1).collect();
        let raw: Vec<[u8; 4]> = xs.iter().map(|x| x.to_le_bytes()).collect();
        let histogram = Histogram::new::<F32>([&raw[..]].into_iter(), &[1.0; 4096], 0.1);
        for shift in [1.0, 1.1, 1.3, 1.6, 1.9] {
            let scale = 0.1 * shift / 448.0;
            let error = |x: &f32| x.abs() - e4m3_rounded(x.abs() / scale) * scale;
            let exact: f32 = xs.iter().map(|x| error(x).powi(2)).sum();
            let told = histogram.error(1.0 / scale) * 0.01;
            assert!((told / exact - 1.0).abs() < 0.05, "{told} for {exact} at {shift}");
        }
    }
}
