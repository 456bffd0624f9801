//! Loaders that `--for` names: what each reads, what it can't, how it is told.
//!
//! A format says which loaders read it at all ([`Format::readers`](crate::format::Format::readers)).
//! Here is the rest: which format suits a loader best, and what of a model it has no code for. The
//! facts are of the versions named, most of them met by running them.

use serde_json::Value;

use crate::error::{self, Result};
use crate::format::{FORMATS, Weight};
use crate::quant::{
    AffineScheme, Granularity, IntScheme, Packing, Scheme, TransposedOrder, TransposedScheme,
};
use crate::recipe::{Request, is_expert, model_type, module_of};
use crate::view::{Model, View};

/// A program or library that loads checkpoints.
#[derive(Debug)]
pub struct Loader {
    /// The name that `--for` takes.
    pub name: &'static str,
    /// One line: its version, and what it is good for here.
    pub about: &'static str,
    /// What formats call it among their readers, and those whose code it loads with.
    reads_as: &'static [&'static str],
    /// The format that is taken where none is asked for.
    pub prefers: &'static str,
    /// What it can't read of a model in one of its formats, and what would work.
    refuses: fn(&Model, &Request) -> Option<String>,
    /// The lines that load a path.
    lines: fn(&Request, Option<&Value>, &str) -> String,
}

/// Every loader, in the order in which they are listed to users.
pub static LOADERS: &[Loader] = &[
    Loader {
        name: "transformers",
        about: "transformers 5.23, with compressed-tensors 0.20 or bitsandbytes 0.50",
        reads_as: &["transformers"],
        prefers: "compressed-tensors",
        refuses: |model, _| refused_by_transformers(model),
        lines: |request, config, path| {
            let class = class_of(config);
            if needs_dequantize(request.symmetric == Some(false), config)
                && PACKED.contains(&request.format.as_str())
            {
                return format!(
                    "from transformers import {class}, CompressedTensorsConfig\n\
                     config = CompressedTensorsConfig(dequantize=True)\n\
                     model = {class}.from_pretrained({path:?}, quantization_config=config)"
                );
            }
            format!("from transformers import {class}\nmodel = {class}.from_pretrained({path:?})")
        },
    },
    Loader {
        name: "vllm",
        about: "vLLM 0.32, on a GPU; its CPU backend has kernels for fewer formats",
        reads_as: &["vLLM"],
        prefers: "compressed-tensors",
        refuses: |model, _| {
            refused_by_kernels(model, "vLLM 0.32").or_else(|| refused_by_vllm(model))
        },
        lines: |_, _, path| format!("vllm serve {}", shell(path)),
    },
    Loader {
        name: "sglang",
        about: "SGLang, by the layout alone",
        reads_as: &["SGLang"],
        prefers: "compressed-tensors",
        refuses: |model, _| refused_by_kernels(model, "SGLang"),
        lines: |_, _, path| format!("python -m sglang.launch_server --model-path {}", shell(path)),
    },
    Loader {
        name: "mlx-lm",
        about: "mlx-lm 0.32, on Apple silicon",
        reads_as: &["mlx-lm"],
        prefers: "mlx",
        refuses: |model, _| {
            let shards = model.checkpoint().shards();
            let odd = shards.iter().find(|shard| !shard.file.name().starts_with("model"))?;
            Some(format!(
                "mlx-lm 0.32 reads files named model*.safetensors alone, and no {}: rename the source's",
                odd.file.name()
            ))
        },
        lines: |_, _, path| format!("mlx_lm.generate --model {} --prompt Hello", shell(path)),
    },
    Loader {
        name: "diffusers",
        about: "diffusers, whose pipelines load text encoders with transformers",
        reads_as: &["diffusers", "transformers"],
        prefers: "bnb-nf4",
        refuses: |model, _| refused_by_transformers(model),
        lines: |_, _, path| {
            format!(
                "from diffusers import DiffusionPipeline\n\
                 pipeline = DiffusionPipeline.from_pretrained({path:?})"
            )
        },
    },
    Loader {
        name: "mistralrs",
        about: "mistral.rs 0.9.5",
        reads_as: &["mistral.rs"],
        prefers: "mlx",
        refuses: |model, _| refused_by_mistralrs(model),
        lines: |_, _, path| {
            format!(
                "from mistralrs import Architecture, Runner, Which\n\
                 runner = Runner(which=Which.Plain(model_id={path:?}))"
            )
        },
    },
];

