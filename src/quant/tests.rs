//! Integer schemes against a naive definition, on every instruction set.

mod affine;
mod best;
mod codebook;
mod every;
mod experts;
mod floats;
mod importance;
mod transposed;

use std::sync::LazyLock;

use super::*;

/// A binary floating-point format, by its parameters.
#[derive(Clone, Copy)]
struct Float {
    dtype: Dtype,
    /// Bits of the significand, the hidden one included.
    precision: i32,
    /// Exponent of the smallest normal number.
    min_exponent: i32,
    /// The largest finite number.
    max: f64,
    epsilon: f32,
}

const FLOATS: [Float; 3] = [
    Float {
        dtype: Dtype::BF16,
        precision: 8,
        min_exponent: -126,
        max: 3.3895313892515355e38,
        epsilon: 0.0078125,
    },
    Float {
        dtype: Dtype::F16,
        precision: 11,
        min_exponent: -14,
        max: 65504.0,
        epsilon: 0.0009765625,
    },
    Float {
        dtype: Dtype::F32,
        precision: 24,
        min_exponent: -126,
        max: f32::MAX as f64,
        epsilon: 1.1920929e-7,
    },
];

fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

impl Float {
    /// Nearest, ties to even: to a whole number of the spacing at `x`.
    fn round(self, x: f32) -> f32 {
        let x = f64::from(x);
        if x.is_nan() || x.is_infinite() || x == 0.0 {
            return x as f32;
        }
        let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        let spacing = power_of_two(exponent.max(self.min_exponent) - self.precision + 1);
        let rounded = (x / spacing).round_ties_even() * spacing;
        if rounded.abs() > self.max { f32::INFINITY.copysign(x as f32) } else { rounded as f32 }
    }

    /// The stored bytes of `x`, a value of the format.
    fn store(self, x: f32) -> impl Iterator<Item = u8> {
        static HALVES: LazyLock<Vec<f64>> = LazyLock::new(|| (0..=0x7c00).map(half).collect());
        let bits = match self.dtype {
            Dtype::F32 if x.is_nan() => 0x7fc0_0000,
            Dtype::BF16 if x.is_nan() => 0x7fc0,
            Dtype::F16 if x.is_nan() => 0x7e00,
            Dtype::F32 => x.to_bits(),
            Dtype::BF16 => x.to_bits() >> 16,
            _ => {
                let magnitude = f64::from(x.abs());
                let bits = HALVES.partition_point(|half| *half < magnitude);
                assert_eq!(HALVES[bits], magnitude, "{x} is a value of the format");
                bits as u32 | if x.is_sign_negative() { 0x8000 } else { 0 }
            }
        };
        bits.to_le_bytes().into_iter().take(self.dtype.bitsize() / 8)
    }
}

/// The value of a binary16 pattern.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * power_of_two(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * power_of_two(exponent - 25),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

struct Naive {
    codes: Vec<i32>,
    scales: Vec<f32>,
    zero_points: Vec<i32>,
}

/// compressed-tensors' arithmetic, one operation and one rounding at a time.
fn naive(f: Float, bits: u8, symmetric: bool, group: usize, weight: &[f32]) -> Naive {
    let (low, high) = (-f32::from(1u8 << (bits - 1)), f32::from((1u8 << (bits - 1)) - 1));
    let mut out = Naive { codes: vec![], scales: vec![], zero_points: vec![] };
    for xs in weight.chunks(group) {
        let nan = xs.iter().any(|x| x.is_nan());
        let min = xs.iter().fold(0f32, |m, &x| m.min(x));
        let max = xs.iter().fold(0f32, |m, &x| m.max(x));
        let (scale, zero) = if nan {
            (f32::NAN, 0.0)
        } else if symmetric {
            (f.round(f32::max(-min, max) / ((high - low) / 2.0)), 0.0)
        } else {
            let scale = f.round(f.round(max - min) / (high - low));
            let zero = f.round(low - f.round(min / scale));
            (scale, if zero.is_nan() { 0.0 } else { zero.max(low).min(high).round_ties_even() })
        };
        let scale = if scale == 0.0 { f.epsilon } else { scale };
        out.scales.push(scale);
        out.zero_points.push(zero as i32);
        for &x in xs {
            let mut q = f.round(x / scale);
            if !symmetric {
                q = f.round(q + zero);
            }
            // NaN becomes 0.
            out.codes.push(q.clamp(low, high).round_ties_even() as i32);
        }
    }
    out
}

