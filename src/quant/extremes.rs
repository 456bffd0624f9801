//! The smallest and largest weights of groups.
//!
//! Found among the bit patterns as integers, whose largest is exact in any order: the largest weight has the
//! largest with a sign, the smallest the largest without one. Those of non-negative numbers order as they are,
//! those of negative ones by magnitude; NaNs lie beyond infinity in both.

use super::isa::prefetch;
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
    /// An integer as large.
    type Reversed: Copy + Ord + std::fmt::Debug;

    /// The smallest integer.
    const LOWEST: Self;

    /// The largest integer.
    const HIGHEST: Self;

    /// That of the number zero.
    const ZERO: Self;

    /// Those of negative numbers become the largest, and order by magnitude.
    fn reversed(self) -> Self::Reversed;

    /// What was reversed.
    fn restored(reversed: Self::Reversed) -> Self;

    /// Orders as the number does. Its own inverse.
    fn ordered(self) -> Self;

    /// Without its sign.
    fn magnitude(self) -> Self;

    /// Of a pattern in 32 bits.
    fn low(bits: u32) -> Self;
}

macro_rules! bits {
    ($int:ty, $reversed:ty, $reverse:expr, $restore:expr) => {
        impl Bits for $int {
            type Reversed = $reversed;

            const LOWEST: Self = Self::MIN;
            const HIGHEST: Self = Self::MAX;
            const ZERO: Self = 0;

            #[inline(always)]
            fn reversed(self) -> $reversed {
                $reverse(self)
            }

            #[inline(always)]
            fn restored(reversed: $reversed) -> Self {
                $restore(reversed)
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

bits!(i16, u16, i16::cast_unsigned, u16::cast_signed);
// x86-64's baseline compares no integers of 32 bits without a sign.
bits!(i32, i32, |bits| bits ^ i32::MIN, |bits| bits ^ i32::MIN);

/// Extremes as bit patterns.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExtremeBits<B> {
    min: B,
    max: B,
}

impl<B: Bits> ExtremeBits<B> {
    #[inline(always)]
    pub(super) fn values<E: Element<Bits = B>>(self) -> Extremes {
        Extremes { min: E::value(self.min), max: E::value(self.max) }
    }

    /// Whether one of them is the zero that is among the extremes.
    #[inline(always)]
    fn is_of_one_sign(self) -> bool {
        self.min == B::LOWEST || self.max == B::ZERO
    }
}

/// The extremes of a group and zero. NaN for one of them if the group has a NaN of that sign.
#[inline(always)]
pub(super) fn extremes<E: Element>(group: &[E::Raw]) -> ExtremeBits<E::Bits> {
    let zero = (E::Bits::LOWEST.reversed(), E::Bits::ZERO);
    let bits = group.iter().map(|&raw| E::bits(raw));
    let (low, max) = bits.fold(zero, |(low, max), bits| (low.max(bits.reversed()), max.max(bits)));
    ExtremeBits { min: E::Bits::restored(low), max }
}

/// The same of a group that has any weight, without zero.
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

/// The extremes of a row's groups, the smallest ones and the largest: many are faster converted together.
#[derive(Debug)]
pub(super) struct GroupExtremes<B: Bits> {
    /// Weights of a group.
    len: usize,
    mins: Vec<B::Reversed>,
    maxs: Vec<B>,
}

impl<B: Bits> GroupExtremes<B> {
    /// For groups of `len` weights, in rows of `cols`.
    pub(super) fn new(len: usize, cols: usize) -> Self {
        let groups = cols / len;
        Self { len, mins: vec![B::LOWEST.reversed(); groups], maxs: vec![B::ZERO; groups] }
    }

    /// Finds the extremes of each group and zero, as [`extremes`] does.
    #[inline(always)]
    pub(super) fn find<E: Element<Bits = B>>(&mut self, row: &[E::Raw]) {
        match self.len {
            16 => self.find_in_arrays::<E, 16>(row),
            32 => self.find_in_arrays::<E, 32>(row),
            64 => self.find_in_arrays::<E, 64>(row),
            128 => self.find_in_arrays::<E, 128>(row),
            len => {
                let out = self.mins.iter_mut().zip(&mut self.maxs);
                for (group, (low, high)) in row.chunks_exact(len).zip(out) {
                    let ExtremeBits { min, max } = extremes::<E>(group);
                    (*low, *high) = (min.reversed(), max);
                }
            }
        }
    }

    #[inline(always)]
    fn find_in_arrays<E: Element<Bits = B>, const LEN: usize>(&mut self, row: &[E::Raw]) {
        let Self { mins, maxs, .. } = self;
        let (groups, _) = row.as_chunks::<LEN>();
        let reversed = |raw| E::bits(raw).reversed();
        if E::SIZE == 2 {
            for (group, (min, max)) in groups.iter().zip(mins.iter_mut().zip(&mut *maxs)) {
                // As in `largest_of_arrays`.
                prefetch(group);
                // Both before either is stored, for the weights to be read once.
                let smallest = largest(group, B::ZERO.reversed(), reversed);
                let largest = largest(group, B::LOWEST, E::bits);
                (*min, *max) = (smallest, largest);
            }
        } else {
            // In 32 bits compilers don't see, of both together, that many lanes would do.
            largest_of_arrays(groups, mins, B::ZERO.reversed(), reversed);
            largest_of_arrays(groups, maxs, B::LOWEST, E::bits);
        }
        for (min, max) in mins.iter_mut().zip(maxs) {
            (*min, *max) = ((*min).max(B::LOWEST.reversed()), (*max).max(B::ZERO));
        }
    }

    /// Finds those of each group alone, as [`range`] does.
    #[inline(always)]
    pub(super) fn find_ranges<E: Element<Bits = B>>(&mut self, row: &[E::Raw]) {
        self.find::<E>(row);
        let out = self.mins.iter_mut().zip(&mut self.maxs);
        for (group, (low, high)) in row.chunks_exact(self.len).zip(out) {
            if (ExtremeBits { min: B::restored(*low), max: *high }).is_of_one_sign() {
                let ExtremeBits { min, max } = range_of_one_sign::<E>(group);
                (*low, *high) = (min.reversed(), max);
            }
        }
    }

    /// What was found of each group.
    #[inline(always)]
    pub(super) fn iter(&self) -> impl Iterator<Item = ExtremeBits<B>> {
        let found = self.mins.iter().zip(&self.maxs);
        found.map(|(&min, &max)| ExtremeBits { min: B::restored(min), max })
    }
}

/// The largest magnitude of a group; NaN if it has any NaN, 0 if it is empty.
#[inline(always)]
pub(super) fn magnitude<E: Element>(group: &[E::Raw]) -> f32 {
    E::value(magnitude_bits::<E>(group))
}

#[inline(always)]
fn magnitude_bits<E: Element>(group: &[E::Raw]) -> E::Bits {
    largest(group, E::Bits::ZERO, |raw| E::bits(raw).magnitude())
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
    match len {
        16 => magnitudes_of_arrays::<E, 16>(row, bits),
        32 => magnitudes_of_arrays::<E, 32>(row, bits),
        64 => magnitudes_of_arrays::<E, 64>(row, bits),
        128 => magnitudes_of_arrays::<E, 128>(row, bits),
        _ => {
            for (group, bits) in row.chunks(len).zip(&mut *bits) {
                *bits = magnitude_bits::<E>(group);
            }
        }
    }
    for (out, bits) in out.iter_mut().zip(bits) {
        *out = E::value(*bits);
    }
}

#[inline(always)]
fn magnitudes_of_arrays<E: Element, const LEN: usize>(row: &[E::Raw], out: &mut [E::Bits]) {
    let (groups, short) = row.as_chunks::<LEN>();
    largest_of_arrays(groups, out, E::Bits::ZERO, |raw| E::bits(raw).magnitude());
    if !short.is_empty() {
        out[groups.len()] = magnitude_bits::<E>(short);
    }
}

/// The largest key of each group. None is smaller than `least`.
#[inline(always)]
fn largest_of_arrays<R: Copy, T: Copy + Ord, const LEN: usize>(
    groups: &[[R; LEN]],
    out: &mut [T],
    least: T,
    key: impl Fn(R) -> T + Copy,
) {
    for (group, out) in groups.iter().zip(out) {
        // Compilers leave a loop with a fetch as it is, one group after the other. Else some would do several
        // at a time, gathering their weights one by one.
        prefetch(group);
        *out = largest(group, least, key);
    }
}

#[inline(always)]
fn largest<R: Copy, T: Copy + Ord>(group: &[R], least: T, key: impl Fn(R) -> T) -> T {
    group.iter().map(|&raw| key(raw)).fold(least, T::max)
}

#[cfg(test)]
mod tests {
    use super::super::tile::{Bf16, F16, F32};
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

    /// What is found of all groups of a row is what is found of each, of any length and in any type.
    #[track_caller]
    fn check_groups<E: Element>(row: &[E::Raw], len: usize) {
        let bits = |e: Extremes| (e.min.to_bits(), e.max.to_bits());
        let mut found = GroupExtremes::<E::Bits>::new(len, row.len());
        let groups = || row.chunks(len);
        found.find::<E>(row);
        for (found, group) in found.iter().zip(groups()) {
            assert_eq!(
                bits(found.values::<E>()),
                bits(extremes::<E>(group).values::<E>()),
                "{len}"
            );
        }
        found.find_ranges::<E>(row);
        for (found, group) in found.iter().zip(groups()) {
            assert_eq!(bits(found.values::<E>()), bits(range::<E>(group).values::<E>()), "{len}");
        }
        let short = &row[..row.len() - len / 2];
        let count = short.len().div_ceil(len);
        let mut magnitudes = vec![0.0; count];
        magnitudes_of_groups::<E>(short, len, &mut vec![E::Bits::ZERO; count], &mut magnitudes);
        for (found, group) in magnitudes.into_iter().zip(short.chunks(len)) {
            assert_eq!(found.to_bits(), magnitude::<E>(group).to_bits(), "{len}");
        }
    }

    #[test]
    fn groups_of_a_row_have_the_extremes_of_each() {
        // All patterns of 16 bits, of numbers or not, and as many longer ones; then groups of one sign.
        let words: Vec<u16> = (0..=u16::MAX).map(|i| i.wrapping_mul(40503)).collect();
        let one_sign = |sign: u16| words.iter().map(move |word| word & 0x7fff | sign);
        let all: Vec<u16> =
            words.iter().copied().chain(one_sign(0)).chain(one_sign(0x8000)).collect();
        let short: Vec<[u8; 2]> = all.iter().map(|word| word.to_le_bytes()).collect();
        let long: Vec<[u8; 4]> = all
            .iter()
            .map(|&word| (u32::from(word) << 16 | u32::from(word.reverse_bits())).to_le_bytes())
            .collect();
        for len in [8, 16, 32, 64, 128, 256] {
            check_groups::<Bf16>(&short, len);
            check_groups::<F16>(&short, len);
            check_groups::<F32>(&long, len);
        }
    }
}
