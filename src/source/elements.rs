//! Stored elements of every type as f32.
//!
//! Values that f32 holds come out exact: all of the floating-point types up to 32 bits, booleans
//! and integers up to 24 bits. Wider integers and F64 are rounded to nearest, ties to even. Any NaN
//! becomes a NaN.
//!
//! Types narrower than a byte are packed from the least significant bit up. For F4 that is what
//! `torch.float4_e2m1fn_x2`, which safetensors stores under this name, documents: the first of two
//! values is in the low four bits. For F6 neither safetensors nor the OCP Microscaling
//! specification prescribes an order, and torch has no such type; the same rule makes four values
//! of three bytes.

use crate::dtype::Dtype;

/// Appends the elements stored in `bytes`, a whole number of them, to `out`.
pub type DecodeF32 = fn(bytes: &[u8], out: &mut Vec<f32>);

/// Bytes are decoded in multiples of this many, save for the end of a tensor: whole elements of
/// every type.
pub const ELEMENTS_ALIGN: u64 = 24;

/// How elements of a type become f32; `None` for those that aren't real numbers (C64).
pub fn f32_decoder(dtype: Dtype) -> Option<DecodeF32> {
    Some(match dtype {
        Dtype::BOOL => |bytes, out| out.extend(bytes.iter().map(|b| f32::from(*b != 0))),
        Dtype::U8 => |bytes, out| out.extend(bytes.iter().map(|b| f32::from(*b))),
        Dtype::I8 => |bytes, out| out.extend(bytes.iter().map(|b| f32::from(b.cast_signed()))),
        Dtype::F4 => |bytes, out| {
            let pair = |b: &u8| [F4[usize::from(b & 0xf)], F4[usize::from(b >> 4)]];
            out.extend(bytes.iter().flat_map(pair));
        },
        Dtype::F6_E2M3 => |bytes, out| sixes(&F6_E2M3, bytes, out),
        Dtype::F6_E3M2 => |bytes, out| sixes(&F6_E3M2, bytes, out),
        Dtype::F8_E4M3 => |bytes, out| look_up(&F8_E4M3, bytes, out),
        Dtype::F8_E5M2 => |bytes, out| look_up(&F8_E5M2, bytes, out),
        Dtype::F8_E4M3FNUZ => |bytes, out| look_up(&F8_E4M3FNUZ, bytes, out),
        Dtype::F8_E5M2FNUZ => |bytes, out| look_up(&F8_E5M2FNUZ, bytes, out),
        Dtype::F8_E8M0 => |bytes, out| look_up(&F8_E8M0, bytes, out),
        Dtype::F16 => |bytes, out| words(bytes, out, |w| f16(u16::from_le_bytes(w))),
        Dtype::BF16 => |bytes, out| {
            words(bytes, out, |w| f32::from_bits(u32::from(u16::from_le_bytes(w)) << 16));
        },
        Dtype::I16 => |bytes, out| words(bytes, out, |w| f32::from(i16::from_le_bytes(w))),
        Dtype::U16 => |bytes, out| words(bytes, out, |w| f32::from(u16::from_le_bytes(w))),
        Dtype::I32 => |bytes, out| words(bytes, out, |w| i32::from_le_bytes(w) as f32),
        Dtype::U32 => |bytes, out| words(bytes, out, |w| u32::from_le_bytes(w) as f32),
        Dtype::I64 => |bytes, out| words(bytes, out, |w| i64::from_le_bytes(w) as f32),
        Dtype::U64 => |bytes, out| words(bytes, out, |w| u64::from_le_bytes(w) as f32),
        Dtype::F32 => |bytes, out| words(bytes, out, f32::from_le_bytes),
        Dtype::F64 => |bytes, out| words(bytes, out, |w| f64::from_le_bytes(w) as f32),
        _ => return None,
    })
}

fn words<const N: usize>(bytes: &[u8], out: &mut Vec<f32>, value: impl Fn([u8; N]) -> f32) {
    let (words, rest) = bytes.as_chunks();
    debug_assert!(rest.is_empty(), "whole elements");
    out.extend(words.iter().map(|word| value(*word)));
}

