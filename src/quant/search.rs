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

use super::int::{Codes, Fit, MODERATE, codes, fit};
use super::tile::Element;

/// Squared errors are summed over this many lanes, whatever the instruction set.
const LANES: usize = 32;

/// The largest magnitude of a group as small integers.
const SMALL: f32 = 255.0;

/// Weights of a group that candidates are nominated by; their sums surely fit in 32 bits.
const SAMPLE: usize = 1 << 18;

/// Added to an f32 below 2^22, leaves the nearest integer (ties to even) in the lowest bits.
const ROUNDING: f32 = 12_582_912.0;

/// The search for one group's scale and zero point, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    range: Codes,
    symmetric: bool,
    /// Where to clip a group.
    clips: Vec<Clip>,
    /// Whether candidates are refitted, and so only nominated.
    refit: bool,
    /// What nominees are chosen from. If symmetric, the same for all groups.
    candidates: Vec<Candidate>,
    /// Their moments.
    moments: Vec<Moments>,
    /// The group's weights in units of a power of two near the largest.
    weights: Vec<f32>,
    /// The group's weights as small integers.
    small: Vec<i16>,
    /// Squared errors, padded with zeros to whole lanes.
    squares: Vec<[f32; LANES]>,
}

impl Search {
    /// A search for groups of `group` weights.
    pub(super) fn new(range: Codes, symmetric: bool, group: usize) -> Self {
        let bits = (range.steps() as u32 + 1).ilog2();
        let wide = group > 512;
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
        Self {
            range,
            symmetric,
            clips,
            refit: bits <= 5,
            moments: vec![Moments { xq: 0, qq: 0 }; candidates.len()],
            candidates,
            weights: vec![0.0; group],
            small: vec![0; group.min(SAMPLE)],
            squares: vec![[0.0; LANES]; group.div_ceil(LANES)],
        }
    }

    /// Encodes a group into `out`.
    #[inline(always)]
    pub(super) fn encode_group<E: Element>(&mut self, group: &[E::Raw], out: &mut [u8]) -> Fit {
        let extremes = E::extremes(group);
        let magnitude = extremes.magnitude();
        let reference = fit::<E>(self.range, self.symmetric, extremes);
        if !MODERATE.contains(&magnitude) || !MODERATE.contains(&reference.scale) {
            codes::<E>(self.range, self.symmetric, reference, group, out);
            return reference;
        }
        let unit = Unit::of(magnitude);
        for (x, &raw) in self.weights.iter_mut().zip(group) {
            *x = E::widen(raw) * unit.reciprocal;
        }
        let (min, max) = (extremes.min * unit.reciprocal, extremes.max * unit.reciprocal);
        let reference = unit.load(reference);
        let nominee = if self.refit { self.nominate(min, max) } else { reference };
        let candidates = if self.refit { 1 } else { self.clips.len() };
        let (mut best, mut least) = (reference, f32::INFINITY);
        for i in 0..=candidates {
            let candidate = match i {
                0 => reference,
                _ if self.refit => unit.as_stored::<E>(nominee),
                _ => unit.as_stored::<E>(self.clipped(self.clips[i - 1], min, max)),
            };
            let error = self.error(candidate);
            // Not so for the NaN of a scale that was rounded to zero.
            if error < least {
                // A sum's own rounding must not prefer what is worse than the reference.
                least = if i == 0 { error * (1.0 - 1.0 / 65536.0) } else { error };
                best = candidate;
            }
        }
        let reciprocal = 1.0 / best.scale;
        let (low, high) = self.range.less(best.zero_point);
        for (&x, out) in self.weights.iter().zip(out) {
            *out = self.range.byte(clamp(x * reciprocal, low, high) + best.zero_point);
        }
        unit.store(best)
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
        let zero_point = round(self.range.clamp(self.range.low - min / scale));
        Fit { scale, zero_point }
    }

