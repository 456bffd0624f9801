//! GPTQ's and AWQ's codes against a naive definition.

use super::*;

/// One of the scheme's groups of a row.
struct Group {
    scale: f32,
    zero: u32,
    codes: Vec<u32>,
}

fn naive_group(bits: u8, symmetric: bool, xs: &[f32]) -> Group {
    let levels = (1u32 << bits) - 1;
    let mut min = xs.iter().fold(0f32, |m, &x| m.min(x));
    let mut max = xs.iter().fold(0f32, |m, &x| m.max(x));
    if symmetric {
        max = max.max(-min);
        min = if min < 0.0 { -max } else { min };
    }
    if min == 0.0 && max == 0.0 {
        (min, max) = (-1.0, 1.0);
    }
    let scale = (max - min) / levels as f32;
    let zero = (-min / scale).round_ties_even().min(levels as f32);
    // Of a scale that rounds to zero there is no telling.
    let middle = symmetric || scale == 0.0 && min == 0.0;
    let zero = if middle { 1 << (bits - 1) } else { zero as u32 };
    let code = |x: f32| {
        let q = (x / scale).round_ties_even();
        let q = if q.is_nan() { 0.0 } else { f64::from(q) } + f64::from(zero);
        q.clamp(0.0, f64::from(levels)) as u32
    };
    Group { scale, zero, codes: xs.iter().map(|&x| code(x)).collect() }
}

/// Fields of `bits` bits one after the other, lowest bit first.
fn stream(bits: u8, fields: impl Iterator<Item = u32>) -> Vec<u32> {
    let bits: Vec<u32> = fields.flat_map(|x| (0..bits).map(move |i| x >> i & 1)).collect();
    bits.chunks(32).map(|word| word.iter().rev().fold(0, |w, bit| w << 1 | bit)).collect()
}

/// A word for every eight fields, the even ones below.
fn gemm(fields: impl Iterator<Item = u32>) -> Vec<u32> {
    let fields: Vec<u32> = fields.collect();
    let word = |eight: &[u32]| {
        let place = |i: usize| 4 * (i / 2 + i % 2 * 4);
        eight.iter().enumerate().fold(0, |w, (i, x)| w | x << place(i))
    };
    fields.chunks(8).map(word).collect()
}

fn naive(f: Float, s: TransposedScheme, (rows, cols): (usize, usize), weight: &[f32]) -> Defined {
    let size = match s.granularity {
        Granularity::Group(size) => size as usize,
        Granularity::Channel => cols,
    };
    let groups: Vec<Vec<Group>> = weight
        .chunks(cols)
        .map(|row| row.chunks(size).map(|xs| naive_group(s.bits, s.symmetric, xs)).collect())
        .collect();
    let code = |r: usize, c: usize| groups[r][c / size].codes[c % size];
    let codes: Vec<u32> = if s.order == TransposedOrder::AwqGemm {
        (0..cols).flat_map(|c| gemm((0..rows).map(|r| code(r, c)))).collect()
    } else {
        let columns: Vec<Vec<u32>> =
            (0..rows).map(|r| stream(s.bits, (0..cols).map(|c| code(r, c)))).collect();
        (0..columns[0].len()).flat_map(|w| columns.iter().map(move |column| column[w])).collect()
    };
    let zeros = (0..cols / size).flat_map(|g| {
        let zeros = groups.iter().map(move |row| row[g].zero);
        match s.order {
            TransposedOrder::AwqGemm => gemm(zeros),
            TransposedOrder::GptqV2 => stream(s.bits, zeros),
            TransposedOrder::GptqV1 if s.bits == 3 => stream(3, zeros.map(|z| z.wrapping_sub(1))),
            TransposedOrder::GptqV1 => {
                let ones = stream(s.bits, std::iter::repeat_n(1, 32 / usize::from(s.bits)))[0];
                stream(s.bits, zeros).iter().map(|word| word.wrapping_sub(ones)).collect()
            }
        }
    });
    let half = FLOATS[1];
    let scales: Vec<u8> = (0..cols / size)
        .flat_map(|g| groups.iter().flat_map(move |row| half.store(half.round(row[g].scale))))
        .collect();
    let values = (0..rows * cols)
        .map(|i| {
            let (r, c) = (i / cols, i % cols);
            let Group { scale, zero, .. } = groups[r][c / size];
            f.round((code(r, c) as f32 - zero as f32) * half.round(scale))
        })
        .collect();
    let bytes = |words: Vec<u32>| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Defined { parts: vec![bytes(codes), scales, bytes(zeros.collect())], values }
}

pub(super) fn schemes(quality: Quality) -> Vec<TransposedScheme> {
    let of = |scheme| match scheme {
        Scheme::Transposed(scheme) => Some(scheme),
        _ => None,
    };
    examples(quality, 32).into_iter().filter_map(of).collect()
}

