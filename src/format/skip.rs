//! Kept modules, as transformers' own quantizers match them.

use serde_json::Value;

use super::Plan;
use crate::recipe::{model_types, module_of};
use crate::source::Catalog;

/// What [`never_converted`] is kept for.
pub(super) const NEVER_CONVERTED: &str = "never converted by transformers";

/// Modules that transformers never converts, whatever a list of them says: the `_keep_in_fp32_modules` of its
/// models that are Linears (transformers 5.23; a model has those of its parts too).
pub(super) fn never_converted(config: Option<&Value>) -> &'static [&'static str] {
    let of_type = |kind: &str| -> Option<&'static [&'static str]> {
        match kind {
            "t5" | "mt5" | "umt5" | "udop" | "pop2piano" => Some(&["wo"]),
            "deepseek_v32" | "glm_moe_dsa" | "axk2" | "mistral_large4" => {
                Some(&["indexer.weights_proj"])
            }
            "deepseek_v4" => Some(&[
                "self_attn.compressor.kv_proj",
                "self_attn.compressor.gate_proj",
                "self_attn.compressor.indexer.kv_proj",
                "self_attn.compressor.indexer.gate_proj",
                "self_attn.compressor.indexer.scorer.weights_proj",
            ]),
            _ => None,
        }
    };
    config.and_then(|config| model_types(config).into_iter().find_map(of_type)).unwrap_or_default()
}

/// Entries for a list of modules not to convert.
///
/// Upstream takes an entry for the end of a name, and for a regex at its start; older releases even
/// when the match stops amid a word. A name that would so catch a quantized module is anchored.
pub(super) fn modules(plan: &Plan, catalog: &Catalog) -> Vec<String> {
    let quantized: Vec<&str> =
        plan.weights.iter().map(|weight| module_of(&catalog[weight.tensor].name)).collect();
    let entry = |ignored: &String| match ignored.strip_prefix("re:") {
        Some(pattern) => pattern.to_owned(),
        None => {
            let caught = |module: &&str| module.starts_with(ignored) || module.ends_with(ignored);
            if quantized.iter().any(caught) {
                format!("{}$", ignored.replace('.', r"\."))
            } else {
                ignored.clone()
            }
        }
    };
    plan.assignment.ignore().iter().map(entry).collect()
}
