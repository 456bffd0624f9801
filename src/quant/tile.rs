//! Weights as the source stores them, and exact conversion to and from f32.

use crate::dtype::Dtype;

use super::extremes::Bits;
use super::importance::Importance;

/// A floating-point type that weights are stored in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Real {
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
}

impl Real {
    /// That element type, if it is one of the three.
    pub fn new(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// The element type.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }
}

/// Elements as the source stores them: little-endian bytes, no alignment promised.
#[derive(Clone, Copy, Debug)]
pub enum Reals<'a> {
    /// bfloat16: the upper half of an f32.
    Bf16(&'a [u8]),
    /// IEEE 754 binary16.
    F16(&'a [u8]),
    /// IEEE 754 binary32.
    F32(&'a [u8]),
}

impl<'a> Reals<'a> {
    /// `bytes` as elements of `dtype`; `None` if that is not one of the three that schemes encode.
    pub fn new(dtype: Dtype, bytes: &'a [u8]) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::Bf16(bytes)),
            Dtype::F16 => Some(Self::F16(bytes)),
            Dtype::F32 => Some(Self::F32(bytes)),
            _ => None,
        }
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Bf16(bytes) | Self::F16(bytes) | Self::F32(bytes) => bytes,
        }
    }

    /// The elements after the first `bytes` of them.
    pub(super) fn skip(&self, bytes: usize) -> Self {
        match self {
            Self::Bf16(all) => Self::Bf16(&all[bytes..]),
            Self::F16(all) => Self::F16(&all[bytes..]),
            Self::F32(all) => Self::F32(&all[bytes..]),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Bf16(_) => Dtype::BF16,
            Self::F16(_) => Dtype::F16,
            Self::F32(_) => Dtype::F32,
        }
    }
}

/// A rectangle of a row-major weight: `rows` x `cols`, consecutive rows `stride` elements apart.
///
/// `data` starts at the first element; it need not reach beyond the last one.
#[derive(Clone, Copy, Debug)]
pub struct Tile<'a> {
    /// The elements.
    pub data: Reals<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row that belong to the tile.
    pub cols: usize,
    /// Elements from the start of a row to the start of the next.
    pub stride: usize,
    /// What the errors of its elements count for in a search; all the same where `None`.
    pub importance: Option<Importance<'a>>,
}

impl<'a> Tile<'a> {
    /// The `rows` x `cols` elements from a row and a column on, which lie within it.
    pub fn part(&self, (row, col): (usize, usize), (rows, cols): (usize, usize)) -> Self {
        let element = self.data.dtype().bitsize() / 8;
        let data = self.data.skip((row * self.stride + col) * element);
        Self { data, rows, cols, ..*self }
    }
}

/// The NaN that is stored for any NaN.
pub(super) const NAN: f32 = f32::from_bits(0x7fc0_0000);

/// A floating-point type that weights and scales are stored in.
pub(super) trait Element: Copy {
    /// One stored element, little-endian.
    type Raw: Copy;

    /// Its bit pattern.
    type Bits: Bits;

    /// The type of 16 bits that [`Self::short`] gives a pattern of.
    type Short: Element<Raw = [u8; 2], Bits = i16>;

    /// Bytes of an element.
    const SIZE: usize;

    /// Elements that fit in 32 bits, where their codes can lie too.
    const PER_LANE: usize = 4 / Self::SIZE;

    /// The distance from 1 to the next larger value. Stands in for a scale of zero.
    const EPSILON: f32;

    /// The smallest positive number that is not subnormal.
    const SMALLEST: f32;

    /// `bytes` as elements. The length is a multiple of `SIZE`.
    fn split(bytes: &[u8]) -> &[Self::Raw];

    /// The exact value.
    fn widen(raw: Self::Raw) -> f32;

    /// The exact values of two that are stored next to each other. Of many, the first ones and the
    /// second ones come apart without elements changing lanes.
    fn widen_pair(pair: [Self::Raw; 2]) -> [f32; 2];

    /// `x` rounded to nearest, ties to even; every NaN becomes the canonical one.
    fn round(x: f32) -> f32;

    /// The bit pattern of `round(x)`.
    fn narrow(x: f32) -> u32;

    /// The bit pattern of a value next to `x`, of the nearest or of one of two that are; any where `x` isn't
    /// positive.
    fn near(x: f32) -> u32;

    /// `round(x)` for 2^-14 <= |x| <= 2^15 and not NaN. Smaller values may come out as anything
    /// smaller in magnitude than 2^-13.
    fn round_moderate(x: f32) -> f32;

    /// What [`Self::quotient`] needs to know of a moderate scale.
    fn divisor(scale: f32) -> f32;

