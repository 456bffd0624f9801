//! compressed-tensors: integers, FP8, MXFP8, MXFP4 and NVFP4.
//!
//! For the weight `X.weight` of shape `[R, C]` with `G` groups to a row:
//!
//! ```text
//! pack-quantized        X.weight_packed        I32      [R, ceil(C*b/32)]  u = q + 2^(b-1)
//!                       X.weight_scale         float    [R, G]
//!                       X.weight_zero_point    I32      [ceil(R*b/32), G]  where asymmetric
//!                       X.weight_shape         I64/I32  [2]                R, C
//! int-, float- and      X.weight               I8 or F8_E4M3  [R, C]
//! naive-quantized       X.weight_scale         float    [R, G], [1] or one per block
//!                       X.weight_zero_point    I8       as the scale       where asymmetric
//! mxfp8-quantized       X.weight               F8_E4M3  [R, C]
//!                       X.weight_scale         U8       [R, C/32]          2^(e - 127)
//! mxfp4-pack-quantized  X.weight_packed        U8       [R, C/2]           low nibble first
//!                       X.weight_scale         U8       [R, C/32]          2^(e - 127)
//! nvfp4-pack-quantized  X.weight_packed        U8       [R, C/2]           low nibble first
//!                       X.weight_scale         F8_E4M3  [R, C/16]
//!                       X.weight_global_scale  F32      [1]                divides the scales
//! ```
//!
//! What tells them apart is in the names, types and shapes, so that each module of a mixed
//! checkpoint is decoded as it is stored. A product is rounded to the type of its scale, then to the
//! model's.
//!
//! Versions before 0.18 packed codes of 3, 5, 6 and 7 bits as whole ones in each 32-bit word.
//!
//! Upstream: `compressors/*/base.py` and `quantization/lifecycle/forward.py` of compressed-tensors
//! 0.20.

use serde_json::Value;

use super::coded::{Code, Coded, Extra, Scale, Unit};
use super::fp8::{blocks, discard_activations, grain, number};
use super::stored::Stored;
use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::source::catalog::TensorId;

/// The `quant_method`.
pub(super) const METHOD: &str = "compressed-tensors";

/// Claims every module that is stored compressed.
///
/// # Errors
/// `Unsupported` for sparse, rotated and reordered weights; `Corrupt` for operands that are missing
/// or don't fit.
pub(super) fn claim(stored: &mut Stored<'_>, declared: &Value) -> Result<()> {
    refuse_transforms(declared)?;
    if let Some((g_idx, module)) = stored.ending(".weight_g_idx").next() {
        let name = &stored.tensor(g_idx).name;
        return Err(error::unsupported(format!(
            "`{module}.weight`: its columns are in groups of any order (`{name}`), which can't be \
             decoded; start from the original"
        )));
    }
    for (codes, module) in stored.ending(".weight_packed") {
        match stored.tensor(codes).dtype {
            Dtype::I32 => claim_integers(stored, codes, module, declared)?,
            Dtype::U8 => claim_floats(stored, codes, module)?,
            _ => return Err(stored.misfit(codes, "is no type of packed codes")),
        }
    }
    for (scale, module) in stored.ending(".weight_scale") {
        if stored.find(format_args!("{module}.weight_packed")).is_none() {
            claim_bytes(stored, scale, module, declared)?;
        }
    }
    discard_activations(stored);
    Ok(())
}

fn refuse_transforms(declared: &Value) -> Result<()> {
    let format = |value: &Value| value.get("format").and_then(Value::as_str).map(str::to_owned);
    let sparse = declared.get("sparsity_config").and_then(format);
    let rotated = declared
        .get("transform_config")
        .and_then(|transforms| transforms.get("config_groups")?.as_object())
        .is_some_and(|groups| !groups.is_empty());
    let what = match (sparse, format(declared)) {
        (Some(sparse), _) if sparse != "dense" => format!("sparsity {sparse}"),
        (_, Some(format)) if format == "marlin-24" => "format marlin-24".to_owned(),
        _ if rotated => "transforms".to_owned(),
        _ => return Ok(()),
    };
    Err(error::unsupported(format!(
        "config.json declares compressed-tensors with {what}, which can't be decoded; start from \
         the original"
    )))
}

/// What every group's weights are declared to have, as far as they have it.
fn weights_of_groups<'a>(
    declared: &'a Value,
    member: &'static str,
) -> impl Iterator<Item = &'a Value> {
    let groups = declared.get("config_groups").and_then(Value::as_object);
    let groups = groups.into_iter().flat_map(|groups| groups.values());
    groups.filter_map(move |group| group.get("weights")?.get(member))
}

