//! Scales and zero points chosen by error search, in f32 for every element type.

use super::int::{Codes, Fit, MODERATE, codes, fit};
use super::tile::Element;

/// Sums run over this many lanes, whatever the instruction set.
pub(super) const LANES: usize = 16;

/// Candidates that are measured in one pass over a group.
pub(super) const BATCH: usize = 4;

/// The search for one group's scale and zero point, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    range: Codes,
    symmetric: bool,
    /// The group in units of a power of two near its largest magnitude, padded with zeros.
    group: Vec<[f32; LANES]>,
}

/// Scales, each with the codes less zero point that it may use.
#[derive(Clone, Copy, Debug)]
struct Batch {
    scale: [f32; BATCH],
    reciprocal: [f32; BATCH],
    low: [f32; BATCH],
    high: [f32; BATCH],
}

/// A scale and zero point, in units of the group.
#[derive(Clone, Copy, Debug)]
struct Choice {
    scale: f32,
    zero_point: f32,
}

impl Search {
    pub(super) fn new(range: Codes, symmetric: bool, group: usize) -> Self {
        Self { range, symmetric, group: vec![[0.0; LANES]; group.div_ceil(LANES)] }
    }

    /// Encodes a group into `out`.
    #[inline(always)]
    pub(super) fn encode_group<E: Element>(&mut self, group: &[E::Raw], out: &mut [u8]) -> Fit {
        let extremes = E::extremes(group);
        let magnitude = extremes.magnitude();
        let reference = fit::<E>(self.range, self.symmetric, extremes);
        if magnitude == 0.0 || !MODERATE.contains(&reference.scale) {
            codes::<E>(self.range, self.symmetric, reference, group, out);
            return reference;
        }
        let exponent = magnitude.to_bits() >> 23;
        let (unit, per_unit) =
            (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        for (x, &raw) in self.group.as_flattened_mut().iter_mut().zip(group) {
            *x = E::widen(raw) * per_unit;
        }
        let (min, max) = (extremes.min * per_unit, extremes.max * per_unit);
        let first = self.coarse(min, max);
        let best = self.refine(first);
        let reference =
            Choice { scale: reference.scale * per_unit, zero_point: reference.zero_point };
        let best = self.settle::<E>(best, reference, unit, per_unit);
        self.write(best, out);
        Fit { scale: best.scale * unit, zero_point: best.zero_point }
    }

    #[inline(always)]
    fn choice(&self, p: f32, min: f32, max: f32) -> Choice {
        if self.symmetric {
            let largest = if -min > max { min } else { max };
            Choice { scale: largest * p / self.range.low, zero_point: 0.0 }
        } else {
            let middle = (min + max) * 0.5;
            let scale = (max - min) * p / self.range.steps();
            let bottom = middle - (max - min) * (0.5 * p);
            let zero = self.range.low - bottom / scale;
            Choice { scale, zero_point: self.range.clamp(zero).round_ties_even() }
        }
    }

    #[inline(always)]
    fn coarse(&self, min: f32, max: f32) -> (Choice, f32) {
        let mut best = (Choice { scale: 1.0, zero_point: 0.0 }, -1.0);
        for ps in shrinks(self.range.bits()).as_chunks::<BATCH>().0 {
            let choices = ps.map(|p| self.choice(p, min, max));
            best = self.better(best, choices);
        }
        best
    }

    #[inline(always)]
    fn refine(&self, (best, gain): (Choice, f32)) -> Choice {
        let Choice { scale, zero_point } = best;
        let at = |scale, zero: f32| Choice { scale, zero_point: self.range.clamp(zero) };
        let choices = if self.symmetric {
            [best, at(scale * 1.03, 0.0), at(scale * 0.97, 0.0), at(-scale, 0.0)]
        } else {
            [
                best,
                at(scale, zero_point + 1.0),
                at(scale, zero_point - 1.0),
                at(scale * 0.97, zero_point),
            ]
        };
        self.better((best, gain), choices).0
    }

    /// The best of `best` and `choices`, each with the scale that suits its codes.
    #[inline(always)]
    fn better(&self, best: (Choice, f32), choices: [Choice; BATCH]) -> (Choice, f32) {
        let (xq, qq) = moments(&self.group, &self.batch(choices));
        let mut best = best;
        for k in 0..BATCH {
            let scale = xq[k] / qq[k];
            let gain = scale * xq[k];
            if gain > best.1 {
                best = (Choice { scale, zero_point: choices[k].zero_point }, gain);
            }
        }
        best
    }

    #[inline(always)]
    fn settle<E: Element>(
        &self,
        best: Choice,
        reference: Choice,
        unit: f32,
        per_unit: f32,
    ) -> Choice {
        let at = |factor: f32| Choice {
            scale: E::round(best.scale * factor * unit) * per_unit,
            zero_point: best.zero_point,
        };
        let choices = [at(1.0), at(1.0 + 3.0 / 512.0), at(1.0 - 3.0 / 512.0), reference];
        let errors = errors(&self.group, &self.batch(choices));
        let mut best = (reference, errors[3]);
        for k in 0..3 {
            if errors[k] < best.1 {
                best = (choices[k], errors[k]);
            }
        }
        best.0
    }

    #[inline(always)]
    fn batch(&self, choices: [Choice; BATCH]) -> Batch {
        Batch {
            scale: choices.map(|c| c.scale),
            reciprocal: choices.map(|c| 1.0 / c.scale),
            low: choices.map(|c| self.range.low - c.zero_point),
            high: choices.map(|c| self.range.high - c.zero_point),
        }
    }

    #[inline(always)]
    fn write(&self, Choice { scale, zero_point }: Choice, out: &mut [u8]) {
        let reciprocal = 1.0 / scale;
        for (&x, out) in self.group.as_flattened().iter().zip(out) {
            *out = self.range.byte(self.range.clamp(round(x * reciprocal) + zero_point));
        }
    }
}

/// Parts of a group's range that are tried for the codes of so many bits.
#[inline(always)]
pub(super) fn shrinks(bits: u8) -> &'static [f32; 8] {
    match bits {
        2 => &[0.35, 0.43, 0.51, 0.6, 0.69, 0.78, 0.88, 1.0],
        3 => &[0.5, 0.57, 0.64, 0.71, 0.78, 0.85, 0.93, 1.01],
        4 => &[0.62, 0.68, 0.74, 0.8, 0.86, 0.91, 0.96, 1.01],
        5 => &[0.80, 0.83, 0.86, 0.89, 0.92, 0.95, 0.98, 1.01],
        _ => &[0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0, 1.01],
    }
}

