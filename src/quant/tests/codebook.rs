//! bitsandbytes' codes against naive definitions.

use super::*;

fn scheme(codebook: Codebook, block_size: u32, quality: Quality) -> Scheme {
    Scheme::Codebook(CodebookScheme { codebook, block_size, storage: Storage::U8, quality })
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
