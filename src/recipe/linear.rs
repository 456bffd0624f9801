//! Which tensors are weights of a Linear, told from a checkpoint's headers alone.
//!
//! Loaders replace every `Linear` of the model's code that `ignore` does not name, but a checkpoint
//! holds names and shapes, not code. [`classify`] reads the evidence in three steps: what a tensor
//! *is* (its rank, its bias, the words of its name, and a short table of architectures whose loader
//! rearranges tensors), what part of the model it *serves* (output head, router, tower, projector),
//! and from both what to do with it. A weight is only called [`Kind::Linear`] when it is provably
//! one; a doubtful one is kept and belongs into `ignore` all the same.

use hashbrown::{HashMap, HashSet};
use serde_json::Value;

use super::is_float;
use super::vocabulary::{
    CONV1D_NAMES, CONV1D_TYPES, HEADS, before_number, components, is_embedding, is_linear_name,
    is_number, is_projection, is_rearranged, is_router, is_table, is_token_table, is_vocabulary,
    is_within, part_named, split_last,
};
use crate::source::Tensor;
use crate::threads;

/// Why a tensor is kept as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub(super) enum Reason {
    /// Not a floating-point tensor.
    NotFloat,
    /// A bias, a norm, a convolution, a table of parameters: whatever is not a `weight` of rank 2.
    NotAMatrix,
    /// The experts of a mixture, one behind the other.
    FusedExperts,
    /// A lookup table: tokens, positions, token types, codebooks.
    Embedding,
    /// GPT-2's `Conv1D`, stored `[in, out]`.
    TransposedConv1d,
    /// Read by fused attention code that never calls the Linear.
    FusedAttention,
    /// The loader splits, merges or permutes this tensor, which it can't do to packed codes.
    Rearranged,
    /// Picks experts, or mixes their outputs.
    Router,
    /// The last layer: logits, scores, labels.
    OutputHead,
    /// An image or video encoder beside a language model.
    VisionTower,
    /// A sound encoder beside a language model.
    AudioTower,
    /// Leads from a tower to the language model.
    Projector,
    /// Might be a Linear; nothing proves it.
    Unproven,
}

impl Reason {
    /// The reason in a few words.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NotFloat => "not floating point",
            Self::NotAMatrix => "not a matrix of weights",
            Self::FusedExperts => "experts fused in one tensor",
            Self::Embedding => "embedding",
            Self::TransposedConv1d => "transposed Conv1D",
            Self::FusedAttention => "read by fused attention",
            Self::Rearranged => "rearranged by the loader",
            Self::Router => "router",
            Self::OutputHead => "output head",
            Self::VisionTower => "vision tower",
            Self::AudioTower => "audio tower",
            Self::Projector => "projector",
            Self::Unproven => "not provably a Linear",
        }
    }
}

impl Reason {
    /// Whether naming the module in `--only` quantizes it after all.
    pub(super) fn is_opt_in(self) -> bool {
        matches!(self, Self::VisionTower | Self::AudioTower | Self::Projector)
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a tensor is to a loader that replaces Linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Provably the weight of a Linear, `[out, in]`: to be quantized.
    Linear,
    /// Provably the weight of a Linear, kept because of the part it plays. It can be opted in, and
    /// its module belongs into `ignore` unless it is.
    Spared(Reason),
    /// Possibly the weight of a Linear: never quantized, and its module belongs into `ignore`.
    Doubtful(Reason),
    /// Not the weight of a Linear.
    Other(Reason),
}

impl Kind {
    /// Whether the loader may have a Linear here, so that keeping the tensor means naming its module
    /// in `ignore`.
    pub(super) fn may_be_linear(self) -> bool {
        !matches!(self, Self::Other(_))
    }