/// `codes`, offset to be non-negative, in bits one after the other.
fn bit_stream(bits: u8, codes: impl Iterator<Item = i32>) -> Vec<u8> {
    let mut stream: Vec<bool> = codes
        .map(|q| (q + (1 << (bits - 1))) as u32)
        .flat_map(|u| (0..bits).map(move |i| u >> i & 1 == 1))
        .collect();
    stream.resize(stream.len().next_multiple_of(32), false);
    stream
        .chunks(8)
        .map(|byte| byte.iter().rev().fold(0, |b, &bit| b << 1 | u8::from(bit)))
        .collect()
}

impl Naive {
    /// The parts as stored.
    fn parts(&self, f: Float, scheme: IntScheme, rows: usize) -> Vec<Vec<u8>> {
        let scales: Vec<u8> = self.scales.iter().flat_map(|&s| f.store(s)).collect();
        let groups = self.scales.len() / rows;
        let bytes = |codes: &[i32]| codes.iter().map(|&q| q as u8).collect::<Vec<_>>();
        let (codes, zeros) = match scheme.packing {
            Packing::Int8 => (bytes(&self.codes), bytes(&self.zero_points)),
            Packing::Packed32 => {
                let cols = self.codes.len() / rows;
                let rows_of = self.codes.chunks(cols);
                let codes =
                    rows_of.flat_map(|r| bit_stream(scheme.bits, r.iter().copied())).collect();
                let columns: Vec<Vec<u8>> = (0..groups)
                    .map(|g| {
                        let column = self.zero_points[g..].iter().step_by(groups);
                        bit_stream(scheme.bits, column.copied())
                    })
                    .collect();
                let words = columns[0].len() / 4;
                let zeros = (0..words)
                    .flat_map(|w| columns.iter().flat_map(move |c| c[w * 4..][..4].to_vec()))
                    .collect();
                (codes, zeros)
            }
        };
        if scheme.symmetric { vec![codes, scales] } else { vec![codes, scales, zeros] }
    }
}

/// A reproducible stream of numbers in [0, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / 16_777_216.0
    }

    /// Roughly normal, of unit variance.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.next()).sum::<f32>() - 6.0
    }
}

/// A weight whose groups have many scales, and among them what is rare: zeros, one sign, single
/// values, outliers, the smallest and largest numbers.
fn weight(f: Float, rows: usize, cols: usize, group: usize) -> Vec<f32> {
    let mut random = Random(u64::from(f.precision.unsigned_abs()) + (rows * cols) as u64);
    let tiny = power_of_two(f.min_exponent - f.precision + 1) as f32;
    let mut out = Vec::with_capacity(rows * cols);
    for g in 0..rows * cols / group {
        for i in 0..group {
            let x = random.normal();
            let x = match g % 16 {
                0 => 0.0,
                1 => x.abs(),
                2 => -x.abs(),
                3 => 0.37,
                4 if i == 0 => x * 100.0,
                5 => (x * 3.0).trunc() * tiny,
                6 => x * tiny,
                7 => x * 0.1 * f.max as f32,
                8 => -0.0,
                9 => x.abs() * 40.0 * tiny,
                10 => 3.0 + x * 0.01,
                11 if i > 0 => 0.0,
                _ => x * 0.02,
            };
            out.push(f.round(x));
        }
    }
    out
}

fn stored(f: Float, weight: &[f32]) -> Vec<u8> {
    weight.iter().flat_map(|&x| f.store(x)).collect()
}

