//! Scales chosen by error search, for E2M1 codes.
//!
//! A group gets the best scale among the reference and those nearby. Groups lie side by side, one to
//! a lane, so that no sum runs across lanes.

use super::Quality;
use super::lanes::LANES;
use super::micro::MicroScheme;
use super::minifloat::{E2M1_MAX, e2m1_rounded, within};
use super::tile::Element;

/// The search for the scales of groups, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    scheme: MicroScheme,
    global: f32,
    /// What the errors of a row's weights count for, if not for the same.
    importance: Option<Vec<f32>>,
    /// The magnitudes of groups side by side.
    magnitudes: Vec<[f32; LANES]>,
    /// What the errors of the groups' weights count for.
    counts: Vec<[f32; LANES]>,
}

impl Search {
    /// For rows whose errors count for `importance`, or all for the same.
    pub(super) fn new(scheme: MicroScheme, global: f32, importance: Option<Vec<f32>>) -> Self {
        let len = scheme.group_size() as usize;
        let (magnitudes, counts) = (vec![[0.0; LANES]; len], vec![[1.0; LANES]; len]);
        Self { scheme, global, importance, magnitudes, counts }
    }

    /// Replaces the codes of the scales of a row's groups by those with the least squared error.
    #[inline(always)]
    pub(super) fn improve<E: Element>(&mut self, row: &[E::Raw], scales: &mut [u8]) {
        let (scheme, global) = (self.scheme, self.global);
        // An E4M3 scale spans a factor of two in eight steps.
        let is_wide = self.importance.is_some() || scheme.quality == Quality::Best;
        let steps: &[i32] = match (scheme.has_e4m3_scales(), is_wide) {
            (true, false) => &[-3, -2, -1, 1, 2, 3, 4, 5],
            (true, true) => &[-1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -8, 8],
            (false, false) => &[-1, 1],
            (false, true) => &[-1, 1, -2],
        };
        let len = self.magnitudes.len();
        let batches = row.chunks(LANES * len).zip(scales.chunks_mut(LANES));
        for (batch, (groups, scales)) in batches.enumerate() {
            for (i, group) in groups.chunks_exact(len).enumerate() {
                for (magnitudes, &raw) in self.magnitudes.iter_mut().zip(group) {
                    magnitudes[i] = E::widen(raw).abs();
                }
            }
            if let Some(importance) = &self.importance {
                let importance = &importance[batch * LANES * len..][..groups.len()];
                for (i, group) in importance.chunks_exact(len).enumerate() {
                    for (counts, count) in self.counts.iter_mut().zip(group) {
                        counts[i] = *count;
                    }
                }
            }
            let mut reference = [0; LANES];
            reference[..scales.len()].copy_from_slice(scales);
            let mut values = [0.0; LANES];
            scheme.values(&reference, global, &mut values);
            // Errors at scales near these are numbers, and not zero for want of smaller ones.
            let moderate = f32::from_bits(67 << 23)..=f32::from_bits(187 << 23);
            let open = values.map(|value| moderate.contains(&value));
            // Steps to the best, and its error.
            let (mut best, mut least) = ([0i32; LANES], self.errors(&values));
            for &step in steps {
                let mut codes = reference;
                for i in 0..LANES {
                    let code = i32::from(reference[i]) + step;
                    let is_scale = !scheme.has_e4m3_scales() || (1..=126).contains(&code);
                    codes[i] = if open[i] && is_scale { code as u8 } else { reference[i] };
                }
                scheme.values(&codes, global, &mut values);
                let mut errors = self.errors(&values);
                if !scheme.has_e4m3_scales() {
                    for i in 0..LANES {
                        // A power of two that a loader can't hold is none.
                        let is_held = E::round(values[i]) == values[i];
                        errors[i] = if is_held { errors[i] } else { f32::INFINITY };
                    }
                }
                for i in 0..LANES {
                    let better = errors[i] < least[i];
                    best[i] = if better { step } else { best[i] };
                    least[i] = if better { errors[i] } else { least[i] };
                }
            }
            for (scale, step) in scales.iter_mut().zip(best) {
                *scale = (i32::from(*scale) + step) as u8;
            }
        }
    }

    /// What the squared errors of groups with those scales count for.
    #[inline(always)]
    fn errors(&self, scales: &[f32; LANES]) -> [f32; LANES] {
        let mut reciprocals = [0.0; LANES];
        for i in 0..LANES {
            reciprocals[i] = 1.0 / scales[i];
        }
        let mut sums = [0.0; LANES];
        for (magnitudes, counts) in self.magnitudes.iter().zip(&self.counts) {
            for i in 0..LANES {
                let a = magnitudes[i] * reciprocals[i];
                let error = a - e2m1_rounded(within(a, E2M1_MAX));
                sums[i] += error * error * counts[i];
            }
        }
        for i in 0..LANES {
            sums[i] = sums[i] * scales[i] * scales[i];
        }
        sums
    }
}
