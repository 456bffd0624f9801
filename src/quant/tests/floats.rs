//! FP8 and microscaled codes against naive definitions.

use super::*;

/// The value of a float's code of so many exponent and mantissa bits, and its largest.
#[derive(Clone, Copy)]
struct Small {
    mantissa: u32,
    bias: i32,
    codes: u8,
}

const E4M3: Small = Small { mantissa: 3, bias: 7, codes: 127 };
const E2M1: Small = Small { mantissa: 1, bias: 1, codes: 8 };

impl Small {
    fn value(self, code: u8) -> f64 {
        let fraction = f64::from(code & ((1 << self.mantissa) - 1)) / f64::from(1 << self.mantissa);
        match i32::from(code >> self.mantissa) {
            0 => fraction * power_of_two(1 - self.bias),
            exponent => (1.0 + fraction) * power_of_two(exponent - self.bias),
        }
    }

    fn max(self) -> f32 {
        self.value(self.codes - 1) as f32
    }

    /// The nearest code; a tie goes to the even one, or else to the smaller.
    fn nearest(self, magnitude: f32, ties_to_even: bool) -> u8 {
        let distance = |code: u8| (self.value(code) - f64::from(magnitude)).abs();
        (0..self.codes)
            .reduce(|best, code| {
                let tie = distance(code) == distance(best) && ties_to_even && code % 2 == 0;
                if distance(code) < distance(best) || tie { code } else { best }
            })
            .expect("there are codes")
    }
}

/// floor(log2(x)) of a positive number.
fn floor_log2(x: f64) -> i32 {
    (-200..200).rev().find(|&e| power_of_two(e) <= x).expect("within reach")
}

fn naive_micro(f: Float, scheme: MicroScheme, cols: usize, weight: &[f32]) -> Defined {
    let small = if scheme.float == MicroFloat::E2m1 { E2M1 } else { E4M3 };
    let ours = scheme.dialect == MicroDialect::CompressedTensors;
    let ties_to_even = ours || scheme.dialect == MicroDialect::TensorGroup;
    let global = {
        let largest = weight.iter().fold(0f32, |m, &x| m.max(x.abs()));
        let largest = largest.max(power_of_two(f.min_exponent) as f32);
        let global = f.round(f.round(1.0 / largest) * 2688.0);
        if global.is_finite() { global } else { 1.0 }
    };
    let (mut codes, mut scales, mut values) = (vec![], vec![], vec![]);
    for xs in weight.chunks(scheme.group_size() as usize) {
        let largest = xs.iter().fold(0f32, |m, &x| m.max(x.abs()));
        let (code, scale) = match scheme.dialect {
            MicroDialect::CompressedTensors => {
                // An addition to the pattern carries into the exponent, which is all that is kept.
                let normal = power_of_two(f.min_exponent);
                let x = f64::from(largest);
                let exponent = if x < normal * 0.75 {
                    None
                } else if x < normal {
                    Some(f.min_exponent)
                } else {
                    let floor = floor_log2(x);
                    Some(if x >= 1.75 * power_of_two(floor) { floor + 1 } else { floor })
                };
                let last = floor_log2(small.max().into());
                let exponent = exponent.map_or(-127, |e| (e - last).max(-127));
                let scale = f.round(power_of_two(exponent) as f32);
                if scale == 0.0 { (127, 1.0) } else { ((exponent + 127) as u8, scale) }
            }
            MicroDialect::TensorGroup => {
                let scale = (global * f.round(largest / 6.0)).min(448.0);
                let code = match E4M3.nearest(scale, true) {
                    0 => E4M3.nearest(0.125, true),
                    code => code,
                };
                (code, E4M3.value(code) as f32 / global)
            }
            MicroDialect::MlxPower if largest == 0.0 => (127, 1.0),
            MicroDialect::MlxPower => {
                let ratio = f64::from(largest / small.max());
                let floor = if ratio == 0.0 { -127 } else { floor_log2(ratio) };
                let ceil = if power_of_two(floor) < ratio { floor + 1 } else { floor };
                let exponent = ceil.clamp(-127, 127);
                ((exponent + 127) as u8, power_of_two(exponent) as f32)
            }
            MicroDialect::MlxE4m3 => {
                let code = E4M3.nearest(largest / small.max(), true);
                (code, E4M3.value(code) as f32)
            }
        };
        scales.push(code);
        for &x in xs {
            let x = if scale == 0.0 { 0.0 } else { x / scale };
            let x = if ours { f.round(x) } else { x };
            let magnitude = x.abs().min(small.max());
            let even = ties_to_even || scheme.float == MicroFloat::E4m3;
            let q = small.nearest(magnitude, even);
            let negative = match (scheme.float, ties_to_even) {
                (MicroFloat::E4m3, _) => x.is_sign_negative() && scale != 0.0,
                (MicroFloat::E2m1, true) => x < 0.0,
                (MicroFloat::E2m1, false) => x < 0.0 && q > 0,
            };
            let value = small.value(q) as f32 * if negative { -1.0 } else { 1.0 };
            values.push(f.round(value * scale));
            let sign = if scheme.float == MicroFloat::E2m1 { 8 } else { 128 };
            codes.push(if negative { q | sign } else { q });
        }
    }
    let packed = match scheme.float {
        MicroFloat::E4m3 => codes,
        MicroFloat::E2m1 => codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect(),
    };
    assert_eq!(weight.len() % cols, 0);
    let mut parts = vec![packed, scales];
    if scheme.dialect == MicroDialect::TensorGroup {
        parts.push(global.to_le_bytes().into());
    }
    Defined { parts, values }
}

