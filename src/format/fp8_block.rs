//! FP8 blocks of transformers' own `fp8`, as in DeepSeek-V3.
//!
//! For the weight `X.weight` of shape `[R, C]`, both multiples of 128:
//!
//! ```text
//! X.weight            F8_E4M3  [R, C]
//! X.weight_scale_inv  F32      [R/128, C/128]  what codes are multiplied by; or F8_E8M0
//! ```
//!
//! Weights that are not whole blocks are kept, as upstream keeps them.
//!
//! Upstream: `integrations/finegrained_fp8.py` of transformers 5.23.

use serde_json::json;

use super::takes::{Grain, Takes};
use super::{Format, Plan, Reader, by_layout, ran, skip};
use crate::error::Result;
use crate::quant::{Fp8Grain, Fp8Scale, Fp8Scheme, Scheme};
use crate::recipe::{Assignment, Decision, Job, Offer, Request, ScaleFormat};

/// `fp8-block`: one scale per block of 128 x 128.
#[derive(Debug)]
pub(super) struct Fp8Block;

impl Format for Fp8Block {
    fn name(&self) -> &'static str {
        "fp8-block"
    }

    fn about(&self) -> &'static str {
        "FP8 per block of 128 x 128 as in DeepSeek-V3, for transformers, vLLM, SGLang and mistral.rs"
    }

    fn takes(&self) -> Takes {
        Takes { scale_format: true, ..Takes::new(&[8], Grain::Squares(128), Some(true)) }
    }

    fn readers(&self) -> &'static [Reader] {
        const {
            &[
                ran("transformers", "5.23, a Llama (`tests/consumers/formats.py`)"),
                by_layout("vLLM"),
                by_layout("SGLang"),
                ran("mistral.rs", "0.9.5, a Llama (`tests/consumers/mistral.py`)"),
            ]
        }
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        self.takes().check(self.name(), job.request)?;
        let (scale, _) = scales(job.request);
        let (grain, quality) = (Fp8Grain::Block(128), job.request.quality);
        let scheme = Scheme::Fp8(Fp8Scheme { grain, scale, whole_blocks: true, quality });
        let never = skip::never_converted(job.config);
        Assignment::new(job, Offer::from(scheme).sparing(never, skip::NEVER_CONVERTED))
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, request, .. } = job;
        let (_, scale_fmt) = scales(request);
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 2);
        for id in 0..catalog.tensors().len() {
            match plan.assignment[id] {
                Decision::Quantize(scheme) => {
                    plan.encode(id, scheme, &["weight", "weight_scale_inv"]);
                }
                Decision::Keep { .. } => plan.keep(id),
            }
        }
        let declared = json!({
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "scale_fmt": scale_fmt,
            "weight_block_size": [128, 128],
            "modules_to_not_convert": skip::modules(&plan, catalog),
        });
        plan.declare("quantization_config", declared);
        plan
    }
}

/// How scales are stored, and what that is called.
fn scales(request: &Request) -> (Fp8Scale, &'static str) {
    match request.scale_format {
        None | Some(ScaleFormat::F32) => (Fp8Scale::Inverse, "float"),
        Some(ScaleFormat::Ue8m0) => (Fp8Scale::Power, "ue8m0"),
    }
}
