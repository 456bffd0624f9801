//! Scales and biases chosen by error search, for affine codes.

use super::affine::{Line, code, encode_group, fit};
use super::int::MODERATE;
use super::lanes::{LANES, clamp, round, sum};
use super::tile::Element;

/// Candidates that are measured in one pass over a group.
const BATCH: usize = 4;

/// Parts of a group's range that are tried for the codes of so many bits.
fn shrinks(bits: u8) -> &'static [f32; 8] {
    match bits {
        2 => &[0.35, 0.43, 0.51, 0.6, 0.69, 0.78, 0.88, 1.0],
        3 => &[0.5, 0.57, 0.64, 0.71, 0.78, 0.85, 0.93, 1.01],
        4 => &[0.62, 0.68, 0.74, 0.8, 0.86, 0.91, 0.96, 1.01],
        5 => &[0.80, 0.83, 0.86, 0.89, 0.92, 0.95, 0.98, 1.01],
        _ => &[0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0, 1.01],
    }
}

/// The search for one group's scale and bias, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    /// Parts of the group's range that are tried.
    shrinks: &'static [f32; 8],
    high: f32,
    /// The group in units of a power of two near its largest magnitude.
    group: Vec<[f32; LANES]>,
}

impl Search {
    /// For groups of a multiple of `LANES`.
    pub(super) fn new(bits: u8, group: usize) -> Self {
        let high = ((1u32 << bits) - 1) as f32;
        Self { shrinks: shrinks(bits), high, group: vec![[0.0; LANES]; group / LANES] }
    }

    /// Encodes a group into `out`. Scale and bias are values of its type.
    #[inline(always)]
    pub(super) fn encode_group<E: Element>(&mut self, group: &[E::Raw], out: &mut [u8]) -> Line {
        let extremes = E::range(group);
        let reference = fit(self.high, extremes);
        let magnitude = E::magnitude(group);
        if extremes.min == extremes.max
            || !MODERATE.contains(&reference.scale.abs())
            || !MODERATE.contains(&magnitude)
        {
            return encode_group::<E>(self.high, group, out);
        }
        let exponent = magnitude.to_bits() >> 23;
        let (unit, per_unit) =
            (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        for (x, &raw) in self.group.as_flattened_mut().iter_mut().zip(group) {
            *x = E::widen(raw) * per_unit;
        }
        let (first, second) = self.lines(extremes.min * per_unit, extremes.max * per_unit);
        let stored = |line: Line| Line {
            scale: E::round(line.scale * unit) * per_unit,
            bias: E::round(line.bias * unit) * per_unit,
        };
        let reference = Line { scale: reference.scale * per_unit, bias: reference.bias * per_unit };
        let lines = [first, second, reference, reference].map(stored);
        let errors = self.errors(lines);
        // A scale that rounds to zero has an error that is not a number.
        let mut best = 2;
        for k in 0..2 {
            if errors[k] < errors[best] {
                best = k;
            }
        }
        if best == 2 {
            return encode_group::<E>(self.high, group, out);
        }
        let Line { scale, bias } = lines[best];
        let reciprocal = 1.0 / scale;
        for (&x, out) in self.group.as_flattened().iter().zip(out) {
            *out = code((x - bias) * reciprocal, self.high);
        }
        Line { scale: scale * unit, bias: bias * unit }
    }

    /// The best line that fits the codes of some narrower range, and the one that fits its codes in
    /// turn.
    #[inline(always)]
    fn lines(&self, min: f32, max: f32) -> (Line, Line) {
        let (middle, width) = ((min + max) * 0.5, max - min);
        let total = sum(self.group.iter().fold([0.0; LANES], |mut lanes, xs| {
            for (lane, x) in lanes.iter_mut().zip(xs) {
                *lane += x;
            }
            lanes
        }));
        let mut best = (Line { scale: width / self.high, bias: min }, -1.0);
        for ps in self.shrinks.as_chunks::<BATCH>().0 {
            let lines = ps.map(|p| {
                let width = width * p;
                Line { scale: width / self.high, bias: middle - width * 0.5 }
            });
            best = self.better(total, best, lines);
        }
        let first = best.0;
        let shifted = |codes: f32| Line { bias: first.bias + first.scale * codes, ..first };
        let narrower = Line { scale: first.scale * 0.97, bias: first.bias };
        (first, self.better(total, best, [first, shifted(0.25), shifted(-0.25), narrower]).0)
    }

    /// The best of `best` and the lines of least squared error through the codes that `lines` make.
    #[inline(always)]
    fn better(&self, total: f32, best: (Line, f32), lines: [Line; BATCH]) -> (Line, f32) {
        let count = (self.group.len() * LANES) as f32;
        let [codes, squares, products] = self.moments(lines);
        let mut best = best;
        for k in 0..BATCH {
            let covariance = products[k] - total * codes[k] / count;
            let variance = squares[k] - codes[k] * codes[k] / count;
            let scale = covariance / variance;
            let gain = scale * covariance;
            if gain > best.1 {
                best = (Line { scale, bias: (total - scale * codes[k]) / count }, gain);
            }
        }
        best
    }

    /// The sums of `q`, `q * q` and `x * q` over the group, for each line.
    #[inline(always)]
    fn moments(&self, lines: [Line; BATCH]) -> [[f32; BATCH]; 3] {
        let reciprocal = lines.map(|line| 1.0 / line.scale);
        let mut sums = [[[0.0; LANES]; BATCH]; 3];
        for xs in &self.group {
            for k in 0..BATCH {
                for i in 0..LANES {
                    let q = round(clamp((xs[i] - lines[k].bias) * reciprocal[k], self.high));
                    sums[0][k][i] += q;
                    sums[1][k][i] += q * q;
                    sums[2][k][i] += xs[i] * q;
                }
            }
        }
        let mut totals = [[0.0; BATCH]; 3];
        for (totals, sums) in totals.iter_mut().zip(&sums) {
            for (total, lanes) in totals.iter_mut().zip(sums) {
                *total = sum(*lanes);
            }
        }
        totals
    }

    /// The squared error over the group, for each line.
    #[inline(always)]
    fn errors(&self, lines: [Line; BATCH]) -> [f32; BATCH] {
        let reciprocal = lines.map(|line| 1.0 / line.scale);
        let mut sums = [[0.0; LANES]; BATCH];
        for xs in &self.group {
            for k in 0..BATCH {
                for i in 0..LANES {
                    let Line { scale, bias } = lines[k];
                    let q = round(clamp((xs[i] - bias) * reciprocal[k], self.high));
                    let error = xs[i] - (q * scale + bias);
                    sums[k][i] += error * error;
                }
            }
        }
        let mut totals = [0.0; BATCH];
        for (total, lanes) in totals.iter_mut().zip(&sums) {
            *total = sum(*lanes);
        }
        totals
    }
}
