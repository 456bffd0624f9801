//! GPTQ checkpoints: integers packed along the input features, both versions.
//!
//! For the weight `X.weight` of shape `[R, C]`, with `G` groups to a row and `b` bits:
//!
//! ```text
//! X.qweight  I32  [C*b/32, R]  codes, a dense bit stream down the inputs of each output
//! X.qzeros   I32  [G, R*b/32]  zeros, a dense bit stream along the outputs; each less 1 in `gptq`
//! X.scales   F16  [G, R]       whatever the element type of X.weight
//! X.g_idx    I32  [C]          the group of each input: 0, 0, ..., 1, ...
//! ```
//!
//! Upstream: `gptqmodel/quantization/quantizer.py` and `gptqmodel/nn_modules/qlinear` of
//! github.com/ModelCloud/GPTQModel 7.7.0.
//!
//! Loaders find the Linears that are kept in different ways: gptqmodel, SGLang and vLLM by negative
//! patterns in `dynamic`, transformers (optimum) by `modules_in_block_to_quantize`, newer vLLM by
//! either that list or the tensors themselves.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{Format, Grain, Plan, Reader, Takes, by_layout, ran};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::quant::{Granularity, Scheme, TransposedOrder, TransposedScheme};
use crate::recipe::{Assignment, Decision, Job, Request, module_of};
use crate::source::Catalog;

/// One of the versions.
#[derive(Debug)]
pub(super) struct Gptq {
    name: &'static str,
    about: &'static str,
    readers: &'static [Reader],
    order: TransposedOrder,
    checkpoint_format: &'static str,
}

/// `gptq`: zeros less 1, what every loader reads.
pub(super) static V1: Gptq = Gptq {
    name: "gptq",
    about: "GPTQ integers of 2, 3, 4 or 8 bits, for vLLM, SGLang, gptqmodel and transformers",
    readers: &[
        ran("transformers", "5.23 + gptqmodel 7.7.0, a Llama (`scripts/gptqmodel.sh`)"),
        ran("gptqmodel", "7.7.0, symmetric (`scripts/gptqmodel.sh`)"),
        ran("vLLM", "0.32 (CPU, `scripts/vllm.sh`), 4 bits, symmetric"),
        by_layout("SGLang"),
    ],
    order: TransposedOrder::GptqV1,
    checkpoint_format: "gptq",
};

/// `gptq-v2`: the zeros themselves.
pub(super) static V2: Gptq = Gptq {
    name: "gptq-v2",
    about: "GPTQ's second version, which stores zero points as they are, for gptqmodel, transformers and vLLM",
    readers: &[
        ran("transformers", "5.23 + gptqmodel 7.7.0, a Llama (`scripts/gptqmodel.sh`)"),
        ran("gptqmodel", "7.7.0 (`scripts/gptqmodel.sh`)"),
        ran("vLLM", "0.32 (CPU, `scripts/vllm.sh`), 4 bits, symmetric"),
    ],
    order: TransposedOrder::GptqV2,
    checkpoint_format: "gptq_v2",
};

/// The sizes of groups that gptqmodel has and packing allows, the default first.
pub(super) const GROUPS: &[u32] = &[128, 32, 64, 256, 512, 1024];

impl Format for Gptq {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn takes(&self) -> Takes {
        Takes::new(&[4, 2, 3, 8], Grain::GroupsOrChannel(GROUPS), None)
    }

    fn readers(&self) -> &'static [Reader] {
        self.readers
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        self.takes().check(self.name, job.request)?;
        Assignment::new(job, Scheme::Transposed(self.scheme(job.request)))
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, request, .. } = job;
        let scheme = self.scheme(request);
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 4);
        for (id, tensor) in catalog.tensors().iter().enumerate() {
            let Decision::Quantize(scheme) = plan.assignment[id] else {
                plan.keep(id);
                continue;
            };
            plan.encode(id, scheme, &["qweight", "scales", "qzeros"]);
            let Scheme::Transposed(TransposedScheme { granularity, .. }) = scheme else {
                unreachable!("the only scheme offered")
            };
            let inputs = u32::try_from(tensor.shape[1]).expect("an input's number is an I32");
            let group = match granularity {
                Granularity::Group(size) => size,
                Granularity::Channel => inputs,
            };
            let groups = (0..inputs).flat_map(|input| (input / group).to_le_bytes());
            let groups: Vec<u8> = groups.collect();
            plan.inline(id, "g_idx", (Dtype::I32, &[inputs.into()]), groups);
        }
        let mut declared = json!({
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": group_size(scheme.granularity),
            "desc_act": false,
            "sym": scheme.symmetric,
            "lm_head": quantizes_head(&plan, catalog),
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            "dynamic": dynamic(plan.assignment.ignore()),
        });
        if let Some(modules) = modules_in_block(&plan, catalog) {
            declared["modules_in_block_to_quantize"] = modules;
        }
        plan.declare("quantization_config", declared);
        plan
    }
}

impl Gptq {
    fn scheme(&self, request: &Request) -> TransposedScheme {
        let takes = self.takes();
        TransposedScheme {
            bits: takes.bits(request),
            granularity: takes.granularity(request),
            symmetric: request.symmetric.unwrap_or(true),
            order: self.order,
            quality: request.quality,
        }
    }
}

