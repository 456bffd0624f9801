//! Checkpoints that arrive quantized: stored codes and scales as the weights they stand for.
//!
//! Each dialect claims the tensors that it knows from their names, element types, shapes and what
//! `config.json` declares, and says how they become one logical tensor ([`Coded`]). What is decoded
//! is bit for bit what the dialect's own loader makes of it. What nobody claims and is no weight
//! either is refused by name.

mod bitsandbytes;
mod coded;
mod compressed_tensors;
mod fp8;
mod kernel;
mod mlx;
mod mxfp4;
mod stored;

use serde_json::Value;

pub use coded::Coded;
pub(super) use coded::{OPERANDS, Rect};
pub(super) use kernel::decode;
use stored::Stored;

use super::catalog::{Catalog, Tensor};
use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::threads;

/// Where configs declare a quantization.
pub(super) const DECLARATIONS: [&str; 3] =
    ["quantization_config", "compression_config", "quantization"];

/// Members of a config that may hold the config of a language model.
pub(super) const NESTED: [&str; 2] = ["text_config", "llm_config"];

/// How the names of tensors end that only quantized checkpoints have: codes, scales and the like.
const ENDINGS: [&str; 12] = [
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_global_scale",
    ".weight_zero_point",
    ".weight_g_idx",
    ".qweight",
    ".qzeros",
    ".SCB",
    "_proj_blocks",
    "_proj_scales",
    "_proj_scale_inv",
];

/// What a config says of its quantization.
#[derive(Clone, Copy, Debug)]
struct Declared<'a> {
    /// `quant_method`, or what else tells the dialect.
    method: &'a str,
    value: &'a Value,
}

impl<'a> Declared<'a> {
    /// The declaration of a config, or of its language model's.
    fn find(config: &'a Value) -> Option<Self> {
        let nested = NESTED.iter().filter_map(|key| config.get(key));
        std::iter::once(config).chain(nested).find_map(|config| {
            let value = DECLARATIONS
                .iter()
                .filter_map(|key| config.get(key))
                .find(|value| value.is_object())?;
            let method = value.get("quant_method").and_then(Value::as_str);
            let method = method.unwrap_or_else(|| match value {
                _ if value.get("config_groups").is_some() => compressed_tensors::METHOD,
                _ if value.get("bits").is_some() && value.get("group_size").is_some() => {
                    mlx::METHOD
                }
                _ => "a quantization",
            });
            Some(Self { method, value })
        })
    }
}

/// What becomes of a checkpoint's stored tensors.
pub(super) enum Outcome {
    /// They are what a loader would see.
    Plain,
    /// They are these.
    Decoded(Catalog),
    /// They are quantized and nobody here knows how: what tells so.
    Unknown(String),
}

/// The logical tensors of a checkpoint, given those that it stores. `read` gives the bytes of a
/// stored tensor; it is asked for small metadata only.
///
/// # Errors
/// `Unsupported` for a variant of a known quantization that can't be decoded, `Corrupt` for operands
/// that are missing or don't fit each other; both with the tensor named. `Io` where metadata can't be
/// read.
pub(super) fn logical(
    catalog: &Catalog,
    config: Option<&Value>,
    read: &dyn Fn(&Tensor) -> Result<Vec<u8>>,
) -> Result<Outcome> {
    let declared = config.and_then(Declared::find);
    let tensors = catalog.tensors();
    let any_quantized =
        || threads::map_ranges(tensors.len(), |range| tensors[range].iter().any(is_quantized));
    if declared.is_none() && !any_quantized().contains(&true) {
        return Ok(Outcome::Plain);
    }
    let mut stored = Stored::new(catalog, config.and_then(model_dtype), read);
    match declared {
        None => {
            // What names and shapes tell by themselves.
            fp8::claim(&mut stored, None)?;
            mxfp4::claim(&mut stored)?;
            bitsandbytes::claim(&mut stored)?;
        }
        Some(Declared { method: "fp8", value }) => fp8::claim(&mut stored, Some(value))?,
        Some(Declared { method: "mxfp4", .. }) => mxfp4::claim(&mut stored)?,
        Some(Declared { method: "bitsandbytes", .. }) => bitsandbytes::claim(&mut stored)?,
        Some(Declared { method: compressed_tensors::METHOD, value }) => {
            compressed_tensors::claim(&mut stored, value)?;
        }
        Some(Declared { method: mlx::METHOD, value }) => mlx::claim(&mut stored, value)?,
        Some(_) => {}
    }
    let left = stored.unclaimed().find(|tensor| is_quantized(tensor));
    let what = match (declared, left) {
        (Some(Declared { method, .. }), None) if stored.is_untouched() => {
            format!("config.json declares {method}")
        }
        (Some(Declared { method, .. }), Some(tensor)) => {
            format!("config.json declares {method}, as in `{}` ({})", tensor.name, tensor.dtype)
        }
        (None, Some(tensor)) => format!("`{}` ({})", tensor.name, tensor.dtype),
        (_, None) => {
            let catalog = Catalog::new(stored.into_tensors()).map_err(|[first, _]| {
                error::corrupt(format!("`{}` is stored both plain and quantized", first.name))
            })?;
            return Ok(Outcome::Decoded(catalog));
        }
    };
    Ok(Outcome::Unknown(what))
}

/// The element type that a config says the model has, its own or its language model's.
fn model_dtype(config: &Value) -> Option<Dtype> {
    let nested = NESTED.iter().filter_map(|key| config.get(key));
    std::iter::once(config).chain(nested).find_map(|config| {
        let name = config.get("dtype").or_else(|| config.get("torch_dtype"))?.as_str()?;
        float_named(name)
    })
}

/// A float that weights can have, as torch names it.
fn float_named(name: &str) -> Option<Dtype> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "bfloat16" => Some(Dtype::BF16),
        "float16" | "half" => Some(Dtype::F16),
        "float32" | "float" => Some(Dtype::F32),
        _ => None,
    }
}

fn is_quantized(tensor: &Tensor) -> bool {
    let codes = matches!(
        tensor.dtype,
        Dtype::F4
            | Dtype::F6_E2M3
            | Dtype::F6_E3M2
            | Dtype::F8_E4M3
            | Dtype::F8_E5M2
            | Dtype::F8_E8M0
            | Dtype::F8_E4M3FNUZ
            | Dtype::F8_E5M2FNUZ
    );
    codes
        || ENDINGS.iter().any(|ending| tensor.name.ends_with(ending))
        || tensor.name.rsplit_once('.').is_some_and(|(of, _)| of.ends_with(".weight.quant_state"))
}