    /// Why the tensor is kept; `None` for a Linear.
    pub(super) fn reason(self) -> Option<Reason> {
        match self {
            Self::Linear => None,
            Self::Spared(reason) | Self::Doubtful(reason) | Self::Other(reason) => Some(reason),
        }
    }
}

/// The kind of every tensor of a checkpoint, in the order given. `config` is the parsed
/// `config.json`, where there is one.
pub(super) fn classify(tensors: &[Tensor], config: Option<&Value>) -> Vec<Kind> {
    let evidence = Evidence::gather(tensors, config);
    let kinds = threads::map_ranges(tensors.len(), |range| {
        let mut memo = Memo::default();
        tensors[range].iter().map(|tensor| evidence.kind(tensor, &mut memo)).collect::<Vec<_>>()
    });
    kinds.concat()
}

/// Every `model_type` in a config, those of a model's parts included.
pub fn model_types(config: &Value) -> Vec<&str> {
    let mut evidence = Evidence::default();
    evidence.read_config(config);
    evidence.model_types
}

/// Whether a tensor is a matrix for each of a mixture's experts.
fn is_stack_of_experts(tensor: &Tensor) -> bool {
    let is_mixture = |component| matches!(component, "experts" | "block_sparse_moe");
    tensor.shape.len() == 3 && components(split_last(&tensor.name).0).any(is_mixture)
}

/// Answers that many tensors share.
#[derive(Default)]
struct Memo<'a> {
    /// The part that a block serves, by the path before its number.
    parts: HashMap<&'a str, Option<Reason>>,
    /// What a name alone says, by its last two components.
    names: HashMap<&'a str, Kind>,
}

/// What the whole catalog and the config say, gathered before any tensor is judged.
#[derive(Default)]
struct Evidence<'a> {
    /// Length of every bias of rank 1, by module.
    biases: HashMap<&'a str, u64>,
    /// Modules with an `in_proj_weight`: torch's own multi-head attention.
    fused_attention: HashSet<&'a str>,
    /// Some bias of a `c_*` module is as long as the weight is wide.
    conv1d: bool,
    /// Modules that hold `experts`.
    mixtures: HashSet<&'a str>,
    /// Modules that look tokens up.
    token_tables: Vec<&'a str>,
    /// Parents of a module named as the language model.
    language_parents: HashSet<&'a str>,
    /// Encoders of equal rank, compared by a scaled product: none of them is a tower.
    contrastive: bool,
    /// Every `model_type` in the config, nested ones included.
    model_types: Vec<&'a str>,
    /// Every vocabulary size in the config.
    vocabularies: Vec<u64>,
}

impl<'a> Evidence<'a> {
    fn gather(tensors: &'a [Tensor], config: Option<&'a Value>) -> Self {
        let mut evidence = Self::default();
        if let Some(config) = config {
            evidence.read_config(config);
        }
        for noted in threads::map_ranges(tensors.len(), |range| {
            let mut noted = Self::default();
            tensors[range].iter().for_each(|tensor| noted.note(tensor));
            noted
        }) {
            evidence.biases.extend(noted.biases);
            evidence.fused_attention.extend(noted.fused_attention);
            evidence.mixtures.extend(noted.mixtures);
            evidence.token_tables.extend(noted.token_tables);
            evidence.language_parents.extend(noted.language_parents);
            evidence.contrastive |= noted.contrastive;
        }
        evidence.conv1d = evidence.model_types.iter().any(|kind| CONV1D_TYPES.contains(kind))
            || tensors.iter().any(|tensor| evidence.is_transposed(tensor));
        evidence
    }

    fn read_config(&mut self, value: &'a Value) {
        let Value::Object(map) = value else { return };
        for (key, value) in map {
            match value {
                Value::String(text) if key == "model_type" => self.model_types.push(text),
                Value::Number(number) if key.contains("vocab_size") => {
                    self.vocabularies.extend(number.as_u64());
                }
                Value::Object(_) if key != "quantization_config" => self.read_config(value),
                _ => {}
            }
        }
    }

