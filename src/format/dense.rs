//! Plain numbers: the source's own, in another type, or with the error of another format.
//!
//! ```text
//! X   as X, or BF16, F16, F32   as X
//! ```
//!
//! Every tensor keeps its name and shape. What another format would quantize is encoded and decoded
//! again where that is simulated, as a loader of the source's element type does it.

use serde_json::{Map, Value};

use super::{Format, Grain, Plan, Reader, Takes, Weight, by_layout, ran};
use crate::error::{self, Result};
use crate::quant::Real;
use crate::recipe::{Assignment, Job, Request};
use crate::source::Edit;

/// `dense`: nothing is shown as codes.
#[derive(Debug)]
pub(super) struct Dense;

impl Format for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn about(&self) -> &'static str {
        "plain numbers, as the source has them or as --dtype and --simulate say, for every loader"
    }

    fn takes(&self) -> Takes {
        Takes::new(&[], Grain::None, None)
    }

    fn readers(&self) -> &'static [Reader] {
        const {
            &[
                ran("safetensors", "(`tests/loaders.rs`)"),
                by_layout("transformers"),
                ran(
                    "diffusers",
                    "0.42.1, a Flux with `--simulate` (`tests/consumers/pipeline.py`)",
                ),
                by_layout("vLLM"),
                by_layout("SGLang"),
                by_layout("mistral.rs"),
                by_layout("mlx-lm"),
            ]
        }
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        let Job { catalog, request, .. } = job;
        if let Some(format) = &request.simulate {
            if format == "dense" {
                return Err(error::invalid("dense has no error that --simulate could show"));
            }
            let request = &simulated(format, request);
            return super::find(format)?.assign(Job { request, ..job });
        }
        let given = [
            ("bits", request.bits.is_some()),
            ("group size", request.granularity.is_some()),
            ("symmetry", request.symmetric.is_some()),
            ("scale format", request.scale_format.is_some()),
            ("storage type", request.storage.is_some()),
            ("double quantization", request.double_quant),
            ("--set", !request.set.is_empty()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(Assignment::keep_all(catalog, "format dense")),
            Some((what, _)) => Err(error::invalid(format!(
                "dense takes no {what} but to --simulate another format"
            ))),
        }
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, config, request } = job;
        let (assignment, weights, surveys) = match &request.simulate {
            None => (assignment, Vec::new(), Vec::new()),
            Some(format) => {
                let request = &simulated(format, request);
                let format = super::find(format).expect("found for the assignment");
                let quantized = format.lay_out(Job { request, ..job }, assignment);
                (quantized.assignment, quantized.weights, quantized.surveys)
            }
        };
        let mut plan = Plan::new(assignment, catalog.tensors().len());
        plan.surveys = surveys;
        let mut weights = weights.into_iter().peekable();
        for (id, tensor) in catalog.tensors().iter().enumerate() {
            let own = Real::new(tensor.dtype).filter(|_| !tensor.shape.contains(&0));
            match (weights.next_if(|weight| weight.tensor == id), own, request.dtype) {
                (Some(weight), Some(own), to) => {
                    // Its chunks are whole rows.
                    let survey = weight.survey.filter(|_| !weight.scheme.is_surveyed_by_row());
                    plan.show(Weight { decoded: Some(to.unwrap_or(own)), survey, ..weight });
                }
                (None, Some(own), Some(to)) if to != own => plan.cast(id, to),
                _ => plan.keep(id),
            }
        }
        if let Some(to) = request.dtype {
            declare(&mut plan, config, to);
        }
        plan
    }
}

/// What is asked of the format that is simulated.
fn simulated(format: &str, request: &Request) -> Request {
    Request { format: format.to_owned(), simulate: None, dtype: None, ..request.clone() }
}

/// Names the element type in the config, wherever the source's config has one.
fn declare(plan: &mut Plan, config: Option<&Value>, to: Real) {
    const KEYS: [&str; 2] = ["torch_dtype", "dtype"];
    let name = match to {
        Real::Bf16 => "bfloat16",
        Real::F16 => "float16",
        Real::F32 => "float32",
    };
    let members = |value: &Value| -> Map<String, Value> {
        let there = KEYS.into_iter().filter(|key| value.get(key).is_some_and(Value::is_string));
        there.map(|key| (key.to_owned(), name.into())).collect()
    };
    let Some(config) = config else { return };
    plan.config.extend(members(config));
    for (key, value) in config.as_object().into_iter().flatten() {
        let set = members(value);
        if !set.is_empty() {
            plan.nested.push((key.clone(), Edit { remove: Vec::new(), set }));
        }
    }
}
