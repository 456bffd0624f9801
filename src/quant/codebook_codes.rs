//! The codes of a table's entries, for blocks whose scales are known.

use super::chunks::Rows;
use super::codebook::Codebook;
use super::extremes::Bits;
use super::isa::prefetch;
use super::thresholds::{Limits, Thresholds, ranks, ranks_of_either_sign};
use super::tile::Element;

/// Scales for which no midpoint but zero is next to a weight that is subnormal in bfloat16, and no
/// product of a weight rounds to zero.
const USUAL: std::ops::RangeInclusive<f32> = f32::from_bits(27 << 23)..=f32::from_bits(142 << 23);

/// How ranks are found, with constants: selected from memory they are for one weight at a time.
trait Ranking {
    /// How many midpoints are less than `y`.
    fn rank(y: f32) -> u32;

    /// For weights of 16 bits in a block of that scale, a usual one.
    fn thresholds<E: Element>(scale: f32) -> Thresholds<16>;

    /// The ranks of weights of 16 bits.
    fn ranks<E: Element, const LEN: usize>(
        thresholds: &Thresholds<16>,
        raw: &[E::Raw; LEN],
    ) -> [u16; LEN];
}

/// Of [`Codebook::Nf4`].
enum Nf4 {}

impl Nf4 {
    const MIDPOINTS: [f32; 15] = Codebook::Nf4.staircase().midpoints;
    const LIMITS: Limits<16> = Limits::below(&Self::MIDPOINTS);
}

impl Ranking for Nf4 {
    #[inline(always)]
    fn rank(y: f32) -> u32 {
        // Half of them are compared, after the middle one, for the compiler to do many weights at a time.
        let m = &Self::MIDPOINTS;
        let is_upper = y > m[7];
        let beyond = |lower: f32, upper: f32| u32::from(y > if is_upper { upper } else { lower });
        let first = if is_upper { 8 } else { 0 };
        let last =
            beyond(m[0], m[8]) + beyond(m[1], m[9]) + beyond(m[2], m[10]) + beyond(m[3], m[11]);
        first + last + beyond(m[4], m[12]) + beyond(m[5], m[13]) + beyond(m[6], m[14])
    }

    #[inline(always)]
    fn thresholds<E: Element>(scale: f32) -> Thresholds<16> {
        let reciprocal = reciprocal(scale);
        Self::LIMITS.thresholds::<E>(scale, |x| x * reciprocal)
    }

    #[inline(always)]
    fn ranks<E: Element, const LEN: usize>(
        thresholds: &Thresholds<16>,
        raw: &[E::Raw; LEN],
    ) -> [u16; LEN] {
        ranks::<E, LEN>(thresholds, raw)
    }
}

/// Of [`Codebook::Fp4`], whose midpoints are the same on both sides of zero.
enum Fp4 {}

impl Fp4 {
    /// The positive ones.
    const MIDPOINTS: [f32; 7] = {
        let all = Codebook::Fp4.staircase().midpoints;
        let mut positive = [0.0; 7];
        let mut i = 0;
        while i < 7 {
            positive[i] = all[8 + i];
            i += 1;
        }
        positive
    };

    const LIMITS: Limits<16> = Limits::below(&Self::MIDPOINTS);
}

impl Ranking for Fp4 {
    #[inline(always)]
    fn rank(y: f32) -> u32 {
        // A midpoint belongs to the larger magnitude where it is negative.
        let bits = y.to_bits();
        let key = ((bits & (u32::MAX >> 1)) + (bits >> 31)).cast_signed();
        let is_beyond = |midpoint: f32| key > midpoint.to_bits().cast_signed();
        let m = &Self::MIDPOINTS;
        let a = is_beyond(m[3]);
        let b = is_beyond(if a { m[5] } else { m[1] });
        let (low, high) = (if a { m[4] } else { m[0] }, if a { m[6] } else { m[2] });
        let c = is_beyond(if b { high } else { low });
        let bit = |set: bool, value: u32| if set { value } else { 0 };
        let flip = if y > 0.0 { 0 } else { 15 };
        (8 + bit(a, 4) + bit(b, 2) + bit(c, 1)) ^ flip
    }

    #[inline(always)]
    fn thresholds<E: Element>(scale: f32) -> Thresholds<16> {
        let reciprocal = reciprocal(scale);
        let mut out = [0; 16];
        // More than are used, for a loop that the compiler does many at a time of, of any element type.
        for (i, out) in out.iter_mut().enumerate() {
            *out = Self::LIMITS.threshold_of_either_sign::<E>(i, scale, |x| x * reciprocal);
        }
        out
    }

    #[inline(always)]
    fn ranks<E: Element, const LEN: usize>(
        thresholds: &Thresholds<16>,
        raw: &[E::Raw; LEN],
    ) -> [u16; LEN] {
        let mut out = ranks_of_either_sign::<E, LEN>(&thresholds[..7], raw);
        for (rank, &raw) in out.iter_mut().zip(raw) {
            let flip = if E::bits(raw) > E::Bits::ZERO { 0 } else { 15 };
            *rank = (8 + *rank) ^ flip;
        }
        out
    }
}

