//! compressed-tensors integer formats: pack-quantized and int-quantized.
//!
//! For the weight `X.weight` of shape `[R, C]`, with `G` groups to a row and `b` bits:
//!
//! ```text
//! pack-quantized (W2..W8, weight-only)
//!   X.weight_packed      I32         [R, ceil(C*b/32)]   code + 2^(b-1), a dense bit stream per row
//!   X.weight_scale       as X.weight [R, G]
//!   X.weight_zero_point  I32         [ceil(R*b/32), G]   asymmetric only; packed down the rows
//!   X.weight_shape       I64         [2]                 R, C
//!
//! int-quantized (W8A8, activations quantized per token by the loader)
//!   X.weight             I8          [R, C]
//!   X.weight_scale       as X.weight [R, 1]
//! ```
//!
//! Fused experts are shown one by one where a loader reads them so (`fused_experts`).
//!
//! Upstream: `compressed_tensors/compressors/pack_quantized` and `naive_quantized` of
//! github.com/vllm-project/compressed-tensors 0.19.0 and 0.20.0. 3, 5, 6 and 7 bits are packed as
//! from 0.18 on.

use serde_json::{Value, json};

use super::ct_config::{declare, group};
use super::takes::{Grain, Takes};
use super::{Format, KeptExperts, Plan, Reader, by_layout, fused_experts, ran};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::quant::{Granularity, IntScheme, Packing, Scheme};
use crate::recipe::{Assignment, Decision, Job, Joined, Offer, Request, Schemes, is_expert};
use crate::source::{Catalog, Tensor};
use crate::threads;

/// One of the integer formats.
#[derive(Debug)]
pub(super) struct CtInt {
    name: &'static str,
    about: &'static str,
    takes: Takes,
    readers: &'static [Reader],
    packing: Packing,
}

/// `compressed-tensors`: pack-quantized, weight-only integers of 2 to 8 bits.
pub(super) static PACK_QUANTIZED: CtInt = CtInt {
    name: "compressed-tensors",
    about: "pack-quantized integers of 2 to 8 bits, weight-only, for transformers, vLLM and SGLang",
    takes: Takes::new(&[4, 2, 3, 5, 6, 7, 8], Grain::Any(128), None),
    readers: &[
        ran(
            "transformers",
            "5.23 + compressed-tensors 0.20.0, 55 architectures at 4 bits; 2, 3, 8 bits, channel, \
             asymmetric on some",
        ),
        ran(
            "vLLM",
            "0.32 (CPU, `scripts/vllm.sh`), 4 bits, group and channel, symmetric and asymmetric",
        ),
        by_layout("SGLang"),
    ],
    packing: Packing::Packed32,
};

/// `ct-int8`: int-quantized, 8-bit weights with 8-bit activations.
pub(super) static INT_QUANTIZED: CtInt = CtInt {
    name: "ct-int8",
    about: "int-quantized W8A8: 8-bit weights per channel, 8-bit activations, for transformers and vLLM",
    takes: Takes::new(&[8], Grain::Channel, Some(true)),
    readers: &[
        ran("transformers", "5.23 + compressed-tensors 0.20.0, a Llama, a Qwen3-MoE and a GPT-2"),
        ran("vLLM", "0.32 (CPU, `scripts/vllm.sh`)"),
    ],
    packing: Packing::Int8,
};

impl Format for CtInt {
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
        fused_experts::in_transformers(config)
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        let Job { catalog, config, request } = job;
        self.takes.check(self.name, request)?;
        let offer = Offer::mixed(request, Joined::Projections, |request| {
            let dense = self.scheme(request);
            let is_linear = self.fused_experts(config) == Some(KeptExperts::Single);
            let experts = if is_linear { dense } else { experts_scheme(catalog, dense) };
            Schemes { dense: Scheme::Int(dense), experts: Some(Scheme::Int(experts)) }
        });
        Assignment::new(job, offer)
    }

    fn lay_out(&self, Job { catalog, request, .. }: Job<'_>, assignment: Assignment) -> Plan {
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 3);
        for (id, tensor) in catalog.tensors().iter().enumerate() {
            let Decision::Quantize(Scheme::Int(int)) = plan.assignment[id] else {
                plan.keep(id);
                continue;
            };
            let parts: &[&str] = match (int.packing, int.symmetric) {
                (Packing::Packed32, true) => &["weight_packed", "weight_scale"],
                (Packing::Packed32, false) => {
                    &["weight_packed", "weight_scale", "weight_zero_point"]
                }
                (Packing::Int8, true) => &["weight", "weight_scale"],
                (Packing::Int8, false) => &["weight", "weight_scale", "weight_zero_point"],
            };
            plan.encode(id, Scheme::Int(int), parts);
            if int.packing == Packing::Packed32 {
                let shape = [tensor.shape[0], tensor.shape[1]].map(u64::to_le_bytes);
                plan.inline(id, "weight_shape", (Dtype::I64, &[2]), shape.as_flattened());
            }
        }
        let base = Scheme::Int(self.scheme(request));
        declare(&mut plan, catalog, base, |scheme, target| match scheme {
            Scheme::Int(int) => config_group(int, target),
            _ => unreachable!("nothing else was offered"),
        });
        plan
    }
}