    /// `round_moderate(x / scale)`, of two values of this type, given `divisor(scale)`.
    fn quotient(x: f32, divisor: f32) -> f32;

    /// Stores `x`, a value of this type, in `out[..SIZE]`.
    fn store(x: f32, out: &mut [u8]);

    /// The bit pattern.
    fn bits(raw: Self::Raw) -> Self::Bits;

    /// The exact value of a bit pattern.
    fn value(bits: Self::Bits) -> f32;

    /// The bit pattern in 16 bits: where there are more, of the value rounded to odd, that is towards zero,
    /// with the last bit set if any was lost. It lies on the same side of each pattern whose last bit is
    /// not set, or on it, as the value does; and so does a NaN or an infinity remain one.
    fn short(raw: Self::Raw) -> i16;
}

/// Evaluates an expression with a type name for the element type of a `Dtype` that a scheme accepts.
macro_rules! for_element {
    ($dtype:expr, $element:ident => $value:expr) => {
        match $dtype {
            $crate::dtype::Dtype::BF16 => {
                type $element = $crate::quant::tile::Bf16;
                $value
            }
            $crate::dtype::Dtype::F16 => {
                type $element = $crate::quant::tile::F16;
                $value
            }
            $crate::dtype::Dtype::F32 => {
                type $element = $crate::quant::tile::F32;
                $value
            }
            other => unreachable!("`accepts` refuses {other}"),
        }
    };
}
pub(super) use for_element;

/// Marker for [`Reals::Bf16`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Bf16;

/// Marker for [`Reals::F16`].
#[derive(Clone, Copy, Debug)]
pub(super) struct F16;

/// Marker for [`Reals::F32`].
#[derive(Clone, Copy, Debug)]
pub(super) struct F32;

impl Element for Bf16 {
    type Raw = [u8; 2];
    type Bits = i16;
    type Short = Self;
    const SIZE: usize = 2;
    const EPSILON: f32 = 1.0 / 128.0;
    const SMALLEST: f32 = f32::MIN_POSITIVE;

    #[inline(always)]
    fn split(bytes: &[u8]) -> &[[u8; 2]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn widen(raw: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(raw)) << 16)
    }

    #[inline(always)]
    fn widen_pair([[a, b], [c, d]]: [[u8; 2]; 2]) -> [f32; 2] {
        let word = u32::from_le_bytes([a, b, c, d]);
        [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        if x.is_nan() { NAN } else { Self::round_moderate(x) }
    }

    #[inline(always)]
    fn narrow(x: f32) -> u32 {
        Self::round(x).to_bits() >> 16
    }

    #[inline(always)]
    fn near(x: f32) -> u32 {
        x.to_bits().wrapping_add(0x8000) >> 16
    }

    #[inline(always)]
    fn round_moderate(x: f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
    }

    #[inline(always)]
    fn divisor(scale: f32) -> f32 {
        1.0 / scale
    }

    #[inline(always)]
    fn quotient(x: f32, reciprocal: f32) -> f32 {
        // A quotient of two 8-bit significands is never halfway between two 8-bit significands
        // (the odd 9-bit midpoint would have to divide the dividend), and never closer to halfway
        // than one part in 2^17. So a product that is off by a part in 2^23 rounds the same way,
        // and half-up is half-even.
        f32::from_bits((x * reciprocal).to_bits().wrapping_add(0x8000) & 0xffff_0000)
    }

    #[inline(always)]
    fn store(x: f32, out: &mut [u8]) {
        out[..2].copy_from_slice(&((x.to_bits() >> 16) as u16).to_le_bytes());
    }

    #[inline(always)]
    fn bits(raw: [u8; 2]) -> i16 {
        i16::from_le_bytes(raw)
    }

    #[inline(always)]
    fn value(bits: i16) -> f32 {
        Self::widen(bits.to_le_bytes())
    }

    #[inline(always)]
    fn short(raw: [u8; 2]) -> i16 {
        Self::bits(raw)
    }
}

/// The exact value of a binary16's bit pattern.
#[inline(always)]
fn widen_f16(bits: u32) -> f32 {
    let magnitude = (bits & 0x7fff) << 13;
    let value = if magnitude >= 0x7c00 << 13 {
        f32::from_bits(magnitude + (224 << 23))
    } else if magnitude < 0x0400 << 13 {
        // Subnormal: the significand of 2^-14 (1 + m), less 2^-14. No subnormal f32 arises.
        f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23)
    } else {
        f32::from_bits(magnitude + (112 << 23))
    };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}

impl Element for F16 {
    type Raw = [u8; 2];
    type Bits = i16;
    type Short = Self;
    const SIZE: usize = 2;
    const EPSILON: f32 = 1.0 / 1024.0;
    const SMALLEST: f32 = 1.0 / 16384.0;