/// The nearest integer, ties to even, for magnitudes below 2^22.
#[inline(always)]
pub(super) fn round(x: f32) -> f32 {
    (x + 12_582_912.0) - 12_582_912.0
}

#[inline(always)]
pub(super) fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// The sums of `x * q` and of `q * q` over a group, for each candidate.
#[inline(always)]
fn moments(group: &[[f32; LANES]], batch: &Batch) -> ([f32; BATCH], [f32; BATCH]) {
    let mut xq = [[0.0; LANES]; BATCH];
    let mut qq = [[0.0; LANES]; BATCH];
    for xs in group {
        for k in 0..BATCH {
            for i in 0..LANES {
                let q = round(clamp(xs[i] * batch.reciprocal[k], batch.low[k], batch.high[k]));
                xq[k][i] += xs[i] * q;
                qq[k][i] += q * q;
            }
        }
    }
    (xq.map(sum), qq.map(sum))
}

/// The squared error over a group, for each candidate.
#[inline(always)]
fn errors(group: &[[f32; LANES]], batch: &Batch) -> [f32; BATCH] {
    let mut sums = [[0.0; LANES]; BATCH];
    for xs in group {
        for k in 0..BATCH {
            for i in 0..LANES {
                let q = round(clamp(xs[i] * batch.reciprocal[k], batch.low[k], batch.high[k]));
                let error = xs[i] - q * batch.scale[k];
                sums[k][i] += error * error;
            }
        }
    }
    sums.map(sum)
}

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
