//! How near to the weights each scheme comes, at each quality, and how long that takes.
//!
//! `cargo bench --bench quality`, or with `-- WORD` the schemes that have it in their names. Signal to
//! error (SQNR) of what a loader in BF16 decodes, on the kinds of weights of `scripts/bench_peers.py`:
//! gaussian and Student's t with five degrees of freedom, with outlier columns.

use std::time::Instant;

use aq_fs::dtype::Dtype;
use aq_fs::quant::{
    AffineScheme, Codebook, CodebookScheme, Fp8Grain, Fp8Scale, Fp8Scheme, Granularity, IntScheme,
    Isa, MicroDialect, MicroFloat, MicroScheme, Packing, Quality, Reals, Scheme, Storage, Survey,
    Tile,
};

const ROWS: usize = 256;
const COLS: usize = 4096;

/// Pseudo-random numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    fn normal(&mut self) -> f64 {
        let (radius, angle) = (self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }

    fn student(&mut self) -> f64 {
        let normal = self.normal();
        let squares: f64 = (0..5).map(|_| self.normal().powi(2)).sum();
        normal / (squares / 5.0).sqrt()
    }
}

/// A weight, rounded to BF16.
fn weight(draw: fn(&mut Random) -> f64) -> Vec<f32> {
    let mut random = Random(7);
    let outliers: Vec<bool> = (0..COLS).map(|_| random.uniform() < 0.005).collect();
    let round = |x: f32| f32::from_bits((x.to_bits() + 0x8000) & 0xffff_0000);
    let scale = |i: usize| if outliers[i % COLS] { 0.1 } else { 0.02 };
    (0..ROWS * COLS).map(|i| round((draw(&mut random) * scale(i)) as f32)).collect()
}

fn schemes(quality: Quality) -> Vec<Scheme> {
    let mut out = Vec::new();
    let packing = Packing::Packed32;
    for (symmetric, granularity) in [
        (true, Granularity::Group(128)),
        (true, Granularity::Channel),
        (false, Granularity::Group(128)),
    ] {
        for bits in [2, 3, 4, 5, 6, 8] {
            out.push(Scheme::Int(IntScheme { bits, granularity, symmetric, packing, quality }));
        }
    }
    for bits in [2, 3, 4, 5, 6, 8] {
        out.push(Scheme::Affine(AffineScheme { bits, group_size: 64, quality }));
    }
    for codebook in [Codebook::Nf4, Codebook::Fp4] {
        for double in [false, true] {
            let (block_size, storage) = (64, Storage::U8);
            let scheme = CodebookScheme { codebook, block_size, storage, double, quality };
            out.push(Scheme::Codebook(scheme));
        }
    }
    let float = MicroFloat::E2m1;
    for dialect in [
        MicroDialect::CompressedTensors,
        MicroDialect::MlxPower,
        MicroDialect::TensorGroup,
        MicroDialect::MlxE4m3,
    ] {
        out.push(Scheme::Micro(MicroScheme { float, dialect, quality }));
    }
    for (grain, scale) in [
        (Fp8Grain::Channel, Fp8Scale::Source),
        (Fp8Grain::Block(128), Fp8Scale::Source),
        (Fp8Grain::Block(128), Fp8Scale::Inverse),
    ] {
        out.push(Scheme::Fp8(Fp8Scheme { grain, scale, whole_blocks: false, quality }));
    }
    out
}

/// Signal to error in decibels, and seconds a GiB of source.
fn measure(scheme: Scheme, weight: &[f32]) -> (f64, f64) {
    let dtype = Dtype::BF16;
    let shape = [ROWS as u64, COLS as u64];
    let bytes: Vec<u8> =
        weight.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let mut parts: Vec<Vec<u8>> =
        scheme.parts(dtype, &shape).iter().map(|part| vec![0; part.bytes() as usize]).collect();
    let (slab, width) = scheme.grid(dtype, &shape, u64::MAX).view();
    let data = Reals::new(dtype, &bytes).expect("a float type");
    let (rows, cols) = (slab as usize, width as usize);
    let tile = Tile { data, rows, cols, stride: cols, importance: None };
    let (isa, mut survey) = (Isa::detect(), Survey::default());
    scheme.survey(isa, &tile, &mut survey);
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        scheme.encode(
            isa,
            &tile,
            &survey,
            &mut parts.iter_mut().map(|p| &mut p[..]).collect::<Vec<_>>(),
        );
        best = best.min(start.elapsed().as_secs_f64());
    }
    parts.extend(scheme.scalar(dtype).map(|_| scheme.scalar_bytes(dtype, &survey)));
    let parts: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
    let mut decoded = vec![0.0; weight.len()];
    scheme.decode(dtype, (ROWS, COLS), &parts, &mut decoded);
    let power: f64 = weight.iter().map(|x| f64::from(*x).powi(2)).sum();
    let errors = weight.iter().zip(&decoded).map(|(x, y)| f64::from(x - y).powi(2));
    let gib = bytes.len() as f64 / (1u64 << 30) as f64;
    (10.0 * (power / errors.sum::<f64>()).log10(), best / gib)
}

fn main() {
    // `cargo bench` adds a flag of its own.
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let weights = [weight(Random::normal), weight(Random::student)];
    println!("dB, gaussian / student-t, and s/GiB on one core, at reference, search and best");
    for (i, scheme) in schemes(Quality::Search).into_iter().enumerate() {
        let name = scheme.to_string();
        let name = name.trim_end_matches(", search");
        if !name.contains(&wanted) {
            continue;
        }
        print!("{name:46}");
        for quality in [Quality::Reference, Quality::Search, Quality::Best] {
            let [gaussian, student] = weights.each_ref().map(|w| measure(schemes(quality)[i], w));
            print!("  {:6.2} / {:5.2} {:6.2} s", gaussian.0, student.0, gaussian.1);
        }
        println!();
    }
}