/// As GPTQ's and AWQ's configs have it.
pub(super) fn group_size(granularity: Granularity) -> i64 {
    match granularity {
        Granularity::Group(size) => size.into(),
        Granularity::Channel => -1,
    }
}

fn quantizes_head(plan: &Plan, catalog: &Catalog) -> bool {
    let is_head = |module: &str| module == "lm_head" || module.ends_with(".lm_head");
    plan.weights.iter().any(|weight| is_head(module_of(&catalog[weight.tensor].name)))
}

/// Kept modules as patterns after `-:`, which are matched from the start of a name on.
fn dynamic(ignore: &[String]) -> Value {
    let pattern = |entry: &String| match entry.strip_prefix("re:") {
        Some(pattern) => format!("-:^{pattern}"),
        None => format!("-:^{}$", regex::escape(entry)),
    };
    let patterns: Map<String, Value> =
        ignore.iter().map(|entry| (pattern(entry), json!({}))).collect();
    patterns.into()
}

/// Which Linears within the repeated blocks are quantized, where not all of them are. Names end in
/// one of these, or contain one; so they are whole names where their ends would catch a kept one.
fn modules_in_block(plan: &Plan, catalog: &Catalog) -> Option<Value> {
    let in_block = |module: &&str| inside_block(module).is_some();
    let modules = |kept: bool| {
        let tensors = catalog.tensors().iter().enumerate();
        let wanted = move |id: usize| match &plan.assignment[id] {
            Decision::Quantize(_) => !kept,
            Decision::Keep { linear, .. } => kept && *linear,
        };
        tensors.filter(move |(id, _)| wanted(*id)).map(|(_, tensor)| module_of(&tensor.name))
    };
    let kept: Vec<&str> = modules(true).filter(in_block).collect();
    if kept.is_empty() {
        return None;
    }
    let ends: BTreeSet<&str> = modules(false).filter_map(inside_block).collect();
    let kept_ends: BTreeSet<&str> = kept.iter().filter_map(|module| inside_block(module)).collect();
    let catches = |end: &&str| kept_ends.iter().any(|kept| kept.contains(*end));
    let listed: Vec<&str> = if ends.iter().any(catches) {
        modules(false).collect()
    } else {
        ends.into_iter().collect()
    };
    Some(json!([listed]))
}

/// What follows the first number in a module's name.
fn inside_block(module: &str) -> Option<&str> {
    let mut rest = module;
    while let Some((component, after)) = rest.split_once('.') {
        rest = after;
        if component.bytes().all(|byte| byte.is_ascii_digit()) {
            return Some(rest);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format;
    use crate::source::{Decoder, Extent, Tensor};

    /// What a checkpoint of those modules declares, each `[64, 64]` but for routers.
    fn declared(modules: &[&str], request: &Request) -> Value {
        let tensor = |module: &&str| Tensor {
            name: format!("{module}.weight"),
            dtype: Dtype::BF16,
            shape: if module.ends_with("gate") { vec![4, 64] } else { vec![64, 64] },
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: 0, start: 0, len: 0 }],
        };
        let catalog = Catalog::new(modules.iter().map(tensor).collect()).expect("names");
        let config = json!({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]});
        let granularity = Some(Granularity::Group(32));
        let request = Request { granularity, ..request.clone() };
        let format = format::find(&request.format).expect("there");
        let job = Job { catalog: &catalog, config: Some(&config), request: &request };
        let plan = format.plan(job).expect("planned");
        plan.config["quantization_config"].clone()
    }

    const MIXTURE: &[&str] = &[
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts.0.down_proj",
        "model.layers.1.self_attn.o_proj",
        "lm_head",
    ];

    #[test]
    fn kept_linears_are_named_as_every_loader_looks_for_them() {
        let request = Request { format: "gptq".to_owned(), ..Request::default() };
        let plain = declared(&["model.layers.0.self_attn.o_proj", "lm_head"], &request);
        assert_eq!(plain["lm_head"], false);
        assert_eq!(plain["dynamic"]["-:^lm_head$"], json!({}));
        assert_eq!(plain.get("modules_in_block_to_quantize"), None);

        let mixture = declared(MIXTURE, &request);
        assert_eq!(mixture["dynamic"][r"-:^model\.layers\.0\.mlp\.gate$"], json!({}));
        let modules = &mixture["modules_in_block_to_quantize"];
        assert_eq!(modules, &json!([["mlp.experts.0.down_proj", "self_attn.o_proj"]]));

        let skip = vec!["*layers.1.*".to_owned()];
        let partly = declared(MIXTURE, &Request { skip, ..request });
        let whole: Vec<String> = MIXTURE[..3].iter().map(|m| (*m).to_owned()).collect();
        let whole = [&whole[0], &whole[2]];
        assert_eq!(partly["modules_in_block_to_quantize"], json!([whole]));
    }

    #[test]
    fn every_pattern_compiles_and_matches_nothing_that_is_quantized() {
        let request = Request { format: "gptq".to_owned(), ..Request::default() };
        let mixture = declared(MIXTURE, &request);
        for pattern in mixture["dynamic"].as_object().expect("patterns").keys() {
            let pattern = pattern.strip_prefix("-:").expect("negative");
            let regex = regex::Regex::new(pattern).expect("it compiles");
            for quantized in [MIXTURE[0], MIXTURE[2], MIXTURE[3]] {
                assert!(!regex.is_match(quantized), "{pattern} matches {quantized}");
            }
        }
    }
}
