//! gpt-oss: experts stored as one tensor, in MXFP4.
//!
//! For the experts `X` (`...mlp.experts.gate_up_proj`, `...mlp.experts.down_proj`) of shape
//! `[E, in, out]`:
//!
//! ```text
//! X_blocks  U8  [E, out, in/32, 16]  E2M1, the even input in the lower half
//! X_scales  U8  [E, out, in/32]      E8M0
//! ```
//!
//! Everything else stays as it is.
//!
//! Upstream: `integrations/mxfp4.py` of transformers 5.23.

use serde_json::json;

use super::{Format, Grain, Plan, Reader, Takes, by_layout, ran};
use crate::error::{self, Result};
use crate::quant::{ExpertsScheme, Scheme};
use crate::recipe::{Assignment, Decision, Job, model_type, module_of};

/// `mxfp4`.
#[derive(Debug)]
pub(super) struct Mxfp4;

impl Format for Mxfp4 {
    fn name(&self) -> &'static str {
        "mxfp4"
    }

    fn about(&self) -> &'static str {
        "gpt-oss's own MXFP4 of its experts, for transformers and vLLM"
    }

    fn takes(&self) -> Takes {
        Takes::new(&[4], Grain::Groups(&[32]), Some(true))
    }

    fn readers(&self) -> &'static [Reader] {
        const {
            &[
                ran("transformers", "5.23, a small gpt-oss (`tests/consumers/formats.py`)"),
                by_layout("vLLM"),
            ]
        }
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        let Job { config, request, .. } = job;
        self.takes().check(self.name(), request)?;
        let kind = model_type(config);
        if kind != Some("gpt_oss") {
            let found = kind.unwrap_or("model without a `model_type`");
            return Err(error::unsupported(format!(
                "mxfp4 is how gpt-oss stores its experts, and no loader reads it of a {found}: \
                 --format ct-mxfp4 has the same codes for Linears"
            )));
        }
        let scheme = Scheme::Experts(ExpertsScheme { quality: request.quality });
        Assignment::of_fused_experts(job, scheme)
    }

    fn lay_out(&self, Job { catalog, .. }: Job<'_>, assignment: Assignment) -> Plan {
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 2);
        for id in 0..catalog.tensors().len() {
            match plan.assignment[id] {
                Decision::Quantize(scheme) => plan.encode(id, scheme, &["_blocks", "_scales"]),
                Decision::Keep { .. } => plan.keep(id),
            }
        }
        // Names of gpt-oss's own config, and the experts that are kept: a loader takes either all
        // tensors of a module for codes or none.
        let mut kept = [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ]
        .map(str::to_owned)
        .to_vec();
        for (id, tensor) in catalog.tensors().iter().enumerate() {
            let module = module_of(&tensor.name);
            let is_kept = matches!(plan.assignment[id], Decision::Keep { .. });
            let is_experts = tensor.shape.len() == 3 && module.ends_with(".experts");
            if is_kept && is_experts && !kept.iter().any(|name| name == module) {
                kept.push(module.to_owned());
            }
        }
        let value = json!({ "quant_method": "mxfp4", "modules_to_not_convert": kept });
        plan.declare("quantization_config", value);
        plan
    }
}