/// Integers in 32-bit words.
fn claim_integers(
    stored: &mut Stored<'_>,
    codes: TensorId,
    module: &str,
    declared: &Value,
) -> Result<()> {
    let name = format!("{module}.weight");
    let scale = stored.require(format_args!("{name}_scale"), &name)?;
    let shape_id = stored.require(format_args!("{name}_shape"), &name)?;
    let zero = stored.find(format_args!("{name}_zero_point"));
    let [rows, cols] = read_shape(stored, shape_id)?;
    let &[packed_rows, words] = stored.tensor(codes).shape.as_slice() else {
        return Err(stored.misfit(codes, "is no matrix of packed codes"));
    };
    // A width that no code fits must not overflow what follows.
    if packed_rows != rows || cols > words.saturating_mul(32) {
        let what = format!("does not hold the codes of [{rows}, {cols}], as `{name}_shape` says");
        return Err(stored.misfit(codes, what));
    }
    let is_old = declared.get("version").and_then(Value::as_str).is_some_and(is_before_0_18);
    let unit = |bits: u8| if is_old { Unit::word(bits) } else { Unit::dense(bits) };
    let fits = |bits: &u8| {
        let bytes = unit(*bits).bytes_of(&(0..cols), u64::MAX).end;
        let exact = if is_old { bytes } else { cols.saturating_mul((*bits).into()).div_ceil(8) };
        exact.div_ceil(4) == words
    };
    let declared_bits = || {
        weights_of_groups(declared, "num_bits")
            .filter_map(Value::as_u64)
            .filter_map(|bits| u8::try_from(bits).ok().filter(|bits| (1..=8).contains(bits)))
    };
    let Some(bits) = declared_bits().find(fits).or_else(|| (1..=8).find(fits)) else {
        let what = format!("is no matrix of 1 to 8 bits for {cols} columns");
        return Err(stored.misfit(codes, what));
    };
    let number = number(stored, scale)?;
    let mut coded = Coded::new(Code::Offset, unit(bits), (rows, cols), number);
    coded.row_bytes = words * 4;
    coded.block.1 = match stored.tensor(scale).shape.as_slice() {
        [down, groups] if *down == rows => grain(cols, *groups, None),
        [1] => {
            coded.block.0 = rows.max(1);
            Some(cols.max(1))
        }
        _ => None,
    }
    .ok_or_else(|| stored.misfit(scale, format_args!("is no scale of [{rows}, {cols}]")))?;
    let mut operands = vec![codes, scale];
    if let Some(zero) = zero {
        let tensor = stored.tensor(zero);
        let groups = coded.scale_cols();
        let unit = unit(bits);
        let words = if rows == 0 { 0 } else { unit.words(rows - 1).end };
        coded.extra = match (tensor.dtype, tensor.shape.as_slice()) {
            (Dtype::I32, [down, across]) if [*down, *across] == [words, groups] => {
                Extra::ZeroDown(unit)
            }
            (Dtype::I8, [down, across]) if [*down, *across] == [rows, groups] => Extra::ZeroBytes,
            _ => {
                let what = format!("has no zero points of {bits} bits for [{rows}, {groups}]");
                return Err(stored.misfit(zero, what));
            }
        };
        operands.push(zero);
    }
    let dtype = rounded_to_scale(stored, scale, &mut coded);
    stored.discard(shape_id);
    stored.claim(&name, dtype, vec![rows, cols], coded, &operands)
}

/// Pairs of E2M1 codes.
fn claim_floats(stored: &mut Stored<'_>, codes: TensorId, module: &str) -> Result<()> {
    let name = format!("{module}.weight");
    let scale = stored.require(format_args!("{name}_scale"), &name)?;
    let &[rows, bytes] = stored.tensor(codes).shape.as_slice() else {
        return Err(stored.misfit(codes, "is no matrix of packed codes"));
    };
    let cols = bytes.saturating_mul(2);
    let (number, group, mut operands) = match stored.tensor(scale).dtype {
        Dtype::U8 => (Scale::Power, 32, vec![codes, scale]),
        Dtype::F8_E4M3 => {
            let global = stored.require(format_args!("{name}_global_scale"), &name)?;
            let tensor = stored.tensor(global);
            if tensor.dtype != Dtype::F32 || tensor.elements() != 1 {
                return Err(stored.misfit(global, "is no single F32"));
            }
            (Scale::OverGlobal, 16, vec![codes, scale, global])
        }
        _ => return Err(stored.misfit(scale, "is no type of a scale of 4-bit floats")),
    };
    if stored.tensor(scale).shape != [rows, cols / group] || !cols.is_multiple_of(group) {
        let what = format!("has no scale for each {group} of [{rows}, {cols}]");
        return Err(stored.misfit(scale, what));
    }
    let mut coded = Coded::new(Code::E2m1, Unit::dense(4), (rows, cols), number);
    coded.block.1 = group;
    // Upstream knows these in BF16 alone, and loads that into whatever the model has.
    coded.rounded = Some(Dtype::BF16);
    let dtype = stored.model_dtype().unwrap_or(Dtype::BF16);
    operands.truncate(3);
    stored.claim(&name, dtype, vec![rows, cols], coded, &operands)
}