#[test]
fn transposed_codes_are_as_defined_at_any_height() {
    for f in FLOATS {
        for scheme in schemes(Quality::Reference) {
            for (group, groups, rows) in
                [(32, 3, 32), (64, 1, 160), (128, 2, 96), (32, 5, 288), (96, 2, 64)]
            {
                let shape = (rows, groups * group);
                let granularity = Granularity::Group(group as u32);
                let scheme = TransposedScheme { granularity, ..scheme };
                let weight = weight(f, shape.0, shape.1, group);
                let defined = naive(f, scheme, shape, &weight);
                check(f, Scheme::Transposed(scheme), shape, &weight, &defined);
            }
            let (shape, granularity) = ((64, 160), Granularity::Channel);
            let scheme = TransposedScheme { granularity, ..scheme };
            let weight = weight(f, shape.0, shape.1, shape.1);
            let defined = naive(f, scheme, shape, &weight);
            check(f, Scheme::Transposed(scheme), shape, &weight, &defined);
        }
    }
}

/// A tile may be fewer rows than the weight's, of any number.
#[test]
fn a_band_of_rows_is_encoded_and_decoded_as_a_weight_of_its_own() {
    let f = FLOATS[0];
    for scheme in schemes(Quality::Reference).into_iter().chain(schemes(Quality::Search)) {
        let scheme = Scheme::Transposed(scheme);
        let (rows, cols) = (64, 96);
        let weight = weight(f, rows, cols, 32);
        let bytes = stored(f, &weight);
        let tile = |first: usize, rows: usize| {
            let data = &bytes[first * cols * 2..];
            let data = Reals::new(f.dtype, data).expect("a float type");
            let mut parts: Vec<Vec<u8>> = scheme
                .parts(f.dtype, &[rows as u64, cols as u64])
                .iter()
                .map(|part| vec![0xaa; part.bytes() as usize])
                .collect();
            let mut out: Vec<&mut [u8]> = parts.iter_mut().map(|part| &mut part[..]).collect();
            scheme.encode(
                Isa::detect(),
                &Tile { data, rows, cols, stride: cols, importance: None },
                &Survey::default(),
                &mut out,
            );
            decode(f, scheme, (rows, cols), &parts)
        };
        let whole = tile(0, rows);
        let mut banded = tile(0, 5);
        banded.extend(tile(5, 16));
        banded.extend(tile(21, 43));
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(whole.iter().zip(&banded).all(same), "{scheme:?}");
    }
}

#[test]
fn windows_of_whole_channels_are_bounded() {
    let shape = [4096, 8192];
    for scheme in schemes(Quality::Search) {
        let granularity = Granularity::Channel;
        let scheme = Scheme::Transposed(TransposedScheme { granularity, ..scheme });
        let most = |grid: Grid| {
            let bytes = |window: Window| window.rows * window.cols * 2;
            (0..grid.chunks()).map(|k| bytes(grid.window(k))).max()
        };
        assert_eq!(most(scheme.survey_grid(Dtype::BF16, &shape, 1 << 20)), Some(1 << 20));
        assert_eq!(most(scheme.grid(Dtype::BF16, &shape, 1 << 20)), Some(8 << 20));
        assert_eq!(most(scheme.grid(Dtype::BF16, &shape, 1)), Some(4096 * 32 * 2), "the least");
    }
}

#[test]
fn the_search_has_no_zero_that_borrows_in_version_1() {
    let f = FLOATS[0];
    let shape = (32, 64);
    let mut random = Random(3);
    let weight: Vec<f32> =
        (0..shape.0 * shape.1).map(|_| f.round(random.normal().abs() + 0.1)).collect();
    let bytes = stored(f, &weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    let zeros = |order| {
        let granularity = Granularity::Group(32);
        let quality = Quality::Search;
        let scheme = TransposedScheme { bits: 4, granularity, symmetric: false, order, quality };
        encode(Scheme::Transposed(scheme), Isa::detect(), data, shape, u64::MAX).swap_remove(2)
    };
    assert!(zeros(TransposedOrder::GptqV1).iter().all(|&byte| byte == 0), "zeros of 1, less 1");
    assert!(zeros(TransposedOrder::GptqV2).contains(&0), "zeros of 0");
}

#[test]
fn what_packing_and_kernels_do_not_take_is_refused() {
    #[track_caller]
    fn check(bits: u8, group: u32, shape: [u64; 2], complaint: Option<&str>) {
        let order = TransposedOrder::GptqV1;
        let granularity = Granularity::Group(group);
        let scheme = TransposedScheme {
            bits,
            granularity,
            symmetric: true,
            order,
            quality: Quality::Search,
        };
        let outcome = Scheme::Transposed(scheme).accepts(Dtype::BF16, &shape);
        assert_eq!(outcome.err().as_deref(), complaint);
    }
    check(4, 128, [64, 256], None);
    check(5, 128, [64, 256], Some("5 bits are not among [2, 3, 4, 8]"));
    check(4, 48, [64, 96], Some("group size 48 is not a multiple of 32"));
    check(4, 128, [64, 320], Some("group size 128 does not divide 320 input features"));
    check(4, 32, [40, 64], Some("40 output features are not a multiple of 32"));
}
