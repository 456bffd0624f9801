//! MLX: affine integers, and the MX and NV floats.
//!
//! For the module `X` with a weight of shape `[.., R, C]`, `b` bits and groups of `g`:
//!
//! ```text
//! X.weight  U32    [.., R, C*b/32]  codes one after the other, the first in the lowest bits
//! X.scales  float  [.., R, C/g]     affine
//!           U8                      2^(e - 127) in `mxfp4` and `mxfp8`, E4M3 in `nvfp4`
//! X.biases  float  [.., R, C/g]     affine alone: what code 0 stands for
//! ```
//!
//! Names stay as they are. Affine elements are `code * scale`, rounded to the type of the scales,
//! plus the bias, rounded again; the others are rounded to the model's type, or else BF16.
//!
//! Upstream: `mx.dequantize` of mlx 0.32 on a CPU, `load_model` in `utils.py` of mlx-lm 0.32.

use serde_json::Value;

use super::coded::{Code, Coded, Extra, Scale, Unit};
use super::fp8::number;
use super::stored::Stored;
use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::source::catalog::TensorId;

/// What a declaration without a `quant_method` is called here.
pub(super) const METHOD: &str = "mlx";

/// Claims every module that has scales.
///
/// # Errors
/// `Unsupported` for a mode that isn't known, `Corrupt` for operands that are missing or don't fit.
pub(super) fn claim(stored: &mut Stored<'_>, declared: &Value) -> Result<()> {
    for (scale, module) in stored.ending(".scales") {
        let found = stored.find(format_args!("{module}.weight"));
        let tensor = stored.tensor(scale);
        let codes = match found {
            Some(codes) => codes,
            // A parameter that just has this name.
            None if tensor.shape.len() < 2 => continue,
            None => return Err(stored.misfit(scale, "belongs to no weight")),
        };
        // A module's own declaration replaces all of the common one.
        let own = declared.get(module).filter(|own| own.is_object()).unwrap_or(declared);
        claim_module(stored, codes, scale, module, own)?;
    }
    for (codes, module) in stored.ending(".weight") {
        if stored.is_unclaimed(codes) && stored.tensor(codes).dtype == Dtype::U32 {
            stored.require(format_args!("{module}.scales"), &stored.tensor(codes).name)?;
        }
    }
    for (bias, _) in stored.ending(".biases") {
        if stored.is_unclaimed(bias) && stored.tensor(bias).shape.len() > 1 {
            return Err(stored.misfit(bias, "belongs to no module with scales"));
        }
    }
    Ok(())
}

fn claim_module(
    stored: &mut Stored<'_>,
    codes: TensorId,
    scale: TensorId,
    module: &str,
    declared: &Value,
) -> Result<()> {
    let mode = declared.get("mode").and_then(Value::as_str).unwrap_or("affine");
    let said = |member: &str| declared.get(member).and_then(Value::as_u64);
    let (code, bits, group) = match mode {
        "affine" => (Code::Unsigned, said("bits").unwrap_or(4), said("group_size").unwrap_or(64)),
        "mxfp4" => (Code::E2m1, 4, said("group_size").unwrap_or(32)),
        "mxfp8" => (Code::E4m3, 8, said("group_size").unwrap_or(32)),
        "nvfp4" => (Code::E2m1, 4, said("group_size").unwrap_or(16)),
        _ => {
            return Err(error::unsupported(format!(
                "`{module}.weight`: config.json declares mode {mode:?}, which can't be decoded; \
                 start from the original"
            )));
        }
    };
    let weight = stored.tensor(codes);
    let (Dtype::U32, [above @ .., words]) = (weight.dtype, &*weight.shape) else {
        return Err(stored.misfit(codes, "has scales, but is not U32"));
    };
    let row_bits = words.saturating_mul(32);
    let fits = (1..=8).contains(&bits) && group > 0 && row_bits.is_multiple_of(bits);
    let cols = if fits { row_bits / bits } else { 0 };
    let grouped: Vec<u64> = above.iter().copied().chain([cols.div_ceil(group.max(1))]).collect();
    if !fits || !cols.is_multiple_of(group) || stored.tensor(scale).shape != grouped {
        let what = format!("is no scale of `{module}.weight`: {bits} bits, groups of {group}");
        return Err(stored.misfit(scale, what));
    }
    let is_affine = code == Code::Unsigned;
    let number = match (mode, stored.tensor(scale).dtype) {
        ("affine", Dtype::F32 | Dtype::BF16 | Dtype::F16) => number(stored, scale)?,
        ("mxfp4" | "mxfp8", Dtype::U8) => Scale::Power,
        ("nvfp4", Dtype::U8) => Scale::E4m3,
        _ => return Err(stored.misfit(scale, format_args!("is no type of a scale of {mode}"))),
    };
    let rows: u64 = above.iter().product();
    let unit = Unit::dense(bits as u8);
    let mut coded = Coded::new(code, unit, (rows, cols), number);
    coded.block.1 = group;
    let mut operands = vec![codes, scale];
    let mut dtype = stored.model_dtype().unwrap_or(Dtype::BF16);
    if is_affine {
        let bias = stored.require(format_args!("{module}.biases"), &weight.name)?;
        let (tensor, scales) = (stored.tensor(bias), stored.tensor(scale));
        if (tensor.dtype, &tensor.shape) != (scales.dtype, &scales.shape) {
            let what = format!("is not what the scales are, {} {:?}", scales.dtype, scales.shape);
            return Err(stored.misfit(bias, what));
        }
        coded.extra = Extra::Bias;
        dtype = scales.dtype;
        operands.push(bias);
    }
    let shape: Vec<u64> = above.iter().copied().chain([cols]).collect();
    stored.claim(&weight.name, dtype, shape, coded, &operands)
}
