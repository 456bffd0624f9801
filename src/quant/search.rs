//! Scales and zero points chosen by error search, in f32 for every element type.
//!
//! Codes `q` of a group `x`, less their zero point, fit best with the scale `sum(x q) / sum(q q)`,
//! which lowers the squared error of no scale at all, `sum(x x)`, by `sum(x q)^2 / sum(q q)`. So one
//! pass over a group tells the least error of *all* scales with a candidate's codes, and a few
//! candidates are as good as many. Candidates shrink the range of codes from the group's extremes
//! inwards: clipping the outermost weights often pays. A symmetric scale may be negative, which
//! swaps the ends of the code range; the largest magnitude then always gets the larger code.
//!
//! The sums run over small integers, which are exact in any order, so they are fast on every
//! instruction set and the same. They only nominate: what a nominee is worth, as stored, is
//! measured in f32, beside the scale and zero point of the reference, which only a smaller error
//! replaces. From 6 bits on a stored scale is too coarse to be refitted, and all candidates are
//! measured as stored.

use super::int::{Codes, Fit, MODERATE, codes, fit};
use super::tile::Element;

/// Squared errors are summed over this many lanes, whatever the instruction set.
const LANES: usize = 32;

/// The largest magnitude of a group as small integers.
const SMALL: f32 = 255.0;

