//! Scales and biases chosen by error search, for affine codes.
//!
//! Codes `q` of a group `x` fit best with the line of least squares through them, which lowers the
//! squared error of no line but a level one, the variance of `x`, by `cov(x, q)^2 / var(q)`. So one
//! pass over a group tells the least error of *all* lines with a candidate's codes, and a few
//! candidates are as good as many: parts of the group's range, around its middle, and then what is
//! near the best of them. The lines found are measured as they will be stored, beside that of the
//! reference, which only a smaller error replaces.
//!
//! Groups lie side by side, one to a lane, so that no sum runs across lanes.

use super::affine::{Line, code, encode_group, fit};
use super::extremes::{Extremes, range};
use super::int::MODERATE;
use super::lanes::{LANES, clamp, round};
use super::tile::Element;

/// Parts of a group's range that are tried for the codes of so many bits.
fn shrinks(bits: u8) -> &'static [f32] {
    match bits {
        2 => &[0.38, 0.5, 0.63, 0.78, 0.95],
        3 => &[0.52, 0.63, 0.75, 0.87, 1.0],
        4 => &[0.65, 0.74, 0.83, 0.92, 1.0],
        5 => &[0.80, 0.86, 0.92, 1.0],
        _ => &[0.98, 1.0],
    }
}

/// A number for each lane.
type Lanes = [f32; LANES];

/// The search for the scales and biases of groups, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    /// Parts of a group's range that are tried.
    shrinks: &'static [f32],
    high: f32,
    /// The groups side by side, each in units of a power of two near its largest magnitude.
    weights: Vec<Lanes>,
}

impl Search {
    /// For groups of so many weights.
    pub(super) fn new(bits: u8, group: usize) -> Self {
        let high = ((1u32 << bits) - 1) as f32;
        Self { shrinks: shrinks(bits), high, weights: vec![[0.0; LANES]; group] }
    }

    /// Encodes the groups of a row: their codes into `out`, scales and biases into `lines`. Those of
    /// groups that can't be searched are as the tool has them before they are stored.
    #[inline(always)]
    pub(super) fn encode_row<E: Element>(
        &mut self,
        row: &[E::Raw],
        out: &mut [u8],
        (scales, biases): (&mut [f32], &mut [f32]),
    ) {
        let len = self.weights.len();
        let lines = scales.chunks_mut(LANES).zip(biases.chunks_mut(LANES));
        let parts = row.chunks(LANES * len).zip(out.chunks_mut(LANES * len));
        for ((row, out), (scales, biases)) in parts.zip(lines) {
            let best = self.best::<E>(row);
            let groups = row.chunks_exact(len).zip(out.chunks_exact_mut(len));
            let lines = scales.iter_mut().zip(biases);
            for (i, ((group, out), (scale, bias))) in groups.zip(lines).enumerate() {
                let found = Line { scale: best.scale[i], bias: best.bias[i] };
                let line = if found.scale == 0.0 {
                    encode_group::<E>(self.high, group, out)
                } else {
                    let reciprocal = 1.0 / found.scale;
                    for (&raw, out) in group.iter().zip(out) {
                        *out = code((E::widen(raw) - found.bias) * reciprocal, self.high);
                    }
                    found
                };
                (*scale, *bias) = (line.scale, line.bias);
            }
        }
    }

