//! MLX: affine integers, MXFP4, MXFP8 and NVFP4, as mlx-lm reads them.
//!
//! For the weight `X.weight` of shape `[R, C]`, with `b` bits and groups of `g`:
//!
//! ```text
//! affine  X.weight  U32          [R, C*b/32]  codes, a dense bit stream per row
//!         X.scales  as X.weight  [R, C/g]
//!         X.biases  as X.weight  [R, C/g]
//! others  X.weight  U32          [R, C*b/32]
//!         X.scales  U8           [R, C/g]     E8M0; in nvfp4 mode E4M3
//! ```
//!
//! Experts `M.experts.N.P.weight` are shown as one weight `M.switch_mlp.P` of shape `[E, R, C]`, in the
//! shard of the first, and so are those that are stored in one tensor already (`fused_experts`). Some
//! models have another name for it (`mlx_mixtures`).
//!
//! Token embeddings and the output head are quantized too. A loader takes a module for quantized
//! when it has `scales`, so what is kept needs no list. Both `quantization` and
//! `quantization_config` declare the same.
//!
//! Upstream: `mlx.core.quantize` of mlx 0.32.4, `mlx_lm/utils.py` of mlx-lm 0.32.2.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::takes::{Grain, Takes};
use super::{Format, KeptExperts, Plan, Reader, mlx_mixtures, mlx_sanitize, ran};
use crate::error::Result;
use crate::quant::{
    AffineScheme, Granularity, MicroDialect, MicroFloat, MicroScheme, Quality, Scheme,
};
use crate::recipe::{Assignment, Decision, Job, Joined, Offer, Request, Schemes, module_of};

/// One of MLX's modes of quantization.
#[derive(Debug)]
pub(super) struct Mlx {
    name: &'static str,
    about: &'static str,
    mode: &'static str,
    takes: Takes,
    scheme: fn(u8, u32, Quality) -> Scheme,
}

/// `mlx`: affine integers.
pub(super) static AFFINE: Mlx = Mlx {
    name: "mlx",
    about: "affine integers of 2, 3, 4, 5, 6 or 8 bits, for mlx-lm",
    mode: "affine",
    takes: Takes::new(&[4, 2, 3, 5, 6, 8], Grain::Groups(&[64, 32, 128]), Some(false)),
    scheme: |bits, group_size, quality| Scheme::Affine(AffineScheme { bits, group_size, quality }),
};

/// `mlx-mxfp4`: E2M1 with a power of two for 32.
pub(super) static MXFP4: Mlx = Mlx {
    name: "mlx-mxfp4",
    about: "MXFP4, for mlx-lm",
    mode: "mxfp4",
    takes: Takes::new(&[4], Grain::Groups(&[32]), Some(true)),
    scheme: |_, _, quality| micro(MicroFloat::E2m1, MicroDialect::MlxPower, quality),
};

/// `mlx-mxfp8`: E4M3 with a power of two for 32.
pub(super) static MXFP8: Mlx = Mlx {
    name: "mlx-mxfp8",
    about: "MXFP8, for mlx-lm",
    mode: "mxfp8",
    takes: Takes::new(&[8], Grain::Groups(&[32]), Some(true)),
    scheme: |_, _, quality| micro(MicroFloat::E4m3, MicroDialect::MlxPower, quality),
};

/// `mlx-nvfp4`: E2M1 with an E4M3 scale for 16.
pub(super) static NVFP4: Mlx = Mlx {
    name: "mlx-nvfp4",
    about: "NVFP4 without a global scale, for mlx-lm",
    mode: "nvfp4",
    takes: Takes::new(&[4], Grain::Groups(&[16]), Some(true)),
    scheme: |_, _, quality| micro(MicroFloat::E2m1, MicroDialect::MlxE4m3, quality),
};

fn micro(float: MicroFloat, dialect: MicroDialect, quality: Quality) -> Scheme {
    Scheme::Micro(MicroScheme { float, dialect, quality })
}

impl Format for Mlx {
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
        const MLX_LM: Reader =
            ran("mlx-lm", "0.32.2, a Llama and ten mixtures (`tests/consumers/mlx_*.py`)");
        match self.mode {
            "affine" => {
                const { &[MLX_LM, ran("mistral.rs", "0.9.5, a Llama (`tests/consumers/mistral.py`)")] }
            }
            _ => const { &[MLX_LM] },
        }
    }

    fn fused_experts(&self, config: Option<&Value>) -> Option<KeptExperts> {
        mlx_mixtures::joint(config).map(|_| KeptExperts::Fused)
    }

    fn assign(&self, job: Job<'_>) -> Result<Assignment> {
        let Job { catalog, config, request } = job;
        self.takes.check(self.name, request)?;
        let joins_experts = mlx_mixtures::stacks(catalog, config).is_some();
        let offer = Offer::mixed(request, Joined::Stacks, |request| {
            let dense = self.scheme(request);
            Schemes { dense, experts: joins_experts.then_some(dense) }
        });
        let spared = mlx_sanitize::spared(job)?;
        Assignment::with_ends(job, offer.sparing(spared, "rearranged by the loader"))
    }

    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan {
        let Job { catalog, config, request } = job;
        let stacks = mlx_mixtures::stacks(catalog, config);
        let mut plan = Plan::new(assignment, catalog.tensors().len() * 3);
        plan.framework = "mlx";
        let suffixes: &[&str] = match self.scheme(request) {
            Scheme::Affine(_) => &["weight", "scales", "biases"],
            _ => &["weight", "scales"],
        };
        let mut places = HashMap::new();
        for (mut stack, ids) in stacks.into_iter().flatten() {
            if matches!(plan.assignment[ids[0]], Decision::Quantize(_)) {
                let places_of = ids.iter().enumerate();
                places.extend(places_of.map(|(place, id)| (*id, (plan.stacks.len(), place))));
                stack.weights = vec![0; ids.len()];
                plan.stacks.push(stack);
            }
        }
        for id in 0..catalog.tensors().len() {
            match (&plan.assignment[id], places.get(&id)) {
                (Decision::Quantize(scheme), Some(place)) => {
                    plan.encode_stacked(id, *scheme, *place, suffixes);
                }
                (Decision::Quantize(scheme), None) => plan.encode(id, *scheme, suffixes),
                (Decision::Keep { .. }, _) => plan.keep(id),
            }
        }
        let describe = |bits: u8, group_size: u32| json!({ "group_size": group_size, "bits": bits, "mode": self.mode });
        let (bits, group_size) = self.numbers(request);
        let mut declared = describe(bits, group_size);
        for item in &plan.items {
            if let Some(weight) = plan.weights_of(item).first()
                && let Scheme::Affine(affine) = plan.weights[*weight].scheme
                && (affine.bits, affine.group_size) != (bits, group_size)
            {
                declared[module_of(&plan.name(catalog, item))] =
                    describe(affine.bits, affine.group_size);
            }
        }
        plan.declare("quantization", declared.clone());
        plan.declare("quantization_config", declared);
        plan
    }
}

impl Mlx {
    /// Bits and group size.
    fn numbers(&self, request: &Request) -> (u8, u32) {
        match self.takes.granularity(request) {
            Granularity::Group(size) => (self.takes.bits(request), size),
            Granularity::Channel => unreachable!("MLX has groups"),
        }
    }

    fn scheme(&self, request: &Request) -> Scheme {
        let (bits, group_size) = self.numbers(request);
        (self.scheme)(bits, group_size, request.quality)
    }
}