    fn note(&mut self, tensor: &'a Tensor) {
        let (module, parameter) = split_last(&tensor.name);
        if parameter == "bias" {
            if let [len] = *tensor.shape {
                self.biases.insert(module, len);
            }
        } else if parameter == "in_proj_weight" || parameter == "in_proj_bias" {
            self.fused_attention.insert(module);
        } else if parameter.starts_with("logit_scale") || parameter.starts_with("logit_bias") {
            self.contrastive |= tensor.shape.iter().product::<u64>() == 1;
        } else if tensor.shape.len() == 2 && is_vocabulary(split_last(module).1) {
            self.token_tables.push(module);
        }
        // Only up to a mixture's experts: beyond them nothing of this stands.
        let mut start = 0;
        for component in components(&tensor.name) {
            let parent = tensor.name[..start].trim_end_matches('.');
            match component {
                "experts" => {
                    self.mixtures.insert(parent);
                    break;
                }
                "language_model" | "llm" => {
                    self.language_parents.insert(parent);
                }
                _ => {}
            }
            start += component.len() + 1;
        }
    }

    /// The bias is as long as the weight is wide, and not as it is high.
    fn is_transposed(&self, tensor: &Tensor) -> bool {
        let [rows, columns] = *tensor.shape else { return false };
        let Some(module) = tensor.name.strip_suffix(".weight") else { return false };
        rows != columns
            && !self.biases.is_empty()
            && CONV1D_NAMES.contains(&split_last(module).1)
            && self.biases.get(module) == Some(&columns)
    }

    fn kind(&self, tensor: &'a Tensor, memo: &mut Memo<'a>) -> Kind {
        let [rows, columns] = *tensor.shape else {
            let is_stack = is_float(tensor.dtype) && is_stack_of_experts(tensor);
            return Kind::Other(if is_stack { Reason::FusedExperts } else { Reason::NotAMatrix });
        };
        if !is_float(tensor.dtype) {
            return Kind::Other(Reason::NotFloat);
        }
        let Some(module) = tensor.name.strip_suffix(".weight") else {
            return Kind::Other(Reason::NotAMatrix);
        };
        let kind = self.nature(tensor, module, memo);
        if matches!(kind, Kind::Other(_)) {
            return kind;
        }
        let block = before_number(module);
        let part = *memo.parts.entry(block).or_insert_with(|| self.part(block));
        match (kind, part) {
            (Kind::Linear, Some(reason)) => return Kind::Spared(reason),
            (Kind::Doubtful(_), Some(reason)) => return Kind::Doubtful(reason),
            (Kind::Linear, None) => {}
            _ => return kind,
        }
        if self.is_output_head(module, rows, columns) {
            return Kind::Spared(Reason::OutputHead);
        }
        Kind::Linear
    }

    /// What the tensor is, whatever it is for.
    fn nature(&self, tensor: &'a Tensor, module: &'a str, memo: &mut Memo<'a>) -> Kind {
        let [rows, columns] = *tensor.shape else { return Kind::Other(Reason::NotAMatrix) };
        let (parent, leaf) = split_last(module);
        if self.conv1d && CONV1D_NAMES.contains(&leaf) {
            return Kind::Other(Reason::TransposedConv1d);
        }
        let bias = self.biases.get(module).copied();
        if bias == Some(columns) && rows != columns {
            return Kind::Other(Reason::TransposedConv1d);
        }
        if self.model_types.iter().any(|kind| is_rearranged(kind, module, leaf)) {
            return Kind::Doubtful(Reason::Rearranged);
        }
        if leaf == "out_proj" && self.fused_attention.contains(parent) {
            return Kind::Doubtful(Reason::FusedAttention);
        }
        // A mixture's gate is often a module of its own, with a bias or without.
        if is_router(module) || (leaf == "gate" && self.mixtures.contains(parent)) {
            return Kind::Doubtful(Reason::Router);
        }
        match bias {
            // No lookup table has a bias.
            Some(len) if len == rows => Kind::Linear,
            Some(_) => Kind::Doubtful(Reason::Unproven),
            None if is_number(leaf) => bare(parent, leaf),
            None => {
                let above = split_last(parent).0;
                let tail = module[above.len()..].trim_start_matches('.');
                *memo.names.entry(tail).or_insert_with(|| bare(parent, leaf))
            }
        }
    }

