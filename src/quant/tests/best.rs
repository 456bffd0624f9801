//! The best quality against the search.

use super::*;

/// Consecutive elements of a row that share a scale, if it is that simple.
fn group(scheme: Scheme, cols: usize) -> usize {
    let of = |granularity| match granularity {
        Granularity::Group(size) => size as usize,
        Granularity::Channel => cols,
    };
    match scheme {
        Scheme::Int(scheme) => of(scheme.granularity),
        Scheme::Transposed(scheme) => of(scheme.granularity),
        Scheme::Affine(scheme) => scheme.group_size as usize,
        Scheme::Micro(scheme) => scheme.group_size() as usize,
        Scheme::Codebook(scheme) => scheme.block_size as usize,
        _ => cols,
    }
}

/// The squared errors of groups; those of all together where groups are not that simple.
fn errors(scheme: Scheme, shape: (usize, usize), weight: &[f32], parts: &[Vec<u8>]) -> Vec<f64> {
    let f = FLOATS[2];
    let values = decode(f, scheme, shape, parts);
    let error = |(x, y): (&f32, &f32)| f64::from(x - y).powi(2);
    let errors: Vec<f64> = weight.iter().zip(&values).map(error).collect();
    match scheme {
        Scheme::Fp8(Fp8Scheme { grain: Fp8Grain::Block(_), .. }) => vec![errors.iter().sum()],
        _ => errors.chunks(group(scheme, shape.1)).map(|group| group.iter().sum()).collect(),
    }
}

#[test]
fn the_best_is_no_worse_than_the_search_and_the_same_on_every_cpu() {
    // Of F32, since what is decoded is then not rounded.
    let f = FLOATS[2];
    let shape = (64, 192);
    let mut random = Random(9);
    let weight: Vec<f32> = (0..shape.0 * shape.1)
        .map(|i| random.normal() * if i % 41 == 0 { 0.1 } else { 0.02 })
        .collect();
    let bytes = stored(f, &weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    let of = |quality| {
        let integers = all_schemes(quality).into_iter().filter(|s| s.packing == Packing::Packed32);
        let grouped = |scheme| IntScheme { granularity: Granularity::Group(32), ..scheme };
        let integers = integers.flat_map(|scheme| [scheme, grouped(scheme)]).map(Scheme::Int);
        integers.chain(every::schemes(quality)).collect::<Vec<_>>()
    };
    for (search, best) in of(Quality::Search).into_iter().zip(of(Quality::Best)) {
        let plain = encode(search, Isa::detect(), data, shape, u64::MAX);
        let found = encode(best, Isa::detect(), data, shape, u64::MAX);
        if !best.is_searched() {
            assert!(found == plain, "{best}");
            continue;
        }
        for isa in Isa::available() {
            for source_bytes in [0, 5000] {
                let cut = encode(best, isa, data, shape, source_bytes);
                assert!(cut == found, "{best} {isa:?} {source_bytes}");
            }
        }
        let [plain, found] = [plain, found].map(|parts| errors(best, shape, &weight, &parts));
        for (g, (a, b)) in found.iter().zip(&plain).enumerate() {
            assert!(*a <= b * (1.0 + 1e-5), "{best}, group {g}: {a:e}, not {b:e}");
        }
        let ratio = found.iter().sum::<f64>() / plain.iter().sum::<f64>();
        println!("{best}: {:.3} dB", -10.0 * ratio.log10());
        let gains = match best {
            // Scales of few bits, and what is found already, leave next to no choice.
            Scheme::Micro(_) | Scheme::Codebook(_) => 1.0,
            Scheme::Affine(_) => 0.995,
            Scheme::Fp8(_) => 0.99,
            _ => 0.9999,
        };
        assert!(ratio <= gains, "{best}: {ratio}");
    }
}

#[test]
fn fp8_follows_what_its_errors_count_for() {
    let f = FLOATS[0];
    let shape = (32, 192);
    let mut random = Random(13);
    let weight: Vec<f32> =
        (0..shape.0 * shape.1).map(|_| f.round(random.normal() * 0.02)).collect();
    let bytes = stored(f, &weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    let features: Vec<f32> = (0..shape.1).map(|i| if i % 24 == 0 { 1.0 } else { 1e-4 }).collect();
    let (grain, scale, quality) = (Fp8Grain::Channel, Fp8Scale::Inverse, Quality::Best);
    let scheme = Scheme::Fp8(Fp8Scheme { grain, scale, whole_blocks: false, quality });
    let grid = scheme.grid(f.dtype, &[shape.0 as u64, shape.1 as u64], u64::MAX);
    let counted = |importance| {
        let tile = Tile { importance, ..tile_of(&grid, data, 0) };
        let (mut codes, mut scales) = (vec![0; weight.len()], vec![0; shape.0 * 4]);
        let mut out = [&mut codes[..], &mut scales[..]];
        scheme.encode(Isa::detect(), &tile, &Survey::default(), &mut out);
        let values = decode(f, scheme, shape, &[codes, scales]);
        let error = |i: usize| f64::from(features[i % shape.1] * (weight[i] - values[i]).powi(2));
        (0..weight.len()).map(error).sum::<f64>()
    };
    let mut copy = features.clone();
    let (with, without) = (counted(Importance::new(&mut copy)), counted(None));
    assert!(with < without * 0.95, "{with} of {without}");
}