    #[inline(always)]
    fn split(bytes: &[u8]) -> &[[u8; 2]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn widen(raw: [u8; 2]) -> f32 {
        widen_f16(u16::from_le_bytes(raw).into())
    }

    #[inline(always)]
    fn widen_pair([[a, b], [c, d]]: [[u8; 2]; 2]) -> [f32; 2] {
        let word = u32::from_le_bytes([a, b, c, d]);
        [widen_f16(word & 0xffff), widen_f16(word >> 16)]
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        let magnitude = x.abs();
        if x.is_nan() {
            NAN
        } else if magnitude < f32::from_bits(113 << 23) {
            // Subnormal below 2^-14: a sum in [0.5, 1) has their spacing, 2^-24.
            ((magnitude + 0.5) - 0.5).copysign(x)
        } else if magnitude >= 65520.0 {
            f32::INFINITY.copysign(x)
        } else {
            Self::round_moderate(x)
        }
    }

    #[inline(always)]
    fn narrow(x: f32) -> u32 {
        let narrowed = Self::near(x.abs());
        if x.is_nan() { 0x7e00 } else { narrowed | (x.to_bits() >> 16 & 0x8000) }
    }

    #[inline(always)]
    fn near(x: f32) -> u32 {
        // What rounds to 2^16 or more has a pattern beyond that of infinity.
        let normal = (Self::round_moderate(x).to_bits() >> 13).wrapping_sub(112 << 10);
        let normal = if normal > 0x7c00 { 0x7c00 } else { normal };
        let is_subnormal = x < f32::from_bits(113 << 23);
        let subnormal = (x + 0.5).to_bits() & 0xffff;
        if is_subnormal { subnormal } else { normal }
    }

    #[inline(always)]
    fn round_moderate(x: f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits(bits.wrapping_add(0x0fff + ((bits >> 13) & 1)) & 0xffff_e000)
    }

    #[inline(always)]
    fn divisor(scale: f32) -> f32 {
        1.0 / scale
    }

    #[inline(always)]
    fn quotient(x: f32, reciprocal: f32) -> f32 {
        // As for bfloat16, with 11-bit significands; that the product is close enough here rests
        // on the test that tries every pair of them.
        f32::from_bits((x * reciprocal).to_bits().wrapping_add(0x1000) & 0xffff_e000)
    }

    #[inline(always)]
    fn store(x: f32, out: &mut [u8]) {
        out[..2].copy_from_slice(&(Self::narrow(x) as u16).to_le_bytes());
    }

    #[inline(always)]
    fn bits(raw: [u8; 2]) -> i16 {
        i16::from_le_bytes(raw)
    }

    #[inline(always)]
    fn value(bits: i16) -> f32 {
        Self::widen(bits.to_le_bytes())
    }

    #[inline(always)]
    fn short(raw: [u8; 2]) -> i16 {
        Self::bits(raw)
    }
}

impl Element for F32 {
    type Raw = [u8; 4];
    type Bits = i32;
    type Short = Bf16;
    const SIZE: usize = 4;
    const EPSILON: f32 = f32::EPSILON;
    const SMALLEST: f32 = f32::MIN_POSITIVE;

