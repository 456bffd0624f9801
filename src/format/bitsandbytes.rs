//! bitsandbytes: NF4, FP4 and LLM.int8.
//!
//! For the weight `X.weight` of shape `[R, C]`, with blocks of `n` of its `R*C` weights in a row:
//!
//! ```text
//! 4 bits
//!   X.weight                                  U8   [R*C/2, 1]      the first of two in the upper half
//!   X.weight.absmax                           F32  [B = ceil(R*C/n)]
//!   X.weight.quant_map                        F32  [16]            the table
//!   X.weight.quant_state.bitsandbytes__nf4    U8   [length]        JSON; or `__fp4`
//!
//! 4 bits with double quantization, in place of the F32 absmax
//!   X.weight.absmax                           U8   [B]
//!   X.weight.nested_absmax                    F32  [ceil(B/256)]
//!   X.weight.nested_quant_map                 F32  [256]           the table of scales
//!
//! int8
//!   X.weight                                  I8   [R, C]
//!   X.SCB                                     F32  [R]             the largest magnitude of a row
//!   X.weight_format                           U8   []              0, for rows
//! ```
//!
//! With double quantization the JSON ends with a mean over the whole weight, and is padded with spaces
//! to a length that does not depend on it.
//!
//! Experts that are stored one by one are kept: transformers joins them into one parameter, and reads no
//! codes there. Llama-4's are Linears to it, stored fused or not.
//!
//! `X.weight` of 4 bits may be declared as BF16, F16 or F32, of the same bytes.
//!
//! Upstream: `bitsandbytes/functional.py` and `nn/modules.py` of bitsandbytes 0.50.2,
//! `quantizers/quantizer_bnb_4bit.py` of transformers 5.23.

use serde_json::{Value, json};

use super::takes::{Grain, Takes};
use super::{Format, KeptExperts, Plan, Reader, by_layout, fused_experts, ran, skip};
use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::quant::{Codebook, CodebookScheme, Granularity, LlmInt8Scheme, Scheme, Storage};
use crate::recipe::{Assignment, Decision, Job, Offer, Request, Schemes, model_type};
use crate::source::Catalog;

/// One of the 4-bit formats.
#[derive(Debug)]
pub(super) struct FourBit {
    name: &'static str,
    about: &'static str,
    codebook: Codebook,
    quant_type: &'static str,
    quant_state: &'static str,
}

/// `bnb-nf4`: quantiles of a normal distribution.
pub(super) static NF4: FourBit = FourBit {
    name: "bnb-nf4",
    about: "bitsandbytes NF4, for transformers, diffusers and vLLM",
    codebook: Codebook::Nf4,
    quant_type: "nf4",
    quant_state: "weight.quant_state.bitsandbytes__nf4",
};

/// `bnb-fp4`: a float of 4 bits.
pub(super) static FP4: FourBit = FourBit {
    name: "bnb-fp4",
    about: "bitsandbytes FP4, for transformers, diffusers and vLLM",
    codebook: Codebook::Fp4,
    quant_type: "fp4",
    quant_state: "weight.quant_state.bitsandbytes__fp4",
};

/// `bnb-int8`: LLM.int8.
#[derive(Debug)]
pub(super) struct Int8;

/// The one [`Int8`].
pub(super) static INT8: Int8 = Int8;

