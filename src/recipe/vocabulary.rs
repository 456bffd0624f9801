//! What names of modules say: the vocabulary of checkpoints.

use super::linear::Reason;

/// The group of modules that engines fuse into one weight, as parent and family: all members of
/// a group share one scheme.
pub fn fused_group(module: &str) -> Option<(&str, &'static str)> {
    let (parent, leaf) = split_last(module);
    let family = match leaf {
        "q_proj" | "k_proj" | "v_proj" | "query" | "key" | "value" | "wq" | "wk" | "wv" | "q"
        | "k" | "v" | "q_lin" | "k_lin" | "v_lin" => "qkv",
        "gate_proj" | "up_proj" | "w1" | "w3" => "gate_up",
        "q_a_proj" | "kv_a_proj_with_mqa" => "qkv_a",
        "in_proj_qkv" | "in_proj_z" => "in_proj_qkvz",
        "in_proj_a" | "in_proj_b" => "in_proj_ba",
        _ => return None,
    };
    Some((parent, family))
}

/// The name that engines have for all of a module's [`fused_group`].
pub(super) fn fused_name(module: &str) -> Option<String> {
    let (parent, family) = fused_group(module)?;
    let leaf = match family {
        "qkv" => "qkv_proj",
        "gate_up" => "gate_up_proj",
        "qkv_a" => "fused_qkv_a_proj",
        family => family,
    };
    Some(if parent.is_empty() { leaf.to_owned() } else { format!("{parent}.{leaf}") })
}

/// What the words of one component of a name say about the part of the model that it begins.
pub(super) fn part_named(component: &str) -> Option<Reason> {
    match component {
        "mlp_AR" => return Some(Reason::Projector),
        "sam_model" => return Some(Reason::VisionTower),
        _ => {}
    }
    let mut found = None;
    for word in words(component) {
        match word {
            "projector" | "connector" | "merger" | "aligner" | "resampler" | "mm"
            | "multimodal" => return Some(Reason::Projector),
            // Layers that mix both, rather than encode one.
            "cross" => return None,
            "vision" | "visual" | "image" | "img" | "video" | "vit" | "pixel" => {
                found = Some(Reason::VisionTower);
            }
            "audio" | "speech" | "sound" | "acoustic" => found = Some(Reason::AudioTower),
            _ => {}
        }
    }
    found
}

/// Names of the last layer of a model, where they stand outside of any numbered block.
pub(super) const HEADS: &[&str] = &[
    "lm_head",
    "lm_heads",
    "head",
    "heads",
    "score",
    "classifier",
    "classifiers",
    "cls_classifier",
    "distillation_classifier",
    "qa_outputs",
    "qa_output",
    "proj_out",
    "embed_out",
    "output_projection",
    "logits_proj",
    "logits_dense",
    "unembed",
    "unembedding_projection",
    "vocab_projector",
    "seq_relationship",
    "audio_lm_head",
    "codec_head",
    "ctc_head",
    "ctc_proj",
    "lm_loss",
    "generator_lm_head",
    "cls",
    "class_head",
    "class_embed",
    "bbox_embed",
    "class_labels_classifier",
    "bbox_predictor",
    "dense_prediction",
    "pred_layer",
    "summary",
    "span_head",
    "start_classifier",
    "end_classifier",
];

/// Architectures whose `c_*` modules are GPT-2's `Conv1D`, where square weights leave no trace of it.
pub(super) const CONV1D_TYPES: &[&str] =
    &["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3", "clvp"];

pub(super) const CONV1D_NAMES: &[&str] = &["c_attn", "c_proj", "c_fc", "q_attn"];

/// Whether the loader of that architecture splits, merges or permutes the module's weight, or
/// replaces Linear by a class of its own.
pub(super) fn is_rearranged(model_type: &str, module: &str, leaf: &str) -> bool {
    match model_type {
        "nomic_bert" | "jina_embeddings_v3" => leaf == "Wqkv",
        "gte" => matches!(leaf, "qkv_proj" | "up_gate_proj"),
        "hrm_text" => matches!(leaf, "gqkv_proj" | "gate_up_proj"),
        "molmo2" | "molmo2_text" => matches!(leaf, "ff_proj" | "att_proj"),
        "sapiens2" => leaf == "w12",
        "tipsv2"
        | "tipsv2_vision_model"
        | "tipsv2_dpt"
        | "radio"
        | "qianfan_ocr"
        | "nemotron_h_omni" => leaf == "qkv",
        "nemo_speechlm" => leaf == "w_qkv",
        "gradium_phonon_tts" => leaf == "in_proj",
        "kimi_k25" => leaf == "wqkv",
        "unlimited_ocr" => leaf == "qkv_proj" && module.contains("vision"),
        "mistral_large4" => matches!(leaf, "wq" | "wk") && module.contains("vision"),
        "minimax_m3_vl" => {
            matches!(leaf, "gate_proj" | "up_proj") && module.contains(".shared_experts.")
        }
        "ernie4_5_vl_moe" => module.contains(".experts."),
        // Its own quantized Linear, with integer buffers beside the weight.
        "ibert" => module.contains("encoder."),
        _ => false,
    }
}