#[test]
fn microscaled_codes_are_as_defined() {
    use MicroDialect::{CompressedTensors, MlxE4m3, MlxPower, TensorGroup};
    use MicroFloat::{E2m1, E4m3};
    for f in FLOATS {
        for (float, dialect) in [
            (E2m1, CompressedTensors),
            (E4m3, CompressedTensors),
            (E2m1, TensorGroup),
            (E2m1, MlxPower),
            (E4m3, MlxPower),
            (E2m1, MlxE4m3),
        ] {
            let scheme = MicroScheme { float, dialect, quality: Quality::Reference };
            let group = scheme.group_size() as usize;
            let shape = (65, 3 * group);
            let weight = weight(f, shape.0, shape.1, group);
            let defined = naive_micro(f, scheme, shape.1, &weight);
            check(f, Scheme::Micro(scheme), shape, &weight, &defined);
        }
    }
}

/// Weights whose largest magnitude is ordinary, tiny, or nothing at all.
#[test]
fn a_scale_of_the_whole_weight_is_as_defined() {
    let (float, dialect) = (MicroFloat::E2m1, MicroDialect::TensorGroup);
    let scheme = MicroScheme { float, dialect, quality: Quality::Reference };
    let shape = (40, 96);
    for f in FLOATS {
        for size in [0.0, 1e-38, 1e-6, 0.005, 0.02, 1.0, 30.0] {
            let mut random = Random(3);
            let weight: Vec<f32> =
                (0..shape.0 * shape.1).map(|_| f.round(random.normal() * size)).collect();
            let defined = naive_micro(f, scheme, shape.1, &weight);
            check(f, Scheme::Micro(scheme), shape, &weight, &defined);
        }
    }
}

