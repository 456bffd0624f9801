//! AWQ checkpoints: 4-bit integers packed across the output features, in gemm order.
//!
//! For the weight `X.weight` of shape `[R, C]`, with `G` groups to a row:
//!
//! ```text
//! X.qweight  I32  [C, R/8]  codes of eight outputs to a word, in the order 0 2 4 6 1 3 5 7
//! X.qzeros   I32  [G, R/8]  zeros likewise
//! X.scales   F16  [G, R]    whatever the element type of X.weight
//! ```
//!
//! Upstream: `gptqmodel/nn_modules/qlinear` of github.com/ModelCloud/GPTQModel 7.7.0, which writes
//! what AutoAWQ's `gemm` version did. The config is AutoAWQ's, which every loader reads.

use serde_json::json;

use super::gptq::{GROUPS, group_size};
use super::{Format, Grain, Plan, Reader, Takes, by_layout, ran, skip};
use crate::error::Result;
use crate::quant::{Scheme, TransposedOrder, TransposedScheme};
use crate::recipe::{Assignment, Decision, Job};

/// `awq`.
#[derive(Debug)]
pub(super) struct Awq;

impl Format for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn about(&self) -> &'static str {
        "AWQ's 4-bit integers with zero points, for vLLM, SGLang, transformers and mlx-lm"
    }

    fn takes(&self) -> Takes {
        Takes::new(&[4], Grain::GroupsOrChannel(GROUPS), Some(false))
    }

    fn readers(&self) -> &'static [Reader] {
        const {
            &[
                ran("vLLM", "0.32 (CPU, `scripts/vllm.sh`)"),
                ran("mlx-lm", "0.32.2, a Llama (`tests/consumers/mlx_formats.py`)"),
                ran("transformers", "5.23 + gptqmodel 7.7.0, a Llama (`scripts/gptqmodel.sh`)"),
                ran("gptqmodel", "7.7.0 (`scripts/gptqmodel.sh`)"),
                by_layout("SGLang"),
            ]
        }
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        let (takes, request) = (self.takes(), job.request);
        takes.check(self.name(), request)?;
        let scheme = TransposedScheme {
            bits: 4,
            granularity: takes.granularity(request),
            symmetric: false,
            order: TransposedOrder::AwqGemm,
            quality: request.quality,
        };
        Assignment::new(job, Scheme::Transposed(scheme))
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, request, .. } = job;
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 3);
        for id in 0..catalog.tensors().len() {
            match plan.assignment[id] {
                Decision::Quantize(scheme) => {
                    plan.encode(id, scheme, &["qweight", "scales", "qzeros"]);
                }
                Decision::Keep { .. } => plan.keep(id),
            }
        }
        let declared = json!({
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size(self.takes().granularity(request)),
            "zero_point": true,
            "modules_to_not_convert": skip::modules(&plan, catalog),
        });
        plan.declare("quantization_config", declared);
        plan
    }
}