    #[inline(always)]
    fn split(bytes: &[u8]) -> &[[u8; 4]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn widen(raw: [u8; 4]) -> f32 {
        f32::from_le_bytes(raw)
    }

    #[inline(always)]
    fn widen_pair([first, second]: [[u8; 4]; 2]) -> [f32; 2] {
        [Self::widen(first), Self::widen(second)]
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        if x.is_nan() { NAN } else { x }
    }

    #[inline(always)]
    fn narrow(x: f32) -> u32 {
        Self::round(x).to_bits()
    }

    #[inline(always)]
    fn near(x: f32) -> u32 {
        x.to_bits()
    }

    #[inline(always)]
    fn round_moderate(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn divisor(scale: f32) -> f32 {
        // With no coarser rounding to follow, `x * (1 / scale)` differs in the last bit.
        scale
    }

    #[inline(always)]
    fn quotient(x: f32, scale: f32) -> f32 {
        x / scale
    }

    #[inline(always)]
    fn store(x: f32, out: &mut [u8]) {
        out[..4].copy_from_slice(&x.to_le_bytes());
    }

    #[inline(always)]
    fn bits(raw: [u8; 4]) -> i32 {
        i32::from_le_bytes(raw)
    }

    #[inline(always)]
    fn value(bits: i32) -> f32 {
        Self::widen(bits.to_le_bytes())
    }

    #[inline(always)]
    fn short(raw: [u8; 4]) -> i16 {
        let bits = u32::from_le_bytes(raw);
        // Of the lower half no bit is carried, and the lowest one of the upper half is set, unless it is zero.
        ((bits | ((bits & 0xffff) + 0xffff)) >> 16) as i16
    }
}

/// A row's exact values.
#[inline(always)]
pub(super) fn widen<E: Element>(row: &[E::Raw], out: &mut [f32]) {
    for (out, &raw) in out.iter_mut().zip(row) {
        *out = E::widen(raw);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power_of_two(exponent: i32) -> f32 {
        f32::from_bits(((exponent + 127) as u32) << 23)
    }

    /// The definition of binary16.
    fn half(bits: u16) -> f32 {
        let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
        let magnitude = match exponent {
            0 => fraction * power_of_two(-24),
            31 if fraction == 0.0 => f32::INFINITY,
            31 => f32::NAN,
            _ => (1024.0 + fraction) * power_of_two(exponent - 25),
        };
        if bits >> 15 == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_f16_pattern_is_widened_to_its_value_and_stored_back() {
        for bits in 0..=u16::MAX {
            let (x, expected) = (F16::widen(bits.to_le_bytes()), half(bits));
            let mut stored = [0; 2];
            F16::store(x, &mut stored);
            if expected.is_nan() {
                assert!(x.is_nan() && F16::round(x).is_nan(), "{bits:#06x}");
                assert_eq!(u16::from_le_bytes(stored) & 0x7fff, 0x7e00, "{bits:#06x}");
            } else {
                assert_eq!(x.to_bits(), expected.to_bits(), "{bits:#06x}");
                assert_eq!(F16::round(x).to_bits(), x.to_bits(), "{bits:#06x}");
                assert_eq!(u16::from_le_bytes(stored), bits);
            }
        }
    }

    /// Between two neighbours `a` and `b` of which the first is even (or else the second).
    #[track_caller]
    fn check_rounding(round: fn(f32) -> f32, (a, b): (f32, f32), a_is_even: bool) {
        let middle = ((f64::from(a) + f64::from(b)) / 2.0) as f32;
        for (x, expected) in [
            (middle.next_down(), a),
            (middle, if a_is_even { a } else { b }),
            (middle.next_up(), b),
        ] {
            assert_eq!(round(x).to_bits(), expected.to_bits(), "{x:e}");
            assert_eq!(round(-x).to_bits(), (-expected).to_bits(), "-{x:e}");
        }
    }

    #[test]
    fn f16_rounds_to_nearest_and_halfway_to_even() {
        for bits in 0..0x7bff {
            check_rounding(F16::round, (half(bits), half(bits + 1)), bits % 2 == 0);
        }
        assert_eq!(F16::round(65519.996), 65504.0);
        assert_eq!(F16::round(65520.0), f32::INFINITY);
        assert_eq!(F16::round(f32::MIN), f32::NEG_INFINITY);
    }

    #[test]
    fn a_short_pattern_is_on_the_same_side_of_every_even_one() {
        for even in (0..0x8000u16).step_by(2) {
            let bound = u32::from(even) << 16;
            for below in [1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_0000, 0x1_0001] {
                for bits in [bound.saturating_sub(below), bound, bound + below] {
                    for sign in [0, 1 << 31] {
                        let short = F32::short((bits | sign).to_le_bytes());
                        assert_eq!(short.magnitude().cmp(&(even as i16)), bits.cmp(&bound));
                        assert_eq!(short < 0, sign != 0);
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_and_halfway_to_even() {
        let value = |bits: u32| f32::from_bits(bits << 16);
        for bits in 0..0x7f7f {
            check_rounding(Bf16::round, (value(bits), value(bits + 1)), bits % 2 == 0);
        }
        assert_eq!(Bf16::round(f32::MAX), f32::INFINITY);
        assert_eq!(Bf16::round(-f32::NAN).to_bits(), 0x7fc0_0000);
    }

    /// Every pair of significands.
    fn check_quotients<E: Element>(significands: std::ops::Range<u32>, shift: u32) {
        for a in significands.clone() {
            for b in significands.clone() {
                let [x, scale] = [a, b].map(|s| f32::from_bits(s << shift | 0x3f80_0000));
                let quotient = E::quotient(x, E::divisor(scale));
                assert_eq!(quotient.to_bits(), E::round(x / scale).to_bits(), "{x} / {scale}");
            }
        }
    }

    #[test]
    fn a_product_with_the_reciprocal_rounds_to_the_quotient() {
        check_quotients::<Bf16>(0..128, 16);
        check_quotients::<F16>(0..1024, 13);
    }
}
