//! Ranks of weights of 16 bits among a table's midpoints, by their bit patterns.
//!
//! Patterns are compared twice as many at a time as numbers, and nothing is multiplied.
//! What a weight is multiplied with is the same for all of a group, and products rise with weights. So
//! those beyond a midpoint are the weights beyond a threshold: the bit pattern of `midpoint * scale`
//! rounded to nearest, or the one before, which its product tells.

use super::extremes::Bits;
use super::tile::Element;

/// A threshold for each midpoint of a table of `N` entries, and an unused one.
pub(super) type Thresholds<const N: usize> = [i32; N];

/// The midpoints of a table of `N` entries, as [`Limits::thresholds`] needs them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits<const N: usize> {
    /// The largest magnitude of products that are not beyond a midpoint, or of those that are beyond
    /// a negative one.
    magnitudes: [f32; N],
    /// All ones where the midpoint is negative.
    negative: [i32; N],
}

impl<const N: usize> Limits<N> {
    /// Of midpoints that rise, and belong to the entry below.
    pub(super) const fn below(midpoints: &[f32]) -> Self {
        let (mut magnitudes, mut negative) = ([1.0; N], [0; N]);
        let mut i = 0;
        while i < midpoints.len() {
            let midpoint = midpoints[i];
            (magnitudes[i], negative[i]) =
                if midpoint < 0.0 { ((-midpoint).next_down(), -1) } else { (midpoint, 0) };
            i += 1;
        }
        Self { magnitudes, negative }
    }

    /// Of midpoints that rise and are positive, and belong to the even one of their entries.
    pub(super) const fn even(midpoints: &[f32]) -> Self {
        let mut limits = Self::below(midpoints);
        let mut i = 1;
        while i < midpoints.len() {
            limits.magnitudes[i] = midpoints[i].next_down();
            i += 2;
        }
        limits
    }

    /// The thresholds of a group with a scale: a weight of 16 bits is beyond those whose midpoint is less
    /// than its `product`, about that with one over the scale. Any numbers, if the scale is none.
    #[inline(always)]
    pub(super) fn thresholds<E: Element>(
        &self,
        scale: f32,
        product: impl Fn(f32) -> f32,
    ) -> Thresholds<N> {
        let mut out = [0; N];
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.threshold::<E>(i, scale, &product);
        }
        out
    }

    /// One of them.
    #[inline(always)]
    pub(super) fn threshold<E: Element>(
        &self,
        i: usize,
        scale: f32,
        product: impl Fn(f32) -> f32,
    ) -> i32 {
        let (limit, negative) = (self.magnitudes[i], self.negative[i]);
        let near = E::near(limit * scale);
        let is_over = product(E::value(E::Bits::low(near))) > limit;
        let last = near.cast_signed() - i32::from(is_over);
        // Of a negative midpoint what is over it is beyond, in integers that order as numbers.
        (last ^ negative) + negative
    }

    /// One of them for magnitudes with the sign as their last bit, as [`ranks_of_either_sign`] compares them:
    /// a midpoint that is the product with a negative weight belongs to the larger magnitude.
    #[inline(always)]
    pub(super) fn threshold_of_either_sign<E: Element>(
        &self,
        i: usize,
        scale: f32,
        product: impl Fn(f32) -> f32,
    ) -> i32 {
        let limit = self.magnitudes[i];
        let near = E::near(limit * scale);
        let product = product(E::value(E::Bits::low(near)));
        // Of the last pattern that isn't beyond, the larger key; the smaller one if its product is the midpoint.
        let key =
            2 * near.cast_signed() + 1 - i32::from(product >= limit) - i32::from(product > limit);
        key ^ i32::from(i16::MIN)
    }
}

/// Whether a pattern is beyond a threshold, as a number.
#[inline(always)]
fn is_beyond<B: Bits>(bits: B, threshold: i32) -> u16 {
    u16::from(bits > B::low(threshold.cast_unsigned()))
}

/// How many of fifteen midpoints are less than the product with each of so many weights of 16 bits.
#[inline(always)]
pub(super) fn ranks<E: Element, const LEN: usize>(
    thresholds: &Thresholds<16>,
    raw: &[E::Raw; LEN],
) -> [u16; LEN] {
    let mut ranks = [0; LEN];
    // Which of the two is faster depends on how many weights there are.
    if LEN > 32 {
        let bits = raw.map(|raw| E::bits(raw).ordered());
        for threshold in &thresholds[..15] {
            for (rank, bits) in ranks.iter_mut().zip(bits) {
                *rank += is_beyond(bits, *threshold);
            }
        }
        return ranks;
    }
    // Half of them are compared, after the middle one. Values, or it would select where they lie in memory.
    let middle = thresholds[7];
    let (mut lower, mut upper) = ([E::Bits::ZERO; 7], [E::Bits::ZERO; 7]);
    for i in 0..7 {
        lower[i] = E::Bits::low(thresholds[i].cast_unsigned());
        upper[i] = E::Bits::low(thresholds[8 + i].cast_unsigned());
    }
    for (rank, &raw) in ranks.iter_mut().zip(raw) {
        let bits = E::bits(raw).ordered();
        let is_upper = is_beyond(bits, middle) == 1;
        *rank = if is_upper { 8 } else { 0 };
        for (lower, upper) in lower.iter().zip(&upper) {
            *rank += u16::from(bits > if is_upper { *upper } else { *lower });
        }
    }
    ranks
}

/// How many of positive midpoints are less than the magnitude of the product with each of so many weights of
/// 16 bits, or equal to it where the weight is negative. Given are [`Limits::threshold_of_either_sign`].
#[inline(always)]
pub(super) fn ranks_of_either_sign<E: Element, const LEN: usize>(
    thresholds: &[i32],
    raw: &[E::Raw; LEN],
) -> [u16; LEN] {
    let mut ranks = [0; LEN];
    for (rank, &raw) in ranks.iter_mut().zip(raw) {
        let key = E::short(raw).rotate_left(1) ^ i16::MIN;
        for threshold in thresholds {
            *rank += is_beyond(key, *threshold);
        }
    }
    ranks
}

/// What `code` makes of the weights of several groups of 16 bits, and of how many midpoints are less than
/// the product with their magnitudes. Given for each midpoint are the thresholds of all groups.
#[inline(always)]
pub(super) fn by_magnitude<E: Element, const N: usize, const LEN: usize, const COUNT: usize>(
    thresholds: [&[i32; COUNT]; N],
    groups: &[[E::Raw; LEN]; COUNT],
    code: impl Fn(E::Bits, u16) -> u16,
) -> [[u16; LEN]; COUNT] {
    let mut codes = [[0; LEN]; COUNT];
    for i in 0..LEN {
        for g in 0..COUNT {
            let bits = E::bits(groups[g][i]);
            let mut rank = 0;
            for threshold in thresholds {
                rank += is_beyond(bits.magnitude(), threshold[g]);
            }
            codes[g][i] = code(bits, rank);
        }
    }
    codes
}