impl CtInt {
    fn scheme(&self, request: &Request) -> IntScheme {
        IntScheme {
            bits: self.takes.bits(request),
            granularity: self.takes.granularity(request),
            symmetric: request.symmetric.unwrap_or(true),
            packing: self.packing,
            quality: request.quality,
        }
    }
}

/// How experts that are stored one by one are quantized. transformers joins them while it loads
/// them, and then reads packed and symmetric codes only, all of one scheme: per channel where the
/// group does not divide every width. (`CompressedTensorsDequantize` in transformers 5.23,
/// `integrations/compressed_tensors.py`.)
fn experts_scheme(catalog: &Catalog, scheme: IntScheme) -> IntScheme {
    let packed = IntScheme { symmetric: true, packing: Packing::Packed32, ..scheme };
    let tensors = catalog.tensors();
    let fits = |tensor: &Tensor| {
        let Some(module) = tensor.name.strip_suffix(".weight") else { return true };
        tensor.shape.len() != 2
            || Scheme::Int(packed).accepts(tensor.dtype, &tensor.shape).is_ok()
            || !is_expert(module)
    };
    let all_fit = threads::map_ranges(tensors.len(), |range| tensors[range].iter().all(fits));
    if !all_fit.contains(&false) {
        packed
    } else {
        IntScheme { granularity: Granularity::Channel, ..packed }
    }
}

fn config_group(scheme: IntScheme, target: String) -> Value {
    let mut weights = json!({
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel",
        "dynamic": false,
    });
    if let Granularity::Group(size) = scheme.granularity {
        weights["strategy"] = "group".into();
        weights["group_size"] = size.into();
    }
    let (format, activations) = match scheme.packing {
        Packing::Packed32 => ("pack-quantized", Value::Null),
        Packing::Int8 => (
            "int-quantized",
            json!({
                "num_bits": 8,
                "type": "int",
                "symmetric": true,
                "strategy": "token",
                "dynamic": true,
            }),
        ),
    };
    group(format, target, weights, activations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Decoder, Extent};

    /// The config groups of a mixture whose experts are `width` wide inside.
    fn groups(format: &dyn Format, symmetric: Option<bool>, width: u64) -> Value {
        let tensors = [
            ("model.layers.0.self_attn.q_proj.weight", [128, 128]),
            ("model.layers.0.mlp.experts.0.up_proj.weight", [width, 128]),
            ("model.layers.0.mlp.experts.0.down_proj.weight", [128, width]),
        ];
        let tensors = tensors.map(|(name, shape)| Tensor {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: 0, start: 0, len: 0 }],
        });
        let catalog = Catalog::new(tensors.into()).expect("names are unique");
        let request = Request { symmetric, ..Request::default() };
        let config = json!({});
        let job = Job { catalog: &catalog, config: Some(&config), request: &request };
        let plan = format.plan(job).expect("it plans");
        assert_eq!(plan.weights.len(), 3, "no expert is kept");
        plan.config["quantization_config"].clone()
    }

    #[test]
    fn experts_have_a_group_of_their_own_where_loaders_could_not_read_them_otherwise() {
        #[track_caller]
        fn check(
            format: &dyn Format,
            symmetric: Option<bool>,
            width: u64,
            expected: Option<Value>,
        ) {
            let config = groups(format, symmetric, width);
            let Some(expected) = expected else {
                assert_eq!(config["config_groups"]["group_1"], Value::Null);
                return;
            };
            let group = &config["config_groups"]["group_1"];
            let weights = &group["weights"];
            let found = json!([
                config["format"],
                group["format"],
                weights["symmetric"],
                weights["strategy"],
                weights["num_bits"]
            ]);
            assert_eq!(found, expected);
            assert_eq!(group["targets"], json!([r"re:(?:.*\.)?experts\.\d+\..*"]));
        }
        let packed = "pack-quantized";
        check(&PACK_QUANTIZED, None, 256, None);
        check(&PACK_QUANTIZED, Some(false), 256, Some(json!([packed, packed, true, "group", 4])));
        check(&PACK_QUANTIZED, None, 96, Some(json!([packed, packed, true, "channel", 4])));
        check(
            &INT_QUANTIZED,
            None,
            96,
            Some(json!(["mixed-precision", packed, true, "channel", 8])),
        );
    }
}