fn look_up(table: &[f32; 256], bytes: &[u8], out: &mut Vec<f32>) {
    out.extend(bytes.iter().map(|byte| table[usize::from(*byte)]));
}

fn sixes(table: &[f32; 64], bytes: &[u8], out: &mut Vec<f32>) {
    let (threes, rest) = bytes.as_chunks();
    debug_assert!(rest.is_empty(), "whole elements");
    out.extend(threes.iter().flat_map(|[a, b, c]| {
        let bits = u32::from_le_bytes([*a, *b, *c, 0]);
        [0, 6, 12, 18].map(|shift| table[(bits >> shift) as usize & 0x3f])
    }));
}

/// IEEE half precision, by selection: no branches, and no subnormal f32 that a thread may have been
/// told to flush.
#[inline(always)]
pub(super) fn f16(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let (sign, magnitude, fraction) = ((bits & 0x8000) << 16, bits & 0x7fff, bits & 0x3ff);
    let magnitude = match magnitude >> 10 {
        0 => (fraction as f32 * power_of_two(-24)).to_bits(),
        0x1f => 0x7f80_0000 | fraction << 13,
        _ => (magnitude << 13) + (112 << 23),
    };
    f32::from_bits(sign | magnitude)
}

/// How the codes with the largest exponent are read, and the code of minus zero.
#[derive(Clone, Copy)]
enum Special {
    /// All are finite.
    None,
    /// As in IEEE 754: infinity, or NaN where the fraction isn't 0.
    Ieee,
    /// The last code of either sign is NaN, there is no infinity.
    LastIsNan,
    /// All are finite, and minus zero is NaN instead.
    MinusZeroIsNan,
}

pub(super) static F4: [f32; 16] = floats(2, 1, 1, Special::None);
static F6_E2M3: [f32; 64] = floats(2, 3, 1, Special::None);
static F6_E3M2: [f32; 64] = floats(3, 2, 3, Special::None);
pub(super) static F8_E4M3: [f32; 256] = floats(4, 3, 7, Special::LastIsNan);
static F8_E5M2: [f32; 256] = floats(5, 2, 15, Special::Ieee);
static F8_E4M3FNUZ: [f32; 256] = floats(4, 3, 8, Special::MinusZeroIsNan);
static F8_E5M2FNUZ: [f32; 256] = floats(5, 2, 16, Special::MinusZeroIsNan);
static F8_E8M0: [f32; 256] = powers_of_two();

/// The values of all codes of a small floating-point type: a sign, `e` bits of exponent, `m` of
/// fraction.
const fn floats<const N: usize>(e: u32, m: u32, bias: i32, special: Special) -> [f32; N] {
    assert!(N == 1 << (1 + e + m));
    let mut table = [0.0; N];
    let mut code = 0;
    while code < N {
        let magnitude = code % (N / 2);
        let exponent = (magnitude >> m) as i32;
        let fraction = (magnitude % (1 << m)) as i32;
        let last_exponent = exponent == (1 << e) - 1;
        let value = match special {
            Special::Ieee if last_exponent && fraction == 0 => f32::INFINITY,
            Special::Ieee if last_exponent => f32::NAN,
            Special::LastIsNan if magnitude == N / 2 - 1 => f32::NAN,
            Special::MinusZeroIsNan if code == N / 2 => f32::NAN,
            _ if exponent == 0 => fraction as f32 * power_of_two(1 - bias - m as i32),
            _ => (fraction + (1 << m)) as f32 * power_of_two(exponent - bias - m as i32),
        };
        table[code] = if code < N / 2 { value } else { -value };
        code += 1;
    }
    table
}

/// E8M0: 2^(code - 127), and NaN for the last code.
const fn powers_of_two() -> [f32; 256] {
    let mut table = [f32::NAN; 256];
    let mut code = 0;
    while code < 255 {
        table[code] = power_of_two(code as i32 - 127);
        code += 1;
    }
    table
}

