//! bitsandbytes: NF4, FP4 and LLM.int8.
//!
//! For the weight `X.weight` of `N` elements, flat, in blocks of `B`:
//!
//! ```text
//! X.weight                                   U8 or a float  N/2 bytes     high nibble first
//! X.weight.absmax                            F32 or U8      [ceil(N/B)]
//! X.weight.quant_map                         F32            [16]          what codes stand for
//! X.weight.quant_state.bitsandbytes__nf4     U8             JSON          shape, dtype, blocksize
//! X.weight.nested_absmax                     F32            [ceil(N/B/b)] where absmax is U8
//! X.weight.nested_quant_map                  F32            [256]
//! ```
//!
//! (or `__fp4`), and for LLM.int8 of shape `[R, C]`:
//!
//! ```text
//! X.weight         I8   [R, C]
//! X.SCB            F32  [R]     the largest magnitude of a row, which 127 stands for
//! X.weight_format  U8   []      0: in rows
//! ```
//!
//! Products are computed in f32, those of LLM.int8 as `code * SCB * (1/127)` in that order, and
//! rounded to the element type that the state names, or for LLM.int8, whose loader has F32, the
//! model's.
//!
//! Upstream: `QuantState` and `dequantize_4bit` in `functional.py`, `int8_vectorwise_dequant` in
//! `_ops.py` of bitsandbytes 0.50.

use serde::Deserialize;

use super::coded::{Code, Coded, Extra, Scale, Unit};
use super::float_named;
use super::stored::Stored;
use crate::dtype::{Dtype, byte_len};
use crate::error::{self, Error, ErrorKind, Result};
use crate::source::catalog::TensorId;

/// More than any state takes.
const STATE_BYTES: u64 = 1 << 16;

/// 1/127, as upstream writes it.
const ONE_127TH: f32 = 7.874_015_718_698_502e-3_f64 as f32;

/// What upstream stores of a weight beside its tensors.
#[derive(Deserialize)]
struct State {
    blocksize: u64,
    dtype: String,
    shape: Vec<u64>,
    nested_blocksize: Option<u64>,
    nested_offset: Option<f64>,
}

/// Claims every weight that has a state or row maxima.
///
/// # Errors
/// `Corrupt` for operands that are missing or don't fit, `Unsupported` for codes that are not in
/// rows.
pub(super) fn claim(stored: &mut Stored<'_>) -> Result<()> {
    for ending in [".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"] {
        for (state, name) in stored.ending(ending) {
            claim_table(stored, state, name)?;
        }
    }
    for (scale, module) in stored.ending(".SCB") {
        claim_int8(stored, scale, module)?;
    }
    for ending in [".weight.absmax", ".weight.quant_map", ".weight.nested_absmax"] {
        let left = stored.ending(ending).find(|(id, _)| stored.is_unclaimed(*id));
        if let Some((id, _)) = left {
            return Err(stored.misfit(id, "belongs to no weight with a quantization state"));
        }
    }
    Ok(())
}

fn claim_table(stored: &mut Stored<'_>, state_id: TensorId, name: &str) -> Result<()> {
    let tensor = stored.tensor(state_id);
    if tensor.dtype != Dtype::U8 || tensor.elements() > STATE_BYTES {
        return Err(stored.misfit(state_id, "is no quantization state"));
    }
    let state: State = serde_json::from_slice(&stored.read(state_id)?)
        .map_err(|cause| Error::caused(ErrorKind::Corrupt, format!("`{}`", tensor.name), cause))?;
    let complain = |what: &str| error::corrupt(format!("`{}`: {what}", tensor.name));
    let dtype = float_named(&state.dtype)
        .ok_or_else(|| complain(&format!("no weight has the dtype {:?}", state.dtype)))?;
    if state.blocksize == 0 || state.nested_blocksize == Some(0) {
        return Err(complain("a block of 0"));
    }
    if byte_len(dtype, &state.shape).is_none() {
        return Err(complain("its shape overflows"));
    }
    let elements: u64 = state.shape.iter().product();
    let codes = stored.require(name, &tensor.name)?;
    if stored.tensor(codes).stored_len() != elements.div_ceil(2) {
        let what = format!("does not hold two codes a byte of {:?}", state.shape);
        return Err(stored.misfit(codes, what));
    }
    let blocks = elements.div_ceil(state.blocksize);
    let operand = |what: &str, dtype: Dtype, count: u64| {
        let id = stored.require(format_args!("{name}.{what}"), name)?;
        let tensor = stored.tensor(id);
        if tensor.dtype != dtype || tensor.elements() != count {
            return Err(stored.misfit(id, format_args!("is not {count} of {dtype}")));
        }
        Ok(id)
    };
    let map = operand("quant_map", Dtype::F32, 16)?;
    let (scale, operands) = match (state.nested_blocksize, state.nested_offset) {
        (Some(block), Some(offset)) => {
            let offset = offset as f32;
            let nested = [
                operand("absmax", Dtype::U8, blocks)?,
                map,
                operand("nested_absmax", Dtype::F32, blocks.div_ceil(block))?,
                operand("nested_quant_map", Dtype::F32, 256)?,
            ];
            (Scale::Nested { block, offset }, nested.to_vec())
        }
        (None, None) => (Scale::F32, vec![operand("absmax", Dtype::F32, blocks)?, map]),
        _ => return Err(complain("half of a nested quantization")),
    };
    let unit = Unit { high_first: true, ..Unit::dense(4) };
    let mut coded = Coded::new(Code::Table, unit, (1, elements), scale);
    coded.block.1 = state.blocksize;
    let operands: Vec<TensorId> = [codes].into_iter().chain(operands).collect();
    stored.discard(state_id);
    stored.claim(name, dtype, state.shape, coded, &operands)
}

fn claim_int8(stored: &mut Stored<'_>, scale: TensorId, module: &str) -> Result<()> {
    let name = format!("{module}.weight");
    let codes = stored.require(&name, &stored.tensor(scale).name)?;
    let weight = stored.tensor(codes);
    let (Dtype::I8, &[rows, cols]) = (weight.dtype, weight.shape.as_slice()) else {
        return Err(stored.misfit(codes, "is no matrix of I8"));
    };
    let tensor = stored.tensor(scale);
    if tensor.dtype != Dtype::F32 || tensor.elements() != rows {
        return Err(stored.misfit(scale, format_args!("has no F32 for each of {rows} rows")));
    }
    if let Some(format) = stored.find(format_args!("{name}_format")) {
        if stored.tensor(format).stored_len() != 1 {
            return Err(stored.misfit(format, "is no single byte"));
        }
        if stored.read(format)? != [0] {
            return Err(error::unsupported(format!(
                "`{name}`: its codes are tiled for a GPU (`{name}_format`), which can't be decoded; \
                 start from the original"
            )));
        }
        stored.discard(format);
    }
    let mut coded = Coded::new(Code::Signed, Unit::dense(8), (rows, cols), Scale::F32);
    coded.extra = Extra::Factor(ONE_127TH);
    let dtype = stored.model_dtype().unwrap_or(Dtype::F16);
    stored.claim(&name, dtype, vec![rows, cols], coded, &[codes, scale])
}
