//! The names that llama.cpp has for weights.
//!
//! Source: ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py and convert_hf_to_gguf.py.

use super::{module_of, vocabulary};

/// Where llama.cpp keeps a weight: a tensor's name, and the expert whose matrix it is there, if it is
/// one of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlamaCppName {
    /// As `blk.3.attn_q.weight`.
    pub name: String,
    /// The expert's number.
    pub expert: Option<u64>,
}

/// The names under which llama.cpp may know what comes into a weight, the likeliest first; none for
/// weights that it has no counterpart of, or in another order of input features.
pub fn llama_cpp_names(weight: &str) -> Vec<LlamaCppName> {
    let module = module_of(weight);
    let components: Vec<&str> = module.split('.').collect();
    if components.iter().any(|component| vocabulary::part_named(component).is_some()) {
        return Vec::new();
    }
    let named = |name: String, expert| LlamaCppName { name, expert };
    let number = |text: &str| -> Option<u64> {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().ok()).flatten()
    };
    let block = components
        .windows(2)
        .position(|pair| matches!(pair[0], "layers" | "h" | "blocks") && number(pair[1]).is_some());
    let Some(block) = block else {
        let is_head = vocabulary::is_language_head(module);
        return if is_head { vec![named("output.weight".to_owned(), None)] } else { Vec::new() };
    };
    let (stack, layer) = (&components[..block], components[block + 1]);
    // Encoders and decoders that stand side by side count their layers each.
    if stack.iter().any(|component| matches!(*component, "encoder" | "decoder")) {
        return Vec::new();
    }
    let of_layer = |leaf: &str, expert| named(format!("blk.{layer}.{leaf}.weight"), expert);
    let rest = &components[block + 2..];
    let leaves: (&[&str], Option<u64>) = match rest {
        [_, "experts", expert, leaf] => (experts(leaf), number(expert)),
        // Stacked in one tensor, which has no `.weight` of its own, or by its own name.
        [_, "experts"] => (experts(weight.rsplit('.').next().unwrap_or_default()), None),
        [_, "experts", leaf] => (experts(leaf), None),
        [_, "shared_expert" | "shared_experts" | "shared_mlp", leaf]
        | ["shared_mlp" | "shared_experts", leaf] => (shared(leaf), None),
        [attention, leaf] => match *attention {
            "self_attn" | "attn" | "attention" | "self_attention" => (attends(leaf), None),
            "mlp" | "feed_forward" | "ffn" | "residual_mlp" => (feeds_forward(leaf), None),
            _ => (&[], None),
        },
        _ => (&[], None),
    };
    leaves.0.iter().map(|leaf| of_layer(leaf, leaves.1)).collect()
}

fn attends(leaf: &str) -> &'static [&'static str] {
    match leaf {
        // What comes into all three is the same.
        "q_proj" | "wq" => &["attn_q", "attn_qkv"],
        "k_proj" | "wk" => &["attn_k", "attn_qkv", "attn_q"],
        "v_proj" | "wv" => &["attn_v", "attn_qkv", "attn_q"],
        "qkv_proj" | "query_key_value" | "Wqkv" | "c_attn" | "wqkv" => &["attn_qkv", "attn_q"],
        "o_proj" | "out_proj" | "dense" | "wo" | "c_proj" => &["attn_output"],
        // Multi-head latent attention.
        "q_a_proj" => &["attn_q_a", "attn_kv_a_mqa"],
        "kv_a_proj_with_mqa" => &["attn_kv_a_mqa", "attn_q_a"],
        "q_b_proj" => &["attn_q_b"],
        "kv_b_proj" => &["attn_kv_b"],
        _ => &[],
    }
}

fn feeds_forward(leaf: &str) -> &'static [&'static str] {
    match leaf {
        "gate_proj" | "w1" => &["ffn_gate", "ffn_up"],
        "up_proj" | "w3" | "gate_up_proj" => &["ffn_up", "ffn_gate"],
        "down_proj" | "w2" => &["ffn_down"],
        "fc1" | "c_fc" | "dense_h_to_4h" | "fc_in" => &["ffn_up"],
        "fc2" | "c_proj" | "dense_4h_to_h" | "fc_out" => &["ffn_down"],
        _ => &[],
    }
}

fn experts(leaf: &str) -> &'static [&'static str] {
    match leaf {
        "gate_proj" | "w1" => &["ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"],
        "up_proj" | "w3" | "gate_up_proj" => &["ffn_up_exps", "ffn_gate_exps", "ffn_gate_up_exps"],
        "down_proj" | "w2" => &["ffn_down_exps"],
        _ => &[],
    }
}

fn shared(leaf: &str) -> &'static [&'static str] {
    match leaf {
        "gate_proj" | "w1" => &["ffn_gate_shexp", "ffn_up_shexp"],
        "up_proj" | "w3" => &["ffn_up_shexp", "ffn_gate_shexp"],
        "down_proj" | "w2" => &["ffn_down_shexp"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_found_where_llama_cpp_keeps_them() {
        #[track_caller]
        fn check(weight: &str, expected: Option<(&str, Option<u64>)>) {
            let first = llama_cpp_names(weight).into_iter().next();
            let expected =
                expected.map(|(name, expert)| LlamaCppName { name: name.to_owned(), expert });
            assert_eq!(first, expected, "{weight}");
        }
        let same = |name| Some((name, None));
        check("model.layers.3.self_attn.q_proj.weight", same("blk.3.attn_q.weight"));
        check("model.layers.31.self_attn.o_proj.weight", same("blk.31.attn_output.weight"));
        check("model.layers.0.mlp.gate_up_proj.weight", same("blk.0.ffn_up.weight"));
        check("model.layers.0.mlp.down_proj.weight", same("blk.0.ffn_down.weight"));
        check("model.language_model.layers.7.mlp.up_proj.weight", same("blk.7.ffn_up.weight"));
        check("transformer.h.2.mlp.c_fc.weight", same("blk.2.ffn_up.weight"));
        check("gpt_neox.layers.2.attention.query_key_value.weight", same("blk.2.attn_qkv.weight"));
        check("lm_head.weight", same("output.weight"));
        check(
            "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
            same("blk.2.attn_kv_a_mqa.weight"),
        );
        check(
            "model.layers.4.mlp.experts.17.down_proj.weight",
            Some(("blk.4.ffn_down_exps.weight", Some(17))),
        );
        check(
            "model.layers.4.block_sparse_moe.experts.0.w1.weight",
            Some(("blk.4.ffn_gate_exps.weight", Some(0))),
        );
        check("model.layers.4.mlp.experts.gate_up_proj", same("blk.4.ffn_up_exps.weight"));
        check(
            "model.layers.4.mlp.shared_experts.up_proj.weight",
            same("blk.4.ffn_up_shexp.weight"),
        );
        // Other layers, other inputs, or inputs in another order.
        check("vision_tower.encoder.layers.3.self_attn.q_proj.weight", None);
        check("model.visual.blocks.3.mlp.fc1.weight", None);
        check("model.decoder.layers.3.self_attn.q_proj.weight", None);
        check("model.layers.3.linear_attn.out_proj.weight", None);
        check("model.embed_tokens.weight", None);
    }
}
