//! MXFP4 of stacked experts against a naive definition.

use super::*;

const SHAPE: [u64; 3] = [3, 64, 133];

fn scheme(quality: Quality) -> Scheme {
    Scheme::Experts(ExpertsScheme { quality })
}

/// The value of each code, by its definition.
const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The nearest code, the even one of two.
fn nearest(x: f64) -> u8 {
    let distance = |code: &u8| ((E2M1[usize::from(*code)] - x.abs()).abs(), code % 2);
    let by_distance = |a: &u8, b: &u8| distance(a).partial_cmp(&distance(b)).expect("numbers");
    let code = (0..8).min_by(by_distance).expect("eight of them");
    code | if x < 0.0 { 8 } else { 0 }
}

fn naive(f: Float, weight: &[f32]) -> Defined {
    let [experts, inputs, outputs] = SHAPE.map(|dim| dim as usize);
    let (mut codes, mut scales) = (vec![], vec![]);
    let mut values = vec![0.0; weight.len()];
    for e in 0..experts {
        for o in 0..outputs {
            for first in (0..inputs).step_by(32) {
                let at = |i: usize| (e * inputs + first + i) * outputs + o;
                let largest = (0..32).map(|i| weight[at(i)].abs()).fold(0.0, f32::max);
                let mut exponent = 0;
                if largest > 0.0 {
                    let bits = f64::from(largest).to_bits();
                    exponent = ((bits >> 52) as i32 - 1023 - 2).max(-127);
                }
                scales.push((exponent + 127) as u8);
                let scale = power_of_two(exponent);
                let nibbles: Vec<u8> =
                    (0..32).map(|i| nearest(f64::from(weight[at(i)]) / scale)).collect();
                codes.extend(nibbles.chunks(2).map(|pair| pair[0] | pair[1] << 4));
                for (i, code) in nibbles.iter().enumerate() {
                    let magnitude = E2M1[usize::from(code & 7)] * scale;
                    let value = if *code < 8 { magnitude } else { -magnitude };
                    values[at(i)] = f.round(value as f32);
                }
            }
        }
    }
    Defined { parts: vec![codes, scales], values }
}

fn chunked(scheme: Scheme, isa: Isa, data: Reals<'_>, source_bytes: u64) -> Vec<Vec<u8>> {
    let dtype = data.dtype();
    scheme.accepts(dtype, &SHAPE).expect("accepted");
    let parts = scheme.parts(dtype, &SHAPE);
    let parts = parts.iter().map(|part| vec![0xaa; part.bytes() as usize]).collect();
    let grid = scheme.grid(dtype, &SHAPE, source_bytes);
    encode_on(&grid, data, parts, |tile, out| scheme.encode(isa, tile, &Survey::default(), out))
}

/// What the parts of all experts decode to.
fn decoded(f: Float, scheme: Scheme, parts: &[Vec<u8>]) -> Vec<f32> {
    let [experts, inputs, outputs] = SHAPE.map(|dim| dim as usize);
    let expert = |e: usize| {
        let parts: Vec<Vec<u8>> = parts
            .iter()
            .map(|part| part.chunks(part.len() / experts).nth(e).expect("one each").to_vec())
            .collect();
        decode(f, scheme, (inputs, outputs), &parts)
    };
    (0..experts).flat_map(expert).collect()
}

#[test]
fn stacked_experts_are_encoded_as_defined_however_they_are_cut() {
    let len = SHAPE.iter().product::<u64>() as usize;
    for f in FLOATS {
        let weight = weight(f, 1, len, 7);
        let defined = naive(f, &weight);
        let bytes = stored(f, &weight);
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        for isa in Isa::available() {
            for source_bytes in [0, 1000, u64::MAX] {
                let parts = chunked(scheme(Quality::Reference), isa, data, source_bytes);
                assert!(parts == defined.parts, "{:?} {isa:?} {source_bytes}", f.dtype);
            }
        }
        let values = decoded(f, scheme(Quality::Reference), &defined.parts);
        assert_eq!(values, defined.values, "{:?}", f.dtype);
    }
}

#[test]
fn the_search_lessens_the_error_and_is_the_same_on_every_cpu() {
    let len = SHAPE.iter().product::<u64>() as usize;
    for f in FLOATS {
        let mut random = Random(5);
        let weight: Vec<f32> = (0..len).map(|_| f.round(random.normal() * 0.02)).collect();
        let bytes = stored(f, &weight);
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        let found = chunked(scheme(Quality::Search), Isa::detect(), data, u64::MAX);
        for isa in Isa::available() {
            assert!(chunked(scheme(Quality::Search), isa, data, 1000) == found, "{isa:?}");
        }
        let error = |parts: &[Vec<u8>]| -> f64 {
            let values = decoded(f, scheme(Quality::Search), parts);
            weight.iter().zip(values).map(|(x, y)| f64::from(x - y).powi(2)).sum()
        };
        let reference = chunked(scheme(Quality::Reference), Isa::detect(), data, 0);
        assert!(error(&found) < 0.97 * error(&reference), "{:?}", f.dtype);
    }
}

#[test]
fn a_number_that_is_none_spoils_its_group_alone() {
    let [_, inputs, outputs] = SHAPE.map(|dim| dim as usize);
    let len = SHAPE.iter().product::<u64>() as usize;
    for f in FLOATS {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for quality in [Quality::Reference, Quality::Search] {
                let mut weight = vec![0.5; len];
                let (row, col) = (inputs + 40, 77);
                weight[row * outputs + col] = odd;
                let bytes = stored(f, &weight);
                let data = Reals::new(f.dtype, &bytes).expect("a float type");
                for isa in Isa::available() {
                    let parts = chunked(scheme(quality), isa, data, u64::MAX);
                    for (i, x) in decoded(f, scheme(quality), &parts).iter().enumerate() {
                        let spoilt = i % outputs == col && i / outputs / 32 == row / 32;
                        assert_eq!(x.is_nan(), spoilt, "{odd} {isa:?} at {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn experts_that_groups_do_not_divide_are_refused() {
    #[track_caller]
    fn check(shape: &[u64], complaint: &str) {
        let refused = scheme(Quality::Search).accepts(Dtype::BF16, shape);
        assert_eq!(refused.expect_err("refused"), complaint);
    }
    check(&[4, 48, 64], "groups of 32 do not divide 48 input features");
    check(&[64, 64], "shape [64, 64] is not one of stacked matrices");
    check(&[0, 64, 64], "shape [0, 64, 64] has no elements");
}
