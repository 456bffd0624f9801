//! bitsandbytes' codes against naive definitions.

use super::*;

fn scheme(codebook: Codebook, block_size: u32, quality: Quality) -> Scheme {
    let (storage, double) = (Storage::U8, false);
    Scheme::Codebook(CodebookScheme { codebook, block_size, storage, double, quality })
}

fn naive_four_bits(f: Float, codebook: Codebook, block: usize, weight: &[f32]) -> Defined {
    let table = codebook.table();
    let mut order: Vec<usize> = (0..16).collect();
    order.sort_by(|&a, &b| table[a].partial_cmp(&table[b]).expect("numbers"));
    let (mut codes, mut scales, mut values) = (vec![], vec![], vec![]);
    for xs in weight.chunks(block) {
        let largest = xs.iter().fold(0f32, |m, &x| m.max(x.abs()));
        scales.extend(largest.to_le_bytes());
        let reciprocal = 1.0 / largest.max(1e-38);
        for &x in xs {
            let y = (x * reciprocal).clamp(-1.0, 1.0);
            let below = order.windows(2).filter(|w| (table[w[0]] + table[w[1]]) / 2.0 < y);
            let code = order[below.count()];
            codes.push(code as u8);
            values.push(f.round(table[code] * largest));
        }
    }
    let packed = codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    Defined { parts: vec![packed, scales], values }
}

#[test]
fn entries_of_tables_are_as_defined() {
    for f in FLOATS {
        for codebook in [Codebook::Nf4, Codebook::Fp4] {
            // Blocks within rows, across rows, and a last one that is short.
            for (block, shape, run) in
                [(64, (33, 128), 64), (64, (9, 100), 20), (128, (5, 70), 35), (4096, (3, 60), 20)]
            {
                let weight = weight(f, 1, shape.0 * shape.1, run);
                let defined = naive_four_bits(f, codebook, block as usize, &weight);
                let scheme = scheme(codebook, block, Quality::Reference);
                check(f, scheme, shape, &weight, &defined);
            }
        }
    }
}

/// The table by its definition, the boundaries of its decades in f64.
fn naive_scales() -> Vec<f32> {
    let mut table = vec![0.0, 1.0];
    for (decade, power) in [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
        let count = 1 << decade;
        for i in 0..count {
            let middle = 0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(count);
            let entry = (f64::from(power) * middle) as f32;
            table.extend([entry, -entry]);
        }
    }
    table.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
    table
}

#[test]
fn entries_for_scales_are_as_defined_but_for_rounding() {
    let naive = naive_scales();
    assert_eq!(naive.len(), 256);
    for (entry, naive) in nested::TABLE.iter().zip(naive) {
        assert!((entry - naive).abs() <= naive.abs() * 3e-7, "{entry} is not {naive}");
    }
}

#[test]
fn quantized_scales_are_as_defined() {
    for f in FLOATS {
        for codebook in [Codebook::Nf4, Codebook::Fp4] {
            // Less than 256 scales, several times 256, and a last block that is short.
            for (block, shape) in [(64, (33, 128)), (64, (260, 128)), (32, (101, 100))] {
                let mut random = Random(11);
                let weight: Vec<f32> = (0..shape.0 * shape.1)
                    .map(|i| f.round(random.normal() * 0.02 * (1.0 + (i / 1000 % 7) as f32)))
                    .collect();
                let plain = naive_four_bits(f, codebook, block as usize, &weight);
                let scales: Vec<f32> =
                    plain.parts[1].as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
                let sum: f64 = scales.iter().map(|scale| f64::from(*scale)).sum();
                let offset = (sum / scales.len() as f64) as f32;
                let (mut codes, mut largest, mut decoded) = (vec![], vec![], vec![]);
                for scales in scales.chunks(256) {
                    let n = scales.iter().fold(0f32, |n, scale| n.max((scale - offset).abs()));
                    largest.extend(n.to_le_bytes());
                    for scale in scales {
                        let y = (scale - offset) * (1.0 / n);
                        let below =
                            nested::TABLE.windows(2).filter(|pair| (pair[0] + pair[1]) / 2.0 < y);
                        let code = below.count();
                        codes.push(code as u8);
                        decoded.push(nested::TABLE[code] * n + offset);
                    }
                }
                let values = (0..weight.len())
                    .map(|i| {
                        let code = plain.parts[0][i / 2] >> (4 - i % 2 * 4) & 15;
                        let scale = decoded[i / block as usize];
                        f.round(codebook.table()[usize::from(code)] * scale)
                    })
                    .collect();
                let parts =
                    vec![plain.parts[0].clone(), codes, largest, offset.to_le_bytes().into()];
                let scheme = Scheme::Codebook(CodebookScheme {
                    codebook,
                    block_size: block,
                    storage: Storage::U8,
                    double: true,
                    quality: Quality::Reference,
                });
                check(f, scheme, shape, &weight, &Defined { parts, values });
            }
        }
    }
}

#[test]
fn a_midpoint_belongs_to_the_lower_entry() {
    let f = FLOATS[2];
    for codebook in [Codebook::Nf4, Codebook::Fp4] {
        let mut table = codebook.table();
        table.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
        let mut weight: Vec<f32> = table.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        weight.push(1.0);
        weight.resize(64, 0.0);
        let defined = naive_four_bits(f, codebook, 64, &weight);
        check(f, scheme(codebook, 64, Quality::Reference), (1, 64), &weight, &defined);
        assert_eq!(defined.values[..15], table[..15]);
    }
}

#[test]
fn any_nan_spoils_its_block_whatever_its_lower_bits() {
    let mut bytes: Vec<u8> = [0.5f32; 128].into_iter().flat_map(f32::to_le_bytes).collect();
    bytes[7 * 4..][..4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    for codebook in [Codebook::Nf4, Codebook::Fp4] {
        for quality in [Quality::Reference, Quality::Search] {
            let scheme = scheme(codebook, 64, quality);
            let parts = encode(scheme, Isa::detect(), Reals::F32(&bytes), (1, 128), u64::MAX);
            let decoded = decode(FLOATS[2], scheme, (1, 128), &parts);
            assert!(decoded[..64].iter().all(|x| x.is_nan()), "{scheme}");
            assert_eq!(decoded[64..], [0.5; 64], "{scheme}");
        }
    }
}

/// The F16 that is nearest.
fn half_of(x: f32) -> f32 {
    FLOATS[1].round(x)
}

#[test]
fn rows_of_int8_are_as_defined() {
    for f in FLOATS {
        for (rows, cols) in [(33, 1), (16, 100), (32, 257)] {
            let weight = weight(f, rows, cols, cols);
            let (mut codes, mut scales, mut values) = (vec![], vec![], vec![]);
            for xs in weight.chunks(cols) {
                let largest = xs.iter().fold(0f32, |m, &x| m.max(half_of(x).abs()));
                scales.extend(largest.to_le_bytes());
                let factor = 1.0 / largest * 127.0;
                for &x in xs {
                    let q = if largest.is_finite() { half_of(x) * factor } else { 0.0 };
                    // NaN becomes 0.
                    let q = q.round_ties_even() as i8;
                    codes.push(q as u8);
                    values.push(f.round(f32::from(q) * largest * (1.0 / 127.0)));
                }
            }
            let defined = Defined { parts: vec![codes, scales], values };
            check(f, Scheme::LlmInt8(LlmInt8Scheme), (rows, cols), &weight, &defined);
        }
    }
}
