//! How fast each scheme encodes on one core, beside reading memory; surveys are counted apart.
//!
//! `cargo bench --bench kernels`, or with `-- WORD` the schemes that have it in their names. What
//! reads memory is a loop over lanes of u64, in the same run: machines that are shared are slower
//! from one run to the next.

use std::hint::black_box;
use std::time::Instant;

use aq_fs::dtype::Dtype;
use aq_fs::quant::{
    AffineScheme, Codebook, CodebookScheme, Fp8Grain, Fp8Scale, Fp8Scheme, Granularity, IntScheme,
    Isa, LlmInt8Scheme, MicroDialect, MicroFloat, MicroScheme, Packing, Quality, Reals, Scheme,
    Storage, Survey, Tile, TransposedOrder, TransposedScheme,
};

const ROWS: usize = 256;
const COLS: usize = 4096;

fn schemes(quality: Quality) -> Vec<Scheme> {
    let int = |bits| IntScheme {
        bits,
        granularity: Granularity::Group(128),
        symmetric: true,
        packing: Packing::Packed32,
        quality,
    };
    let mut out = vec![Scheme::Int(int(4)), Scheme::Int(int(8))];
    for (bits, group_size) in [(4, 64), (2, 64), (3, 64), (5, 64), (6, 64), (8, 64), (4, 32)] {
        out.push(Scheme::Affine(AffineScheme { bits, group_size, quality }));
    }
    for (float, dialect) in [
        (MicroFloat::E2m1, MicroDialect::CompressedTensors),
        (MicroFloat::E4m3, MicroDialect::CompressedTensors),
        (MicroFloat::E2m1, MicroDialect::TensorGroup),
        (MicroFloat::E2m1, MicroDialect::MlxPower),
        (MicroFloat::E4m3, MicroDialect::MlxPower),
        (MicroFloat::E2m1, MicroDialect::MlxE4m3),
    ] {
        out.push(Scheme::Micro(MicroScheme { float, dialect, quality }));
    }
    for (grain, scale) in [
        (Fp8Grain::Tensor, Fp8Scale::Source),
        (Fp8Grain::Channel, Fp8Scale::Source),
        (Fp8Grain::Block(128), Fp8Scale::Source),
        (Fp8Grain::Block(128), Fp8Scale::Inverse),
    ] {
        out.push(Scheme::Fp8(Fp8Scheme { grain, scale, whole_blocks: false, quality }));
    }
    for codebook in [Codebook::Nf4, Codebook::Fp4] {
        for double in [false, true] {
            let (block_size, storage) = (64, Storage::U8);
            out.push(Scheme::Codebook(CodebookScheme {
                codebook,
                block_size,
                storage,
                double,
                quality,
            }));
        }
    }
    out.push(Scheme::LlmInt8(LlmInt8Scheme));
    for (bits, order, symmetric) in [
        (4, TransposedOrder::GptqV1, true),
        (2, TransposedOrder::GptqV1, true),
        (3, TransposedOrder::GptqV1, true),
        (8, TransposedOrder::GptqV1, true),
        (4, TransposedOrder::GptqV1, false),
        (4, TransposedOrder::AwqGemm, false),
    ] {
        let granularity = Granularity::Group(128);
        let scheme = TransposedScheme { bits, granularity, symmetric, order, quality };
        out.push(Scheme::Transposed(scheme));
    }
    out
}

/// Source bytes a second: the best of many rounds.
fn rate(scheme: Scheme, isa: Isa, dtype: Dtype, bytes: &[u8]) -> f64 {
    let shape = [ROWS as u64, COLS as u64];
    let mut parts: Vec<_> =
        scheme.parts(dtype, &shape).iter().map(|part| vec![0; part.bytes() as usize]).collect();
    let (slab, width) = scheme.grid(dtype, &shape, u64::MAX).view();
    let data = Reals::new(dtype, bytes).expect("a float type");
    let (rows, cols) = (slab as usize, width as usize);
    let tile = Tile { data, rows, cols, stride: cols, importance: None };
    let mut survey = Survey::default();
    scheme.survey(isa, &tile, &mut survey);
    let mut best = f64::INFINITY;
    for _ in 0..40 {
        let mut out: Vec<&mut [u8]> = parts.iter_mut().map(|part| &mut part[..]).collect();
        let start = Instant::now();
        scheme.encode(isa, &tile, &survey, &mut out);
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes.len() as f64 / best
}

/// Bytes a second of a loop that adds up what it reads, of more than any cache holds: the best of
/// many rounds.
fn memory_rate() -> f64 {
    const LANES: usize = 32;
    let memory: Vec<u64> = (0..1 << 25).collect();
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        let mut sums = [0u64; LANES];
        for lanes in black_box(&memory[..]).as_chunks::<LANES>().0 {
            for (sum, lane) in sums.iter_mut().zip(lanes) {
                *sum = sum.wrapping_add(*lane);
            }
        }
        black_box(sums);
        best = best.min(start.elapsed().as_secs_f64());
    }
    size_of_val(&memory[..]) as f64 / best
}

fn main() {
    // `cargo bench` adds a flag of its own.
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let mut seed = 1u64;
    let mut uniform = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1u64 << 24) as f32
    };
    let weight: Vec<f32> =
        (0..ROWS * COLS).map(|_| ((0..4).map(|_| uniform()).sum::<f32>() - 2.0) * 0.1).collect();
    let bf16: Vec<u8> =
        weight.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let f32s: Vec<u8> = weight.iter().flat_map(|x| x.to_le_bytes()).collect();
    let memory = memory_rate();
    println!("one core reads memory at {:.2} GB/s", memory / 1e9);
    for isa in Isa::available() {
        for (dtype, bytes) in [(Dtype::BF16, &bf16), (Dtype::F32, &f32s)] {
            for quality in [Quality::Reference, Quality::Search] {
                let int4 = rate(schemes(quality)[0], isa, dtype, bytes);
                println!(
                    "{} {dtype}: GB/s of source, of memory's rate, against int4's time",
                    isa.name()
                );
                for scheme in schemes(quality) {
                    if !scheme.to_string().contains(&wanted) {
                        continue;
                    }
                    let rate = rate(scheme, isa, dtype, bytes);
                    let (gb, share, times) = (rate / 1e9, rate / memory, int4 / rate);
                    println!("  {gb:6.2}  {share:5.3}  x {times:5.2}  {scheme}");
                }
            }
        }
    }
}
