//! What errors count for, against plain errors, for every scheme that searches.

use super::*;

/// Encodes a weight chunk by chunk, its errors counted by input feature.
fn weighed(
    scheme: Scheme,
    isa: Isa,
    data: Reals<'_>,
    shape: &[u64],
    source_bytes: u64,
    importance: Option<Importance<'_>>,
) -> Vec<Vec<u8>> {
    let dtype = data.dtype();
    scheme.accepts(dtype, shape).expect("the scheme takes this shape");
    let mut parts: Vec<Vec<u8>> =
        scheme.parts(dtype, shape).iter().map(|p| vec![0xaa; p.bytes() as usize]).collect();
    let grid = scheme.grid(dtype, shape, source_bytes);
    let survey = survey_of(scheme, isa, data, shape, source_bytes, importance);
    for k in 0..grid.chunks() {
        let (_, first) = scheme.first_input(shape, &grid.window(k));
        let importance = importance.map(|importance| importance.starting_at(first as usize));
        let tile = Tile { importance, ..tile_of(&grid, data, k) };
        let places = parts.iter_mut().enumerate().map(|(p, part)| {
            let range = grid.range(p, k);
            &mut part[range.start as usize..range.end as usize]
        });
        scheme.encode(isa, &tile, &survey, &mut places.collect::<Vec<_>>());
    }
    parts.extend(scheme.scalar(dtype).map(|_| scheme.scalar_bytes(dtype, &survey)));
    parts
}

/// Every scheme that searches, and the shape of a weight for it.
fn schemes(quality: Quality) -> Vec<(Scheme, Vec<u64>)> {
    let mut out = vec![];
    for bits in 2..=8 {
        for symmetric in [true, false] {
            for granularity in [Granularity::Group(32), Granularity::Channel] {
                let packing = Packing::Packed32;
                let scheme = IntScheme { bits, granularity, symmetric, packing, quality };
                out.push(Scheme::Int(scheme));
            }
        }
    }
    out.extend(every::schemes(quality).into_iter().filter(Scheme::is_searched));
    let matrix = |scheme| (scheme, vec![64, 192]);
    let mut out: Vec<_> = out.into_iter().map(matrix).collect();
    out.push((Scheme::Experts(ExpertsScheme { quality }), vec![2, 96, 64]));
    out
}

/// A weight's features, of which few matter.
fn features(len: u64) -> Vec<f32> {
    let mut random = Random(11);
    (0..len).map(|_| random.normal().powi(6) + 0.01).collect()
}

/// What the errors of all elements count for.
fn counted(scheme: Scheme, shape: &[u64], features: &[f32], errors: &[f64]) -> f64 {
    let inner = shape[shape.len() - 1] as usize;
    let of = |i: usize| match scheme {
        Scheme::Experts(_) => features[i / inner % features.len()],
        _ => features[i % inner],
    };
    errors.iter().enumerate().map(|(i, error)| error * f64::from(of(i))).sum()
}

fn errors(f: Float, scheme: Scheme, shape: &[u64], weight: &[f32], parts: &[Vec<u8>]) -> Vec<f64> {
    let inner = shape[shape.len() - 1] as usize;
    let slabs = if shape.len() == 3 { shape[0] as usize } else { 1 };
    let rows = weight.len() / inner / slabs;
    let values = (0..slabs).flat_map(|slab| {
        let of_slab = parts.iter().map(|part| {
            let len = part.len() / slabs;
            part[slab * len..][..len].to_vec()
        });
        decode(f, scheme, (rows, inner), &of_slab.collect::<Vec<_>>())
    });
    weight.iter().zip(values).map(|(x, y)| f64::from(x - y).powi(2)).collect()
}

#[test]
fn errors_that_count_for_more_are_made_smaller() {
    for f in FLOATS {
        for (scheme, shape) in schemes(Quality::Search) {
            let mut random = Random(5);
            let len = shape.iter().product::<u64>() as usize;
            let weight: Vec<f32> = (0..len).map(|_| f.round(random.normal() * 0.02)).collect();
            let bytes = stored(f, &weight);
            let data = Reals::new(f.dtype, &bytes).expect("a float type");
            let inputs = scheme.inputs(&shape);
            let features = features(inputs);
            let mut copy = features.clone();
            let importance = Importance::new(&mut copy);
            let isa = Isa::detect();
            let found = weighed(scheme, isa, data, &shape, u64::MAX, importance);
            let plain = weighed(scheme, isa, data, &shape, u64::MAX, None);
            let [counted_found, counted_plain] = [&found, &plain].map(|parts| {
                counted(scheme, &shape, &features, &errors(f, scheme, &shape, &weight, parts))
            });
            let ratio = counted_found / counted_plain;
            println!("{scheme}, {:?}: {:.2} dB", f.dtype, -10.0 * ratio.log10());
            assert!(ratio < 0.985, "{scheme}, {:?}: {ratio}", f.dtype);
            // However it is cut, on every CPU.
            for isa in Isa::available() {
                for source_bytes in [0, 5000, u64::MAX] {
                    let cut = weighed(scheme, isa, data, &shape, source_bytes, importance);
                    assert!(cut == found, "{scheme} {:?} {isa:?} {source_bytes}", f.dtype);
                }
            }
        }
    }
}

#[test]
fn a_weight_shown_decoded_has_the_errors_of_its_parts() {
    let f = FLOATS[0];
    for (scheme, shape) in schemes(Quality::Search) {
        let len = shape.iter().product::<u64>() as usize;
        let weight = weight(f, 1, len, 32);
        let bytes = stored(f, &weight);
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        let mut features = features(scheme.inputs(&shape));
        let importance = Importance::new(&mut features);
        let parts = weighed(scheme, Isa::detect(), data, &shape, u64::MAX, importance);
        let expected = errors(f, scheme, &shape, &weight, &parts);
        let survey = survey_of(scheme, Isa::detect(), data, &shape, u64::MAX, importance);
        for source_bytes in [0, 5000, u64::MAX] {
            let grid = scheme.decoded_grid(f.dtype, &shape, Real::F32, source_bytes);
            let mut out = vec![0; len * 4];
            for k in 0..grid.chunks() {
                let (_, first) = scheme.first_input(&shape, &grid.window(k));
                let importance = importance.map(|i| i.starting_at(first as usize));
                let tile = Tile { importance, ..tile_of(&grid, data, k) };
                let range = grid.range(0, k);
                let out = &mut out[range.start as usize..range.end as usize];
                scheme.encode_decoded(Isa::detect(), &tile, &survey, Real::F32, out);
            }
            let values = out.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value));
            let found = weight.iter().zip(values).map(|(x, y)| f64::from(x - y).powi(2));
            for ((i, found), expected) in found.enumerate().zip(&expected) {
                let same = found == *expected || found.is_nan() && expected.is_nan();
                assert!(same, "{scheme}, {source_bytes}: element {i}");
            }
        }
    }
}
