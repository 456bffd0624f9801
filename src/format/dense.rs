//! The identity: every tensor as it is in the source.

use serde_json::Value;

use super::{Format, Grain, Plan, Reader, Takes, by_layout, ran};
use crate::error::{self, Result};
use crate::recipe::{Assignment, Request};
use crate::source::Catalog;

/// `dense`: nothing is quantized.
#[derive(Debug)]
pub(super) struct Dense;

impl Format for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn about(&self) -> &'static str {
        "the source as it is, for every loader"
    }

    fn takes(&self) -> Takes {
        Takes { bits: &[], grain: Grain::None, symmetry: None, scale_format: false, storage: false }
    }

    fn readers(&self) -> &'static [Reader] {
        const {
            &[
                ran("safetensors", "(`tests/loaders.rs`)"),
                by_layout("transformers"),
                by_layout("diffusers"),
                by_layout("vLLM"),
                by_layout("SGLang"),
                by_layout("mistral.rs"),
                by_layout("mlx-lm"),
            ]
        }
    }

    fn plan(&self, catalog: &Catalog, _: Option<&Value>, request: &Request) -> Result<Plan> {
        let given = [
            ("bits", request.bits.is_some()),
            ("group size", request.granularity.is_some()),
            ("symmetry", request.symmetric.is_some()),
            ("scale format", request.scale_format.is_some()),
            ("storage type", request.storage.is_some()),
            ("--set", !request.set.is_empty()),
        ];
        if let Some((what, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(error::invalid(format!(
                "format dense quantizes nothing: it takes no {what}"
            )));
        }
        let mut plan =
            Plan::new(Assignment::keep_all(catalog, "format dense"), catalog.tensors().len());
        for id in 0..catalog.tensors().len() {
            plan.keep(id);
        }
        Ok(plan)
    }
}
