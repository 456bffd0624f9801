//! compressed-tensors floats: FP8 per tensor, channel and block, NVFP4, MXFP4, MXFP8.
//!
//! For the weight `X.weight` of shape `[R, C]`:
//!
//! ```text
//! float-quantized (W8A8; activations quantized by the loader: all, per token, or per 128 of it)
//!   X.weight         F8_E4M3      [R, C]
//!   X.weight_scale   as X.weight  [1], [R, 1], or of blocks [ceil(R/128), ceil(C/128)]
//!
//! nvfp4-pack-quantized (weight-only)
//!   X.weight_packed        U8       [R, C/2]   E2M1, the even column in the lower half
//!   X.weight_scale         F8_E4M3  [R, C/16]
//!   X.weight_global_scale  F32      [1]        what scales are divided by, one for fused weights
//!
//! mxfp4-pack-quantized (weight-only)
//!   X.weight_packed  U8           [R, C/2]   E2M1, the even column in the lower half
//!   X.weight_scale   U8           [R, C/32]  E8M0
//!
//! mxfp8-quantized (weight-only)
//!   X.weight         F8_E4M3      [R, C]
//!   X.weight_scale   U8           [R, C/32]  E8M0
//! ```
//!
//! Upstream: `compressed_tensors/compressors/naive_quantized`, `nvfp4`, `mxfp4` and `mxfp8` of
//! github.com/vllm-project/compressed-tensors 0.19.0.

use serde_json::{Value, json};

use super::ct_config::{declare, group};
use super::takes::{Grain, Takes};
use super::{Format, KeptExperts, Plan, Reader, by_layout, fused_experts, ran};
use crate::error::Result;
use crate::quant::{
    Fp8Grain, Fp8Scale, Fp8Scheme, MicroDialect, MicroFloat, MicroScheme, Quality, Scheme,
};
use crate::recipe::{Assignment, Decision, Job, Schemes};

/// One of the float formats.
#[derive(Debug)]
pub(super) struct CtFloat {
    name: &'static str,
    about: &'static str,
    takes: Takes,
    readers: &'static [Reader],
    /// How experts are written that are stored one by one. transformers joins them, which it can't
    /// where scales are of blocks, or of other types than their codes.
    experts: Option<&'static CtFloat>,
    scheme: fn(Quality) -> Scheme,
    suffixes: &'static [&'static str],
    /// What follows the module in the name of the scalar, if the scheme has one.
    scalar: Option<&'static str>,
    /// Whether weights share it that engines fuse into one.
    fuses: bool,
    /// Its name in the config.
    format: &'static str,
    /// What the config says of weights beyond their bits.
    weights: fn() -> Value,
    /// What it says of activations.
    activations: fn() -> Value,
}

/// `ct-fp8`: one scale per output channel.
pub(super) static FP8: CtFloat = CtFloat {
    name: "ct-fp8",
    about: "FP8 per channel, activations per token, for transformers, vLLM, SGLang and mistral.rs",
    takes: Takes::new(&[8], Grain::Channel, Some(true)),
    readers: &[TRANSFORMERS, VLLM, by_layout("SGLang"), MISTRAL_RS],
    experts: Some(&FP8),
    scheme: |quality| fp8(Fp8Grain::Channel, quality),
    suffixes: &["weight", "weight_scale"],
    scalar: None,
    fuses: false,
    format: "float-quantized",
    weights: || json!({ "strategy": "channel" }),
    activations: || json!({ "num_bits": 8, "type": "float", "symmetric": true, "strategy": "token", "dynamic": true }),
};

/// `ct-fp8-tensor`: one scale per weight.
pub(super) static FP8_TENSOR: CtFloat = CtFloat {
    name: "ct-fp8-tensor",
    about: "FP8 per tensor, activations per tensor, for transformers, vLLM and SGLang",
    takes: Takes::new(&[8], Grain::Tensor, Some(true)),
    experts: Some(&FP8_TENSOR),
    scheme: |quality| fp8(Fp8Grain::Tensor, quality),
    suffixes: &["weight"],
    scalar: Some("weight_scale"),
    fuses: false,
    format: "float-quantized",
    readers: &[TRANSFORMERS, by_layout("vLLM"), by_layout("SGLang")],
    weights: || json!({ "strategy": "tensor" }),
    activations: || json!({ "num_bits": 8, "type": "float", "symmetric": true, "strategy": "tensor", "dynamic": true }),
};

