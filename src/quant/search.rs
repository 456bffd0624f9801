//! Scales and zero points chosen by error search, in f32 for every element type.
//!
//! Codes `q` of a group `x`, less their zero point, fit best with the scale `sum(x q) / sum(q q)`,
//! which lowers the squared error of no scale at all, `sum(x x)`, by `sum(x q)^2 / sum(q q)`. So one
//! pass over a group tells the least error of *all* scales with a candidate's codes, and a few
//! candidates are as good as many. Candidates clip the group: the outermost weights are often
//! better off with the outermost code. A symmetric scale takes the sign that gives the largest
//! magnitude the code `-2^(b-1)`, so the whole range of codes is used.
//!
//! Those sums run over small integers, which are exact in any order, so they are fast on every
//! instruction set and the same. They only nominate: what the nominee is worth, as stored, is
//! measured in f32, beside the scale and zero point of the reference, which only a smaller error
//! replaces. From 6 bits on a stored scale is too coarse to be refitted, and all candidates are
//! measured as stored.

use super::extremes::extremes;
use super::int::{Codes, Fit, MODERATE};
use super::lanes::{ROUNDING, round};
use super::nearest::{Tool, codes};
use super::tile::Element;
use super::weighed::Unit;

/// Squared errors are summed over this many lanes, whatever the instruction set.
const LANES: usize = 32;

/// The largest magnitude of a group as small integers.
const SMALL: f32 = 255.0;

/// Weights of a group that candidates are nominated by; their sums surely fit in 32 bits.
const SAMPLE: usize = 1 << 18;

/// Weights of the groups that go through a step together; they fit in the first-level cache.
const BATCH: usize = 2048;

/// The search for scales and zero points, with its memory.
///
/// Groups go through its steps some at a time, so that a step's groups, which do not depend on one
/// another, overlap in the CPU.
#[derive(Debug)]
pub(super) struct Search {
    range: Codes,
    symmetric: bool,
    /// The smallest zero point there is.
    lowest_zero: f32,
    /// Weights of a group.
    len: usize,
    /// Where to clip a group.
    clips: Vec<Clip>,
    /// Whether candidates are refitted, and so only nominated.
    refit: bool,
    /// What nominees are chosen from. If symmetric, the same for all groups.
    candidates: Vec<Candidate>,
    /// How well each candidate suits each group: a row per candidate.
    trials: Vec<Trial>,
    groups: Vec<Group>,
    /// The weights of all groups, each in its unit and padded with zeros to whole lanes.
    weights: Vec<[f32; LANES]>,
    /// Lanes of a group.
    lanes: usize,
    /// The weights of all groups as small integers, padded likewise.
    small: Vec<[i16; LANES]>,
}

/// A group of weights. Its numbers are in its unit, a power of two near the largest magnitude.
#[derive(Clone, Copy, Debug)]
struct Group {
    unit: Unit,
    min: f32,
    max: f32,
    /// Small integers per unit.
    to_small: f32,
    /// The candidate to be measured.
    nominee: Fit,
    /// The best so far. At first the reference.
    best: Fit,
    /// The squared error of the best.
    error: f32,
    /// Whether anything but the reference is possible.
    open: bool,
}