fn all_schemes(quality: Quality) -> Vec<IntScheme> {
    let mut out = vec![];
    for packing in [Packing::Packed32, Packing::Int8] {
        for bits in 2..=8 {
            for symmetric in [true, false] {
                let granularity = Granularity::Channel;
                out.push(IntScheme { bits, granularity, symmetric, packing, quality });
            }
        }
    }
    out
}

/// Encodes `rows` x `cols` elements chunk by chunk: the parts, and the scalar if there is one.
fn encode(
    scheme: impl Into<Scheme>,
    isa: Isa,
    data: Reals<'_>,
    (rows, cols): (usize, usize),
    source_bytes: u64,
) -> Vec<Vec<u8>> {
    let (scheme, shape) = (scheme.into(), [rows as u64, cols as u64]);
    let dtype = data.dtype();
    scheme.accepts(dtype, &shape).expect("the scheme takes this shape");
    let parts =
        scheme.parts(dtype, &shape).iter().map(|p| vec![0xaa; p.bytes() as usize]).collect();
    let grid = scheme.grid(dtype, &shape, source_bytes);
    let survey = survey_of(scheme, isa, data, &shape, source_bytes, None);
    let mut parts =
        encode_on(&grid, data, parts, |tile, out| scheme.encode(isa, tile, &survey, out));
    parts.extend(scheme.scalar(dtype).map(|_| scheme.scalar_bytes(dtype, &survey)));
    parts
}

/// The source of one chunk.
fn tile_of<'a>(grid: &Grid, data: Reals<'a>, chunk: u64) -> Tile<'a> {
    let (_, width) = grid.view();
    let window = grid.window(chunk);
    let first = window.first_row * width + window.first_col;
    Tile {
        data: data.skip(first as usize * data.dtype().bitsize() / 8),
        rows: window.rows as usize,
        cols: window.cols as usize,
        stride: width as usize,
        importance: None,
    }
}

/// The survey of a weight, in windows of about `source_bytes`, with what its errors count for.
fn survey_of(
    scheme: Scheme,
    isa: Isa,
    data: Reals<'_>,
    shape: &[u64],
    source_bytes: u64,
    importance: Option<Importance<'_>>,
) -> Survey {
    let mut survey = Survey::default();
    if scheme.is_surveyed() {
        let grid = scheme.survey_grid(data.dtype(), shape, source_bytes);
        for k in 0..grid.chunks() {
            let (_, first) = scheme.first_input(shape, &grid.window(k));
            let importance = importance.map(|importance| importance.starting_at(first as usize));
            scheme.survey(isa, &Tile { importance, ..tile_of(&grid, data, k) }, &mut survey);
        }
    }
    survey
}

