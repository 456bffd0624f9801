//! The smallest and largest weights of groups.
//!
//! Found among the bit patterns as signed integers, whose largest is exact in any order. Those of
//! non-negative numbers order as they are, those of negative ones by magnitude; NaNs lie beyond infinity
//! in both.

use super::tile::{Element, NAN};

/// The smallest and largest value of a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extremes {
    pub(super) min: f32,
    pub(super) max: f32,
}

impl Extremes {
    /// The largest magnitude of a group whose extremes include zero; NaN if it has any NaN.
    #[inline(always)]
    pub(super) fn magnitude(self) -> f32 {
        let largest = if -self.min > self.max { -self.min } else { self.max };
        // `f32::max` would drop a NaN.
        if self.min.is_nan() | self.max.is_nan() { NAN } else { largest }
    }
}

/// A bit pattern as a signed integer.
pub(super) trait Bits: Copy + Ord + std::fmt::Debug {
    /// The smallest integer.
    const LOWEST: Self;

    /// The largest integer.
    const HIGHEST: Self;

    /// That of the number zero.
    const ZERO: Self;

    /// With the other sign: then those of negative numbers are the largest, and order by magnitude.
    fn negated(self) -> Self;

    /// Orders as the number does. Its own inverse.
    fn ordered(self) -> Self;

    /// Without its sign.
    fn magnitude(self) -> Self;
}

macro_rules! bits {
    ($int:ty) => {
        impl Bits for $int {
            const LOWEST: Self = Self::MIN;
            const HIGHEST: Self = Self::MAX;
            const ZERO: Self = 0;

            #[inline(always)]
            fn negated(self) -> Self {
                self ^ Self::MIN
            }

            #[inline(always)]
            fn ordered(self) -> Self {
                self ^ ((self >> (Self::BITS - 1)) & Self::MAX)
            }

            #[inline(always)]
            fn magnitude(self) -> Self {
                self & Self::MAX
            }
        }
    };
}

bits!(i16);
bits!(i32);

/// `f(group)`, of a length that the compiler knows if it is one of the usual ones: a loop over many
/// lanes at a time would leave short groups to the loop for what remains.
#[inline(always)]
fn of_known_length<R, T>(group: &[R], f: impl Fn(&[R]) -> T) -> T {
    match group.len() {
        16 => f(&group[..16]),
        32 => f(&group[..32]),
        64 => f(&group[..64]),
        _ => f(group),
    }
}

/// Extremes as bit patterns, which for all groups of a row are faster converted together.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExtremeBits<B> {
    min: B,
    max: B,
}

impl<B: Bits> ExtremeBits<B> {
    pub(super) const ZERO: Self = Self { min: B::ZERO, max: B::ZERO };

    #[inline(always)]
    pub(super) fn values<E: Element<Bits = B>>(self) -> Extremes {
        Extremes { min: E::value(self.min), max: E::value(self.max) }
    }
}

/// The extremes of a group and zero. NaN for one of them if the group has a NaN of that sign.
#[inline(always)]
pub(super) fn extremes<E: Element>(group: &[E::Raw]) -> ExtremeBits<E::Bits> {
    of_known_length(group, |group| {
        let bits = || group.iter().map(|&raw| E::bits(raw));
        let min = bits().map(Bits::negated).fold(E::Bits::ZERO, Ord::max);
        ExtremeBits { min: min.negated(), max: bits().fold(E::Bits::ZERO, Ord::max) }
    })
}

/// The extremes of a group that has any weight. NaN for one of them if the group has a NaN of that
/// sign.
#[inline(always)]
pub(super) fn range<E: Element>(group: &[E::Raw]) -> ExtremeBits<E::Bits> {
    let extremes = extremes::<E>(group);
    if extremes.min == E::Bits::ZERO.negated() || extremes.max == E::Bits::ZERO {
        range_of_one_sign::<E>(group)
    } else {
        extremes
    }
}

/// As [`range`], of any group. Few have weights of one sign alone.
#[cold]
fn range_of_one_sign<E: Element>(group: &[E::Raw]) -> ExtremeBits<E::Bits> {
    let keys = || group.iter().map(|&raw| E::bits(raw).ordered());
    let min = keys().fold(E::Bits::HIGHEST, Ord::min);
    let max = keys().fold(E::Bits::LOWEST, Ord::max);
    ExtremeBits { min: min.ordered(), max: max.ordered() }
}

/// The largest magnitude of a group; NaN if it has any NaN, 0 if it is empty.
#[inline(always)]
pub(super) fn magnitude<E: Element>(group: &[E::Raw]) -> f32 {
    E::value(group.iter().map(|&raw| E::bits(raw).magnitude()).fold(E::Bits::ZERO, Ord::max))
}

/// As [`magnitude`].
#[inline(always)]
pub(super) fn short_magnitude<E: Element>(group: &[E::Raw]) -> f32 {
    of_known_length(group, magnitude::<E>)
}

#[cfg(test)]
mod tests {
    use super::super::tile::{Bf16, F32};
    use super::*;

    #[test]
    fn extremes_include_zero_and_let_no_nan_pass() {
        let inf = f32::INFINITY;
        let cases: [(&[f32], f32, f32); 6] = [
            (&[1.0, 2.0, 0.5], 0.0, 2.0),
            (&[-1.0, -0.25], -1.0, 0.0),
            (&[-3.0, 0.0, 2.0, -0.0], -3.0, 2.0),
            (&[inf, -1.0], -1.0, inf),
            (&[0.0, -0.0], 0.0, 0.0),
            (&[-inf, 5.0], -inf, 5.0),
        ];
        let raw = |xs: &[f32]| xs.iter().map(|x| x.to_le_bytes()).collect::<Vec<_>>();
        let raw_bf16 = |xs: &[f32]| -> Vec<[u8; 2]> {
            xs.iter().map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect()
        };
        for (xs, min, max) in cases {
            for e in [
                extremes::<F32>(&raw(xs)).values::<F32>(),
                extremes::<Bf16>(&raw_bf16(xs)).values::<Bf16>(),
            ] {
                assert_eq!((e.min, e.max), (min, max));
                assert_eq!(e.magnitude(), f32::max(-min, max));
            }
            let largest = xs.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let smallest = xs.iter().fold(f32::INFINITY, |m, &x| m.min(x));
            for e in [
                range::<F32>(&raw(xs)).values::<F32>(),
                range::<Bf16>(&raw_bf16(xs)).values::<Bf16>(),
            ] {
                assert_eq!((e.min, e.max), (smallest, largest));
            }
            assert_eq!(magnitude::<F32>(&raw(xs)), f32::max(-min, max));
            assert_eq!(magnitude::<Bf16>(&raw_bf16(xs)), f32::max(-min, max));
        }
        for nan in [f32::NAN, -f32::NAN] {
            for other in [inf, -inf, 1.0] {
                assert!(extremes::<F32>(&raw(&[other, nan])).values::<F32>().magnitude().is_nan());
                assert!(
                    extremes::<Bf16>(&raw_bf16(&[nan, other]))
                        .values::<Bf16>()
                        .magnitude()
                        .is_nan()
                );
                assert!(magnitude::<F32>(&raw(&[other, nan])).is_nan());
                assert!(magnitude::<Bf16>(&raw_bf16(&[nan, other])).is_nan());
                let e = range::<Bf16>(&raw_bf16(&[nan, other])).values::<Bf16>();
                assert!(e.min.is_nan() || e.max.is_nan());
                let e = range::<F32>(&raw(&[other, nan])).values::<F32>();
                assert!(e.min.is_nan() || e.max.is_nan());
            }
        }
    }
}
