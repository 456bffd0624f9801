//! Affine codes against a naive definition.

use super::*;

fn naive(f: Float, scheme: AffineScheme, (rows, cols): (usize, usize), weight: &[f32]) -> Defined {
    let high = ((1u32 << scheme.bits) - 1) as f32;
    let (mut codes, mut scales, mut biases, mut values) = (vec![], vec![], vec![], vec![]);
    for xs in weight.chunks(scheme.group_size as usize) {
        let min = xs.iter().fold(f32::INFINITY, |m, &x| m.min(x));
        let max = xs.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
        let mut scale = f32::max((max - min) / high, 1e-7);
        let mut edge = min;
        if min.abs() <= max.abs() {
            (scale, edge) = (-scale, max);
        }
        let mut bias = 0.0;
        let steps = (edge / scale).round_ties_even();
        if steps != 0.0 {
            (scale, bias) = (edge / steps, edge);
        }
        let stored = (f.round(scale), f.round(bias));
        scales.extend(f.store(stored.0));
        biases.extend(f.store(stored.1));
        for &x in xs {
            let q = ((x - bias) / scale).round_ties_even().clamp(0.0, high);
            codes.push(q as i32);
            values.push(f.round(f.round(q * stored.0) + stored.1));
        }
    }
    // The stream is of codes with an offset.
    let half = 1 << (scheme.bits - 1);
    assert_eq!(codes.len(), rows * cols);
    let packed = codes
        .chunks(cols)
        .flat_map(|row| bit_stream(scheme.bits, row.iter().map(|q| q - half)))
        .collect();
    Defined { parts: vec![packed, scales, biases], values }
}

#[test]
fn affine_codes_are_as_defined() {
    for f in FLOATS {
        for bits in [2, 3, 4, 5, 6, 8] {
            for group_size in [32, 64, 128] {
                let scheme = AffineScheme { bits, group_size, quality: Quality::Reference };
                let shape = (37, 3 * group_size as usize);
                let weight = weight(f, shape.0, shape.1, group_size as usize);
                let defined = naive(f, scheme, shape, &weight);
                check(f, Scheme::Affine(scheme), shape, &weight, &defined);
            }
        }
    }
}

#[test]
fn the_largest_magnitude_and_zero_are_exact() {
    let f = FLOATS[2];
    let scheme = AffineScheme { bits: 3, group_size: 32, quality: Quality::Reference };
    let mut weight: Vec<f32> = (0..32).map(|i| i as f32 * 0.03 - 0.3).collect();
    weight[5] = 0.0;
    let bytes = stored(f, &weight);
    let parts = encode(Scheme::Affine(scheme), Isa::detect(), Reals::F32(&bytes), (1, 32), 0);
    let decoded = decode(f, Scheme::Affine(scheme), (1, 32), &parts);
    assert_eq!((decoded[31], decoded[5]), (weight[31], 0.0));
}
