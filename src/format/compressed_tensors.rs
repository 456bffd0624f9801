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
//! Upstream: `compressed_tensors/compressors/pack_quantized` and `naive_quantized` of
//! github.com/vllm-project/compressed-tensors 0.19.0 and 0.20.0. 3, 5, 6 and 7 bits are packed as
//! from 0.18 on.

use serde_json::{Value, json};

use super::takes::{Grain, Takes};
use super::{Format, Plan};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::quant::{Granularity, IntScheme, Packing, Scheme};
use crate::recipe::{Assignment, Decision, Request};
use crate::source::Catalog;

/// `compressed-tensors`: pack-quantized, weight-only integers of 2 to 8 bits.
#[derive(Debug)]
pub(super) struct PackQuantized;

/// `ct-int8`: int-quantized, 8-bit weights with 8-bit activations.
#[derive(Debug)]
pub(super) struct IntQuantized;

impl Format for PackQuantized {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn about(&self) -> &'static str {
        "pack-quantized integers of 2 to 8 bits, weight-only, for transformers, vLLM and SGLang"
    }

    fn plan(&self, catalog: &Catalog, config: Option<&Value>, request: &Request) -> Result<Plan> {
        let takes = Takes {
            bits: &[2, 3, 4, 5, 6, 7, 8],
            grain: Grain::Any,
            symmetry: None,
            scale_format: false,
            storage: false,
        };
        takes.check(self.name(), request)?;
        let scheme = IntScheme {
            bits: request.bits.unwrap_or(4),
            granularity: request.granularity.unwrap_or(Granularity::Group(128)),
            symmetric: request.symmetric.unwrap_or(true),
            packing: Packing::Packed32,
            quality: request.quality,
        };
        plan(catalog, config, request, scheme)
    }
}

impl Format for IntQuantized {
    fn name(&self) -> &'static str {
        "ct-int8"
    }

    fn about(&self) -> &'static str {
        "int-quantized W8A8: 8-bit weights per channel, 8-bit activations, for transformers and vLLM"
    }

    fn plan(&self, catalog: &Catalog, config: Option<&Value>, request: &Request) -> Result<Plan> {
        let takes = Takes {
            bits: &[8],
            grain: Grain::Channel,
            symmetry: Some(true),
            scale_format: false,
            storage: false,
        };
        takes.check(self.name(), request)?;
        let scheme = IntScheme {
            bits: 8,
            granularity: Granularity::Channel,
            symmetric: true,
            packing: Packing::Int8,
            quality: request.quality,
        };
        plan(catalog, config, request, scheme)
    }
}

fn plan(
    catalog: &Catalog,
    config: Option<&Value>,
    request: &Request,
    int: IntScheme,
) -> Result<Plan> {
    let assignment = Assignment::new(catalog, config, request, Scheme::Int(int))?;
    let mut plan = Plan::new(assignment, catalog.tensors().len() * 2);
    for (id, tensor) in catalog.tensors().iter().enumerate() {
        let Decision::Quantize(scheme) = plan.assignment[id] else {
            plan.keep(id);
            continue;
        };
        let parts: &[&str] = match (int.packing, int.symmetric) {
            (Packing::Packed32, true) => &["weight_packed", "weight_scale"],
            (Packing::Packed32, false) => &["weight_packed", "weight_scale", "weight_zero_point"],
            (Packing::Int8, true) => &["weight", "weight_scale"],
            (Packing::Int8, false) => &["weight", "weight_scale", "weight_zero_point"],
        };
        plan.encode(id, scheme, parts);
        if int.packing == Packing::Packed32 {
            let bytes: Vec<u8> = tensor.shape.iter().flat_map(|dim| dim.to_le_bytes()).collect();
            plan.inline(id, "weight_shape", (Dtype::I64, &[2]), bytes);
        }
    }
    let value = quantization_config(int, plan.assignment.ignore());
    plan.declare("quantization_config", value);
    Ok(plan)
}

/// What `quantization_config` says of integers.
fn quantization_config(scheme: IntScheme, ignore: &[String]) -> Value {
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
    declared(format, weights, activations, ignore)
}

/// `quantization_config` as compressed-tensors 0.20 writes it, less its null fields: older readers
/// refuse fields that they don't know.
pub(super) fn declared(
    format: &str,
    weights: Value,
    activations: Value,
    ignore: &[String],
) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "format": format,
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": null,
            },
        },
        "ignore": ignore,
    })
}