#[test]
fn a_search_holds_the_scale_of_a_whole_weight_that_f16_cannot() {
    let f = FLOATS[1];
    let mut random = Random(5);
    let weight: Vec<f32> = (0..64 * 64).map(|_| f.round(random.normal() * 0.004)).collect();
    let bytes = stored(f, &weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    let global = |quality| {
        let (float, dialect) = (MicroFloat::E2m1, MicroDialect::TensorGroup);
        let scheme = Scheme::Micro(MicroScheme { float, dialect, quality });
        let parts = encode(scheme, Isa::detect(), data, (64, 64), u64::MAX);
        f32::from_le_bytes(parts[2].as_slice().try_into().expect("one F32"))
    };
    let largest = weight.iter().fold(0f32, |m, &x| m.max(x.abs()));
    assert_eq!(global(Quality::Reference), 1.0);
    assert_eq!(global(Quality::Search), 2688.0 / largest);
}

fn naive_fp8(f: Float, scheme: Fp8Scheme, (rows, cols): (usize, usize), weight: &[f32]) -> Defined {
    let (high, wide) = match scheme.grain {
        Fp8Grain::Tensor => (rows, cols),
        Fp8Grain::Channel => (1, cols),
        Fp8Grain::Block(size) => (size as usize, size as usize),
    };
    let (mut codes, mut values) = (vec![0; rows * cols], vec![0.0; rows * cols]);
    let mut scales = vec![];
    for top in (0..rows).step_by(high) {
        for left in (0..cols).step_by(wide) {
            let places: Vec<usize> = (top..rows.min(top + high))
                .flat_map(|r| (left..cols.min(left + wide)).map(move |c| r * cols + c))
                .collect();
            let largest = places.iter().fold(0f32, |m, &i| m.max(weight[i].abs()));
            let inverse = if largest > 0.0 { 1.0 / largest * 448.0 } else { 1.0 };
            let scale = match scheme.scale {
                Fp8Scale::Source => {
                    let scale = f.round(largest / 448.0);
                    let scale = if scale == 0.0 { f.epsilon } else { scale };
                    scales.extend(f.store(scale));
                    scale
                }
                Fp8Scale::Inverse => {
                    scales.extend((1.0 / inverse).to_le_bytes());
                    1.0 / inverse
                }
                Fp8Scale::Power => {
                    let ratio = f64::from((1.0 / inverse).max(f32::MIN_POSITIVE));
                    let floor = floor_log2(ratio);
                    let exponent = if power_of_two(floor) < ratio { floor + 1 } else { floor };
                    scales.push((exponent + 127) as u8);
                    power_of_two(exponent) as f32
                }
            };
            for i in places {
                let x = match scheme.scale {
                    Fp8Scale::Source => f.round(weight[i] / scale),
                    Fp8Scale::Inverse => weight[i] * inverse,
                    Fp8Scale::Power => weight[i] * (1.0 / scale),
                };
                let (q, sign) = if x.is_nan() {
                    (0x7f, 1.0)
                } else {
                    let q = E4M3.nearest(x.abs().min(448.0), true);
                    if x.is_sign_negative() { (q | 0x80, -1.0) } else { (q, 1.0) }
                };
                codes[i] = q;
                let value = if x.is_nan() { f32::NAN } else { E4M3.value(q & 0x7f) as f32 };
                values[i] = f.round(value * sign * scale);
            }
        }
    }
    Defined { parts: vec![codes, scales], values }
}

#[test]
fn fp8_codes_are_as_defined() {
    for f in FLOATS {
        for scale in [Fp8Scale::Source, Fp8Scale::Inverse, Fp8Scale::Power] {
            for (grain, shape) in [
                (Fp8Grain::Tensor, (33, 70)),
                (Fp8Grain::Tensor, (1, 1)),
                (Fp8Grain::Channel, (33, 70)),
                (Fp8Grain::Channel, (16, 1)),
                (Fp8Grain::Block(16), (32, 48)),
                (Fp8Grain::Block(16), (35, 50)),
                (Fp8Grain::Block(128), (130, 140)),
            ] {
                let quality = Quality::Search;
                let scheme = Fp8Scheme { grain, scale, whole_blocks: false, quality };
                let weight = weight(f, shape.0, shape.1, shape.1);
                let defined = naive_fp8(f, scheme, shape, &weight);
                check(f, Scheme::Fp8(scheme), shape, &weight, &defined);
            }
        }
    }
}

/// One binade of scales stands for all: every quotient that a BF16 weight can have.
#[test]
fn every_bf16_quotient_has_its_nearest_fp8_code() {
    let f = FLOATS[0];
    let value = |pattern: u32| f32::from_bits(pattern << 16);
    let scheme = Fp8Scheme {
        grain: Fp8Grain::Channel,
        scale: Fp8Scale::Source,
        whole_blocks: false,
        quality: Quality::Search,
    };
    for largest in (0x3d00..0x3d80).step_by(5) {
        let smallest = largest - 20 * 128;
        let row: Vec<f32> = (smallest..=largest).flat_map(|x| [value(x), -value(x)]).collect();
        let shape = (1, row.len());
        check(f, Scheme::Fp8(scheme), shape, &row, &naive_fp8(f, scheme, shape, &row));
    }
}

#[test]
fn what_is_not_in_whole_blocks_is_refused_where_upstream_keeps_it() {
    let scheme = |whole_blocks| {
        let (grain, scale) = (Fp8Grain::Block(128), Fp8Scale::Inverse);
        let quality = Quality::Search;
        Scheme::Fp8(Fp8Scheme { grain, scale, whole_blocks, quality })
    };
    let complaint = "shape [256, 200] is not in whole blocks of 128 x 128".to_owned();
    assert_eq!(scheme(true).accepts(Dtype::BF16, &[256, 200]), Err(complaint));
    assert_eq!(scheme(true).accepts(Dtype::BF16, &[256, 384]), Ok(()));
    assert_eq!(scheme(false).accepts(Dtype::BF16, &[256, 200]), Ok(()));
}