/// A byte for each element.
fn claim_bytes(
    stored: &mut Stored<'_>,
    scale: TensorId,
    module: &str,
    declared: &Value,
) -> Result<()> {
    let name = format!("{module}.weight");
    let codes = stored.require(&name, &stored.tensor(scale).name)?;
    let weight = stored.tensor(codes);
    let code_type = weight.dtype;
    if !matches!(code_type, Dtype::I8 | Dtype::F8_E4M3) {
        return Err(stored.misfit(codes, "has a scale, but is neither I8 nor F8_E4M3"));
    }
    if stored.tensor(scale).dtype == Dtype::U8 {
        let mut coded = blocks(stored, codes, scale, Scale::Power, None)?;
        if coded.block != (1, 32) {
            return Err(stored
                .misfit(scale, format_args!("has no scale for each 32 of {:?}", weight.shape)));
        }
        coded.rounded = Some(Dtype::BF16);
        let dtype = stored.model_dtype().unwrap_or(Dtype::BF16);
        return stored.claim(&name, dtype, weight.shape.clone(), coded, &[codes, scale]);
    }
    let declared_block = weights_of_groups(declared, "block_structure")
        .filter_map(Value::as_array)
        .find_map(|sizes| Some((sizes.first()?.as_u64()?, sizes.get(1)?.as_u64()?)));
    let number = number(stored, scale)?;
    let mut coded = blocks(stored, codes, scale, number, declared_block)?;
    let mut operands = vec![codes, scale];
    if let Some(zero) = stored.find(format_args!("{name}_zero_point")) {
        let (tensor, scales) = (stored.tensor(zero), stored.tensor(scale));
        // FP8 has none but zeros, which older versions stored in the type of the codes.
        if code_type == Dtype::I8 {
            if tensor.dtype != Dtype::I8 || tensor.elements() != scales.elements() {
                return Err(stored.misfit(
                    zero,
                    format_args!("has no zero point for each of {:?}", scales.shape),
                ));
            }
            coded.extra = Extra::ZeroBytes;
            operands.push(zero);
        } else {
            stored.discard(zero);
        }
    }
    let dtype = rounded_to_scale(stored, scale, &mut coded);
    stored.claim(&name, dtype, weight.shape.clone(), coded, &operands)
}

/// The logical element type: the model's, or else that of the scale, to which products are rounded
/// on the way.
fn rounded_to_scale(stored: &Stored<'_>, scale: TensorId, coded: &mut Coded) -> Dtype {
    let scale = match stored.tensor(scale).dtype {
        Dtype::F16 => Dtype::F16,
        Dtype::F32 => Dtype::F32,
        _ => Dtype::BF16,
    };
    let dtype = stored.model_dtype().unwrap_or(scale);
    coded.rounded = (dtype != scale).then_some(scale);
    dtype
}

/// The two dimensions that a `weight_shape` holds.
fn read_shape(stored: &Stored<'_>, id: TensorId) -> Result<[u64; 2]> {
    let tensor = stored.tensor(id);
    let bytes = match (tensor.dtype, tensor.shape.as_slice()) {
        (Dtype::I64 | Dtype::I32, [2]) => stored.read(id)?,
        _ => return Err(stored.misfit(id, "does not hold a shape of two dimensions")),
    };
    let size = bytes.len() / 2;
    let dim = |bytes: &[u8]| {
        // Negative ones come out too large for any codes.
        let mut word = [if bytes[size - 1] >> 7 == 1 { 0xff } else { 0 }; 8];
        word[..size].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    Ok([dim(&bytes[..size]), dim(&bytes[size..])])
}

fn is_before_0_18(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (0, 18)
}
