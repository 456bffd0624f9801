//! Names by which a loader knows the Linears that stay as they are.
//!
//! A loader matches `ignore` with the module names of the model that it builds in memory, which are
//! not always the checkpoint's: vision-language models move their language model, saves of a base
//! model lack a prefix, tied heads have no tensor, and whole encoders are renamed on the way in.
//! [`ignore`] therefore lists every kept module by its own name and by the other names it may have,
//! and adds a few patterns for what no checkpoint tells. A pattern is only added when it matches
//! none of the quantized modules.

use hashbrown::HashSet;

use super::linear::{Kind, Reason};
use super::{stack_of, vocabulary};
use crate::threads;

/// One module whose weight is kept though the loader may have a Linear there.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeptModule<'a> {
    /// Its name in the checkpoint.
    pub(super) name: &'a str,
    /// What [`classify`](super::linear::classify) says of its weight.
    pub(super) kind: Kind,
}

/// The entries of `quantization_config.ignore`: names in the order of `kept`, then more patterns, which
/// begin with `re:`. Of a mixture's experts all are kept or none. `quantized` are the names of all quantized modules.
pub(super) fn ignore(kept: &[KeptModule<'_>], quantized: &[&str]) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut list = Vec::new();
    let mut add = |name: String| {
        if seen.insert(name.clone()) {
            list.push(name);
        }
    };
    // Of experts there may be tens of thousands: one entry for a mixture, or for all.
    let any_quantized = quantized.iter().any(|module| stack_of(module).is_some());
    for module in kept {
        if let Some((mixture, _)) = stack_of(module.name) {
            if any_quantized {
                let names = loader_names(mixture).into_iter().chain([mixture.to_owned()]);
                let names: Vec<String> = names.map(|name| regex::escape(&name)).collect();
                add(format!(r"re:(?:{})(?:\..*)?$", names.join("|")));
            } else {
                add(r"re:(?:.*\.)?experts(?:\.\d+\..*)?$".to_owned());
            }
            continue;
        }
        add(module.name.to_owned());
        for name in loader_names(module.name) {
            add(name);
        }
    }
    // A tied head has no tensor.
    add("lm_head".to_owned());
    // Nets look at the path before the first number or at the last components, which repeat.
    let (mut taken, mut blocks, mut tails) = (HashSet::new(), HashSet::new(), HashSet::new());
    let gathered = threads::map_ranges(quantized.len(), |range| {
        let modules = &quantized[range];
        let taken = modules.iter().copied().filter(|module| seen.contains(*module));
        let blocks = modules.iter().map(|module| vocabulary::before_number(module));
        let tails = modules.iter().map(|module| tail(module));
        [taken.collect(), blocks.collect(), tails.collect::<HashSet<&str>>()]
    });
    for [more_taken, more_blocks, more_tails] in gathered {
        taken.extend(more_taken);
        blocks.extend(more_blocks);
        tails.extend(more_tails);
    }
    list.retain(|name| !taken.contains(name.as_str()));
    for net in Net::ALL {
        let looked_at = if matches!(net, Net::Parts) { &blocks } else { &tails };
        if net.is_wanted(kept) && !looked_at.iter().any(|module| net.matches(module)) {
            list.push(net.pattern());
        }
    }
    list
}

/// The last four components of a path: a head's name has two, and two layers follow at most.
fn tail(module: &str) -> &str {
    let dots = module.bytes().enumerate().rev().filter(|(_, byte)| *byte == b'.');
    dots.map(|(dot, _)| dot).nth(3).map_or(module, |dot| &module[dot + 1..])
}

/// Other names under which a loader may hold the module: with the base model's prefix or without,
/// with the language model on either side of `model`, and by the words that newer code has for the
/// layers of a BERT or ViT.
pub(super) fn loader_names(module: &str) -> Vec<String> {
    let mut names = moved(module);
    if let Some(renamed) = reworded(module) {
        for path in [renamed.replacen("encoder.layer.", "layers.", 1), renamed] {
            names.extend(moved(&path));
            names.push(path);
        }
    }
    names
}

/// The module with its first components added, dropped or exchanged.
fn moved(module: &str) -> Vec<String> {
    if let Some(rest) = module.strip_prefix("language_model.model.") {
        vec![format!("model.language_model.{rest}"), format!("language_model.{rest}")]
    } else if let Some(rest) = module.strip_prefix("model.language_model.model.") {
        vec![format!("model.language_model.{rest}")]
    } else if let Some(rest) = module.strip_prefix("model.language_model.") {
        vec![format!("language_model.model.{rest}"), format!("language_model.{rest}")]
    } else if let Some(rest) = module.strip_prefix("language_model.") {
        vec![rest.to_owned(), format!("model.{module}")]
    } else if let Some(rest) = module.strip_prefix("model.") {
        vec![
            rest.to_owned(),
            format!("model.language_model.{rest}"),
            format!("language_model.{module}"),
        ]
    } else {
        vec![format!("model.{module}")]
    }
}

/// The module with the last components of an older encoder layer in newer words.
fn reworded(module: &str) -> Option<String> {
    const WORDS: &[(&str, &str)] = &[
        (".attention.attention.query", ".attention.q_proj"),
        (".attention.attention.key", ".attention.k_proj"),
        (".attention.attention.value", ".attention.v_proj"),
        (".attention.self.query", ".attention.q_proj"),
        (".attention.self.key", ".attention.k_proj"),
        (".attention.self.value", ".attention.v_proj"),
        (".attention.output.dense", ".attention.o_proj"),
        (".intermediate.dense", ".mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
    ];
    WORDS.iter().find_map(|(old, new)| Some(format!("{}{new}", module.strip_suffix(old)?)))
}

/// Words of the parts that lead into a language model; see [`classify`](super::linear::classify).
const PART_WORDS: &[&str] = &[
    "vision",
    "visual",
    "image",
    "img",
    "video",
    "vit",
    "pixel",
    "audio",
    "speech",
    "sound",
    "acoustic",
    "projector",
    "connector",
    "merger",
    "aligner",
    "resampler",
    "multimodal",
    "mm",
];

/// The last components of output heads that are tied, and of those made anew for a task.
const HEAD_NAMES: &[&str] = &[
    "lm_head",
    "lm_heads",
    "decoder",
    "generator_lm_head",
    "predictions.decoder",
    "proj_out",
    "output_projection",
    "embed_out",
    "pred_layer.proj",
    "vocab_projector",
    "lm_loss",
    "score",
    "classifier",
    "qa_outputs",
    "unembedding_projection",
    "ctc_head",
];
const HEAD_LAYERS: &[&str] = &["decoder", "out_proj"];

/// The last component of modules that choose or weigh experts.
const ROUTER_NAMES: &[&str] = &["gate", "router", "shared_expert_gate"];

/// A family of modules, matched by pattern.
#[derive(Clone, Copy, Debug)]
enum Net {
    Parts,
    Routers,
    Heads,
    SplitAttention,
    SplitFeedForward,
}

impl Net {
    const ALL: [Self; 5] =
        [Self::Parts, Self::Routers, Self::Heads, Self::SplitAttention, Self::SplitFeedForward];

    fn is_wanted(self, kept: &[KeptModule<'_>]) -> bool {
        let any = |wanted: &dyn Fn(Reason, &str) -> bool| {
            kept.iter().any(|module| {
                module.kind.reason().is_some_and(|reason| wanted(reason, module.name))
            })
        };
        match self {
            Self::Parts => any(&|reason, _| {
                matches!(reason, Reason::VisionTower | Reason::AudioTower | Reason::Projector)
            }),
            Self::Routers => any(&|reason, _| reason == Reason::Router),
            Self::Heads => true,
            Self::SplitAttention => any(&|reason, module| {
                reason == Reason::Rearranged && vocabulary::splits_attention(module)
            }),
            Self::SplitFeedForward => any(&|reason, module| {
                reason == Reason::Rearranged && !vocabulary::splits_attention(module)
            }),
        }
    }

    fn pattern(self) -> String {
        match self {
            Self::Parts => format!(
                r"re:(?:[^.\d][^.]*\.)*(?:[^.]*_)?(?:{})\d*(?:_[^.]*)?(?:\..*)?$",
                PART_WORDS.join("|")
            ),
            Self::Routers => format!(r"re:(?:.*\.)?(?:{})$", ROUTER_NAMES.join("|")),
            Self::Heads => format!(
                r"re:(?:.*\.)?(?:{})(?:\.(?:{}|\d+))?$",
                HEAD_NAMES.join("|").replace('.', r"\."),
                HEAD_LAYERS.join("|")
            ),
            Self::SplitAttention => r"re:(?:.*\.)?(?:q_proj|k_proj|v_proj)$".to_owned(),
            Self::SplitFeedForward => r"re:(?:.*\.)?(?:gate_proj|up_proj|gate_up_proj)$".to_owned(),
        }
    }

    /// Whether [`Self::pattern`] matches a module, told without a regex.
    fn matches(self, module: &str) -> bool {
        let leaf = module.rsplit('.').next().unwrap_or(module);
        match self {
            Self::Parts => module
                .split('.')
                .take_while(|component| !component.starts_with(|c: char| c.is_ascii_digit()))
                .flat_map(|component| component.split('_'))
                .any(|word| {
                    PART_WORDS.contains(&word.trim_end_matches(|c: char| c.is_ascii_digit()))
                }),
            Self::Routers => ROUTER_NAMES.contains(&leaf),
            Self::Heads => {
                let is_layer =
                    HEAD_LAYERS.contains(&leaf) || leaf.bytes().all(|byte| byte.is_ascii_digit());
                let parent = module.strip_suffix(leaf).unwrap_or("").trim_end_matches('.');
                let ends = |path: &str| {
                    HEAD_NAMES.iter().any(|head| {
                        path.strip_suffix(head).is_some_and(|r| r.is_empty() || r.ends_with('.'))
                    })
                };
                ends(module) || is_layer && ends(parent)
            }
            Self::SplitAttention => {
                matches!(leaf, "q_proj" | "k_proj" | "v_proj")
            }
            Self::SplitFeedForward => matches!(leaf, "gate_proj" | "up_proj" | "gate_up_proj"),
        }
    }
}

#[cfg(test)]
mod tests {
    use regex::Regex;

    use super::*;

    const MODULES: &[&str] = &[
        "model.visual.blocks.0.attn.qkv",
        "vision_tower.layers.3.mlp.fc1",
        "model.multi_modal_projector.linear_1",
        "mm_projector",
        "model.layers.0.vision_experts.up_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.gate_proj",
        "block.1.layer.2.mlp.router",
        "lm_head",
        "model.lm_head",
        "lm_head.decoder",
        "decoder.lm_heads.3",
        "cls.predictions.decoder",
        "roberta.lm_header",
        "classifier.out_proj",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.up_proj",
        "q_proj",
    ];

    #[test]
    fn a_pattern_matches_what_its_net_does() {
        for net in Net::ALL {
            let pattern = net.pattern();
            let pattern = pattern.strip_prefix("re:").expect("a pattern");
            let regex = Regex::new(&format!("^(?:{pattern})")).expect("it compiles");
            for module in MODULES {
                assert_eq!(regex.is_match(module), net.matches(module), "{net:?} {module}");
            }
        }
    }

    #[test]
    fn nothing_that_is_quantized_is_ignored() {
        let gate =
            KeptModule { name: "model.layers.0.mlp.gate", kind: Kind::Doubtful(Reason::Router) };
        let list = ignore(&[gate], &["model.layers.0.mlp.up_proj"]);
        assert!(list.contains(&"layers.0.mlp.gate".to_owned()));
        assert!(list.iter().any(|entry| entry.starts_with("re:") && entry.contains("router")));
        let expert =
            KeptModule { name: "model.layers.0.mlp.experts.7.up_proj", kind: Kind::Linear };
        #[track_caller]
        fn matched(list: &[String], module: &str) -> bool {
            let patterns = list.iter().filter_map(|entry| entry.strip_prefix("re:"));
            patterns
                .map(|p| Regex::new(&format!("^(?:{p})")).expect("valid"))
                .any(|r| r.is_match(module))
        }
        for quantized in ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.7.up_proj"] {
            let list = ignore(&[expert], &[quantized]);
            assert!(matched(&list, expert.name) && !matched(&list, quantized), "{list:?}");
            assert!(matched(&list, "layers.0.mlp.experts"), "{list:?}");
        }
        let list = ignore(&[gate], &["layers.0.mlp.gate"]);
        assert!(!list.contains(&"layers.0.mlp.gate".to_owned()));
        assert!(!list.iter().any(|entry| entry.contains("router")));
    }

    #[test]
    fn a_language_model_is_found_on_either_side_of_model() {
        let names = loader_names("language_model.model.layers.0.mlp.gate");
        assert!(names.contains(&"model.language_model.layers.0.mlp.gate".to_owned()));
        let names = loader_names("model.layers.0.mlp.gate");
        assert!(names.contains(&"model.language_model.layers.0.mlp.gate".to_owned()));
        assert!(names.contains(&"language_model.model.layers.0.mlp.gate".to_owned()));
        let names = loader_names("vit.encoder.layer.0.attention.attention.query");
        assert!(names.contains(&"vit.layers.0.attention.q_proj".to_owned()));
    }
}
