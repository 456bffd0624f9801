//! A group whose errors count for different amounts, and sums over it.

use super::int::MODERATE;
use super::lanes::{LANES, sum};

/// Candidates that are measured in one pass over a group.
pub(super) const BATCH: usize = 4;

/// The numbers that codes stand for, less scale and offset.
pub(super) trait Levels: Copy {
    /// The one nearest to `y`.
    fn nearest(self, y: f32) -> f32;
}

/// Codes as weights: about `level * scale + offset`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<L> {
    pub(super) levels: L,
    pub(super) scale: f32,
    pub(super) offset: f32,
}

/// Weighed sums over a group, of the levels `v` that a candidate makes of its weights `x`.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Moments {
    /// Of `v`.
    pub(super) v: f32,
    /// Of `v * v`.
    pub(super) vv: f32,
    /// Of `x * v`.
    pub(super) xv: f32,
}

impl Moments {
    /// The scale that fits these levels best where there is no offset.
    #[inline(always)]
    pub(super) fn scale(self) -> f32 {
        self.xv / self.vv
    }

    /// By how much that scale lowers the error of no scale at all; NaN where all levels are zero.
    #[inline(always)]
    pub(super) fn gain(self) -> f32 {
        self.xv * self.scale()
    }
}

/// A power of two, and one over it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    pub(super) value: f32,
    pub(super) reciprocal: f32,
}

impl Unit {
    /// The largest power of two within `magnitude`, which is neither tiny nor huge.
    #[inline(always)]
    pub(super) fn of(magnitude: f32) -> Self {
        let exponent = magnitude.to_bits() >> 23;
        Self {
            value: f32::from_bits(exponent << 23),
            reciprocal: f32::from_bits((254 - exponent) << 23),
        }
    }

    /// `x`, in this unit, rounded as when it is stored.
    #[inline(always)]
    pub(super) fn as_stored(self, stored: fn(f32) -> f32, x: f32) -> f32 {
        stored(x * self.value) * self.reciprocal
    }
}

/// What a group is measured in, and its smallest and largest weight in that unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded {
    pub(super) unit: Unit,
    pub(super) min: f32,
    pub(super) max: f32,
}

/// A group, in units of a power of two near its largest magnitude, and what its errors count for.
#[derive(Debug)]
pub(super) struct Weighed {
    xs: Vec<[f32; LANES]>,
    /// Zero beyond the group's end.
    ws: Vec<[f32; LANES]>,
}

impl Weighed {
    /// Room for a group of `len`.
    pub(super) fn new(len: usize) -> Self {
        let lanes = vec![[0.0; LANES]; len.div_ceil(LANES)];
        Self { xs: lanes.clone(), ws: lanes }
    }

    /// Takes in a group of numbers, at most as long as there is room for, and what its errors count for.
    /// `None` where its largest magnitude is not a moderate one.
    #[inline(always)]
    pub(super) fn load(&mut self, group: &[f32], importance: &[f32]) -> Option<Loaded> {
        let (mut min, mut max) = (group[0], group[0]);
        for &x in group {
            min = if x < min { x } else { min };
            max = if x > max { x } else { max };
        }
        let magnitude = if -min > max { -min } else { max };
        if !MODERATE.contains(&magnitude) {
            return None;
        }
        let unit = Unit::of(magnitude);
        let (xs, ws) = (self.xs.as_flattened_mut(), self.ws.as_flattened_mut());
        for (in_unit, &x) in xs.iter_mut().zip(group) {
            *in_unit = x * unit.reciprocal;
        }
        ws[..group.len()].copy_from_slice(importance);
        xs[group.len()..].fill(0.0);
        ws[group.len()..].fill(0.0);
        let (min, max) = (min * unit.reciprocal, max * unit.reciprocal);
        Some(Loaded { unit, min, max })
    }

    /// The group, then zeros.
    pub(super) fn xs(&self) -> &[f32] {
        self.xs.as_flattened()
    }

    /// The sums of what errors count for, and of that times the weights.
    #[inline(always)]
    pub(super) fn totals(&self) -> (f32, f32) {
        let (mut count, mut total) = ([0.0; LANES], [0.0; LANES]);
        for (xs, ws) in self.xs.iter().zip(&self.ws) {
            for i in 0..LANES {
                count[i] += ws[i];
                total[i] += ws[i] * xs[i];
            }
        }
        (sum(count), sum(total))
    }

    /// What each candidate's levels sum up to.
    #[inline(always)]
    pub(super) fn moments<L: Levels>(&self, candidates: [Candidate<L>; BATCH]) -> [Moments; BATCH] {
        let reciprocal = candidates.map(|candidate| 1.0 / candidate.scale);
        let mut sums = [[[0.0; LANES]; BATCH]; 3];
        for (xs, ws) in self.xs.iter().zip(&self.ws) {
            for k in 0..BATCH {
                let Candidate { levels, offset, .. } = candidates[k];
                for i in 0..LANES {
                    let v = levels.nearest((xs[i] - offset) * reciprocal[k]);
                    let weighed = ws[i] * v;
                    sums[0][k][i] += weighed;
                    sums[1][k][i] += weighed * v;
                    sums[2][k][i] += weighed * xs[i];
                }
            }
        }
        std::array::from_fn(|k| Moments {
            v: sum(sums[0][k]),
            vv: sum(sums[1][k]),
            xv: sum(sums[2][k]),
        })
    }

    /// What each candidate's squared errors count for; NaN where its scale is zero.
    #[inline(always)]
    pub(super) fn errors<L: Levels>(&self, candidates: [Candidate<L>; BATCH]) -> [f32; BATCH] {
        let reciprocal = candidates.map(|candidate| 1.0 / candidate.scale);
        let mut sums = [[0.0; LANES]; BATCH];
        for (xs, ws) in self.xs.iter().zip(&self.ws) {
            for k in 0..BATCH {
                let Candidate { levels, scale, offset } = candidates[k];
                for i in 0..LANES {
                    let v = levels.nearest((xs[i] - offset) * reciprocal[k]);
                    let error = xs[i] - (v * scale + offset);
                    sums[k][i] += error * error * ws[i];
                }
            }
        }
        sums.map(sum)
    }
}