/// Encodes runs of blocks.
pub(super) struct Encoder {
    codebook: Codebook,
    block: usize,
    /// One over the scale of each chunk of a run.
    reciprocals: Vec<f32>,
    /// Of each chunk of a run.
    thresholds: Vec<Thresholds<16>>,
    /// The ranks of a run, in lanes as wide as those that they are found in: every outcome of a
    /// comparison would be narrowed by itself.
    short: Vec<u16>,
    wide: Vec<u32>,
}

impl Encoder {
    /// For runs of at most so many blocks.
    pub(super) fn new(codebook: Codebook, block: usize, blocks: usize) -> Self {
        let len = block * blocks;
        Self {
            codebook,
            block,
            reciprocals: vec![0.0; len / 4],
            thresholds: vec![Thresholds::<16>::default(); len / 32],
            short: vec![0; len],
            wide: vec![0; len],
        }
    }

    #[inline(always)]
    pub(super) fn encode<E: Element>(
        &mut self,
        runs: Rows<'_, E::Raw>,
        scales: &[f32],
        packed: &mut [u8],
    ) {
        match self.codebook {
            Codebook::Nf4 => self.rank::<E, Nf4>(runs, scales, packed),
            Codebook::Fp4 => {
                self.rank::<E, Fp4>(runs, scales, packed);
                for packed in &mut *packed {
                    *packed = fp4_of_ranks(*packed);
                }
                for (packed, scale) in packed.chunks_mut(self.block / 2).zip(scales) {
                    // Products with one over such a scale are zeros and NaNs.
                    if !scale.is_finite() {
                        packed.fill(0);
                    }
                }
            }
        }
    }

    /// Packs how many midpoints are less than each of a run, over its block's scale.
    #[inline(always)]
    fn rank<E: Element, T: Ranking>(
        &mut self,
        runs: Rows<'_, E::Raw>,
        scales: &[f32],
        packed: &mut [u8],
    ) {
        let is_usual = scales.iter().fold(true, |all, scale| all & USUAL.contains(scale));
        if E::SIZE == 2 && is_usual && self.block.is_multiple_of(64) {
            self.rank_by_thresholds::<E, T, 64>(runs, scales, packed);
        } else if E::SIZE == 2 && is_usual && self.block.is_multiple_of(32) {
            self.rank_by_thresholds::<E, T, 32>(runs, scales, packed);
        } else if self.block.is_multiple_of(32) {
            self.rank_by_products::<E, T, 32>(runs, scales, packed);
        } else {
            self.rank_by_products::<E, T, 4>(runs, scales, packed);
        }
    }

    /// As [`Self::rank`], of weights of 16 bits with usual scales, in chunks of `N`, of which a block is a
    /// multiple: a block is too short for a loop of its own.
    #[inline(always)]
    fn rank_by_thresholds<E: Element, T: Ranking, const N: usize>(
        &mut self,
        Rows { row, next }: Rows<'_, E::Raw>,
        scales: &[f32],
        packed: &mut [u8],
    ) {
        fill(&mut self.thresholds, self.block / N, scales, T::thresholds::<E>);
        let (chunks, rest) = row.as_chunks::<N>();
        let sources = chunks.iter().zip(next.as_chunks::<N>().0);
        let outs = self.short.as_chunks_mut::<N>().0.iter_mut().zip(&self.thresholds);
        for ((chunk, next), (out, thresholds)) in sources.zip(outs) {
            prefetch(next);
            *out = T::ranks::<E, N>(thresholds, chunk);
        }
        let last = &self.thresholds[row.len().div_ceil(N) - 1];
        for (out, raw) in self.short[chunks.len() * N..].iter_mut().zip(rest) {
            [*out] = T::ranks::<E, 1>(last, std::array::from_ref(raw));
        }
        for (byte, &[first, second]) in packed.iter_mut().zip(self.short.as_chunks::<2>().0) {
            // A lane of 32 bits, as they lie.
            let pair = u32::from(first) | u32::from(second) << 16;
            *byte = (pair << 4 | pair >> 16) as u8;
        }
    }

    /// As [`Self::rank`], likewise. No need to clamp: beyond the last midpoint all is the last entry. A NaN
    /// is beyond none.
    #[inline(always)]
    fn rank_by_products<E: Element, T: Ranking, const N: usize>(
        &mut self,
        Rows { row, next }: Rows<'_, E::Raw>,
        scales: &[f32],
        packed: &mut [u8],
    ) {
        fill(&mut self.reciprocals, self.block / N, scales, reciprocal);
        let rank = |raw, reciprocal| T::rank(E::widen(raw) * reciprocal);
        let (chunks, rest) = row.as_chunks::<N>();
        let sources = chunks.iter().zip(next.as_chunks::<N>().0);
        let outs = self.wide.as_chunks_mut::<N>().0.iter_mut().zip(&self.reciprocals);
        for ((chunk, next), (out, &reciprocal)) in sources.zip(outs) {
            if size_of_val(next) >= 64 {
                prefetch(next);
            }
            for (out, &raw) in out.iter_mut().zip(chunk) {
                *out = rank(raw, reciprocal);
            }
        }
        let last = self.reciprocals[row.len().div_ceil(N) - 1];
        for (out, &raw) in self.wide[chunks.len() * N..].iter_mut().zip(rest) {
            *out = rank(raw, last);
        }
        for (byte, [first, second]) in packed.iter_mut().zip(self.wide.as_chunks::<2>().0) {
            *byte = (*first << 4 | *second) as u8;
        }
    }
}