/// `ct-fp8-block`: one scale per block of 128 x 128.
pub(super) static FP8_BLOCK: CtFloat = CtFloat {
    name: "ct-fp8-block",
    about: "FP8 per block of 128 x 128, for transformers, vLLM, SGLang and mistral.rs",
    takes: Takes::new(&[8], Grain::Squares(128), Some(true)),
    readers: &[TRANSFORMERS, by_layout("vLLM"), by_layout("SGLang"), MISTRAL_RS],
    experts: Some(&FP8),
    scheme: |quality| fp8(Fp8Grain::Block(128), quality),
    suffixes: &["weight", "weight_scale"],
    scalar: None,
    fuses: false,
    format: "float-quantized",
    weights: || json!({ "strategy": "block", "block_structure": [128, 128] }),
    activations: || {
        json!({
            "num_bits": 8,
            "type": "float",
            "symmetric": true,
            "strategy": "group",
            "group_size": 128,
            "dynamic": true,
        })
    },
};

/// `ct-nvfp4`: E2M1 with an E4M3 scale for 16, and one for the weight.
pub(super) static NVFP4: CtFloat = CtFloat {
    name: "ct-nvfp4",
    about: "NVFP4, weight-only, for transformers, vLLM, SGLang and mistral.rs",
    takes: Takes::new(&[4], Grain::Groups(&[16]), Some(true)),
    experts: None,
    scheme: |quality| micro(MicroFloat::E2m1, MicroDialect::TensorGroup, quality),
    suffixes: &["weight_packed", "weight_scale"],
    scalar: Some("weight_global_scale"),
    fuses: true,
    format: "nvfp4-pack-quantized",
    readers: &[TRANSFORMERS, by_layout("vLLM"), by_layout("SGLang"), MISTRAL_RS],
    weights: || {
        json!({
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        })
    },
    activations: || Value::Null,
};

/// `ct-mxfp4`: E2M1 with a power of two for 32.
pub(super) static MXFP4: CtFloat = CtFloat {
    name: "ct-mxfp4",
    about: "MXFP4, weight-only, for transformers and vLLM",
    takes: Takes::new(&[4], Grain::Groups(&[32]), Some(true)),
    readers: &[TRANSFORMERS, by_layout("vLLM")],
    experts: Some(&MXFP4),
    scheme: |quality| micro(MicroFloat::E2m1, MicroDialect::CompressedTensors, quality),
    suffixes: &["weight_packed", "weight_scale"],
    scalar: None,
    fuses: false,
    format: "mxfp4-pack-quantized",
    weights: of_32,
    activations: || Value::Null,
};

/// `ct-mxfp8`: E4M3 with a power of two for 32.
pub(super) static MXFP8: CtFloat = CtFloat {
    name: "ct-mxfp8",
    about: "MXFP8, weight-only, for transformers and vLLM",
    takes: Takes::new(&[8], Grain::Groups(&[32]), Some(true)),
    readers: &[TRANSFORMERS, by_layout("vLLM")],
    experts: None,
    scheme: |quality| micro(MicroFloat::E4m3, MicroDialect::CompressedTensors, quality),
    suffixes: &["weight", "weight_scale"],
    scalar: None,
    fuses: false,
    format: "mxfp8-quantized",
    weights: of_32,
    activations: || Value::Null,
};

const VLLM: Reader = ran("vLLM", "0.32 (CPU, `scripts/vllm.sh`)");

const MISTRAL_RS: Reader = ran("mistral.rs", "0.9.5, a Llama (`tests/consumers/mistral.py`)");

const TRANSFORMERS: Reader =
    ran("transformers", "5.23 + compressed-tensors 0.20.0, a Llama (`tests/consumers/formats.py`)");

fn fp8(grain: Fp8Grain, quality: Quality) -> Scheme {
    Scheme::Fp8(Fp8Scheme { grain, scale: Fp8Scale::Source, whole_blocks: false, quality })
}

