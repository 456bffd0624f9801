//! What holds for schemes of every kind.

use super::*;

const QUALITIES: [Quality; 3] = [Quality::Reference, Quality::Search, Quality::Best];

/// One scheme of each kind that takes a matrix, or more where kinds have kinds.
pub(super) fn schemes(quality: Quality) -> Vec<Scheme> {
    let mut schemes = examples(quality, 32);
    let granularity = Granularity::Channel;
    let transposed = transposed::schemes(quality).into_iter();
    let channels = transposed.map(|scheme| TransposedScheme { granularity, ..scheme });
    schemes.extend(channels.map(Scheme::Transposed));
    schemes.retain(|scheme| scheme.accepts(Dtype::BF16, &[64, 96]).is_ok());
    schemes
}

/// An odd number of rows, at most 75, where the scheme takes one.
fn shape_for(scheme: Scheme) -> (usize, usize) {
    let takes_any = scheme.accepts(Dtype::BF16, &[75, 96]).is_ok();
    (if takes_any { 75 } else { 64 }, 96)
}

#[test]
fn a_cast_rounds_each_element_to_nearest() {
    let shape = (3, 77);
    for from in FLOATS {
        let weight = weight(from, shape.0, shape.1, 7);
        for to in FLOATS {
            let values: Vec<f32> = weight.iter().map(|x| to.round(*x)).collect();
            let parts = vec![stored(to, &values)];
            let values = values.iter().map(|x| from.round(*x)).collect();
            let scheme = Scheme::Cast(CastScheme { to: Real::new(to.dtype).expect("a real") });
            check(from, scheme, shape, &weight, &Defined { parts, values });
        }
    }
}

#[test]
fn a_weight_shown_decoded_is_what_its_parts_decode_to() {
    let integers = all_schemes(Quality::Search).into_iter().map(Scheme::Int);
    let schemes: Vec<Scheme> = integers
        .chain(schemes(Quality::Reference))
        .chain(schemes(Quality::Search))
        .chain(schemes(Quality::Best))
        .collect();
    for f in FLOATS {
        let bytes = stored(f, &weight(f, 75, 96, 32));
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        for &scheme in &schemes {
            let shape = shape_for(scheme);
            let (rows, cols) = shape;
            let parts = encode(scheme, Isa::detect(), data, shape, u64::MAX);
            let decoded = decode(f, scheme, shape, &parts);
            let survey = survey_of(scheme, Isa::detect(), data, &[75, 96], u64::MAX, None);
            for to in FLOATS {
                let real = Real::new(to.dtype).expect("a real");
                let values: Vec<f32> = decoded.iter().map(|x| to.round(*x)).collect();
                for source_bytes in [0, 20_000, u64::MAX] {
                    let grid = scheme.decoded_grid(
                        f.dtype,
                        &[rows as u64, cols as u64],
                        real,
                        source_bytes,
                    );
                    let found = encode_on(
                        &grid,
                        data,
                        vec![vec![0xaa; rows * cols * to.dtype.bitsize() / 8]],
                        |tile, out| {
                            scheme.encode_decoded(Isa::detect(), tile, &survey, real, out[0]);
                        },
                    );
                    assert!(
                        found[0] == stored(to, &values),
                        "{scheme:?} {:?} {:?}",
                        f.dtype,
                        to.dtype
                    );
                }
            }
        }
    }
}

#[test]
fn chunks_make_the_bytes_of_the_whole_on_every_cpu() {
    for f in FLOATS {
        let bytes = stored(f, &weight(f, 75, 96, 32));
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        for scheme in QUALITIES.into_iter().flat_map(schemes) {
            let shape = shape_for(scheme);
            let whole = encode(scheme, Isa::detect(), data, shape, u64::MAX);
            for isa in Isa::available() {
                for source_bytes in [0, 1000, 20_000] {
                    let chunked = encode(scheme, isa, data, shape, source_bytes);
                    assert!(chunked == whole, "{scheme:?}, {isa:?}, {source_bytes}");
                }
            }
        }
    }
}

/// Whether one number is part of every scale of a weight.
fn spoils_the_weight(scheme: Scheme) -> bool {
    match scheme {
        Scheme::Fp8(scheme) => scheme.grain == Fp8Grain::Tensor,
        Scheme::Codebook(scheme) => scheme.double,
        _ => false,
    }
}