impl Format for FourBit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn takes(&self) -> Takes {
        let grain = Grain::FlatBlocks(&[64, 32, 128, 256, 512, 1024, 2048, 4096]);
        Takes { storage: true, double_quant: true, ..Takes::new(&[4], grain, Some(true)) }
    }

    fn readers(&self) -> &'static [Reader] {
        const { &[TRANSFORMERS, by_layout("diffusers"), by_layout("vLLM")] }
    }

    fn fused_experts(&self, config: Option<&Value>) -> Option<KeptExperts> {
        fused_experts::in_transformers(config).filter(|kept| *kept == KeptExperts::Single)
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        self.takes().check(self.name, job.request)?;
        let dense = Scheme::Codebook(self.scheme(job.request));
        Assignment::new(job, offer(dense, job)?)
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, request, .. } = job;
        let CodebookScheme { codebook, block_size, storage, double, .. } = self.scheme(request);
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 4);
        let bytes = |table: &[f32]| table.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (table, nested) = (bytes(&codebook.table()), bytes(&CodebookScheme::nested_table()));
        for (id, tensor) in catalog.tensors().iter().enumerate() {
            let Decision::Quantize(scheme) = plan.assignment[id] else {
                plan.keep(id);
                continue;
            };
            let suffixes = ["weight", "weight.absmax", "weight.nested_absmax"];
            plan.encode(id, scheme, if double { &suffixes } else { &suffixes[..2] });
            plan.inline(id, "weight.quant_map", (Dtype::F32, &[16]), table.clone());
            // As Python's `json.dumps` spaces it.
            let state = format!(
                r#"{{"quant_type": "{}", "blocksize": {block_size}, "dtype": "{}", "shape": [{}, {}]"#,
                self.quant_type,
                torch_name(tensor.dtype),
                tensor.shape[0],
                tensor.shape[1]
            );
            if double {
                plan.inline(id, "weight.nested_quant_map", (Dtype::F32, &[256]), nested.clone());
                let nested = r#""nested_blocksize": 256, "nested_dtype": "float32""#;
                let begin = format!(r#"{state}, {nested}, "nested_offset": "#);
                plan.scalar(self.quant_state, Some(begin.into()));
            } else {
                let state = state + "}";
                let len = state.len() as u64;
                plan.inline(id, self.quant_state, (Dtype::U8, &[len]), state.into_bytes());
            }
        }
        let mut declared = declared(&plan, catalog);
        declared["load_in_4bit"] = true.into();
        declared["bnb_4bit_quant_type"] = self.quant_type.into();
        declared["bnb_4bit_use_double_quant"] = double.into();
        declared["bnb_4bit_quant_storage"] = torch_name(storage.dtype()).into();
        if let Some(weight) = plan.weights.first() {
            declared["bnb_4bit_compute_dtype"] = torch_name(catalog[weight.tensor].dtype).into();
        }
        plan.declare("quantization_config", declared);
        plan
    }
}

impl FourBit {
    fn scheme(&self, request: &Request) -> CodebookScheme {
        let Granularity::Group(block_size) = self.takes().granularity(request) else {
            unreachable!("blocks have a size")
        };
        CodebookScheme {
            codebook: self.codebook,
            block_size,
            storage: request.storage.unwrap_or(Storage::U8),
            double: request.double_quant,
            quality: request.quality,
        }
    }
}

impl Format for Int8 {
    fn name(&self) -> &'static str {
        "bnb-int8"
    }

    fn about(&self) -> &'static str {
        "bitsandbytes LLM.int8, for transformers and diffusers"
    }

    fn takes(&self) -> Takes {
        Takes::new(&[8], Grain::Channel, Some(true))
    }

    fn readers(&self) -> &'static [Reader] {
        const { &[TRANSFORMERS, by_layout("diffusers")] }
    }

    fn fused_experts(&self, config: Option<&Value>) -> Option<KeptExperts> {
        fused_experts::in_transformers(config).filter(|kept| *kept == KeptExperts::Single)
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        self.takes().check(self.name(), job.request)?;
        let dense = Scheme::LlmInt8(LlmInt8Scheme);
        Assignment::new(job, offer(dense, job)?)
    }

    fn lay_out(&self, Job { catalog, .. }: Job<'_>, assignment: Assignment) -> Plan {
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 3);
        for id in 0..catalog.tensors().len() {
            match plan.assignment[id] {
                Decision::Quantize(scheme) => {
                    plan.encode(id, scheme, &["weight", "SCB"]);
                    plan.inline(id, "weight_format", (Dtype::U8, &[]), [0]);
                }
                Decision::Keep { .. } => plan.keep(id),
            }
        }
        let mut declared = declared(&plan, catalog);
        declared["load_in_8bit"] = true.into();
        plan.declare("quantization_config", declared);
        plan
    }
}

/// Types of models that are built of Linears of their own: transformers 5.23 replaces none but `nn.Linear`
/// itself.
const OWN_LINEARS: &[&str] = &["falcon"];

/// Experts that the loader joins it can't join quantized; others are Linears like any.
fn offer(dense: Scheme, Job { config, request, .. }: Job<'_>) -> Result<Offer> {
    if let Some(kind) = model_type(config).filter(|kind| OWN_LINEARS.contains(kind)) {
        return Err(error::unsupported(format!(
            "{}: transformers replaces no Linear of the model type {kind}, whose class is its own: \
             --format compressed-tensors",
            request.format
        )));
    }
    let is_linear = fused_experts::in_transformers(config) == Some(KeptExperts::Single);
    let schemes = Schemes { dense, experts: is_linear.then_some(dense) };
    let never = skip::never_converted(config);
    Ok(Offer::from(schemes).sparing(never, skip::NEVER_CONVERTED))
}

const TRANSFORMERS: Reader =
    ran("transformers", "5.23 + bitsandbytes 0.50.2, a Llama (`tests/consumers/formats.py`)");

/// What all of bitsandbytes declares, as transformers writes it.
fn declared(plan: &Plan, catalog: &Catalog) -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": false,
        "load_in_8bit": false,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skip::modules(plan, catalog),
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
    })
}

/// The name of an element type in PyTorch.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
        _ => "uint8",
    }
}