impl Search {
    /// A search for groups of `len` weights.
    pub(super) fn new(range: Codes, symmetric: bool, len: usize) -> Self {
        let bits = (range.steps() as u32 + 1).ilog2();
        let wide = len > 512;
        let clips = if wide { far(bits) } else { near(bits) };
        let mut candidates: Vec<_> = clips
            .iter()
            .map(|clip| Candidate::new(range, SMALL * clip / -range.low, 0.0))
            .collect();
        if symmetric && bits <= 3 {
            // So few codes that it may pay to leave the smallest to the other sign.
            for i in 0..clips.len() {
                let Candidate { low, high, .. } = candidates[i];
                candidates.push(Candidate { low: -high, high: -low, sign: -1.0, ..candidates[i] });
            }
        }
        let mut clips: Vec<_> = clips.iter().map(|&to| Clip { to, middle: true }).collect();
        if !symmetric && (wide || bits <= 3) {
            for i in 0..clips.len() {
                candidates.push(candidates[i]);
                clips.push(Clip { middle: false, ..clips[i] });
            }
        }
        let batch = (BATCH / len).max(1);
        let none = Fit { scale: 0.0, zero_point: 0.0 };
        let unit = Unit { value: 1.0, reciprocal: 1.0 };
        let group = Group {
            unit,
            min: 0.0,
            max: 0.0,
            to_small: 1.0,
            nominee: none,
            best: none,
            error: 0.0,
            open: false,
        };
        Self {
            range,
            symmetric,
            lowest_zero: range.low,
            len,
            clips,
            // A code less its zero point is at most 16, for the sums.
            refit: bits <= if symmetric { 5 } else { 4 },
            trials: vec![Trial::default(); candidates.len() * batch],
            candidates,
            groups: vec![group; batch],
            weights: vec![[0.0; LANES]; batch * len.div_ceil(LANES)],
            lanes: len.div_ceil(LANES),
            small: vec![[0; LANES]; batch * len.div_ceil(LANES)],
        }
    }

    /// The search, less zero points of the smallest code.
    pub(super) fn without_lowest_zero(mut self) -> Self {
        self.lowest_zero += 1.0;
        self
    }

    /// Encodes the groups of a row: their codes into `out`, scales and zero points into `fits`.
    /// Scales of groups that can't be searched are as the tool has them before they are stored.
    #[inline(always)]
    pub(super) fn encode_row<E: Element, T: Tool>(
        &mut self,
        row: &[E::Raw],
        out: &mut [u8],
        fits: &mut [Fit],
    ) {
        let batch = self.groups.len();
        let rows = row.chunks(batch * self.len);
        let outs = out.chunks_mut(batch * self.len);
        for ((row, out), fits) in rows.zip(outs).zip(fits.chunks_mut(batch)) {
            let groups = fits.len();
            self.load::<E, T>(row);
            for g in 0..groups {
                self.groups[g].error = self.error(g, self.groups[g].best);
            }
            if self.refit {
                self.nominate(groups);
                for g in 0..groups {
                    self.consider::<E, T>(g, self.groups[g].nominee);
                }
            } else {
                for i in 0..self.clips.len() {
                    for g in 0..groups {
                        let Group { min, max, .. } = self.groups[g];
                        self.consider::<E, T>(g, self.clipped(self.clips[i], min, max));
                    }
                }
            }
            self.finish::<E, T>(row, out, fits);
        }
    }

    /// Takes in the groups of `row`.
    #[inline(always)]
    fn load<E: Element, T: Tool>(&mut self, row: &[E::Raw]) {
        let groups = row.chunks_exact(self.len).zip(self.weights.chunks_exact_mut(self.lanes));
        for ((raw, weights), group) in groups.zip(&mut self.groups) {
            let extremes = extremes::<E>(raw).values::<E>();
            let magnitude = extremes.magnitude();
            let Fit { scale, zero_point } = T::fit::<E>(self.range, self.symmetric, extremes);
            let reference = Fit {
                scale: T::stored::<E>(scale),
                zero_point: at_least(zero_point, self.lowest_zero),
            };
            let open = MODERATE.contains(&magnitude) && MODERATE.contains(&reference.scale);
            let unit = Unit::of(if open { magnitude } else { 1.0 });
            let (min, max) = if open { (extremes.min, extremes.max) } else { (-1.0, 1.0) };
            let (min, max) = (min * unit.reciprocal, max * unit.reciprocal);
            let largest = if -min > max { min } else { max };
            // If symmetric, the largest magnitude becomes the smallest integer, which gets the
            // smallest code.
            let to_small = SMALL / if self.symmetric { -largest } else { largest.abs() };
            let (nominee, best) = (unit.load(reference), unit.load(reference));
            *group = Group { unit, min, max, to_small, nominee, best, error: 0.0, open };
            for (x, &raw) in weights.as_flattened_mut().iter_mut().zip(raw) {
                *x = E::widen(raw) * unit.reciprocal;
            }
            if !open {
                weights.fill([0.0; LANES]);
            }
        }
    }

