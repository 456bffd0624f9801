//! How fast each scheme encodes on one core, beside reading memory; surveys are counted apart.
//!
//! `cargo bench --bench kernels`, or with `-- WORD` the schemes that have it in their names. What
//! reads memory is a loop over lanes of u64, in the same run, and int4 is measured again beside each
//! scheme: machines that are shared are slower from one second to the next.

use std::hint::black_box;
use std::time::Instant;

use aq_fs::dtype::Dtype;
use aq_fs::quant::{
    CastScheme, Fp8Grain, Fp8Scheme, Isa, Quality, Real, Reals, Scheme, Survey, Tile, examples,
};

const ROWS: usize = 256;
const COLS: usize = 4096;
const ROUNDS: usize = 20;

/// What is measured, int4 in groups of 128 first.
fn schemes(quality: Quality) -> Vec<Scheme> {
    let mut out = Vec::new();
    for scheme in [128, 64, 32].into_iter().flat_map(|size| examples(quality, size)) {
        // What has no groups, or groups of its own, is there but once.
        // Every format's blocks of FP8 are of 128.
        let is_block = |scheme: &Fp8Scheme| matches!(scheme.grain, Fp8Grain::Block(1..128));
        let is_unused = matches!(&scheme, Scheme::Fp8(scheme) if is_block(scheme));
        if !out.contains(&scheme) && !is_unused {
            out.push(scheme);
        }
    }
    out
}

/// Encodes weights that lie one after the other, each time it is called; how long that took, in seconds.
fn runner(scheme: Scheme, isa: Isa, dtype: Dtype, bytes: &[u8]) -> impl FnMut() -> f64 {
    let shape: &[u64] = match scheme {
        Scheme::Experts(_) => &[1, ROWS as u64, COLS as u64],
        _ => &[ROWS as u64, COLS as u64],
    };
    let mut parts: Vec<_> =
        scheme.parts(dtype, shape).iter().map(|part| vec![0; part.bytes() as usize]).collect();
    let (slab, width) = scheme.grid(dtype, shape, u64::MAX).view();
    let (rows, cols) = (slab as usize, width as usize);
    let weights = bytes.chunks_exact(ROWS * COLS * dtype.bitsize() / 8);
    let tile = move |weight| {
        let data = Reals::new(dtype, weight).expect("a float type");
        Tile { data, rows, cols, stride: cols, importance: None }
    };
    let mut survey = Survey::default();
    scheme.survey(isa, &tile(bytes), &mut survey);
    move || {
        let mut out: Vec<&mut [u8]> = parts.iter_mut().map(|part| &mut part[..]).collect();
        let start = Instant::now();
        for weight in weights.clone() {
            scheme.encode(isa, &tile(weight), &survey, &mut out);
        }
        start.elapsed().as_secs_f64()
    }
}

/// The best of many rounds.
fn best(mut run: impl FnMut() -> f64) -> f64 {
    (0..ROUNDS).map(|_| run()).fold(f64::INFINITY, f64::min)
}

/// The best of many rounds, and the median of what each took for the time of `base` just before: a shared
/// machine is faster now and slower then.
fn beside(mut base: impl FnMut() -> f64, mut run: impl FnMut() -> f64) -> (f64, f64) {
    let (mut best, mut ratios) = (f64::INFINITY, Vec::new());
    for _ in 0..ROUNDS {
        let base = base();
        let seconds = run();
        best = best.min(seconds);
        ratios.push(seconds / base);
    }
    ratios.sort_by(f64::total_cmp);
    (best, ratios[ROUNDS / 2])
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
    let mut f16 = vec![0; ROWS * COLS * 2];
    let data = Reals::new(Dtype::F32, &f32s).expect("a float type");
    let tile = Tile { data, rows: ROWS, cols: COLS, stride: COLS, importance: None };
    let to_f16 = Scheme::Cast(CastScheme { to: Real::F16 });
    to_f16.encode(Isa::detect(), &tile, &Survey::default(), &mut [&mut f16[..]]);
    let memory = memory_rate();
    println!("one core reads memory at {:.2} GB/s", memory / 1e9);
    let int4 = schemes(Quality::Reference)[0];
    // More than any cache holds.
    let many = bf16.repeat(128);
    for isa in Isa::available() {
        let rate = many.len() as f64 / best(runner(int4, isa, Dtype::BF16, &many));
        println!("{} BF16 from memory: {:.2} GB/s of source, {int4}", isa.name(), rate / 1e9);
    }
    for isa in Isa::available() {
        for (dtype, bytes) in [(Dtype::BF16, &bf16), (Dtype::F16, &f16), (Dtype::F32, &f32s)] {
            for quality in [Quality::Reference, Quality::Search] {
                let mut int4 = runner(schemes(quality)[0], isa, dtype, bytes);
                println!(
                    "{} {dtype}: GB/s of source, of memory's rate, against int4's time",
                    isa.name()
                );
                for scheme in schemes(quality) {
                    if !scheme.to_string().contains(&wanted) {
                        continue;
                    }
                    let (seconds, times) = beside(&mut int4, runner(scheme, isa, dtype, bytes));
                    let rate = bytes.len() as f64 / seconds;
                    let (gb, share) = (rate / 1e9, rate / memory);
                    println!("  {gb:6.2}  {share:5.3}  x {times:5.2}  {scheme}");
                }
            }
        }
    }
}