/// The loader of that name.
///
/// # Errors
/// `Invalid` with the names there are.
pub fn find(name: &str) -> Result<&'static Loader> {
    LOADERS.iter().find(|loader| loader.name == name).ok_or_else(|| {
        let names: Vec<&str> = LOADERS.iter().map(|loader| loader.name).collect();
        error::invalid(format!("no loader {name:?}: there are {}", names.join(", ")))
    })
}

impl Loader {
    /// The formats that it reads.
    pub fn formats(&self) -> impl Iterator<Item = &'static str> {
        let reads = |format: &&&'static dyn crate::format::Format| {
            format.readers().iter().any(|reader| self.reads_as.contains(&reader.loader))
        };
        FORMATS.iter().filter(reads).map(|format| format.name())
    }

    /// Refuses a format that it doesn't read.
    ///
    /// # Errors
    /// `Invalid`, with those that it reads.
    pub fn check_format(&self, format: &str) -> Result<()> {
        let formats: Vec<&str> = self.formats().collect();
        if formats.contains(&format) {
            return Ok(());
        }
        Err(error::invalid(format!("{} reads no {format}: {}", self.name, formats.join(", "))))
    }

    /// Refuses a view that it can't load.
    ///
    /// # Errors
    /// `Invalid` or `Unsupported`, with the part of the model that is in the way and what would work.
    pub fn check(&self, view: &View, request: &Request) -> Result<()> {
        self.check_format(&request.format)?;
        if self.name == "diffusers" && !view.root().join("model_index.json").exists() {
            return Err(error::unsupported(format!(
                "{}: no pipeline, for want of a model_index.json: --for transformers",
                view.root().display()
            )));
        }
        let refused = view.models().iter().find_map(|model| (self.refuses)(model, request));
        refused.map_or(Ok(()), |why| Err(error::unsupported(why)))
    }

    /// What to type to load a path, given what was asked for and the source's config.
    pub fn lines(&self, request: &Request, config: Option<&Value>, path: &str) -> String {
        (self.lines)(request, config, path)
    }
}

/// Types of models that transformers 5.23 builds without the parameters that packed modules have: it
/// loads them decoded.
const DECODED: &[&str] = &[
    "t5",
    "mt5",
    "umt5",
    "clip",
    "siglip",
    "mamba",
    "mamba2",
    "falcon",
    "gpt_bigcode",
    "modernbert",
    "wav2vec2",
    "paligemma",
];

/// Formats whose packed codes have other parameters than a Linear.
const PACKED: &[&str] = &["compressed-tensors", "ct-nvfp4", "ct-mxfp4"];

fn needs_dequantize(asymmetric: bool, config: Option<&Value>) -> bool {
    asymmetric || model_type(config).is_some_and(|kind| DECODED.contains(&kind))
}

fn config_of(model: &Model) -> Option<&Value> {
    model.checkpoint().config().map(|config| &config.value)
}

/// The name of a weight's module.
fn module<'a>(model: &'a Model, weight: &Weight) -> &'a str {
    module_of(&model.checkpoint().catalog()[weight.tensor].name)
}

/// The integers of a model, packed or not, with their modules.
fn integers(model: &Model) -> impl Iterator<Item = (&str, IntScheme)> {
    model.plan().weights.iter().filter_map(|weight| match weight.scheme {
        Scheme::Int(scheme) => Some((module(model, weight), scheme)),
        _ => None,
    })
}

fn refused_by_transformers(model: &Model) -> Option<String> {
    let mut dense = integers(model).filter(|(module, _)| !is_expert(module));
    let (_, first) = dense.next()?;
    let asymmetric = !first.symmetric;
    let (other, scheme) = dense.find(|(_, scheme)| *scheme != first)?;
    if !needs_dequantize(asymmetric, config_of(model)) {
        return None;
    }
    let why = if asymmetric { "asymmetric codes" } else { "this model" };
    let instead = if asymmetric { "--symmetric, or no --set" } else { "no --set" };
    Some(format!(
        "transformers 5.23 loads {why} with dequantize=True alone, and then all modules with one \
         scheme, but `{other}` has {}: {instead}",
        Scheme::Int(scheme)
    ))
}

/// Weight-only kernels of engines for GPUs.
fn refused_by_kernels(model: &Model, loader: &str) -> Option<String> {
    const GROUPS: [u32; 3] = [32, 64, 128];
    integers(model).filter(|(_, scheme)| scheme.packing == Packing::Packed32).find_map(
        |(module, scheme)| {
            let what = Scheme::Int(scheme);
            if !matches!(scheme.bits, 4 | 8) {
                return Some(format!(
                    "{loader} has no kernel for {what} (`{module}`): it has 4 and 8 bits"
                ));
            }
            if !scheme.symmetric && scheme.bits == 8 {
                return Some(format!(
                    "{loader} has no kernel for {what} (`{module}`): --symmetric, or 4 bits"
                ));
            }
            match scheme.granularity {
                Granularity::Group(size) if !GROUPS.contains(&size) => Some(format!(
                    "{loader} has no kernel for {what} (`{module}`): groups of 32, 64 and 128, and \
                     channels"
                )),
                _ => None,
            }
        },
    )
}