    /// The part of the model that all modules of a block serve, where that keeps them.
    fn part(&self, block: &str) -> Option<Reason> {
        if self.contrastive {
            return None;
        }
        let mut start = 0;
        for component in components(block) {
            let parent = block[..start].trim_end_matches('.');
            start += component.len();
            let path = &block[..start];
            start += 1;
            if matches!(component, "language_model" | "text_model" | "llm") {
                return None;
            }
            let sense = part_named(component);
            let beside_language = self.language_parents.contains(parent);
            let reason = match sense {
                Some(reason) => reason,
                None if beside_language && !HEADS.contains(&component) => Reason::Projector,
                None => continue,
            };
            let holds_tokens = self.token_tables.iter().any(|table| is_within(table, path));
            let tokens_elsewhere = self.token_tables.iter().any(|table| !is_within(table, path));
            if !holds_tokens && tokens_elsewhere {
                return Some(reason);
            }
        }
        None
    }

    fn is_output_head(&self, module: &str, rows: u64, columns: u64) -> bool {
        let (parent, leaf) = split_last(module);
        if before_number(parent).len() != parent.len() {
            return false;
        }
        let name = if is_number(leaf) { split_last(parent).1 } else { leaf };
        if HEADS.contains(&name) || rows != columns && self.vocabularies.contains(&rows) {
            return true;
        }
        // Inside a head, the layer that makes the scores.
        (is_number(leaf) || matches!(leaf, "out_proj" | "decoder" | "out" | "proj" | "output"))
            && components(parent).any(|component| HEADS.contains(&component))
    }
}

