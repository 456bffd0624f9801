//! FP8 of transformers and vLLM, in blocks as in DeepSeek-V3 or whole tensors.
//!
//! For a weight `X` of shape `[.., R, C]` in blocks of `r` x `c` (128 x 128 unless the config's
//! `weight_block_size` says otherwise), the last of which may reach beyond the weight:
//!
//! ```text
//! X            F8_E4M3           [.., R, C]
//! X_scale_inv  F32, BF16 or F16  [.., ceil(R/r), ceil(C/c)]  what codes are multiplied by
//!              F8_E8M0 or U8                                 a power of two
//! ```
//!
//! or one scale for all, of shape `[]` or `[1]`, which may be called `X_scale`. The product is
//! computed in f32 and rounded to the model's element type, BF16 where its config names none.
//!
//! Upstream: `Fp8Dequantize` in `integrations/finegrained_fp8.py` of transformers 5.23, and
//! `fp8_cast_bf16.py` of DeepSeek-V3. Where a scale grid fits neither the declared block size nor
//! divides the weight, upstream has no meaning for it either.

use serde_json::Value;

use super::coded::{Code, Coded, Scale, Unit};
use super::stored::Stored;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::source::catalog::TensorId;

/// How scales of what is not a weight end; they mean nothing once weights are decoded.
pub(super) const OF_ACTIVATIONS: [&str; 8] = [
    ".activation_scale",
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".input_zero_point",
    ".input_global_scale",
];

/// Claims every weight that has a scale.
///
/// # Errors
/// `Corrupt` for a scale without its weight, or of a type or shape that isn't a scale's of it.
pub(super) fn claim(stored: &mut Stored<'_>, declared: Option<&Value>) -> Result<()> {
    let block = declared
        .and_then(|value| value.get("weight_block_size")?.as_array())
        .and_then(|sizes| Some((sizes.first()?.as_u64()?, sizes.get(1)?.as_u64()?)))
        .filter(|(rows, cols)| *rows > 0 && *cols > 0)
        .unwrap_or((128, 128));
    for ending in ["_scale_inv", "_scale"] {
        for (scale, name) in stored.ending(ending) {
            if OF_ACTIVATIONS.iter().any(|of| stored.tensor(scale).name.ends_with(of)) {
                continue;
            }
            let codes = match stored.find(name) {
                Some(codes) => codes,
                // Many a parameter that is no scale of codes ends so.
                None if ending == "_scale" => continue,
                None => return Err(stored.misfit(scale, format_args!("belongs to no `{name}`"))),
            };
            let weight = stored.tensor(codes);
            if weight.dtype != Dtype::F8_E4M3 && ending == "_scale" {
                continue;
            }
            if weight.dtype != Dtype::F8_E4M3 {
                return Err(stored.misfit(codes, "has a scale, but is not F8_E4M3"));
            }
            let dtype = stored.model_dtype().unwrap_or(Dtype::BF16);
            let number = match stored.tensor(scale).dtype {
                Dtype::U8 => Scale::Power,
                _ => number(stored, scale)?,
            };
            let coded = blocks(stored, codes, scale, number, Some(block))?;
            stored.claim(name, dtype, weight.shape.clone(), coded, &[codes, scale])?;
        }
    }
    discard_activations(stored);
    Ok(())
}

/// Leaves out the scales of activations.
pub(super) fn discard_activations(stored: &mut Stored<'_>) {
    for ending in OF_ACTIVATIONS {
        for (id, _) in stored.ending(ending) {
            stored.discard(id);
        }
    }
}

/// How a scale is stored that is a float.
pub(super) fn number(stored: &Stored<'_>, scale: TensorId) -> Result<Scale> {
    match stored.tensor(scale).dtype {
        Dtype::F32 => Ok(Scale::F32),
        Dtype::BF16 => Ok(Scale::Bf16),
        Dtype::F16 => Ok(Scale::F16),
        Dtype::F8_E8M0 => Ok(Scale::E8m0),
        _ => Err(stored.misfit(scale, "is no type of a scale")),
    }
}

/// One-byte codes of a weight with a scale for the tensor, or for each row or block of a matrix.
pub(super) fn blocks(
    stored: &Stored<'_>,
    codes: TensorId,
    scale: TensorId,
    number: Scale,
    block: Option<(u64, u64)>,
) -> Result<Coded> {
    let weight = stored.tensor(codes);
    let code = if weight.dtype == Dtype::I8 { Code::Signed } else { Code::E4m3 };
    let shape = &stored.tensor(scale).shape;
    let misfit = || {
        let what = format!("is no scale of {:?}", weight.shape);
        Err(stored.misfit(scale, what))
    };
    let (above, [rows, cols]) = match weight.shape.as_slice() {
        [above @ .., rows, cols] => (above, [*rows, *cols]),
        [cols] => (&[][..], [1, *cols]),
        [] => return Err(stored.misfit(codes, "is no weight")),
    };
    let slabs: u64 = above.iter().product();
    let mut coded = Coded::new(code, Unit::dense(8), (slabs * rows, cols), number);
    if shape.iter().product::<u64>() == 1 && shape.len() <= 1 {
        coded.block = (coded.rows.max(1), cols.max(1));
        return Ok(coded);
    }
    coded.slab_rows = rows.max(1);
    let grid = match shape.as_slice() {
        [grid @ .., down, across] if grid == above => Some([*down, *across]),
        // A channel's, without the column that it would be.
        [down] if above.is_empty() && *down == rows => Some([*down, 1]),
        _ => None,
    };
    let sizes = grid.and_then(|[down, across]| {
        let (r, c) = block.unzip();
        Some((grain(rows, down, r)?, grain(cols, across, c)?))
    });
    match sizes {
        Some(block) => coded.block = block,
        None => return misfit(),
    }
    Ok(coded)
}

/// How many of `len` share one of `count` scales: as many as declared, the last ones perhaps fewer,
/// or equal shares.
pub(super) fn grain(len: u64, count: u64, declared: Option<u64>) -> Option<u64> {
    match declared {
        Some(declared) if declared > 0 && len.div_ceil(declared) == count => Some(declared),
        _ if count > 0 && len.is_multiple_of(count) => Some((len / count).max(1)),
        _ => None,
    }
}