fn micro(float: MicroFloat, dialect: MicroDialect, quality: Quality) -> Scheme {
    Scheme::Micro(MicroScheme { float, dialect, quality })
}

fn of_32() -> Value {
    json!({ "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8" })
}

impl Format for CtFloat {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn takes(&self) -> Takes {
        self.takes
    }

    fn readers(&self) -> &'static [Reader] {
        self.readers
    }

    fn fused_experts(&self, config: Option<&Value>) -> Option<KeptExperts> {
        let is_read = |_: &KeptExperts| self.experts(config).is_some();
        fused_experts::in_transformers(config).filter(is_read)
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        let Job { config, request, .. } = job;
        self.takes.check(self.name, request)?;
        let dense = (self.scheme)(request.quality);
        let experts = self.experts(config).map(|format| (format.scheme)(request.quality));
        Assignment::new(job, Schemes { dense, experts })
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, request, .. } = job;
        let dense = (self.scheme)(request.quality);
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 2);
        for id in 0..catalog.tensors().len() {
            match plan.assignment[id] {
                Decision::Quantize(scheme) => {
                    plan.encode(id, scheme, self.suffixes);
                    if let Some(suffix) = self.scalar {
                        plan.scalar(suffix, None);
                    }
                }
                Decision::Keep { .. } => plan.keep(id),
            }
        }
        if self.fuses {
            plan.fuse_surveys(catalog);
        }
        declare(&mut plan, catalog, dense, |scheme, target| match self.experts {
            Some(format) if scheme != dense => format.group(target),
            _ => self.group(target),
        });
        plan
    }
}

impl CtFloat {
    /// How experts of a model are written.
    fn experts(&self, config: Option<&Value>) -> Option<&Self> {
        match fused_experts::in_transformers(config) {
            Some(KeptExperts::Single) => Some(self),
            _ => self.experts,
        }
    }

    /// What the config says of modules in this format.
    fn group(&self, target: String) -> Value {
        let mut weights = json!({
            "num_bits": self.takes.bits[0],
            "type": "float",
            "symmetric": true,
            "dynamic": false,
        });
        for (key, value) in (self.weights)().as_object().into_iter().flatten() {
            weights[key] = value.clone();
        }
        group(self.format, target, weights, (self.activations)())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::recipe::Request;
    use crate::source::{Catalog, Decoder, Extent, Tensor};

    #[track_caller]
    fn check(format: &CtFloat, expected: &[&[&str]]) {
        let names = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "other.w1",
            "other.w2",
            "other.w3",
        ];
        let tensor = |name: &str| Tensor {
            name: format!("{name}.weight"),
            dtype: Dtype::BF16,
            shape: vec![128, 128],
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: 0, start: 0, len: 0 }],
        };
        let catalog = Catalog::new(names.map(tensor).into()).expect("names are unique");
        let request = Request { format: format.name.to_owned(), ..Request::default() };
        let config = json!({});
        let job = Job { catalog: &catalog, config: Some(&config), request: &request };
        let plan = format.plan(job).expect("it plans");
        let name = |id: &usize| names[*id];
        let surveys: Vec<Vec<&str>> =
            plan.surveys.iter().map(|ids| ids.iter().map(name).collect()).collect();
        assert_eq!(surveys, expected);
        for weight in &plan.weights {
            let survey = weight.survey.expect("all are surveyed");
            assert!(plan.surveys[survey].contains(&weight.tensor));
        }
    }

    #[test]
    fn what_engines_fuse_is_surveyed_together_where_it_shares_a_scale() {
        check(
            &NVFP4,
            &[
                &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                &["self_attn.o_proj"],
                &["mlp.gate_proj", "mlp.up_proj"],
                &["other.w1", "other.w3"],
                &["other.w2"],
            ],
        );
        check(
            &FP8_TENSOR,
            &[
                &["self_attn.q_proj"],
                &["self_attn.k_proj"],
                &["self_attn.v_proj"],
                &["self_attn.o_proj"],
                &["mlp.gate_proj"],
                &["mlp.up_proj"],
                &["other.w1"],
                &["other.w2"],
                &["other.w3"],
            ],
        );
    }
}
