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

    /// Of a pattern in 32 bits.
    fn low(bits: u32) -> Self;
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

            #[inline(always)]
            fn low(bits: u32) -> Self {
                bits as Self
            }
        }
    };
}

bits!(i16);
bits!(i32);

/// Extremes as bit patterns, which for all groups of a row are faster converted together.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExtremeBits<B> {
    min: B,
    max: B,
}

impl<B: Bits> ExtremeBits<B> {
    pub(super) const ZERO: Self = Self { min: B::ZERO, max: B::ZERO };

    /// As the extremes of a group are gathered, `min` negated: the largest integer is the smallest number.
    const GATHERED: Self = Self { min: B::ZERO, max: B::ZERO };

    #[inline(always)]
    fn gather(self, bits: B) -> Self {
        Self { min: self.min.max(bits.negated()), max: self.max.max(bits) }
    }

    #[inline(always)]
    fn gathered(self) -> Self {
        Self { min: self.min.negated(), ..self }
    }

    /// Whether one of them is the zero that is among the extremes.
    #[inline(always)]
    fn is_of_one_sign(self) -> bool {
        self.min == B::ZERO.negated() || self.max == B::ZERO
    }

    #[inline(always)]
    pub(super) fn values<E: Element<Bits = B>>(self) -> Extremes {
        Extremes { min: E::value(self.min), max: E::value(self.max) }
    }
}

/// The extremes of a group and zero. NaN for one of them if the group has a NaN of that sign.
#[inline(always)]
pub(super) fn extremes<E: Element>(group: &[E::Raw]) -> ExtremeBits<E::Bits> {
    group.iter().fold(ExtremeBits::GATHERED, |all, &raw| all.gather(E::bits(raw))).gathered()
}

/// The same of each group of `len` weights.
#[inline(always)]
pub(super) fn extremes_of_groups<E: Element>(
    row: &[E::Raw],
    len: usize,
    out: &mut [ExtremeBits<E::Bits>],
) {
    fold_groups(row, len, out, ExtremeBits::GATHERED, |all, raw| all.gather(E::bits(raw)));
    for out in out {
        *out = out.gathered();
    }
}

/// The extremes of each group of `len` weights. NaN for one of them if the group has a NaN of that sign.
#[inline(always)]
pub(super) fn ranges_of_groups<E: Element>(
    row: &[E::Raw],
    len: usize,
    out: &mut [ExtremeBits<E::Bits>],
) {
    extremes_of_groups::<E>(row, len, out);
    for (group, out) in row.chunks_exact(len).zip(out) {
        if out.is_of_one_sign() {
            *out = range_of_one_sign::<E>(group);
        }
    }
}

/// The same of a group that has any weight.
#[inline(always)]
pub(super) fn range<E: Element>(group: &[E::Raw]) -> ExtremeBits<E::Bits> {
    let extremes = extremes::<E>(group);
    if extremes.is_of_one_sign() { range_of_one_sign::<E>(group) } else { extremes }
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

/// The same of each group of `len` weights, the last of which may be shorter. `bits` lends the memory.
#[inline(always)]
pub(super) fn magnitudes_of_groups<E: Element>(
    row: &[E::Raw],
    len: usize,
    bits: &mut [E::Bits],
    out: &mut [f32],
) {
    let bits = &mut bits[..out.len()];
    fold_groups(row, len, bits, E::Bits::ZERO, |all, raw| all.max(E::bits(raw).magnitude()));
    for (out, bits) in out.iter_mut().zip(bits) {
        *out = E::value(*bits);
    }
}

/// Folds each group of `len`, the last of which may be shorter.
#[inline(always)]
fn fold_groups<R: Copy, T: Copy>(
    row: &[R],
    len: usize,
    out: &mut [T],
    none: T,
    fold: impl Fn(T, R) -> T + Copy,
) {
    match len {
        16 => fold_together::<R, T, 16, 8>(row, out, none, fold),
        32 => fold_together::<R, T, 32, 4>(row, out, none, fold),
        64 => fold_together::<R, T, 64, 2>(row, out, none, fold),
        128 => fold_together::<R, T, 128, 1>(row, out, none, fold),
        _ => {
            for (group, out) in row.chunks(len).zip(out) {
                *out = group.iter().copied().fold(none, fold);
            }
        }
    }
}

/// Folds groups of `LEN`, `COUNT` at a time. Of one of the shorter ones at a time compilers unroll the loop,
/// and then don't see that many lanes would do.
#[inline(always)]
fn fold_together<R: Copy, T: Copy, const LEN: usize, const COUNT: usize>(
    row: &[R],
    out: &mut [T],
    none: T,
    fold: impl Fn(T, R) -> T + Copy,
) {
    let (groups, short) = row.as_chunks::<LEN>();
    let (blocks, rest) = groups.as_chunks::<COUNT>();
    let (outs, rest_out) = out.split_at_mut(groups.len() - rest.len());
    for (block, out) in blocks.iter().zip(outs.as_chunks_mut::<COUNT>().0) {
        let mut folded = [none; COUNT];
        for i in 0..LEN {
            for (folded, group) in folded.iter_mut().zip(block) {
                *folded = fold(*folded, group[i]);
            }
        }
        *out = folded;
    }
    let rest = rest.iter().map(|group| &group[..]).chain([short]);
    for (group, out) in rest.zip(rest_out) {
        *out = group.iter().copied().fold(none, fold);
    }
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