/// What weights of a block are multiplied with.
#[inline(always)]
fn reciprocal(scale: f32) -> f32 {
    1.0 / if scale < 1e-38 { 1e-38 } else { scale }
}

/// Fills in what so many chunks of each block have in common.
#[inline(always)]
fn fill<P: Copy>(chunks: &mut [P], of_block: usize, scales: &[f32], common: impl Fn(f32) -> P) {
    if of_block == 1 {
        for (chunk, &scale) in chunks.iter_mut().zip(scales) {
            *chunk = common(scale);
        }
    } else {
        for (chunks, &scale) in chunks.chunks_mut(of_block).zip(scales) {
            chunks.fill(common(scale));
        }
    }
}

/// A pair of FP4's codes by their ranks, in the order of [`Codebook::order`].
#[inline(always)]
const fn fp4_of_ranks(ranks: u8) -> u8 {
    // Each step in both halves of the byte.
    let negative = !ranks & 0x88;
    // The eight negative ranks fall as magnitudes rise.
    let magnitude = (ranks & 0x77) ^ (negative - (negative >> 3));
    let is_zero = !(magnitude + 0x77) & 0x88;
    // The magnitudes rise in the order of codes 0, 1, 6, 7, 4, 5, 2, 3. Of the zeros, the lower is 0.
    (magnitude ^ (magnitude & 0x22) << 1) | (negative ^ is_zero)
}

#[cfg(test)]
mod tests {
    use super::super::tile::{Bf16, F16};
    use super::*;

    /// The rank by definition: each midpoint in turn.
    fn naive(codebook: Codebook, y: f32) -> u32 {
        let midpoints = codebook.staircase().midpoints;
        midpoints.iter().filter(|midpoint| **midpoint < y).count() as u32
    }

    #[test]
    fn ranks_next_to_midpoints_and_at_the_ends_of_the_scale_are_as_defined() {
        let ends = [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 1.0, 1.001, f32::MAX, f32::INFINITY];
        let nf4 = (Codebook::Nf4, Nf4::rank as fn(f32) -> u32);
        for (codebook, rank) in [nf4, (Codebook::Fp4, Fp4::rank)] {
            let midpoints = codebook.staircase().midpoints.into_iter();
            let near = midpoints.flat_map(|m| [m.next_down(), m, m.next_up()]);
            let grid = (0..=1 << 14).map(|i| i as f32 / 16384.0);
            for y in near.chain(ends).chain(grid).flat_map(|y| [y, -y]) {
                assert_eq!(rank(y), naive(codebook, y), "{codebook:?} of {y:e}");
            }
        }
    }

    #[test]
    fn codes_of_ranks_are_in_the_order_of_entries() {
        let order = Codebook::Fp4.order();
        for ranks in 0..=u8::MAX {
            let [first, second] = [ranks >> 4, ranks & 15].map(|rank| order[usize::from(rank)]);
            assert_eq!(fp4_of_ranks(ranks), first << 4 | second);
        }
    }

    /// All weights, with scales of every significand that weights have, and others.
    fn check_thresholds<E: Element<Raw = [u8; 2]>, T: Ranking>() {
        let significands = (0..1u32 << 7).map(|i| i << 16);
        let significands = significands.chain([1, 0x2a_aaab, 0x55_5555, 0x7f_ffff]);
        for (i, significand) in significands.enumerate() {
            // From the smallest to the largest that is usual.
            let exponent = 27 + (i as u32 * 37) % 115;
            let scale = f32::from_bits(exponent << 23 | significand);
            let reciprocal = reciprocal(scale);
            assert!(USUAL.contains(&scale));
            let thresholds = T::thresholds::<E>(scale);
            for first in (0..=u16::MAX).step_by(64) {
                let raw: [_; 64] = std::array::from_fn(|i| (first + i as u16).to_le_bytes());
                let found = T::ranks::<E, 64>(&thresholds, &raw);
                for (raw, found) in raw.into_iter().zip(found) {
                    assert_eq!(
                        [found],
                        T::ranks::<E, 1>(&thresholds, &[raw]),
                        "{raw:?}, {scale:e}"
                    );
                    let y = E::widen(raw) * reciprocal;
                    if !y.is_nan() {
                        assert_eq!(u32::from(found), T::rank(y), "{y:e}, {scale:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn ranks_by_thresholds_are_those_of_products() {
        check_thresholds::<Bf16, Nf4>();
        check_thresholds::<Bf16, Fp4>();
        check_thresholds::<F16, Nf4>();
        check_thresholds::<F16, Fp4>();
    }
}