/// GPTQ's codes, by the `TYPE_MAP` of vLLM's `quantization/auto_gptq.py`.
fn refused_by_vllm(model: &Model) -> Option<String> {
    model.plan().weights.iter().find_map(|weight| match weight.scheme {
        Scheme::Transposed(TransposedScheme { bits, symmetric, order, .. })
            if order != TransposedOrder::AwqGemm && !(symmetric && matches!(bits, 4 | 8)) =>
        {
            Some(format!(
                "vLLM 0.32 reads no GPTQ of {} (`{}`): 4 and 8 bits, symmetric, or --format awq",
                weight.scheme,
                module(model, weight)
            ))
        }
        _ => None,
    })
}

fn refused_by_mistralrs(model: &Model) -> Option<String> {
    let config = config_of(model);
    if model_type(config) == Some("llama") && config?.get("rope_theta").is_none() {
        return Some(
            "mistral.rs 0.9.5 asks a Llama's config.json for a rope_theta, and here is none: \
             --for transformers"
                .to_owned(),
        );
    }
    model.plan().weights.iter().find_map(|weight| match weight.scheme {
        Scheme::Affine(AffineScheme { bits: 5, .. }) => Some(format!(
            "mistral.rs 0.9.5 fails on 5 bits (`{}`): 2, 3, 4, 6 and 8 bits work",
            module(model, weight)
        )),
        _ => None,
    })
}

/// The class of transformers that loads the model.
fn class_of(config: Option<&Value>) -> &str {
    let class = config.and_then(|config| config.get("architectures")?.get(0)?.as_str());
    match class {
        Some(class) if class.ends_with("ForCausalLM") => "AutoModelForCausalLM",
        Some(class) if class.bytes().all(|byte| byte.is_ascii_alphanumeric()) => class,
        _ => "AutoModel",
    }
}

/// A path as a shell takes it.
fn shell(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:@%,=".contains(&byte);
    if path.bytes().all(plain) {
        path.to_owned()
    } else {
        format!("'{}'", path.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_loader_reads_the_format_that_it_prefers() {
        for loader in LOADERS {
            assert!(loader.check_format(loader.prefers).is_ok(), "{}", loader.name);
            assert!(loader.formats().any(|format| format == "dense"), "{}", loader.name);
        }
    }

    #[test]
    fn a_format_that_a_loader_does_not_read_is_refused_with_those_that_it_does() {
        let error = find("mlx-lm").and_then(|loader| loader.check_format("bnb-nf4"));
        let text = error.expect_err("refused").to_string();
        assert!(text.starts_with("mlx-lm reads no bnb-nf4: dense, mlx, "), "{text}");
    }

    #[test]
    fn the_lines_load_what_was_asked_for() {
        #[track_caller]
        fn check(loader: &str, request: Request, config: Value, path: &str, expected: &str) {
            let loader = find(loader).expect("there");
            assert_eq!(loader.lines(&request, Some(&config), path), expected);
        }
        let llama = || json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"]});
        let t5 = || json!({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]});
        let asymmetric = || Request { symmetric: Some(false), ..Request::default() };
        check(
            "transformers",
            Request::default(),
            llama(),
            "/mnt/q",
            "from transformers import AutoModelForCausalLM\n\
             model = AutoModelForCausalLM.from_pretrained(\"/mnt/q\")",
        );
        check(
            "transformers",
            asymmetric(),
            llama(),
            "/mnt/q",
            "from transformers import AutoModelForCausalLM, CompressedTensorsConfig\n\
             config = CompressedTensorsConfig(dequantize=True)\n\
             model = AutoModelForCausalLM.from_pretrained(\"/mnt/q\", quantization_config=config)",
        );
        check(
            "transformers",
            Request { format: "bnb-nf4".to_owned(), ..Request::default() },
            t5(),
            "/mnt/q",
            "from transformers import T5ForConditionalGeneration\n\
             model = T5ForConditionalGeneration.from_pretrained(\"/mnt/q\")",
        );
        check("vllm", Request::default(), llama(), "/mnt/q", "vllm serve /mnt/q");
        check("vllm", Request::default(), llama(), "/mnt/my model", "vllm serve '/mnt/my model'");
    }
}
