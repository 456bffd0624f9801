//! Schemes of every kind: what tests hold each of to, and benchmarks measure.

use super::{
    AffineScheme, CastScheme, Codebook, CodebookScheme, ExpertsScheme, Fp8Grain, Fp8Scale,
    Fp8Scheme, Granularity, IntScheme, LlmInt8Scheme, MicroDialect, MicroFloat, MicroScheme,
    Packing, Quality, Real, Scheme, Storage, TransposedOrder, TransposedScheme,
};

/// Every kind of scheme in all that its arithmetic depends on, in groups of `size` weights, a
/// multiple of 32, where that is free; int4 comes first.
pub fn examples(quality: Quality, size: u32) -> Vec<Scheme> {
    let mut out = Vec::new();
    let granularity = Granularity::Group(size);
    for (bits, symmetric) in [(4, true), (8, true), (4, false)] {
        let packing = Packing::Packed32;
        out.push(Scheme::Int(IntScheme { bits, granularity, symmetric, packing, quality }));
    }
    for bits in [2, 3, 4, 5, 6, 8] {
        out.push(Scheme::Affine(AffineScheme { bits, group_size: size, quality }));
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
    for grain in [Fp8Grain::Tensor, Fp8Grain::Channel, Fp8Grain::Block(size)] {
        for scale in [Fp8Scale::Source, Fp8Scale::Inverse, Fp8Scale::Power] {
            out.push(Scheme::Fp8(Fp8Scheme { grain, scale, whole_blocks: false }));
        }
    }
    for codebook in [Codebook::Nf4, Codebook::Fp4] {
        for double in [false, true] {
            let (block_size, storage) = (size, Storage::U8);
            let scheme = CodebookScheme { codebook, block_size, storage, double, quality };
            out.push(Scheme::Codebook(scheme));
        }
    }
    out.push(Scheme::LlmInt8(LlmInt8Scheme));
    for order in [TransposedOrder::GptqV1, TransposedOrder::GptqV2, TransposedOrder::AwqGemm] {
        for bits in [2, 3, 4, 8] {
            for symmetric in [true, false] {
                if order != TransposedOrder::AwqGemm || bits == 4 && !symmetric {
                    let scheme = TransposedScheme { bits, granularity, symmetric, order, quality };
                    out.push(Scheme::Transposed(scheme));
                }
            }
        }
    }
    out.push(Scheme::Experts(ExpertsScheme { quality }));
    for to in [Real::Bf16, Real::F16, Real::F32] {
        out.push(Scheme::Cast(CastScheme { to }));
    }
    out
}