    /// Makes `candidate`, as stored, the best of a group if its error is smaller.
    #[inline(always)]
    fn consider<E: Element, T: Tool>(&mut self, g: usize, candidate: Fit) {
        let candidate = self.groups[g].unit.rounded::<E, T>(candidate);
        let error = self.error(g, candidate);
        let group = &mut self.groups[g];
        // Not so for the NaN of a scale that was rounded to zero. A sum's own rounding must not
        // prefer what is worse, least of all than the reference.
        if error < group.error * (1.0 - 1.0 / 65536.0) {
            (group.best, group.error) = (candidate, error);
        }
    }

    /// Writes the codes of the groups of `row` and what they were found with.
    #[inline(always)]
    fn finish<E: Element, T: Tool>(&self, row: &[E::Raw], out: &mut [u8], fits: &mut [Fit]) {
        let rows = row.chunks_exact(self.len).zip(self.weights.chunks_exact(self.lanes));
        let outs = out.chunks_exact_mut(self.len).zip(fits);
        for (((raw, weights), (out, fit)), group) in rows.zip(outs).zip(&self.groups) {
            if !group.open {
                *fit = T::fit::<E>(self.range, self.symmetric, extremes::<E>(raw).values::<E>());
                codes::<E, T>(self.range, self.symmetric, *fit, raw, out);
                continue;
            }
            let Fit { scale, zero_point } = group.best;
            *fit = group.unit.store(group.best);
            let reciprocal = 1.0 / scale;
            let (low, high) = self.range.less(zero_point);
            for (out, &x) in out.iter_mut().zip(weights.as_flattened()) {
                *out = self.range.byte(clamp(x * reciprocal, low, high) + zero_point);
            }
        }
    }

    /// The scale and zero point whose codes cover what `clip` leaves of a group's range.
    #[inline(always)]
    fn clipped(&self, clip: Clip, min: f32, max: f32) -> Fit {
        if self.symmetric {
            let largest = if -min > max { min } else { max };
            return Fit { scale: largest * clip.to / self.range.low, zero_point: 0.0 };
        }
        let (min, max) = clip.apply(min, max);
        let scale = (max - min) / self.range.steps();
        let zero_point =
            at_least(round(self.range.clamp(self.range.low - min / scale)), self.lowest_zero);
        Fit { scale, zero_point }
    }

    /// Finds each group's candidate whose codes fit best, with the scale that fits them best.
    #[inline(always)]
    fn nominate(&mut self, groups: usize) {
        let batch = self.groups.len();
        let sample = self.lanes.min(SAMPLE / LANES);
        for g in 0..groups {
            let to_small = self.groups[g].to_small;
            let weights = self.weights[g * self.lanes..][..sample].as_flattened();
            let small = self.small[g * sample..][..sample].as_flattened_mut();
            for (small, &x) in small.iter_mut().zip(weights) {
                *small = (x * to_small + ROUNDING).to_bits() as i16;
            }
        }
        for g in 0..groups {
            let Group { min, max, to_small, .. } = self.groups[g];
            if !self.symmetric {
                for i in 0..self.clips.len() {
                    let fit = self.clipped(self.clips[i], min * to_small, max * to_small);
                    self.candidates[i] = Candidate::new(self.range, fit.scale, fit.zero_point);
                }
            }
            let small = self.small[g * sample..][..sample].as_flattened();
            for (k, candidate) in self.candidates.iter().enumerate() {
                self.trials[k * batch + g] = candidate.try_on(small);
            }
        }
        let (best, others) = self.trials.split_at_mut(batch);
        for trials in others.chunks_exact(batch) {
            for (best, trial) in best.iter_mut().zip(trials) {
                *best = best.or(*trial);
            }
        }
        if !self.symmetric {
            for g in 0..groups {
                let first = self.trials[g];
                for step in [-1.0, 1.0] {
                    let zero =
                        at_least(self.range.clamp(first.zero_point + step), self.lowest_zero);
                    let neighbour = Candidate::new(self.range, first.scale, zero);
                    let small = self.small[g * sample..][..sample].as_flattened();
                    let trial = neighbour.try_on(small);
                    self.trials[g] = self.trials[g].or(trial);
                }
            }
        }
        for (group, &Trial { scale, zero_point, .. }) in self.groups.iter_mut().zip(&self.trials) {
            group.nominee = Fit { scale: scale / group.to_small, zero_point };
        }
    }