    /// The candidate whose codes fit best, with the scale that fits them best.
    #[inline(always)]
    fn nominate(&mut self, min: f32, max: f32) -> Fit {
        let largest = if -min > max { min } else { max };
        // If symmetric, the largest magnitude becomes the smallest integer, for the smallest code.
        let to_small = if self.symmetric { -SMALL / largest } else { SMALL / largest.abs() };
        for (small, &x) in self.small.iter_mut().zip(&self.weights) {
            *small = (x * to_small + ROUNDING).to_bits() as i16;
        }
        if !self.symmetric {
            for i in 0..self.clips.len() {
                let fit = self.clipped(self.clips[i], min * to_small, max * to_small);
                self.candidates[i] = Candidate::new(self.range, fit.scale, fit.zero_point);
            }
        }
        for (moments, candidate) in self.moments.iter_mut().zip(&self.candidates) {
            *moments = candidate.moments(&self.small);
        }
        let (mut best, mut best_gain) = (0, 0.0);
        for (i, moments) in self.moments.iter().enumerate() {
            let gain = moments.gain();
            // Not so for the NaN of codes that are all zero.
            if gain > best_gain {
                (best, best_gain) = (i, gain);
            }
        }
        let (mut moments, mut zero_point) = (self.moments[best], self.candidates[best].zero_point);
        if !self.symmetric {
            let scale = moments.scale();
            for step in [-1.0, 1.0] {
                let zero = self.range.clamp(self.candidates[best].zero_point + step);
                let neighbour = Candidate::new(self.range, scale, zero).moments(&self.small);
                let gain = neighbour.gain();
                if gain > best_gain {
                    (moments, zero_point, best_gain) = (neighbour, zero, gain);
                }
            }
        }
        Fit { scale: moments.scale() * self.candidates[best].sign / to_small, zero_point }
    }

    /// The squared error of the group.
    #[inline(always)]
    fn error(&mut self, Fit { scale, zero_point }: Fit) -> f32 {
        let reciprocal = 1.0 / scale;
        let (low, high) = self.range.less(zero_point);
        for (square, &x) in self.squares.as_flattened_mut().iter_mut().zip(&self.weights) {
            let error = x - round(clamp(x * reciprocal, low, high)) * scale;
            *square = error * error;
        }
        let mut sums = [0.0; LANES];
        for squares in &self.squares {
            for (sum, square) in sums.iter_mut().zip(squares) {
                *sum += square;
            }
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
            width /= 2;
        }
        sums[0]
    }
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

/// A power of two, and one over it.
#[derive(Clone, Copy, Debug)]
struct Unit {
    value: f32,
    reciprocal: f32,
}

impl Unit {
    /// The largest power of two within `magnitude`, which is neither tiny nor huge.
    #[inline(always)]
    fn of(magnitude: f32) -> Self {
        let exponent = magnitude.to_bits() >> 23;
        Self {
            value: f32::from_bits(exponent << 23),
            reciprocal: f32::from_bits((254 - exponent) << 23),
        }
    }

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
    fn as_stored<E: Element>(self, fit: Fit) -> Fit {
        self.load(Fit { scale: E::round(fit.scale * self.value), ..fit })
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

    /// The sums over a group with this candidate's codes.
    #[inline(always)]
    fn moments(self, group: &[i16]) -> Moments {
        let (mut xq, mut qq) = (0, 0);
        for &x in group {
            // The nearest integer to `x / scale`, halves up.
            let q = x.wrapping_mul(self.multiplier).wrapping_add(1 << (self.shift - 1));
            let q = (q >> self.shift).max(self.low).min(self.high);
            xq += i32::from(x.wrapping_mul(q));
            qq += i32::from(q.wrapping_mul(q));
        }
        Moments { xq, qq }
    }
}

/// The sums of `x * q` and `q * q` over a group.
#[derive(Clone, Copy, Debug)]
struct Moments {
    xq: i32,
    qq: i32,
}

impl Moments {
    /// The scale that suits the codes best.
    #[inline(always)]
    fn scale(self) -> f32 {
        self.xq as f32 / self.qq as f32
    }

    /// By how much the codes then lower the squared error of no scale at all.
    #[inline(always)]
    fn gain(self) -> f32 {
        self.scale() * self.xq as f32
    }
}

/// The nearest integer, ties to even, of a magnitude below 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ROUNDING) - ROUNDING
}

#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}
