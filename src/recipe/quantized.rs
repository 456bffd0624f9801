//! Tells a checkpoint that is quantized already, which can't be quantized again as it stands.

use serde_json::Value;

use super::module_of;
use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::source::{Catalog, Tensor};

/// Where configs declare a quantization.
const DECLARATIONS: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// How the names of tensors end that only quantized checkpoints have: codes, scales and the like of
/// compressed-tensors, GPTQ, AWQ, block FP8, LLM.int8 and gpt-oss.
const ENDINGS: [&str; 9] = [
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_global_scale",
    ".qweight",
    ".qzeros",
    ".SCB",
    "_proj_blocks",
    "_proj_scales",
];

/// Refuses a checkpoint whose weights are codes already.
///
/// # Errors
/// `Unsupported`, with the method that its config declares and a tensor that shows it.
pub(super) fn refuse(catalog: &Catalog, config: Option<&Value>) -> Result<()> {
    let declared = config.and_then(declared);
    let tensor = catalog.tensors().iter().find(|tensor| is_quantized(tensor));
    let what = match (declared, tensor) {
        (None, None) => return Ok(()),
        (Some(method), None) => format!("config.json declares {method}"),
        (None, Some(tensor)) => format!("`{}` ({})", tensor.name, tensor.dtype),
        (Some(method), Some(tensor)) => {
            format!("config.json declares {method}, as in `{}` ({})", tensor.name, tensor.dtype)
        }
    };
    Err(error::unsupported(format!(
        "the source is quantized already and can't be decoded: {what}; start from the original"
    )))
}

/// The method that a config, or its language model's, declares.
fn declared(config: &Value) -> Option<String> {
    let nested = ["text_config", "llm_config"].iter().filter_map(|key| config.get(key));
    std::iter::once(config).chain(nested).find_map(|config| {
        let declared = DECLARATIONS
            .iter()
            .filter_map(|key| config.get(key))
            .find(|value| value.is_object())?;
        let method = declared.get("quant_method").or_else(|| declared.get("mode"));
        Some(method.and_then(Value::as_str).unwrap_or("a quantization").to_owned())
    })
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
        || module_of(&tensor.name).ends_with(".weight.quant_state")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Decoder, Extent};
    use serde_json::json;

    #[track_caller]
    fn check(name: &str, dtype: Dtype, config: Value, complaint: Option<&str>) {
        let operands = vec![Extent { shard: 0, start: 0, len: 0 }];
        let tensor = Tensor {
            name: name.to_owned(),
            dtype,
            shape: vec![128, 128],
            decoder: Decoder::Plain,
            operands,
        };
        let catalog = Catalog::new(vec![tensor]).expect("one name");
        match (refuse(&catalog, Some(&config)), complaint) {
            (Ok(()), None) => {}
            (Err(error), Some(complaint)) => {
                assert!(error.to_string().contains(complaint), "{error}");
            }
            (outcome, _) => panic!("{name}, {config}: {outcome:?}"),
        }
    }

    #[test]
    fn codes_are_told_from_weights_by_config_dtype_or_name() {
        check("a.weight", Dtype::BF16, json!({}), None);
        check("a.weight", Dtype::BF16, json!({"quantization_config": null}), None);
        let fp8 = json!({"quantization_config": {"quant_method": "fp8"}});
        check("a.weight", Dtype::F8_E4M3, fp8.clone(), Some("declares fp8, as in `a.weight` (F8"));
        check("a.weight", Dtype::BF16, fp8, Some("declares fp8;"));
        check(
            "a.weight",
            Dtype::BF16,
            json!({"quantization": {"bits": 4}}),
            Some("a quantization"),
        );
        let nested = json!({"text_config": {"quantization_config": {"quant_method": "awq"}}});
        check("a.qweight", Dtype::I32, nested, Some("declares awq, as in `a.qweight` (I32)"));
        check("a.weight.quant_state.bitsandbytes__nf4", Dtype::U8, json!({}), Some("quant_state"));
        check("mlp.experts.gate_up_proj_blocks", Dtype::U8, json!({}), Some("_blocks"));
    }
}