    /// The squared error of a group.
    #[inline(always)]
    fn error(&self, g: usize, Fit { scale, zero_point }: Fit) -> f32 {
        let reciprocal = 1.0 / scale;
        let (low, high) = self.range.less(zero_point);
        let mut sums = [0.0; LANES];
        for xs in &self.weights[g * self.lanes..][..self.lanes] {
            for i in 0..LANES {
                let error = xs[i] - round(clamp(xs[i] * reciprocal, low, high)) * scale;
                sums[i] += error * error;
            }
        }
        let [a, b, c, d] = fold::<8, 4>(&fold::<16, 8>(&fold::<LANES, 16>(&sums)));
        (a + c) + (b + d)
    }
}

/// The first half of some lanes, plus the second.
#[inline(always)]
fn fold<const N: usize, const HALF: usize>(lanes: &[f32; N]) -> [f32; HALF] {
    let mut half = [0.0; HALF];
    for i in 0..HALF {
        half[i] = lanes[i] + lanes[i + HALF];
    }
    half
}

/// A part of a group's range.
#[derive(Clone, Copy, Debug)]
struct Clip {
    /// What remains, relative to the range or the largest magnitude.
    to: f32,
    /// Whether the middle of the range remains, rather than what lies around zero.
    middle: bool,
}

impl Clip {
    #[inline(always)]
    fn apply(self, min: f32, max: f32) -> (f32, f32) {
        if self.middle {
            let (middle, reach) = ((min + max) * 0.5, (max - min) * (0.5 * self.to));
            (middle - reach, middle + reach)
        } else {
            let end = self.to * if -min > max { -min } else { max };
            (if min < -end { -end } else { min }, if max > end { end } else { max })
        }
    }
}

/// Where to clip groups, by bits of a code.
fn near(bits: u32) -> &'static [f32] {
    match bits {
        2 => &[0.35, 0.43, 0.51, 0.6, 0.69, 0.78, 0.88, 1.0],
        3 => &[0.5, 0.57, 0.64, 0.71, 0.78, 0.85, 0.93, 1.01],
        4 => &[0.62, 0.68, 0.74, 0.8, 0.86, 0.91, 0.96, 1.01],
        5 => &[0.79, 0.83, 0.86, 0.89, 0.92, 0.95, 0.98, 1.01],
        6 => &[0.9, 0.92, 0.94, 0.955, 0.97, 0.985, 1.0, 1.015],
        7 => &[0.955, 0.965, 0.975, 0.985, 0.99, 0.995, 1.0, 1.01],
        _ => &[0.98, 0.985, 0.99, 0.9925, 0.995, 1.0, 1.005, 1.01],
    }
}

/// Where to clip whole channels, whose outliers may be far out.
fn far(bits: u32) -> &'static [f32] {
    const ALL: [f32; 24] = [
        0.075, 0.084, 0.095, 0.106, 0.119, 0.134, 0.15, 0.168, 0.188, 0.211, 0.237, 0.266, 0.298,
        0.334, 0.375, 0.42, 0.471, 0.528, 0.592, 0.664, 0.745, 0.835, 0.93, 1.0,
    ];
    match bits {
        2..=4 => &ALL,
        5 => &ALL[6..],
        6 => &ALL[10..],
        7 => &[0.5, 0.6, 0.7, 0.8, 0.86, 0.92, 0.97, 1.0],
        _ => &[0.7, 0.8, 0.88, 0.93, 0.96, 0.98, 0.99, 1.0],
    }
}

impl Unit {
    /// `fit` in this unit.
    #[inline(always)]
    fn load(self, fit: Fit) -> Fit {
        Fit { scale: fit.scale * self.reciprocal, ..fit }
    }

    /// `fit`, in this unit, as it is stored.
    #[inline(always)]
    fn store(self, fit: Fit) -> Fit {
        Fit { scale: fit.scale * self.value, ..fit }
    }

    /// `fit`, in this unit, with its scale rounded as it will be when stored.
    #[inline(always)]
    fn rounded<E: Element, T: Tool>(self, fit: Fit) -> Fit {
        self.load(Fit { scale: T::stored::<E>(fit.scale * self.value), ..fit })
    }
}