    /// The lines of at most `LANES` groups, as stored; of scale 0 where the reference is no worse.
    #[inline(always)]
    fn best<E: Element>(&mut self, groups: &[E::Raw]) -> Lines {
        let len = self.weights.len();
        let (mut min, mut max) = ([0.0; LANES], [0.0; LANES]);
        for (i, group) in groups.chunks_exact(len).enumerate() {
            Extremes { min: min[i], max: max[i] } = range::<E>(group).values::<E>();
        }
        let (mut unit, mut per_unit) = ([1.0; LANES], [1.0; LANES]);
        let mut reference = Lines::default();
        let mut open = [false; LANES];
        for i in 0..LANES {
            let extremes = Extremes { min: min[i], max: max[i] };
            let line = fit(self.high, extremes);
            let magnitude = extremes.magnitude();
            open[i] = min[i] != max[i]
                && MODERATE.contains(&line.scale.abs())
                && MODERATE.contains(&magnitude);
            let exponent = if open[i] { magnitude.to_bits() >> 23 } else { 127 };
            unit[i] = f32::from_bits(exponent << 23);
            per_unit[i] = f32::from_bits((254 - exponent) << 23);
            let stored = |x| if open[i] { E::round(x) * per_unit[i] } else { 1.0 };
            (reference.scale[i], reference.bias[i]) = (stored(line.scale), stored(line.bias));
            min[i] = if open[i] { min[i] * per_unit[i] } else { 0.0 };
            max[i] = if open[i] { max[i] * per_unit[i] } else { 1.0 };
        }
        self.weights.fill([0.0; LANES]);
        for (i, group) in groups.chunks_exact(len).enumerate().filter(|(i, _)| open[*i]) {
            for (weights, &raw) in self.weights.iter_mut().zip(group) {
                weights[i] = E::widen(raw) * per_unit[i];
            }
        }
        let mut total = [0.0; LANES];
        for xs in &self.weights {
            for i in 0..LANES {
                total[i] += xs[i];
            }
        }
        let mut fits = Fits::default();
        for shrink in self.shrinks {
            let mut lines = Lines::default();
            for i in 0..LANES {
                let width = (max[i] - min[i]) * shrink;
                lines.scale[i] = width / self.high;
                lines.bias[i] = (min[i] + max[i] - width) * 0.5;
            }
            self.improve(&mut fits, &total, &lines);
        }
        let first = fits;
        for (narrower, shifted) in [(1.0, 0.0), (1.0, 0.25), (1.0, -0.25)] {
            let mut lines = first.lines;
            for i in 0..LANES {
                lines.bias[i] += lines.scale[i] * shifted;
                lines.scale[i] *= narrower;
            }
            self.improve(&mut fits, &total, &lines);
        }
        // A rounded scale has another bias.
        let stored = |fits: &Fits| {
            let mut lines = Lines::default();
            for i in 0..LANES {
                let scale = E::round(fits.lines.scale[i] * unit[i]) * per_unit[i];
                let bias = (total[i] - scale * fits.codes[i]) / len as f32;
                lines.scale[i] = scale;
                lines.bias[i] = E::round(bias * unit[i]) * per_unit[i];
            }
            lines
        };
        let mut least = self.errors(&reference);
        let mut best = Lines::default();
        for lines in [stored(&first), stored(&fits)] {
            let errors = self.errors(&lines);
            for i in 0..LANES {
                // Not so for the NaN of a scale that was rounded to zero.
                if open[i] && errors[i] < least[i] {
                    least[i] = errors[i];
                    best.scale[i] = lines.scale[i] * unit[i];
                    best.bias[i] = lines.bias[i] * unit[i];
                }
            }
        }
        best
    }

    /// Replaces fits by those through the codes that `lines` make, where those are better.
    #[inline(always)]
    fn improve(&self, best: &mut Fits, total: &Lanes, lines: &Lines) {
        let count = self.weights.len() as f32;
        let reciprocal = lines.scale.map(|scale| 1.0 / scale);
        let (mut codes, mut squares, mut products) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for xs in &self.weights {
            for i in 0..LANES {
                let q = round(clamp((xs[i] - lines.bias[i]) * reciprocal[i], self.high));
                codes[i] += q;
                squares[i] += q * q;
                products[i] += xs[i] * q;
            }
        }
        for i in 0..LANES {
            let covariance = products[i] - total[i] * codes[i] / count;
            let variance = squares[i] - codes[i] * codes[i] / count;
            let scale = covariance / variance;
            let bias = (total[i] - scale * codes[i]) / count;
            let better = scale * covariance > best.gain[i];
            let keep = |new: f32, old: f32| if better { new } else { old };
            best.lines.scale[i] = keep(scale, best.lines.scale[i]);
            best.lines.bias[i] = keep(bias, best.lines.bias[i]);
            best.codes[i] = keep(codes[i], best.codes[i]);
            best.gain[i] = keep(scale * covariance, best.gain[i]);
        }
    }

    /// The squared errors of groups with those lines.
    #[inline(always)]
    fn errors(&self, lines: &Lines) -> Lanes {
        let reciprocal = lines.scale.map(|scale| 1.0 / scale);
        let mut sums = [0.0; LANES];
        for xs in &self.weights {
            for i in 0..LANES {
                let q = round(clamp((xs[i] - lines.bias[i]) * reciprocal[i], self.high));
                let error = xs[i] - (q * lines.scale[i] + lines.bias[i]);
                sums[i] += error * error;
            }
        }
        sums
    }
}

/// A line for each lane.
#[derive(Clone, Copy, Debug, Default)]
struct Lines {
    scale: Lanes,
    bias: Lanes,
}

/// Lines of least squares through some codes.
#[derive(Clone, Copy, Debug, Default)]
struct Fits {
    lines: Lines,
    /// The sum of the codes.
    codes: Lanes,
    /// By how much the line lowers the squared error.
    gain: Lanes,
}
