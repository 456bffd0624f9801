//! MXFP4 of gpt-oss: fused experts, transposed.
//!
//! For experts `X` of shape `[E, I, O]`, where `I` is a multiple of 32:
//!
//! ```text
//! X_blocks  U8  [E, O, I/32, 16]  E2M1, low nibble first
//! X_scales  U8  [E, O, I/32]      2^(e - 127)
//! ```
//!
//! A product is rounded to the model's element type, BF16 where its config names none.
//!
//! Upstream: `convert_moe_packed_tensors` in `integrations/mxfp4.py` of transformers 5.23.

use super::coded::{Code, Coded, Scale, Unit};
use super::stored::Stored;
use crate::dtype::Dtype;
use crate::error::Result;

/// Claims every pair of blocks and scales.
///
/// # Errors
/// `Corrupt` for one without the other, and where they don't fit.
pub(super) fn claim(stored: &mut Stored<'_>) -> Result<()> {
    for (codes, name) in stored.ending("_blocks") {
        let blocks = stored.tensor(codes);
        if blocks.dtype != Dtype::U8 && !blocks.name.ends_with("_proj_blocks") {
            continue;
        }
        let scale = stored.require(format_args!("{name}_scales"), &blocks.name)?;
        let (Dtype::U8, [above @ .., outputs, groups, 16]) = (blocks.dtype, &*blocks.shape) else {
            return Err(stored.misfit(codes, "is not U8 in blocks of 16"));
        };
        let scales = stored.tensor(scale);
        if scales.dtype != Dtype::U8 || scales.shape != blocks.shape[..blocks.shape.len() - 1] {
            return Err(
                stored.misfit(scale, format_args!("has no U8 for each of {:?}", blocks.shape))
            );
        }
        let slabs: u64 = above.iter().product();
        let inputs = groups.saturating_mul(32);
        let size = (slabs * outputs, inputs);
        let mut coded = Coded::new(Code::E2m1, Unit::dense(4), size, Scale::Power);
        coded.block.1 = 32;
        coded.slab_rows = (*outputs).max(1);
        coded.transposed = true;
        let shape: Vec<u64> = above.iter().copied().chain([inputs, *outputs]).collect();
        let dtype = stored.model_dtype().unwrap_or(Dtype::BF16);
        stored.claim(name, dtype, shape, coded, &[codes, scale])?;
    }
    for (scale, name) in stored.ending("_proj_scales") {
        stored.require(format_args!("{name}_proj_blocks"), &stored.tensor(scale).name)?;
    }
    Ok(())
}