/// A scale `2^shift / multiplier`, in small integers, and a zero point.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    multiplier: i16,
    shift: u32,
    /// The smallest code, less the zero point.
    low: i16,
    /// The largest code, less the zero point.
    high: i16,
    zero_point: f32,
    /// -1 if the codes are the negatives of those that will be stored.
    sign: f32,
}

impl Candidate {
    /// A candidate of about `scale`, 1/32 to 2^13 in small integers.
    #[inline(always)]
    fn new(range: Codes, scale: f32, zero_point: f32) -> Self {
        // The multiplier lies in 48..=96, so that its product with a small integer, and half of a
        // unit more, fit in 16 bits.
        let reciprocal = 1.0 / scale;
        let exponent = (reciprocal / 1.5).to_bits() >> 23;
        let shift = (132 - exponent.clamp(118, 131)) & 15;
        let multiplier = reciprocal * f32::from_bits((127 + shift) << 23);
        let multiplier = (if multiplier < 96.0 { multiplier } else { 96.0 } + ROUNDING).to_bits();
        let (low, high) = range.less(zero_point);
        let code = |x: f32| (x + ROUNDING).to_bits() as i16;
        Self {
            multiplier: multiplier as i16,
            shift,
            low: code(low),
            high: code(high),
            zero_point,
            sign: 1.0,
        }
    }

    /// How well this candidate's codes suit a group.
    #[inline(always)]
    fn try_on(self, group: &[i16]) -> Trial {
        let (mut xq, mut qq) = (0, 0);
        // Loops of a known length have no tails.
        let (blocks, rest) = group.as_chunks::<128>();
        for block in blocks {
            self.add_moments(block, &mut xq, &mut qq);
        }
        for block in rest.as_chunks::<LANES>().0 {
            self.add_moments(block, &mut xq, &mut qq);
        }
        // At least 1, so that codes of nothing but zeros gain nothing.
        let (xq, qq) = (xq as f32, qq.max(1) as f32);
        let scale = xq / qq;
        Trial { gain: scale * xq, scale: scale * self.sign, zero_point: self.zero_point }
    }

    /// Adds the sums of `x * q` and `q * q` over `N` weights, at most 256.
    #[inline(always)]
    fn add_moments<const N: usize>(self, block: &[i16; N], xq: &mut u32, qq: &mut u32) {
        // 16 bits hold twice the lanes of 32. `q` has the sign of `x` or is 0, and is at most 16:
        // a product lies in 0..2^12, a square in 0..=2^8.
        let (mut products, mut upper, mut squares) = (0u16, 0u16, 0u16);
        for &x in block {
            // The nearest integer to `x / scale`, halves up.
            let q = x.wrapping_mul(self.multiplier).wrapping_add(1 << (self.shift - 1));
            let q = (q >> self.shift).max(self.low).min(self.high);
            let product = x.wrapping_mul(q).cast_unsigned();
            products = products.wrapping_add(product);
            upper = upper.wrapping_add(product >> 8);
            squares = squares.wrapping_add(q.wrapping_mul(q).cast_unsigned());
        }
        // Less than 2^16 more than the sum of the upper bytes, and known modulo 2^16.
        let upper = u32::from(upper) << 8;
        *xq += upper + (u32::from(products).wrapping_sub(upper) & 0xffff);
        *qq += u32::from(squares);
    }
}

/// What a candidate's codes are good for.
#[derive(Clone, Copy, Default, Debug)]
struct Trial {
    /// By how much they lower the squared error of no scale at all.
    gain: f32,
    /// The scale that suits them best, in small integers.
    scale: f32,
    zero_point: f32,
}

impl Trial {
    /// The better of the two.
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        let better = other.gain > self.gain;
        Self {
            gain: if better { other.gain } else { self.gain },
            scale: if better { other.scale } else { self.scale },
            zero_point: if better { other.zero_point } else { self.zero_point },
        }
    }
}

#[inline(always)]
pub(super) fn at_least(x: f32, low: f32) -> f32 {
    if x < low { low } else { x }
}

#[inline(always)]
pub(super) fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}