/// 2 to the power of -127 to 127.
const fn power_of_two(exponent: i32) -> f32 {
    // The only one that is subnormal.
    let bits = if exponent == -127 { 1 << 22 } else { ((exponent + 127) as u32) << 23 };
    f32::from_bits(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
        let mut out = Vec::new();
        f32_decoder(dtype).expect("a real type")(bytes, &mut out);
        out
    }

    /// The value of a code by the definition of a binary floating-point type, in f64.
    fn by_definition(code: u32, e: i32, m: i32, bias: i32) -> f64 {
        let sign = if code >> (e + m) & 1 == 1 { -1.0 } else { 1.0 };
        let exponent = (code >> m & ((1 << e) - 1)) as i32;
        let fraction = f64::from(code & ((1 << m) - 1)) / f64::powi(2.0, m);
        let magnitude = match exponent {
            0 => fraction * f64::powi(2.0, 1 - bias),
            _ => (1.0 + fraction) * f64::powi(2.0, exponent - bias),
        };
        sign * magnitude
    }

    /// The same value, sign of zero included, or NaN both.
    #[track_caller]
    fn check(code: u32, found: f32, expected: f64) {
        let same =
            found.is_nan() && expected.is_nan() || f64::from(found).to_bits() == expected.to_bits();
        assert!(same, "code {code:#x}: {found:?} instead of {expected:?}");
    }

    #[test]
    fn every_f16_and_bf16_is_exact() {
        let codes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for (dtype, e, m, bias) in [(Dtype::F16, 5, 10, 15), (Dtype::BF16, 8, 7, 127)] {
            let found = decode(dtype, &codes);
            assert_eq!(found.len(), 1 << 16);
            for (code, found) in (0..).zip(found) {
                let last = code >> m & ((1 << e) - 1) == (1 << e) - 1;
                let expected = match (last, code & ((1 << m) - 1)) {
                    (false, _) => by_definition(code, e, m, bias),
                    (true, 0) if code >> 15 == 0 => f64::INFINITY,
                    (true, 0) => f64::NEG_INFINITY,
                    (true, _) => f64::NAN,
                };
                check(code, found, expected);
            }
        }
    }

    #[test]
    fn every_8_bit_float_is_exact() {
        let codes: Vec<u8> = (0..=255).collect();
        // Their special codes, as the OCP and FNUZ definitions list them.
        type Specials = &'static [(u32, f64)];
        let cases: [(Dtype, i32, i32, i32, Specials); 4] = [
            (Dtype::F8_E4M3, 4, 3, 7, &[(0x7f, f64::NAN), (0xff, f64::NAN)]),
            (
                Dtype::F8_E5M2,
                5,
                2,
                15,
                &[
                    (0x7c, f64::INFINITY),
                    (0xfc, f64::NEG_INFINITY),
                    (0x7d, f64::NAN),
                    (0x7e, f64::NAN),
                    (0x7f, f64::NAN),
                    (0xfd, f64::NAN),
                    (0xfe, f64::NAN),
                    (0xff, f64::NAN),
                ],
            ),
            (Dtype::F8_E4M3FNUZ, 4, 3, 8, &[(0x80, f64::NAN)]),
            (Dtype::F8_E5M2FNUZ, 5, 2, 16, &[(0x80, f64::NAN)]),
        ];
        for (dtype, e, m, bias, specials) in cases {
            for (code, found) in (0..).zip(decode(dtype, &codes)) {
                let special = specials.iter().find(|(special, _)| *special == code);
                check(code, found, special.map_or(by_definition(code, e, m, bias), |s| s.1));
            }
        }
        for (code, found) in (0..255u8).zip(decode(Dtype::F8_E8M0, &codes)) {
            check(code.into(), found, f64::powi(2.0, i32::from(code) - 127));
        }
        assert!(decode(Dtype::F8_E8M0, &[255])[0].is_nan());
        // The largest of each, as upstream documents them.
        for (dtype, code, largest) in [
            (Dtype::F8_E4M3, 0x7e, 448.0),
            (Dtype::F8_E5M2, 0x7b, 57344.0),
            (Dtype::F8_E4M3FNUZ, 0x7f, 240.0),
            (Dtype::F8_E5M2FNUZ, 0x7f, 57344.0),
        ] {
            assert_eq!(decode(dtype, &[code]), [largest]);
        }
    }

    #[test]
    fn every_packed_float_is_exact_and_packed_from_the_low_bits_up() {
        assert_eq!(F4[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!(F6_E2M3[31], 7.5);
        assert_eq!(F6_E3M2[31], 28.0);
        for (code, value) in (0..).zip(F4) {
            check(code, value, by_definition(code, 2, 1, 1));
        }
        for code in 0..64u32 {
            check(code, F6_E2M3[code as usize], by_definition(code, 2, 3, 1));
            check(code, F6_E3M2[code as usize], by_definition(code, 3, 2, 3));
        }
        for byte in 0..=255u8 {
            let pair = [F4[usize::from(byte % 16)], F4[usize::from(byte / 16)]];
            assert_eq!(decode(Dtype::F4, &[byte]).map_bits(), pair.to_vec().map_bits());
        }
        for bits in 0..1u32 << 24 {
            // Every 97th is enough to meet every code in every place.
            if bits % 97 == 0 {
                let mut found = Vec::with_capacity(4);
                sixes(&F6_E3M2, &bits.to_le_bytes()[..3], &mut found);
                let code = |i: u32| F6_E3M2[(bits / 64u32.pow(i) % 64) as usize];
                assert_eq!(found.map_bits(), (0..4).map(code).collect::<Vec<_>>().map_bits());
            }
        }
    }

    trait MapBits {
        fn map_bits(&self) -> Vec<u32>;
    }

    impl MapBits for Vec<f32> {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|value| value.to_bits()).collect()
        }
    }

    #[test]
    fn integers_and_booleans_are_their_values() {
        let bytes: Vec<u8> = (0..=255).collect();
        let found: Vec<f32> = decode(Dtype::U8, &bytes);
        assert!(found.iter().zip(0..=u8::MAX).all(|(found, byte)| *found == f32::from(byte)));
        let found: Vec<f32> = decode(Dtype::I8, &bytes);
        assert!(found.iter().zip(0..=u8::MAX).all(|(found, byte)| *found == f32::from(byte as i8)));
        assert_eq!(decode(Dtype::BOOL, &[0, 1, 2, 255]), [0.0, 1.0, 1.0, 1.0]);
        let codes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let found = decode(Dtype::U16, &codes);
        assert!(found.iter().zip(0..=u16::MAX).all(|(found, code)| *found == f32::from(code)));
        let found = decode(Dtype::I16, &codes);
        assert!(
            found.iter().zip(0..=u16::MAX).all(|(found, code)| *found == f32::from(code as i16))
        );
    }

    #[test]
    fn wide_types_round_to_nearest_even() {
        // One above 2^24, the first integer that f32 lacks, and its neighbours.
        let tie = 1u64 << 24;
        for (value, nearest) in [(tie + 1, tie), (tie + 2, tie + 2), (tie + 3, tie + 4)] {
            let expected = [nearest as f32];
            assert_eq!(decode(Dtype::U32, &(value as u32).to_le_bytes()), expected);
            assert_eq!(decode(Dtype::I32, &(value as i32).to_le_bytes()), expected);
            assert_eq!(decode(Dtype::U64, &value.to_le_bytes()), expected);
            assert_eq!(decode(Dtype::I64, &(value as i64).to_le_bytes()), expected);
            assert_eq!(decode(Dtype::I64, &(-(value as i64)).to_le_bytes()), [-expected[0]]);
            assert_eq!(decode(Dtype::F64, &(value as f64).to_le_bytes()), expected);
        }
        assert_eq!(decode(Dtype::F64, &1e300f64.to_le_bytes()), [f32::INFINITY]);
        assert_eq!(decode(Dtype::U64, &u64::MAX.to_le_bytes()), [18446744073709551616.0]);
        let bits = [1u32, 0x8000_0000, 0x7f80_0001, 0xff80_0000, 0x3f80_0000];
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        assert_eq!(decode(Dtype::F32, &bytes).map_bits(), bits);
    }

    #[test]
    fn a_complex_number_is_no_real_one() {
        assert!(f32_decoder(Dtype::C64).is_none());
    }

    #[test]
    fn pieces_are_whole_elements_of_every_type() {
        for bits in [4, 6, 8, 16, 32, 64] {
            assert_eq!(ELEMENTS_ALIGN * 8 % bits, 0);
        }
    }
}
