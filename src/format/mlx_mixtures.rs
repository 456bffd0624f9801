//! Mixtures of experts in MLX: one tensor for all experts of a layer.
//!
//! mlx-lm joins experts that are stored one by one, or splits fused ones, but in many models their plain
//! weights only, and by names of its own. These are the models whose names it is known to have once
//! that is done, and to take so. (The `sanitize` of `mlx_lm/models/*.py` of mlx-lm 0.32.2.)

use std::collections::BTreeMap;

use serde_json::Value;

use super::Stack;
use crate::recipe::{is_expert, model_type, stack_of};
use crate::source::{Catalog, TensorId};

/// Types of models that hold `switch_mlp` where the checkpoint holds `experts`.
const SWITCHED: &[&str] = &[
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "hunyuan",
    "jamba",
    "lfm2_moe",
    "mellum",
    "minimax",
    "mistral4",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_vl_moe",
];

/// What tells the names of a model's experts: its type, or its language model's, where that is one of
/// several that may stand behind it.
pub(super) fn language_type(config: Option<&Value>) -> Option<&str> {
    match model_type(config)? {
        "mistral3" => model_type(config?.get("text_config")),
        kind => Some(kind),
    }
}

/// Where below the parent of `experts` a loader holds them joined, if that is known.
pub(super) fn joint(config: Option<&Value>) -> Option<&'static str> {
    match language_type(config)? {
        "gemma4" | "gemma4_text" | "gemma4_unified" => Some("experts.switch_glu"),
        "llama4" => Some("experts"),
        kind => SWITCHED.contains(&kind).then_some("switch_mlp"),
    }
}

/// The experts of a checkpoint, by what they are shown in, each with the expert's weights in order;
/// `None` where there are experts that no name is known for, or that are not of one shape.
pub(super) fn stacks(
    catalog: &Catalog,
    config: Option<&Value>,
) -> Option<Vec<(Stack, Vec<TensorId>)>> {
    let joint = joint(config);
    let mut found: BTreeMap<(&str, &str), BTreeMap<u64, TensorId>> = BTreeMap::new();
    for (id, tensor) in catalog.tensors().iter().enumerate() {
        let Some((module, parameter)) = tensor.name.rsplit_once('.') else { continue };
        if !is_expert(module) {
            continue;
        }
        let (mixture, projection) = stack_of(module).filter(|_| parameter == "weight")?;
        joint?;
        let number = module[mixture.len() + 1..].split('.').next()?.parse().ok()?;
        found.entry((mixture, projection)).or_default().insert(number, id);
    }
    let stack = |((mixture, projection), experts): ((&str, &str), BTreeMap<u64, TensorId>)| {
        let projection = match projection {
            "gate_proj" | "w1" => "gate_proj",
            "up_proj" | "w3" => "up_proj",
            "down_proj" | "w2" => "down_proj",
            _ => return None,
        };
        let first = &catalog[*experts.get(&0)?];
        let is_like_first = |id: &TensorId| {
            (catalog[*id].dtype, &catalog[*id].shape) == (first.dtype, &first.shape)
        };
        let is_whole = experts.keys().copied().eq(0..experts.len() as u64);
        if !is_whole || !experts.values().all(is_like_first) {
            return None;
        }
        let parent = mixture.strip_suffix("experts")?;
        let module = format!("{parent}{}.{projection}", joint?);
        Some((Stack { module, weights: Vec::new() }, experts.into_values().collect()))
    };
    found.into_iter().map(stack).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::dtype::Dtype;
    use crate::source::{Decoder, Extent, Tensor};

    #[test]
    fn experts_are_joined_by_the_names_that_the_loader_has_for_them() {
        #[track_caller]
        fn check(model_type: &str, names: &[(&str, u64)], expected: Option<&[(&str, &[usize])]>) {
            let tensor = |(name, rows): &(&str, u64)| Tensor {
                name: format!("model.layers.0.{name}"),
                dtype: Dtype::BF16,
                shape: vec![*rows, 128],
                decoder: Decoder::Plain,
                operands: vec![Extent { shard: 0, start: 0, len: 0 }],
            };
            let catalog = Catalog::new(names.iter().map(tensor).collect()).expect("unique");
            let (outer, inner) = model_type.split_once('/').unwrap_or((model_type, ""));
            let config = json!({ "model_type": outer, "text_config": { "model_type": inner } });
            let found = stacks(&catalog, Some(&config));
            let found: Option<Vec<(String, Vec<usize>)>> = found
                .map(|stacks| stacks.into_iter().map(|(stack, ids)| (stack.module, ids)).collect());
            let expected: Option<Vec<(String, Vec<usize>)>> = expected.map(|stacks| {
                let owned = |(name, ids): &(&str, &[usize])| {
                    (format!("model.layers.0.{name}"), ids.to_vec())
                };
                stacks.iter().map(owned).collect()
            });
            assert_eq!(found, expected, "{model_type}, {names:?}");
        }
        let pair = [("mlp.experts.1.up_proj.weight", 64), ("mlp.experts.0.up_proj.weight", 64)];
        check("qwen3_moe", &pair, Some(&[("mlp.switch_mlp.up_proj", &[1, 0])]));
        check("somebody_s_own", &pair, None);
        check("somebody_s_own", &[("mlp.up_proj.weight", 64)], Some(&[]));
        check(
            "mixtral",
            &[("block_sparse_moe.experts.0.w2.weight", 64), ("mlp.gate.weight", 8)],
            Some(&[("block_sparse_moe.switch_mlp.down_proj", &[0])]),
        );
        check("llama4", &pair, Some(&[("mlp.experts.up_proj", &[1, 0])]));
        check("gemma4", &pair, Some(&[("mlp.experts.switch_glu.up_proj", &[1, 0])]));
        check("mistral3/mistral4", &pair, Some(&[("mlp.switch_mlp.up_proj", &[1, 0])]));
        check("mistral3/llama", &pair, None);
        check("qwen3_moe", &pair[..1], None);
        check("qwen3_moe", &[pair[0], ("mlp.experts.0.up_proj.weight", 32)], None);
        check("qwen3_moe", &[("mlp.experts.0.mystery.weight", 64)], None);
        check("qwen3_moe", &[pair[1], ("mlp.experts.0.up_proj.bias", 64)], None);
    }
}