/// Whether a rearranged module becomes the projections of an attention, rather than those of a
/// feed-forward block.
pub(super) fn splits_attention(module: &str) -> bool {
    let leaf = split_last(module).1;
    leaf.contains("qkv") || leaf.contains("att") || matches!(leaf, "in_proj" | "wq" | "wk")
}

/// The part of a name before its last dot, and the one after it.
pub(super) fn split_last(name: &str) -> (&str, &str) {
    last_dot(name).map_or(("", name), |dot| (&name[..dot], &name[dot + 1..]))
}

/// Where a name's last dot is.
pub(super) fn last_dot(name: &str) -> Option<usize> {
    name.bytes().rposition(|byte| byte == b'.')
}

/// What stands between the dots of a name.
pub(super) fn components(name: &str) -> impl Iterator<Item = &str> {
    split(name, b'.')
}

/// As [`str::split`] at an ASCII character, which takes longer to begin than such short texts take to end.
fn split(text: &str, at: u8) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let (part, after) = match text.bytes().position(|byte| byte == at) {
            Some(end) => (&text[..end], Some(&text[end + 1..])),
            None => (text, None),
        };
        rest = after;
        Some(part)
    })
}

pub(super) fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit())
}

/// The path up to its first numbered component, or all of it.
pub(super) fn before_number(path: &str) -> &str {
    let mut start = 0;
    for component in components(path) {
        if is_number(component) {
            return path[..start].trim_end_matches('.');
        }
        start += component.len() + 1;
    }
    path
}

