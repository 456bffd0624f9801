//! Floats of 4 and 8 bits, and scales that are powers of two.

/// The largest E4M3 number, 1.75 * 2^8.
pub(super) const E4M3_MAX: f32 = 448.0;

/// The largest E2M1 number, 1.5 * 2^2.
pub(super) const E2M1_MAX: f32 = 6.0;

/// The number 2^(`exponent` - 127) for an exponent of 1 to 254, as a biased exponent is stored.
#[inline(always)]
fn power(exponent: u32) -> f32 {
    f32::from_bits(exponent << 23)
}

/// The magnitude `a` rounded to the nearest float of `MANTISSA` bits after the point and exponents
/// from `LOWEST` on, ties to even: its code and its value. `a` is less than 2^100; of a NaN the code is any.
#[inline(always)]
fn nearest<const MANTISSA: u32, const LOWEST: i32>(a: f32) -> (u32, f32) {
    let lowest = ((127 + LOWEST) as u32) << 23;
    let exponent = a.to_bits() & 0x7f80_0000;
    let exponent = if exponent > lowest { exponent } else { lowest };
    // A sum with 2^(exponent + 23 - MANTISSA) has the spacing of the float at `a`: the addition
    // rounds, and leaves the number of spacings in its lowest bits.
    let magic = exponent.wrapping_add((23 - MANTISSA) << 23);
    let sum = a + f32::from_bits(magic);
    // Wrapping, for the NaN that some kernels pass and whose code they replace.
    let spacings = sum.to_bits().wrapping_sub(magic);
    let code = spacings.wrapping_add((exponent - lowest) >> (23 - MANTISSA));
    (code, sum - f32::from_bits(magic))
}

/// The E4M3 code nearest to `x`, ties to even, its sign kept; `x` is within +-448 and not NaN.
#[inline(always)]
pub(super) fn e4m3(x: f32) -> u8 {
    let (code, _) = nearest::<3, -6>(x.abs());
    (code | (x.to_bits() >> 24 & 0x80)) as u8
}

/// The code of a NaN in E4M3.
pub(super) const E4M3_NAN: u8 = 0x7f;

/// The value of an E4M3 code.
#[inline(always)]
pub(super) fn e4m3_value(code: u8) -> f32 {
    let (exponent, fraction) = (u32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        15 if code & 7 == 7 => f32::NAN,
        0 => fraction * power(127 - 9),
        _ => (8.0 + fraction) * power(127 + exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The E2M1 code nearest to a magnitude of at most 6, ties to even codes.
#[inline(always)]
pub(super) fn e2m1(a: f32) -> u32 {
    nearest::<1, 0>(a).0
}

/// The E2M1 magnitude nearest to one of at most 6, ties to even codes.
#[inline(always)]
pub(super) fn e2m1_rounded(a: f32) -> f32 {
    nearest::<1, 0>(a).1
}

/// The smaller of two magnitudes, of which the second is a number.
#[inline(always)]
pub(super) fn within(magnitude: f32, largest: f32) -> f32 {
    if magnitude > largest { largest } else { magnitude }
}

/// The E2M1 code nearest to a magnitude, ties to the smaller one; what is beyond 6 becomes 6.
#[inline(always)]
pub(super) fn e2m1_down(a: f32) -> u32 {
    // From 1 on, codes are the bits that a float begins with.
    let above = ((a.to_bits() + 0x1f_ffff) >> 22).wrapping_sub(252).cast_signed();
    let below = i32::from(a > 0.25) + i32::from(a > 0.75);
    above.max(below).min(7).cast_unsigned()
}

/// The value of an E2M1 code of four bits.
#[inline(always)]
pub(super) fn e2m1_value(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The E8M0 code of a scale that is not a number.
pub(super) const E8M0_NAN: u8 = 255;

/// The value of an E8M0 code: 2^(code - 127), and NaN for 255.
#[inline(always)]
pub(super) fn e8m0_value(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        E8M0_NAN => f32::NAN,
        _ => power(u32::from(code)),
    }
}

/// The E8M0 code of the smallest power of two that is not less than `x`, which is positive; 255 for
/// an infinity or NaN.
#[inline(always)]
pub(super) fn e8m0_ceil(x: f32) -> u8 {
    let bits = x.to_bits();
    if bits <= 1 << 22 {
        0
    } else if bits > 254 << 23 {
        // Too large a number gets the largest power there is.
        if bits < 255 << 23 { 254 } else { E8M0_NAN }
    } else {
        (bits.wrapping_add(0x007f_ffff) >> 23) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between any two neighbours, what is nearer wins, and the even code where none is.
    #[track_caller]
    fn check(codes: std::ops::RangeInclusive<u8>, value: fn(u8) -> f32, nearest: fn(f32) -> u8) {
        let codes: Vec<u8> = codes.collect();
        for pair in codes.windows(2) {
            let (low, high) = (pair[0], pair[1]);
            let middle = f32::midpoint(value(low), value(high));
            let even = if low % 2 == 0 { low } else { high };
            for (x, code) in [
                (value(low), low),
                (middle.next_down(), low),
                (middle, even),
                (middle.next_up(), high),
                (value(high), high),
            ] {
                assert_eq!(nearest(x), code, "{x}");
            }
        }
    }

    #[test]
    fn codes_are_the_nearest_and_ties_go_to_even() {
        check(0..=126, e4m3_value, e4m3);
        check(0..=7, e2m1_value, |a| e2m1(a) as u8);
        for code in 0..=126 {
            assert_eq!(e4m3(-e4m3_value(code)), code | 0x80);
            assert_eq!(e4m3_value(code | 0x80), -e4m3_value(code));
        }
        assert_eq!(e4m3_value(126), E4M3_MAX);
        assert_eq!(e2m1_value(7), E2M1_MAX);
        assert!(e4m3_value(E4M3_NAN).is_nan());
    }

    #[test]
    fn the_other_e2m1_differs_in_ties_alone() {
        for i in 0..=6 * 64 {
            let a = i as f32 / 64.0;
            let even = e2m1(a) as u8;
            assert_eq!(e2m1_rounded(a), e2m1_value(even));
            let down = e2m1_down(a) as u8;
            if down != even {
                assert_eq!(a, f32::midpoint(e2m1_value(down), e2m1_value(down + 1)));
            }
        }
        assert_eq!([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0].map(e2m1_down), [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn powers_of_two_are_rounded_up() {
        for code in 0..=254 {
            let value = e8m0_value(code);
            assert_eq!(e8m0_ceil(value), code);
            assert_eq!(e8m0_ceil(value.next_up()), code.saturating_add(1).min(254));
            assert_eq!(e8m0_ceil(value.next_down()), code);
        }
        assert_eq!([0.0, f32::INFINITY, f32::NAN].map(e8m0_ceil), [0, 255, 255]);
    }
}