/// The search for one group's scale and zero point, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    range: Codes,
    symmetric: bool,
    /// Whether scales of both signs are tried for every candidate.
    both_signs: bool,
    /// Whether candidates are refitted, and so only nominated.
    refit: bool,
    /// The candidates: ranges of codes, relative to the group's.
    shrinks: &'static [f32],
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
        let shrinks = if group > 512 { wide(bits) } else { near(bits) };
        Self {
            range,
            symmetric,
            both_signs: symmetric && bits <= 3,
            refit: bits <= 5,
            shrinks,
            weights: vec![0.0; group],
            small: vec![0; group],
            squares: vec![[0.0; LANES]; group.div_ceil(LANES)],
        }
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
        let unit = Unit::of(magnitude);
        for (x, &raw) in self.weights.iter_mut().zip(group) {
            *x = E::widen(raw) * unit.reciprocal;
        }
        let (min, max) = (extremes.min * unit.reciprocal, extremes.max * unit.reciprocal);
        let reference = unit.load(reference);
        let nominee = if self.refit { self.nominate(min, max) } else { reference };
        let candidates = if self.refit { 1 } else { self.shrinks.len() };
        let (mut best, mut least) = (reference, f32::INFINITY);
        for i in 0..=candidates {
            let candidate = match i {
                0 => reference,
                _ if self.refit => unit.as_stored::<E>(nominee),
                _ => unit.as_stored::<E>(self.candidate(self.shrinks[i - 1], min, max)),
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
        let (low, high) = self.window(best);
        for (&x, out) in self.weights.iter().zip(out) {
            *out = self.range.byte(clamp(x * reciprocal, low, high) + best.zero_point);
        }
        unit.store(best)
    }

    /// The scale and zero point whose codes cover the middle `shrink` of a group's range.
    #[inline(always)]
    fn candidate(&self, shrink: f32, min: f32, max: f32) -> Fit {
        if self.symmetric {
            let largest = if -min > max { min } else { max };
            return Fit { scale: largest * shrink / self.range.low, zero_point: 0.0 };
        }
        let scale = (max - min) * shrink / self.range.steps();
        let bottom = (min + max) * 0.5 - (max - min) * (0.5 * shrink);
        let zero_point = round(self.range.clamp(self.range.low - bottom / scale));
        Fit { scale, zero_point }
    }

    /// The candidate whose codes fit best with the scale that fits them best.
    #[inline(always)]
    fn nominate(&mut self, min: f32, max: f32) -> Fit {
        let to_small = SMALL / if -min > max { -min } else { max };
        for (small, &x) in self.small.iter_mut().zip(&self.weights) {
            *small = (x * to_small + ROUNDING).to_bits() as i16;
        }
        let mut best = Nominee { fit: self.candidate(1.0, min, max), gain: 0.0, to_small };
        for &shrink in self.shrinks {
            let candidate = self.candidate(shrink, min, max);
            let (low, high) = self.window(candidate);
            let (low, high) = if candidate.scale < 0.0 { (-high, -low) } else { (low, high) };
            let divisor = Divisor::new(candidate.scale.abs() * to_small);
            if self.both_signs {
                let [same, opposite] = moments_both_signs(&self.small, divisor, low, high);
                best.consider(candidate, same);
                best.consider(Fit { scale: -candidate.scale, ..candidate }, opposite);
            } else {
                best.consider(candidate, moments(&self.small, divisor, low, high));
            }
        }
        if !self.symmetric {
            let Fit { scale, zero_point } = best.fit;
            for zero_point in [zero_point - 1.0, zero_point + 1.0] {
                if self.range.clamp(zero_point) == zero_point {
                    let candidate = Fit { scale, zero_point };
                    let (low, high) = self.window(candidate);
                    let divisor = Divisor::new(scale * to_small);
                    best.consider(candidate, moments(&self.small, divisor, low, high));
                }
            }
        }
        best.fit
    }

    /// The smallest and largest code, less the zero point.
    #[inline(always)]
    fn window(&self, fit: Fit) -> (f32, f32) {
        (self.range.low - fit.zero_point, self.range.high - fit.zero_point)
    }

    /// The squared error of the group.
    #[inline(always)]
    fn error(&mut self, fit: Fit) -> f32 {
        let (scale, reciprocal) = (fit.scale, 1.0 / fit.scale);
        let (low, high) = self.window(fit);
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

/// Candidates for groups: the distribution's tail is short. By bits of a code.
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

/// Candidates for whole channels, where outliers may be far out.
fn wide(bits: u32) -> &'static [f32] {
    const ALL: [f32; 24] = [
        0.075, 0.084, 0.095, 0.106, 0.119, 0.134, 0.15, 0.168, 0.188, 0.211, 0.237, 0.266, 0.298,
        0.334, 0.375, 0.42, 0.471, 0.528, 0.592, 0.664, 0.745, 0.835, 0.93, 1.01,
    ];
    match bits {
        2..=4 => &ALL,
        5 => &ALL[6..],
        6 => &ALL[12..],
        _ => &ALL[16..],
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

    #[inline(always)]
    fn load(self, fit: Fit) -> Fit {
        Fit { scale: fit.scale * self.reciprocal, ..fit }
    }

    /// `fit` with its scale as a value of `E`, in this unit.
    #[inline(always)]
    fn as_stored<E: Element>(self, fit: Fit) -> Fit {
        self.load(Fit { scale: E::round(fit.scale * self.value), ..fit })
    }

    #[inline(always)]
    fn store(self, fit: Fit) -> Fit {
        Fit { scale: fit.scale * self.value, ..fit }
    }
}

/// `2^shift / multiplier`: a positive scale that small integers are divided by.
#[derive(Clone, Copy, Debug)]
struct Divisor {
    multiplier: i16,
    shift: u32,
}

impl Divisor {
    /// About `scale`, 1/64 to 2^14.
    #[inline(always)]
    fn new(scale: f32) -> Self {
        // The multiplier lies in 48..96, so that its product with a small integer, and half of a
        // unit more, fit in 16 bits.
        let reciprocal = 1.0 / scale;
        let exponent = ((reciprocal / 1.5).to_bits() >> 23) as i32 - 127;
        let shift = (5 - exponent).clamp(1, 14) as u32;
        let multiplier = reciprocal * (1 << shift) as f32;
        Self { multiplier: (if multiplier < 96.0 { multiplier } else { 96.0 }) as i16, shift }
    }

    /// The nearest integer to `x / scale`, halves up.
    #[inline(always)]
    fn divide(self, x: i16) -> i16 {
        x.wrapping_mul(self.multiplier).wrapping_add(1 << (self.shift - 1)) >> self.shift
    }
}

/// The sums of `x * q` and `q * q` over a group.
#[derive(Clone, Copy, Debug)]
struct Moments {
    xq: f32,
    qq: f32,
}

/// The best candidate so far.
#[derive(Clone, Copy, Debug)]
struct Nominee {
    fit: Fit,
    /// By how much it lowers the squared error of no scale at all, in small integers.
    gain: f32,
    /// Small integers per unit of the group.
    to_small: f32,
}

impl Nominee {
    /// Takes the codes of `candidate`, with the scale that suits them best, if that is better.
    #[inline(always)]
    fn consider(&mut self, candidate: Fit, Moments { xq, qq }: Moments) {
        let scale = xq / qq;
        let gain = scale * xq;
        // Not so for the NaN of codes that are all zero.
        if gain > self.gain {
            let scale = (scale / self.to_small).copysign(candidate.scale);
            *self = Self { fit: Fit { scale, ..candidate }, gain, ..*self };
        }
    }
}

/// The moments of a group with its codes in `low..=high`.
#[inline(always)]
fn moments(group: &[i16], divisor: Divisor, low: f32, high: f32) -> Moments {
    let (low, high) = (low as i16, high as i16);
    let mut sums = [0; 2];
    for block in group.chunks(BLOCK) {
        let (mut xq, mut qq) = (0, 0);
        for &x in block {
            let q = divisor.divide(x).max(low).min(high);
            xq += i32::from(x.wrapping_mul(q));
            qq += i32::from(q.wrapping_mul(q));
        }
        sums[0] += i64::from(xq);
        sums[1] += i64::from(qq);
    }
    Moments { xq: sums[0] as f32, qq: sums[1] as f32 }
}

/// The moments of a group with its codes in `low..=high`, and in `-high..=-low`.
#[inline(always)]
fn moments_both_signs(group: &[i16], divisor: Divisor, low: f32, high: f32) -> [Moments; 2] {
    let (low, high) = (low as i16, high as i16);
    let mut sums = [0; 4];
    for block in group.chunks(BLOCK) {
        let (mut xq, mut qq, mut xp, mut pp) = (0, 0, 0, 0);
        for &x in block {
            let q = divisor.divide(x);
            let (q, p) = (q.max(low).min(high), q.max(-high).min(-low));
            xq += i32::from(x.wrapping_mul(q));
            qq += i32::from(q.wrapping_mul(q));
            xp += i32::from(x.wrapping_mul(p));
            pp += i32::from(p.wrapping_mul(p));
        }
        for (sum, part) in sums.iter_mut().zip([xq, qq, xp, pp]) {
            *sum += i64::from(part);
        }
    }
    let [xq, qq, xp, pp] = sums.map(|s| s as f32);
    [Moments { xq, qq }, Moments { xq: xp, qq: pp }]
}

/// Weights whose moments surely fit in 32 bits: with 5 bits, a code is at most 31.
const BLOCK: usize = 1 << 18;

/// Added to an f32 below 2^22, leaves the nearest integer (ties to even) in the lowest bits.
const ROUNDING: f32 = 12_582_912.0;

#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ROUNDING) - ROUNDING
}

#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}