pub(super) fn is_within(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Whether one or more components in a row are among those of a name.
pub(super) fn has_part(module: &str, part: &str) -> bool {
    module.match_indices(part).any(|(at, _)| {
        let (before, after) = (&module[..at], &module[at + part.len()..]);
        (before.is_empty() || before.ends_with('.')) && (after.is_empty() || after.starts_with('.'))
    })
}

/// The words of a component: split at underscores, without trailing digits.
pub(super) fn words(component: &str) -> impl Iterator<Item = &str> {
    split(component, b'_').map(|word| word.trim_end_matches(|c: char| c.is_ascii_digit()))
}

/// A table of tokens as language models call it. The text side of a contrastive or a segmenting
/// model says `token_embedding`, and makes no tower of the other side.
pub(super) fn is_vocabulary(leaf: &str) -> bool {
    matches!(
        leaf,
        "embed_tokens"
            | "wte"
            | "word_embeddings"
            | "word_embedding"
            | "tok_embeddings"
            | "tokens_embed"
            | "shared"
            | "embed_in"
            | "embedding"
            | "embeddings"
    )
}

/// A table of tokens or of their positions, under a name that only tables have.
pub(super) fn is_token_table(leaf: &str) -> bool {
    matches!(
        leaf,
        "embed_tokens"
            | "wte"
            | "wpe"
            | "word_embeddings"
            | "word_embedding"
            | "tok_embeddings"
            | "token_embedding"
            | "token_embeddings"
            | "tokens_embed"
            | "positions_embed"
            | "embed_positions"
            | "position_embedding"
            | "position_embeddings"
            | "token_type_embeddings"
            | "shared"
            | "embed_in"
            | "embed"
            | "embedding"
            | "embeddings"
            | "relative_attention_bias"
    )
}

/// A module whose name says that it embeds, so that an unusual name inside proves nothing.
pub(super) fn is_embedding(module: &str) -> bool {
    words(split_last(module).1).any(|word| word.starts_with("embed"))
}

/// Whether a module looks up tokens, and nothing else, under the name that it has.
pub(super) fn is_token_embedding(module: &str) -> bool {
    matches!(
        split_last(module).1,
        "embed_tokens"
            | "wte"
            | "word_embeddings"
            | "tok_embeddings"
            | "token_embedding"
            | "token_embeddings"
            | "tokens_embed"
            | "embed_in"
    )
}

/// Whether an output head makes logits of tokens.
pub(super) fn is_language_head(module: &str) -> bool {
    matches!(split_last(module).1, "lm_head" | "embed_out")
}

/// A word that says that something is multiplied, whatever else is in the name.
pub(super) fn is_projection(leaf: &str) -> bool {
    words(leaf).any(|word| {
        matches!(
            word,
            "proj"
                | "projection"
                | "projections"
                | "projector"
                | "project"
                | "dense"
                | "linear"
                | "fc"
                | "lin"
                | "mlp"
        )
    })
}

/// A module named as lookup tables and learned queries are, so that a bias would have to prove that
/// it is a Linear.
pub(super) fn is_table(leaf: &str) -> bool {
    let is_word = |word: &str| {
        matches!(
            word,
            "embed"
                | "embeds"
                | "embedding"
                | "embeddings"
                | "embedder"
                | "emb"
                | "codebook"
                | "codebooks"
                | "codevectors"
                | "token"
                | "tokens"
                | "table"
                | "pe"
                | "pos"
                | "position"
                | "positions"
                | "relative"
                | "feat"
                | "feats"
                | "features"
                | "queries"
                | "points"
                | "norm"
                | "layernorm"
        )
    };
    !is_projection(leaf) && words(leaf).any(is_word)
}

pub(super) fn is_router(module: &str) -> bool {
    let (parent, leaf) = split_last(module);
    words(leaf).any(|word| matches!(word, "router" | "routing"))
        || matches!(leaf, "shared_expert_gate" | "wg" | "gating")
        || split_last(parent).1 == "router"
        || leaf == "gate"
}

/// A module without bias that is named as Linears are, and as nothing else is.
pub(super) fn is_linear_name(parent: &str, leaf: &str) -> bool {
    if is_number(leaf) {
        // An entry of a list or of a sequence is what the list is called.
        let mut rest = parent;
        loop {
            let (above, list) = split_last(rest);
            if !is_number(list) {
                return !is_table(list) && words(list).any(is_linear_word);
            }
            rest = above;
        }
    }
    // `w` alone is an embedding somewhere; `w1`, `w_out` and `wq` are Linears everywhere.
    if let Some(rest) = leaf.strip_prefix(['w', 'W'])
        && (is_number(rest) || rest.starts_with('_'))
    {
        return true;
    }
    let compound = leaf.contains('_');
    words(leaf).any(|word| is_linear_word(word) || compound && matches!(word, "gate" | "layer"))
}

fn is_linear_word(word: &str) -> bool {
    const WORDS: &[&str] = &[
        "proj",
        "projection",
        "projections",
        "project",
        "projector",
        "fc",
        "lin",
        "linear",
        "dense",
        "mlp",
        "ffn",
        "ffw",
        "ff",
        "q",
        "k",
        "v",
        "o",
        "qkv",
        "kv",
        "qk",
        "qkvz",
        "query",
        "key",
        "value",
        "wq",
        "wk",
        "wv",
        "wo",
        "wr",
        "wi",
        "wkv",
        "wqkv",
        "Wq",
        "Wk",
        "Wv",
        "Wo",
        "Wi",
        "Wkv",
        "Wqkv",
        "wgate",
        "up",
        "down",
        "out",
        "output",
        "head",
        "score",
        "classifier",
        "unembed",
        "preact",
        "reduction",
        "receptance",
        "adapter",
    ];
    WORDS.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_components() {
        for (module, part, is_there) in [
            ("wo", "wo", true),
            ("a.0.wo", "wo", true),
            ("wo.a", "wo", true),
            ("a.two.b", "wo", false),
            ("a.two.wo", "wo", true),
            ("a.won.b", "wo", false),
            ("m.feed_forward.w1", "feed_forward.w1", true),
            ("m.feed_forward.experts.0.w1", "feed_forward.w1", false),
            ("m.feed_forward.w10", "feed_forward.w1", false),
        ] {
            assert_eq!(has_part(module, part), is_there, "{module}, {part}");
        }
    }

    #[test]
    fn fused_groups_join_what_engines_load_as_one() {
        let group = |module| fused_group(module);
        assert_eq!(group("a.q_proj"), group("a.v_proj"));
        assert_eq!(group("a.gate_proj"), group("a.up_proj"));
        assert_ne!(group("a.q_proj"), group("b.q_proj"));
        assert_ne!(group("a.q_proj"), group("a.up_proj"));
        assert_eq!(group("a.o_proj"), None);
    }
}