#[test]
fn nan_and_infinity_are_not_mistaken_for_weights_and_spoil_no_other_block() {
    // The first and last 32 rows share no block with the middle, nor do the last 32 columns.
    let (rows, cols, row, col) = (96, 192, 40, 70);
    for f in FLOATS {
        let mut random = Random(1);
        let mut weight: Vec<f32> = (0..rows * cols).map(|_| f.round(random.normal())).collect();
        for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            weight[row * cols + col] = odd;
            let bytes = stored(f, &weight);
            for scheme in QUALITIES.into_iter().flat_map(schemes) {
                let data = Reals::new(f.dtype, &bytes).expect("a float type");
                let mut seen = None;
                for isa in Isa::available() {
                    let parts = encode(scheme, isa, data, (rows, cols), u64::MAX);
                    let decoded = decode(f, scheme, (rows, cols), &parts);
                    assert!(!decoded[row * cols + col].is_finite(), "{odd} {scheme:?} {isa:?}");
                    let mut others = decoded[..32 * cols].iter().chain(&decoded[64 * cols..]);
                    let spoilt = spoils_the_weight(scheme);
                    assert!(others.all(|x| x.is_finite() != spoilt), "{odd} {scheme:?} {isa:?}");
                    let parts = seen.get_or_insert_with(|| parts.clone()) == &parts;
                    assert!(parts, "{odd} {scheme:?} {isa:?}");
                }
            }
        }
    }
}

fn error(weight: &[f32], decoded: &[f32]) -> f64 {
    weight.iter().zip(decoded).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum()
}

#[test]
fn search_lessens_the_error_where_it_has_a_choice() {
    let shape = (64, 512);
    for f in FLOATS {
        let mut random = Random(7);
        let weight: Vec<f32> = (0..shape.0 * shape.1)
            .map(|i| f.round(random.normal() * if i % 97 == 0 { 0.1 } else { 0.02 }))
            .collect();
        let bytes = stored(f, &weight);
        let data = Reals::new(f.dtype, &bytes).expect("a float type");
        for (reference, search) in
            schemes(Quality::Reference).into_iter().zip(schemes(Quality::Search))
        {
            let [reference_error, search_error] = [reference, search].map(|scheme| {
                let parts = encode(scheme, Isa::detect(), data, shape, u64::MAX);
                error(&weight, &decode(f, scheme, shape, &parts))
            });
            // A cast to the same type has no error.
            let ratio =
                if search_error == reference_error { 1.0 } else { search_error / reference_error };
            println!("{search}, {:?}: {:.2} dB", f.dtype, -10.0 * ratio.log10());
            let searches = match search {
                Scheme::Int(_) | Scheme::Affine(_) | Scheme::Codebook(_) => true,
                Scheme::Transposed(_) | Scheme::Experts(_) => true,
                Scheme::Micro(scheme) => scheme.float == MicroFloat::E2m1,
                Scheme::Fp8(_) | Scheme::LlmInt8(_) | Scheme::Cast(_) => false,
            };
            if searches {
                assert!(ratio < 0.99, "{search:?}, {:?}: {ratio}", f.dtype);
            } else {
                assert_eq!(ratio, 1.0, "{search:?}, {:?}", f.dtype);
            }
        }
    }
}

#[test]
fn a_search_is_no_worse_than_the_reference_for_any_group() {
    let f = FLOATS[2];
    let shape = (128, 32);
    let weight = weight(f, shape.0, shape.1, shape.1);
    let bytes = stored(f, &weight);
    let data = Reals::new(f.dtype, &bytes).expect("a float type");
    for (reference, search) in schemes(Quality::Reference).into_iter().zip(schemes(Quality::Search))
    {
        let measured = match search {
            Scheme::Affine(_) | Scheme::Micro(_) => true,
            // What a quantized scale is for one block depends on the others.
            Scheme::Codebook(scheme) => !scheme.double,
            _ => false,
        };
        if !measured {
            continue;
        }
        let [reference, found] = [reference, search].map(|scheme| {
            let parts = encode(scheme, Isa::detect(), data, shape, u64::MAX);
            let decoded = decode(f, scheme, shape, &parts);
            let rows = weight.chunks(shape.1).zip(decoded.chunks(shape.1));
            rows.map(|(xs, ys)| error(xs, ys)).collect::<Vec<f64>>()
        });
        for (row, (reference, found)) in reference.into_iter().zip(found).enumerate() {
            let is_worse = found > reference * (1.0 + 1e-4);
            assert!(!is_worse, "row {row} of {search:?}: {found:e} > {reference:e}");
        }
    }
}

#[test]
fn a_scheme_is_named_by_what_a_person_would_ask() {
    let names: Vec<String> = schemes(Quality::Search).iter().map(ToString::to_string).collect();
    for name in [
        "int8, per channel",
        "affine 4-bit, groups of 32, search",
        "E2M1, groups of 16, search",
        "E4M3, groups of 32",
        "E4M3, blocks of 32 x 32",
        "NF4, flat blocks of 32, search",
        "NF4, flat blocks of 32, scales quantized, search",
    ] {
        assert!(names.iter().any(|n| n == name), "{name}: {names:?}");
    }
}