/// What a matrix without a bias is by its module's name, the names around it being unremarkable.
fn bare(parent: &str, leaf: &str) -> Kind {
    if HEADS.contains(&leaf) {
        Kind::Linear
    } else if is_token_table(leaf) {
        Kind::Other(Reason::Embedding)
    } else if is_table(leaf) || is_embedding(parent) && !is_projection(leaf) {
        Kind::Doubtful(Reason::Embedding)
    } else if is_linear_name(parent, leaf) {
        Kind::Linear
    } else {
        Kind::Doubtful(Reason::Unproven)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::dtype::Dtype;
    use crate::source::Decoder;

    /// A name, a shape, the length of the bias beside it (0 for none) and the kind.
    type Case = (&'static str, &'static [u64], u64, Kind);

    #[track_caller]
    fn check(config: Value, cases: &[Case]) {
        let tensor = |name: &str, shape: &[u64]| Tensor {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            decoder: Decoder::Plain,
            operands: Vec::new(),
        };
        let weights = cases.iter().map(|(name, shape, ..)| tensor(name, shape));
        let biases = cases.iter().filter(|(_, _, bias, _)| *bias > 0);
        let biases =
            biases.map(|(name, _, bias, _)| tensor(&name.replace(".weight", ".bias"), &[*bias]));
        let tensors: Vec<Tensor> = weights.chain(biases).collect();
        let kinds = classify(&tensors, Some(&config));
        for ((name, _, _, expected), kind) in cases.iter().zip(kinds) {
            assert_eq!(kind, *expected, "{name}");
        }
    }

    const TABLE: Kind = Kind::Other(Reason::Embedding);
    const TRANSPOSED: Kind = Kind::Other(Reason::TransposedConv1d);
    const HEAD: Kind = Kind::Spared(Reason::OutputHead);

    #[test]
    fn a_llama_is_quantized_but_for_its_tables_and_its_head() {
        check(
            json!({"model_type": "llama", "vocab_size": 512}),
            &[
                ("lm_head.weight", &[512, 128], 0, HEAD),
                ("model.embed_tokens.weight", &[512, 128], 0, TABLE),
                ("model.layers.0.self_attn.q_proj.weight", &[128, 128], 0, Kind::Linear),
                ("model.layers.0.mlp.down_proj.weight", &[128, 256], 0, Kind::Linear),
                ("model.norm.weight", &[128], 0, Kind::Other(Reason::NotAMatrix)),
            ],
        );
    }

    #[test]
    fn one_oblong_bias_shows_that_square_weights_are_transposed_too() {
        check(
            json!({}),
            &[
                ("h.0.attn.c_attn.weight", &[128, 384], 384, TRANSPOSED),
                ("h.0.attn.c_proj.weight", &[128, 128], 128, TRANSPOSED),
                ("wpe.weight", &[64, 128], 0, TABLE),
            ],
        );
        check(
            json!({"model_type": "gpt_bigcode"}),
            &[
                ("h.0.attn.c_attn.weight", &[192, 128], 192, Kind::Linear),
                ("h.0.attn.c_proj.weight", &[128, 128], 128, Kind::Linear),
            ],
        );
    }

    #[test]
    fn a_gate_is_a_router_and_a_gate_projection_is_not() {
        check(
            json!({}),
            &[
                ("layers.0.mlp.gate.weight", &[8, 128], 0, Kind::Doubtful(Reason::Router)),
                ("layers.0.mlp.gate_proj.weight", &[256, 128], 0, Kind::Linear),
                ("layers.0.mlp.experts.0.gate_proj.weight", &[128, 128], 0, Kind::Linear),
                ("layers.0.mlp.router.weight", &[8, 128], 8, Kind::Doubtful(Reason::Router)),
                (
                    "layers.0.mlp.experts.gate_up_proj",
                    &[8, 128, 256],
                    0,
                    Kind::Other(Reason::FusedExperts),
                ),
            ],
        );
    }

    #[test]
    fn an_encoder_is_a_tower_only_beside_a_language_model() {
        let tower = ("vision_tower.layers.0.mlp.fc1.weight", &[256u64, 128][..], 256);
        let spared = Kind::Spared(Reason::VisionTower);
        check(
            json!({}),
            &[
                (tower.0, tower.1, tower.2, spared),
                ("vision_tower.position_embedding.weight", &[16, 128], 0, TABLE),
                (
                    "multi_modal_projector.linear_1.weight",
                    &[128, 128],
                    128,
                    Kind::Spared(Reason::Projector),
                ),
                ("language_model.model.embed_tokens.weight", &[512, 128], 0, TABLE),
                ("language_model.model.layers.0.mlp.up_proj.weight", &[256, 128], 0, Kind::Linear),
            ],
        );
        check(json!({}), &[(tower.0, tower.1, tower.2, Kind::Linear)]);
        check(
            json!({}),
            &[
                (tower.0, tower.1, tower.2, Kind::Linear),
                ("logit_scale", &[], 0, Kind::Other(Reason::NotAMatrix)),
                ("text_model.embeddings.token_embedding.weight", &[512, 128], 0, TABLE),
            ],
        );
    }

    #[test]
    fn what_is_only_read_or_rearranged_is_not_quantized() {
        check(
            json!({}),
            &[
                ("head.attention.in_proj_weight", &[384, 128], 0, Kind::Other(Reason::NotAMatrix)),
                (
                    "head.attention.out_proj.weight",
                    &[128, 128],
                    128,
                    Kind::Doubtful(Reason::FusedAttention),
                ),
            ],
        );
        check(
            json!({"model_type": "nomic_bert"}),
            &[
                (
                    "encoder.layers.0.attn.Wqkv.weight",
                    &[384, 128],
                    0,
                    Kind::Doubtful(Reason::Rearranged),
                ),
                ("encoder.layers.0.attn.out_proj.weight", &[128, 128], 0, Kind::Linear),
            ],
        );
    }

    #[test]
    fn a_name_that_nothing_is_known_of_needs_a_bias() {
        check(
            json!({}),
            &[
                ("layers.0.blend.weight", &[128, 128], 0, Kind::Doubtful(Reason::Unproven)),
                ("layers.0.mingle.weight", &[128, 128], 128, Kind::Linear),
                ("layers.0.twist.weight", &[128, 256], 64, Kind::Doubtful(Reason::Unproven)),
            ],
        );
    }
}