/// Has `encode` fill in `parts` chunk by chunk.
fn encode_on(
    grid: &Grid,
    data: Reals<'_>,
    mut parts: Vec<Vec<u8>>,
    encode: impl Fn(&Tile<'_>, &mut [&mut [u8]]),
) -> Vec<Vec<u8>> {
    for k in 0..grid.chunks() {
        let mut out: Vec<_> = parts
            .iter_mut()
            .enumerate()
            .map(|(p, part)| {
                let range = grid.range(p, k);
                &mut part[range.start as usize..range.end as usize]
            })
            .collect();
        encode(&tile_of(grid, data, k), &mut out);
    }
    parts
}

impl From<IntScheme> for Scheme {
    fn from(scheme: IntScheme) -> Self {
        Self::Int(scheme)
    }
}

fn decode(f: Float, scheme: Scheme, shape: (usize, usize), parts: &[Vec<u8>]) -> Vec<f32> {
    let mut decoded = vec![0.0; shape.0 * shape.1];
    let parts: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
    scheme.decode(f.dtype, shape, &parts, &mut decoded);
    decoded
}

/// What a weight is encoded to by definition, and then decoded to.
struct Defined {
    parts: Vec<Vec<u8>>,
    values: Vec<f32>,
}

#[track_caller]
fn check(f: Float, scheme: Scheme, shape: (usize, usize), weight: &[f32], defined: &Defined) {
    let bytes = stored(f, weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    for isa in Isa::available() {
        let parts = encode(scheme, isa, data, shape, u64::MAX);
        for (p, (part, expected)) in parts.iter().zip(&defined.parts).enumerate() {
            let difference = part.iter().zip(expected).position(|(a, b)| a != b);
            assert_eq!(difference, None, "part {p} of {scheme:?}, {:?}, {isa:?}", f.dtype);
            assert_eq!(part.len(), expected.len(), "part {p} of {scheme:?}, {:?}", f.dtype);
        }
    }
    let decoded = decode(f, scheme, shape, &defined.parts);
    for (i, (x, expected)) in decoded.iter().zip(&defined.values).enumerate() {
        let same = x.to_bits() == expected.to_bits() || x.is_nan() && expected.is_nan();
        assert!(same, "element {i} of {scheme:?}, {:?}: {x}, not {expected}", f.dtype);
    }
}

#[track_caller]
fn check_reference(f: Float, scheme: IntScheme, (rows, cols): (usize, usize), weight: &[f32]) {
    let group = match scheme.granularity {
        Granularity::Group(size) => size as usize,
        Granularity::Channel => cols,
    };
    let bytes = stored(f, weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    let naive = naive(f, scheme.bits, scheme.symmetric, group, weight);
    let expected = naive.parts(f, scheme, rows);
    for isa in Isa::available() {
        let parts = encode(scheme, isa, data, (rows, cols), u64::MAX);
        for (p, (part, expected)) in parts.iter().zip(&expected).enumerate() {
            let difference = part.iter().zip(expected).position(|(a, b)| a != b);
            assert_eq!(difference, None, "part {p} of {scheme:?}, {:?}, {isa:?}", f.dtype);
            assert_eq!(part.len(), expected.len(), "part {p} of {scheme:?}, {:?}", f.dtype);
        }
    }
    let mut decoded = vec![0.0; weight.len()];
    let parts: Vec<&[u8]> = expected.iter().map(|p| &p[..]).collect();
    Scheme::Int(scheme).decode(f.dtype, (rows, cols), &parts, &mut decoded);
    for (i, &x) in decoded.iter().enumerate() {
        let (scale, zero) = (naive.scales[i / group], naive.zero_points[i / group]);
        let expected = f.round((naive.codes[i] - zero) as f32 * scale);
        assert_eq!(x.to_bits(), expected.to_bits(), "element {i} of {scheme:?}, {:?}", f.dtype);
    }
}

#[test]
fn every_scheme_and_element_type_encodes_as_defined_at_any_width() {
    let widths = [(1, 70), (3, 35), (7, 35), (32, 40), (128, 40), (200, 33)];
    for f in FLOATS {
        for scheme in all_schemes(Quality::Reference) {
            for (group, rows) in widths {
                let cols = 3 * group;
                let granularity = Granularity::Group(group as u32);
                let weight = weight(f, rows, cols, group);
                check_reference(f, IntScheme { granularity, ..scheme }, (rows, cols), &weight);
            }
            for (cols, rows) in [(1, 33), (13, 64), (257, 20)] {
                check_reference(f, scheme, (rows, cols), &weight(f, rows, cols, cols));
            }
        }
    }
}

/// One binade of scales stands for all, so this is every quotient that a BF16 weight can have, each
/// of them in a group of two (the tail of a kernel) and in a long one (its body).
#[test]
fn every_bf16_quotient_is_rounded_as_defined() {
    let bf16 = FLOATS[0];
    let value = |pattern: u32| f32::from_bits(pattern << 16);
    for scheme in all_schemes(Quality::Reference) {
        if scheme.packing == Packing::Int8 {
            continue;
        }
        for largest in 0x3d00..0x3d80 {
            let smallest = largest - 11 * 128;
            let xs = (smallest..=largest).flat_map(|x| [value(x), -value(x)]);
            let pairs: Vec<f32> = xs.clone().flat_map(|x| [value(largest), x]).collect();
            let granularity = Granularity::Group(2);
            let shape = (1, pairs.len());
            check_reference(bf16, IntScheme { granularity, ..scheme }, shape, &pairs);
            let row: Vec<f32> = xs.collect();
            check_reference(bf16, scheme, (1, row.len()), &row);
        }
    }
}

#[test]
fn nan_and_infinity_spoil_their_group_and_no_other() {
    for f in FLOATS {
        for quality in [Quality::Reference, Quality::Search] {
            for scheme in all_schemes(quality) {
                for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut weight = vec![0.5; 3 * 48];
                    weight[48 + 17] = odd;
                    let scheme = IntScheme { granularity: Granularity::Group(48), ..scheme };
                    let bytes = stored(f, &weight);
                    let data = Reals::new(f.dtype, &bytes).expect("a float type");
                    for isa in Isa::available() {
                        let parts = encode(scheme, isa, data, (1, weight.len()), 0);
                        let same = naive(f, scheme.bits, scheme.symmetric, 48, &weight);
                        if quality == Quality::Reference {
                            assert_eq!(parts, same.parts(f, scheme, 1), "{odd} {scheme:?} {isa:?}");
                        }
                        let mut decoded = vec![0.0; weight.len()];
                        let parts: Vec<_> = parts.iter().map(|p| &p[..]).collect();
                        Scheme::Int(scheme).decode(
                            f.dtype,
                            (1, weight.len()),
                            &parts,
                            &mut decoded,
                        );
                        assert!(!decoded[48 + 17].is_finite(), "{odd} {scheme:?}");
                        let others = decoded[..48].iter().chain(&decoded[96..]);
                        assert!(others.into_iter().all(|x| x.is_finite()), "{odd} {scheme:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn chunks_make_the_bytes_of_the_whole() {
    for f in FLOATS {
        for quality in [Quality::Reference, Quality::Search] {
            for scheme in all_schemes(quality) {
                let (rows, cols) = (75, 96);
                let scheme = IntScheme { granularity: Granularity::Group(32), ..scheme };
                let bytes = stored(f, &weight(f, rows, cols, 32));
                let data = Reals::new(f.dtype, &bytes).expect("a float type");
                let isa = Isa::detect();
                let whole = encode(scheme, isa, data, (rows, cols), u64::MAX);
                for source_bytes in [0, 1000, 20_000] {
                    let chunked = encode(scheme, isa, data, (rows, cols), source_bytes);
                    assert_eq!(chunked, whole, "{scheme:?}, {source_bytes}");
                }
            }
        }
    }
}

#[test]
fn a_tile_skips_what_lies_between_its_rows() {
    let f = FLOATS[0];
    let (rows, cols, stride) = (5, 24, 37);
    let wide = weight(f, rows, stride, stride);
    let narrow: Vec<f32> =
        wide.chunks(stride).flat_map(|row| row[..cols].iter().copied()).collect();
    let (wide, narrow) = (stored(f, &wide), stored(f, &narrow));
    let scheme = IntScheme {
        bits: 5,
        granularity: Granularity::Group(8),
        symmetric: true,
        packing: Packing::Packed32,
        quality: Quality::Reference,
    };
    let isa = Isa::detect();
    let expected = encode(scheme, isa, Reals::Bf16(&narrow), (rows, cols), u64::MAX);
    let mut parts: Vec<Vec<u8>> = expected.iter().map(|p| vec![0; p.len()]).collect();
    let mut out: Vec<&mut [u8]> = parts.iter_mut().map(|p| &mut p[..]).collect();
    let end = ((rows - 1) * stride + cols) * 2;
    let tile = Tile { data: Reals::Bf16(&wide[..end]), rows, cols, stride, importance: None };
    Scheme::Int(scheme).encode(isa, &tile, &Survey::default(), &mut out);
    assert_eq!(parts, expected);
}

#[test]
fn refuses_what_the_layout_cannot_hold() {
    let good = all_schemes(Quality::Search)[0];
    let group = |size| IntScheme { granularity: Granularity::Group(size), ..good };
    let cases: [(IntScheme, Dtype, &[u64], &str); 7] = [
        (group(128), Dtype::BF16, &[4, 200], "group size 128 does not divide 200 input features"),
        (group(0), Dtype::BF16, &[4, 200], "group size 0"),
        (good, Dtype::I8, &[4, 4], "element type I8 is not one of BF16, F16, F32"),
        (good, Dtype::F32, &[4], "shape [4] is not a matrix"),
        (good, Dtype::F32, &[2, 4, 4], "shape [2, 4, 4] is not a matrix"),
        (good, Dtype::F32, &[0, 4], "shape [0, 4] has no elements"),
        (IntScheme { bits: 9, ..good }, Dtype::F32, &[4, 4], "9 bits are not among 2 to 8"),
    ];
    for (scheme, dtype, shape, complaint) in cases {
        assert_eq!(Scheme::Int(scheme).accepts(dtype, shape), Err(complaint.to_owned()));
    }
    assert_eq!(Scheme::Int(group(100)).accepts(Dtype::F16, &[4, 200]), Ok(()));
}

/// Scales, codes and zero points as stored, back in numbers.
struct Stored {
    scales: Vec<f32>,
    codes: Vec<f32>,
    zero_points: Vec<f32>,
}

impl Stored {
    /// From parts with signed bytes.
    fn new(f: Float, parts: &[Vec<u8>]) -> Self {
        let numbers = |bytes: &[u8]| bytes.iter().map(|&q| f32::from(q as i8)).collect::<Vec<_>>();
        let scales = match f.dtype {
            Dtype::F32 => parts[1].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::F16 => {
                let bits = parts[1].as_chunks().0.iter().map(|&b| u16::from_le_bytes(b));
                bits.map(|b| half(b) as f32).collect()
            }
            _ => {
                let bits = parts[1].as_chunks().0.iter().map(|&b| u16::from_le_bytes(b));
                bits.map(|b| f32::from_bits(u32::from(b) << 16)).collect()
            }
        };
        let zero_points = parts.get(2).map_or(vec![0.0; parts[0].len()], |z| numbers(z));
        Self { scales, codes: numbers(&parts[0]), zero_points }
    }

    /// The squared error of each group.
    fn errors(&self, group: usize, weight: &[f32]) -> Vec<f64> {
        let error = |i: usize| {
            let code = f64::from(self.codes[i] - self.zero_points[i / group]);
            f64::from(weight[i]) - code * f64::from(self.scales[i / group])
        };
        let groups = 0..weight.len() / group;
        groups.map(|g| (g * group..(g + 1) * group).map(|i| error(i).powi(2)).sum()).collect()
    }
}

#[test]
fn search_is_never_worse_than_the_reference_and_the_same_on_every_cpu() {
    for f in FLOATS {
        for scheme in all_schemes(Quality::Search) {
            for (rows, group, groups) in [(35, 7, 3), (64, 32, 2), (32, 128, 2), (16, 1100, 1)] {
                let cols = group * groups;
                let granularity = Granularity::Group(group as u32);
                let scheme = IntScheme { granularity, packing: Packing::Int8, ..scheme };
                let reference = IntScheme { quality: Quality::Reference, ..scheme };
                let best = IntScheme { quality: Quality::Best, ..scheme };
                let weight = weight(f, rows, cols, group);
                let bytes = stored(f, &weight);
                let data = Reals::new(f.dtype, &bytes).expect("a float type");
                let run = |scheme, isa| encode(scheme, isa, data, (rows, cols), u64::MAX);
                let found = run(scheme, Isa::detect());
                for isa in Isa::available() {
                    assert_eq!(run(scheme, isa), found, "{scheme:?} {isa:?} {:?}", f.dtype);
                }
                let found = Stored::new(f, &found);
                assert!(found.scales.iter().all(|&s| s != 0.0), "{scheme:?} {:?}", f.dtype);
                let known = Stored::new(f, &run(reference, Isa::detect()));
                let best = Stored::new(f, &run(best, Isa::detect())).errors(group, &weight);
                for (g, (a, b)) in best.iter().zip(found.errors(group, &weight)).enumerate() {
                    let context = format!("{a:e} > {b:e}, group {g}, {scheme:?} {:?}", f.dtype);
                    assert!(*a <= b * (1.0 + 1e-6), "best: {context}");
                }
                let pairs = found.errors(group, &weight).into_iter();
                for (g, (a, b)) in pairs.zip(known.errors(group, &weight)).enumerate() {
                    let context = format!("{a:e} > {b:e}, group {g}, {scheme:?} {:?}", f.dtype);
                    assert!(a <= b * (1.0 + 1e-6), "{context}");
                }
            }
        }
    }
}

/// The squared error of the best of 52 scales from 0.6 to 1.1 of the full range, of both signs.
fn exhaustive(f: Float, bits: u8, xs: &[f32]) -> f64 {
    let half = f32::from(1u8 << (bits - 1));
    let largest = xs.iter().fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let scales = (0..52).map(|i| {
        let shrink = 0.6 + 0.02 * (i / 2) as f32;
        f.round(largest * shrink / if i % 2 == 0 { half } else { -half })
    });
    let error = |x: f32, scale: f32| {
        f64::from(x - (x / scale).round_ties_even().clamp(-half, half - 1.0) * scale).powi(2)
    };
    scales.map(|scale| xs.iter().map(|&x| error(x, scale)).sum()).fold(f64::INFINITY, f64::min)
}

#[test]
fn search_comes_close_to_an_exhaustive_one() {
    let mut random = Random(7);
    let (rows, cols, group) = (64, 1024, 128);
    let outliers: Vec<_> = (0..cols).map(|_| random.next() < 0.005).collect();
    for f in FLOATS {
        let weight: Vec<f32> = (0..rows * cols)
            .map(|i| f.round(random.normal() * if outliers[i % cols] { 0.1 } else { 0.02 }))
            .collect();
        let bytes = stored(f, &weight);
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        let power: f64 = weight.iter().map(|&x| f64::from(x).powi(2)).sum();
        let decibels = |error: f64| 10.0 * (power / error).log10();
        for bits in [2, 3, 4, 5, 6, 7, 8] {
            let scheme = IntScheme {
                bits,
                granularity: Granularity::Group(group as u32),
                symmetric: true,
                packing: Packing::Int8,
                quality: Quality::Search,
            };
            let best = decibels(weight.chunks(group).map(|xs| exhaustive(f, bits, xs)).sum());
            let of = |scheme| {
                let parts = encode(scheme, Isa::detect(), data, (rows, cols), u64::MAX);
                decibels(Stored::new(f, &parts).errors(group, &weight).iter().sum())
            };
            let (found, joint) = (of(scheme), of(IntScheme { symmetric: false, ..scheme }));
            let context = format!("{bits} bits, {:?}: {found:.3} of {best:.3} dB", f.dtype);
            assert!(found > best - 0.05, "{context}");
            assert!(joint > found - 0.1, "{context}, {joint:.3} dB with zero points");
        }
    }
}

#[test]
fn two_bit_scales_may_leave_the_largest_weight_to_the_smaller_end() {
    let f = FLOATS[0];
    let mut weight = vec![1.0; 16];
    weight[5] = f.round(-1.05);
    let scheme = IntScheme {
        bits: 2,
        granularity: Granularity::Channel,
        symmetric: true,
        packing: Packing::Int8,
        quality: Quality::Search,
    };
    let bytes = stored(f, &weight);
    let parts = encode(scheme, Isa::detect(), Reals::Bf16(&bytes), (1, 16), u64::MAX);
    let found = Stored::new(f, &parts);
    // Fifteen weights are met with -2 * -0.5, one is halved.
    assert!(found.scales[0] < 0.0, "{:?}", found.scales);
    assert!(found.errors(16, &weight)[0] < 0.32, "{:?}", found.errors(16, &weight));
}
