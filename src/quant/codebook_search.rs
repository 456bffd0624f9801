//! Scales chosen by error search, for codebooks.

use super::codebook::Steps;
use super::lanes::{LANES, sum};
use super::tile::Element;

/// Parts of the largest magnitude that are tried as the scale.
const SHRINKS: [f32; 7] = [0.70, 0.76, 0.82, 0.87, 0.92, 0.96, 1.04];

/// The search for one block's scale, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    steps: Steps,
    /// The block in units of a power of two near its largest magnitude, padded with zeros.
    block: Vec<[f32; LANES]>,
}

impl Search {
    pub(super) fn new(steps: Steps, block: usize) -> Self {
        Self { steps, block: vec![[0.0; LANES]; block.div_ceil(LANES)] }
    }

    /// The best scale found for a block of at most the length given before, of that largest
    /// magnitude.
    #[inline(always)]
    pub(super) fn scale<E: Element>(&mut self, xs: &[E::Raw], magnitude: f32) -> f32 {
        let Some(unit) = self.load::<E>(xs, magnitude) else { return magnitude };
        let per_unit = 1.0 / unit;
        let largest = magnitude * per_unit;
        // The best scale for the codes that a trial makes is `xv / vv`, and lessens the error by
        // `xv * xv / vv`.
        let mut best = (largest, -1.0);
        for shrink in SHRINKS {
            let (xv, vv) = self.moments(largest * shrink);
            if xv * xv / vv > best.1 {
                best = (xv / vv, xv * xv / vv);
            }
        }
        let refined = {
            let (xv, vv) = self.moments(best.0);
            xv / vv
        };
        let mut chosen = (largest, self.error(largest));
        for scale in [best.0, refined] {
            let error = self.error(scale);
            if error < chosen.1 {
                chosen = (scale, error);
            }
        }
        chosen.0 * unit
    }

    /// The place of the best of some scales for a block, the first of equals; those that are not
    /// positive are none. The first where there is nothing to choose by.
    #[inline(always)]
    pub(super) fn best<E: Element>(&mut self, xs: &[E::Raw], scales: [f32; 3]) -> usize {
        let Some(unit) = self.load::<E>(xs, E::magnitude(xs)) else { return 0 };
        let mut best = (0, f32::INFINITY);
        for (i, scale) in scales.into_iter().enumerate() {
            if scale > 0.0 {
                let error = self.error(scale * (1.0 / unit));
                if error < best.1 {
                    best = (i, error);
                }
            }
        }
        best.0
    }

    /// Takes in a block of that largest magnitude, if that is a moderate one, and returns the unit.
    #[inline(always)]
    fn load<E: Element>(&mut self, xs: &[E::Raw], magnitude: f32) -> Option<f32> {
        if !super::int::MODERATE.contains(&magnitude) {
            return None;
        }
        let exponent = magnitude.to_bits() >> 23;
        let (unit, per_unit) =
            (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        let flat = self.block.as_flattened_mut();
        flat[xs.len()..].fill(0.0);
        for (x, &raw) in flat.iter_mut().zip(xs) {
            *x = E::widen(raw) * per_unit;
        }
        Some(unit)
    }

    /// The sums of `x * v` and `v * v` over the block, `v` the entries nearest to `x / scale`.
    #[inline(always)]
    fn moments(&self, scale: f32) -> (f32, f32) {
        let reciprocal = 1.0 / scale;
        let (mut xv, mut vv) = ([0.0; LANES], [0.0; LANES]);
        for xs in &self.block {
            for i in 0..LANES {
                let v = self.steps.entry(xs[i] * reciprocal);
                xv[i] += xs[i] * v;
                vv[i] += v * v;
            }
        }
        (sum(xv), sum(vv))
    }

    /// The squared error over the block.
    #[inline(always)]
    fn error(&self, scale: f32) -> f32 {
        let reciprocal = 1.0 / scale;
        let mut sums = [0.0; LANES];
        for xs in &self.block {
            for i in 0..LANES {
                let error = xs[i] - self.steps.entry(xs[i] * reciprocal) * scale;
                sums[i] += error * error;
            }
        }
        sum(sums)
    }
}
