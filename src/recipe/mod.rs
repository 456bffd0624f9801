//! Which module is quantized how, and why.

mod ignore;
mod linear;
mod llama_cpp;
mod overrides;
mod pattern;
mod vocabulary;

use std::borrow::Cow;
use std::path::PathBuf;

use hashbrown::HashMap;
use serde_json::Value;

use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::quant::{Granularity, Quality, Real, Scheme, Storage};
use crate::source::{Catalog, Tensor, TensorId};
use crate::threads;
use ignore::KeptModule;
pub use linear::model_types;
use linear::{Kind, Reason};
pub use llama_cpp::{LlamaCppName, llama_cpp_names};
pub use overrides::{Joined, Override, Setting, fused_name, stack_of};
use pattern::Patterns;
pub use vocabulary::fused_group;

/// What the user asked for: flags, before any checkpoint is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The format's name, as `--format` takes it.
    pub format: String,
    /// Bits per weight; the format's default where `None`.
    pub bits: Option<u8>,
    /// Weights that share a scale; the format's default where `None`.
    pub granularity: Option<Granularity>,
    /// Whether there are no zero points; the format's default where `None`.
    pub symmetric: Option<bool>,
    /// How scales are chosen.
    pub quality: Quality,
    /// The file that says what the errors of input features count for in a search: an imatrix of
    /// llama.cpp, or safetensors. All count the same where `None`.
    pub importance: Option<PathBuf>,
    /// How block scales are stored; the format's default where `None`.
    pub scale_format: Option<ScaleFormat>,
    /// What bitsandbytes' codes are declared as; U8 where `None`.
    pub storage: Option<Storage>,
    /// Whether bitsandbytes' scales are quantized in turn.
    pub double_quant: bool,
    /// The format whose error plain numbers are to carry.
    pub simulate: Option<String>,
    /// The element type of plain numbers; the source's where `None`.
    pub dtype: Option<Real>,
    /// Modules to keep: globs, or regexes after `re:`.
    pub skip: Vec<String>,
    /// The only modules to quantize: globs, or regexes after `re:`; empty for all.
    pub only: Vec<String>,
    /// What some modules become instead; of those that match one, the last counts.
    pub set: Vec<Override>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            format: "compressed-tensors".to_owned(),
            bits: None,
            granularity: None,
            symmetric: None,
            quality: Quality::Search,
            importance: None,
            scale_format: None,
            storage: None,
            double_quant: false,
            simulate: None,
            dtype: None,
            skip: Vec::new(),
            only: Vec::new(),
            set: Vec::new(),
        }
    }
}

/// How the scales of FP8 blocks are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    /// In F32.
    F32,
    /// As powers of two, in E8M0.
    Ue8m0,
}

/// What happens to one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is the weight of a module that is quantized.
    Quantize(Scheme),
    /// It is shown as it is.
    Keep {
        /// Why.
        reason: Cow<'static, str>,
        /// Whether a loader may take the module for one to replace, so that it must be ignored by
        /// name.
        linear: bool,
    },
}

/// The schemes that a format offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schemes {
    /// For every weight but those of experts.
    pub dense: Scheme,
    /// For the weights of experts that are stored one by one. Loaders that join them into one
    /// tensor read them all with one scheme, and not with every scheme; none where they read none.
    pub experts: Option<Scheme>,
}

impl From<Scheme> for Schemes {
    fn from(scheme: Scheme) -> Self {
        Self { dense: scheme, experts: Some(scheme) }
    }
}

/// All that a format offers for a request.
#[derive(Clone, Debug)]
pub struct Offer {
    schemes: Schemes,
    /// In place of `schemes`, for each of the request's overrides; none where the format has one
    /// scheme for a whole checkpoint.
    overrides: Vec<Option<Schemes>>,
    joined: Joined,
    /// Parts of names of modules, with the reason.
    spared: (&'static [&'static str], &'static str),
}

impl Offer {
    /// A format whose checkpoints may mix schemes: those of a request, whatever its bits and groups.
    /// Weights that its loaders read as one share one.
    pub fn mixed(request: &Request, joined: Joined, schemes: impl Fn(&Request) -> Schemes) -> Self {
        let of = |set: &Override| set.applied(request).map(|request| schemes(&request));
        let overrides = request.set.iter().map(of).collect();
        Self { overrides, joined, ..schemes(request).into() }
    }

    /// Without the modules that have one of these among the components of their names, for the reason given.
    pub fn sparing(self, parts: &'static [&'static str], reason: &'static str) -> Self {
        Self { spared: (parts, reason), ..self }
    }
}

impl<T: Into<Schemes>> From<T> for Offer {
    fn from(schemes: T) -> Self {
        let joined = Joined::Projections;
        Self { schemes: schemes.into(), overrides: Vec::new(), joined, spared: (&[], "") }
    }
}

/// A checkpoint, and what is asked of it.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// Its tensors.
    pub catalog: &'a Catalog,
    /// The value of its `config.json`, if it has one.
    pub config: Option<&'a Value>,
    /// What is asked.
    pub request: &'a Request,
}

/// A decision for every tensor of a catalog, with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    decisions: Vec<Decision>,
    ignore: Vec<String>,
    warnings: Vec<String>,
}

impl Assignment {
    /// Decides for every tensor, giving each one of the schemes offered.
    ///
    /// Quantized is what is provably the weight of a Linear, is not spared for the
    /// part it plays unless `--only` names it, passes the request's patterns, and is accepted by
    /// the scheme. Weights that loaders fuse into one share one decision.
    ///
    /// # Errors
    /// `Invalid` for a malformed pattern and for overrides where the format has one scheme.
    pub fn new(job: Job<'_>, offer: impl Into<Offer>) -> Result<Self> {
        Self::decide(job, &offer.into(), Ends::Keep)
    }

    /// As [`new`](Self::new), for a loader that takes token embeddings and the output head
    /// quantized as well.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_ends(job: Job<'_>, offer: impl Into<Offer>) -> Result<Self> {
        let is_untied = is_untied(job.config);
        let ends = if is_untied { Ends::QuantizeBoth } else { Ends::QuantizeEmbedding };
        Self::decide(job, &offer.into(), ends)
    }

    /// As [`new`](Self::new), for a format that takes experts stored as one tensor, and nothing else.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_fused_experts(job: Job<'_>, offer: impl Into<Offer>) -> Result<Self> {
        Self::decide(job, &offer.into(), Ends::FusedExpertsAlone)
    }

    fn decide(job: Job<'_>, offer: &Offer, ends: Ends) -> Result<Self> {
        let Job { catalog, config, request } = job;
        let sets_bits = |set: &&Override| set.to != Setting::Keep;
        if let (Some(set), true) = (request.set.iter().find(sets_bits), offer.overrides.is_empty())
        {
            return Err(error::invalid(format!(
                "--set {:?}: {} has one scheme for a whole checkpoint, and takes PATTERN=keep alone; \
                 compressed-tensors and mlx take several",
                set.pattern, request.format
            )));
        }
        let skip = Patterns::new("--skip", &request.skip)?;
        let only = Patterns::new("--only", &request.only)?;
        let kinds = linear::classify(catalog.tensors(), config);
        let (choices, mut warnings) = overrides::choose(catalog, &kinds, request, offer.joined)?;
        let judge = |id: TensorId| {
            let tensor = &catalog[id];
            let (set, schemes) = match choices.get(id).copied().flatten() {
                Some(choice) => (Some(&request.set[choice]), offer.overrides.get(choice)),
                None => (None, None),
            };
            let schemes = schemes.copied().flatten().unwrap_or(offer.schemes);
            let decision = decide(tensor, kinds[id], &skip, &only, set, schemes, ends);
            let (parts, reason) = offer.spared;
            let is_spared =
                || parts.iter().any(|part| vocabulary::has_part(module_of(&tensor.name), part));
            if matches!(decision, Decision::Quantize(_)) && is_spared() {
                return Decision::Keep { reason: reason.into(), linear: true };
            }
            decision
        };
        let decided =
            threads::map_ranges(kinds.len(), |range| range.map(judge).collect::<Vec<_>>());
        let mut decisions: Vec<Decision> = decided.into_iter().flatten().collect();
        keep_together(catalog, offer.joined, &mut decisions);
        let modules = || catalog.tensors().iter().map(|tensor| module_of(&tensor.name));
        for (flag, patterns) in [("--skip", &skip), ("--only", &only)] {
            for pattern in patterns.unused(modules()) {
                warnings.push(format!("{flag} {pattern:?} matches no module"));
            }
        }
        if !decisions.iter().any(|decision| matches!(decision, Decision::Quantize(_))) {
            warnings.push("nothing is left to quantize: shown as it is".to_owned());
        } else if config.is_none() {
            warnings.push("no config.json, so nothing declares the quantization".to_owned());
        }
        let expert = |wanted: &dyn Fn(&Decision) -> bool| {
            catalog.tensors().iter().zip(&kinds).zip(&decisions).any(|((t, kind), d)| {
                *kind == Kind::Linear && wanted(d) && is_expert(module_of(&t.name))
            })
        };
        let is_quantized = |decision: &Decision| matches!(decision, Decision::Quantize(_));
        if offer.schemes.experts.is_none() && expert(&|_| true) {
            warnings.push(format!(
                "experts are kept: loaders can't join quantized ones in {}",
                request.format
            ));
        } else if offer.schemes.experts != Some(offer.schemes.dense) && expert(&is_quantized) {
            warnings
                .push("experts have a scheme of their own: loaders read them in it alone".into());
        }
        warnings.extend(fused_experts_kept(catalog, &kinds, &decisions, config));
        let ignore = ignored(catalog, &kinds, &decisions);
        Ok(Self { decisions, ignore, warnings })
    }

    /// Keeps everything, for the reason given.
    pub fn keep_all(catalog: &Catalog, reason: &'static str) -> Self {
        let keep = Decision::Keep { reason: reason.into(), linear: false };
        let decisions = vec![keep; catalog.tensors().len()];
        Self { decisions, ignore: Vec::new(), warnings: Vec::new() }
    }

    /// The same, with the reasons given for what is kept, and the warnings of an assignment that they
    /// come from.
    pub(crate) fn explained(
        mut self,
        reasons: impl IntoIterator<Item = (TensorId, Cow<'static, str>)>,
        from: &Self,
    ) -> Self {
        for (id, why) in reasons {
            if let Decision::Keep { reason, .. } = &mut self.decisions[id] {
                *reason = why;
            }
        }
        self.warnings.clone_from(&from.warnings);
        self
    }

    /// The modules that a loader must leave alone although it has a Linear there, by every name
    /// that a loader may know them by, then patterns.
    pub fn ignore(&self) -> &[String] {
        &self.ignore
    }

    /// What the user should know, a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Adds a line to what the user should know.
    pub(crate) fn warn(&mut self, warning: impl Into<String>) {
        self.warnings.push(warning.into());
    }
}

impl std::ops::Index<TensorId> for Assignment {
    type Output = Decision;

    fn index(&self, id: TensorId) -> &Decision {
        &self.decisions[id]
    }
}

/// The `model_type` of a config.
pub fn model_type(config: Option<&Value>) -> Option<&str> {
    config?.get("model_type")?.as_str()
}

/// The module that a tensor belongs to: its name without its last component.
pub fn module_of(tensor: &str) -> &str {
    vocabulary::last_dot(tensor).map_or(tensor, |dot| &tensor[..dot])
}

/// Other names by which a loader may hold a quantized module, be it as a part of a fused one.
pub fn names_in_loaders(module: &str) -> Vec<String> {
    let mut names = ignore::loader_names(module);
    if let Some(fused) = vocabulary::fused_name(module) {
        names.extend(ignore::loader_names(&fused));
        names.push(fused);
    }
    names
}

/// Whether the module belongs to one of several experts that are stored one by one.
pub fn is_expert(module: &str) -> bool {
    let mut above = "";
    vocabulary::components(module).any(|component| {
        std::mem::replace(&mut above, component) == "experts" && vocabulary::is_number(component)
    })
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
}

/// What a format quantizes beside Linears: the first and last layer of a language model, or, in
/// their place, fused experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    Keep,
    QuantizeEmbedding,
    QuantizeBoth,
    FusedExpertsAlone,
}

impl Ends {
    fn quantizes(self, module: &str, reason: Reason) -> bool {
        match reason {
            Reason::FusedExperts => self == Self::FusedExpertsAlone,
            Reason::Embedding => {
                matches!(self, Self::QuantizeEmbedding | Self::QuantizeBoth)
                    && vocabulary::is_token_embedding(module)
            }
            Reason::OutputHead => {
                self == Self::QuantizeBoth && vocabulary::is_language_head(module)
            }
            _ => false,
        }
    }
}

/// Whether the config says that the output head has a weight of its own. Where it doesn't, a loader
/// may drop that weight, and would not know what to do with its scales.
fn is_untied(config: Option<&Value>) -> bool {
    let says = |value: Option<&Value>| value?.get("tie_word_embeddings")?.as_bool();
    let text = config.and_then(|config| config.get("text_config"));
    says(config).or(says(text)) == Some(false)
}

fn decide(
    tensor: &Tensor,
    kind: Kind,
    skip: &Patterns,
    only: &Patterns,
    set: Option<&Override>,
    schemes: Schemes,
    ends: Ends,
) -> Decision {
    let keep = |reason: Cow<'static, str>| Decision::Keep { reason, linear: kind.may_be_linear() };
    let module = module_of(&tensor.name);
    match kind {
        Kind::Linear if ends == Ends::FusedExpertsAlone => {
            return keep("only fused experts are quantized".into());
        }
        Kind::Linear => {}
        Kind::Spared(reason) | Kind::Other(reason) if ends.quantizes(module, reason) => {}
        Kind::Spared(reason)
            if reason.is_opt_in() && only.find(module).is_some()
                || set.is_some_and(|set| set.opts_in(reason)) => {}
        Kind::Spared(reason) | Kind::Doubtful(reason) | Kind::Other(reason) => {
            return keep(reason.as_str().into());
        }
    }
    if !only.is_empty() && only.find(module).is_none() {
        return keep("not named by --only".into());
    }
    if let Some(pattern) = skip.find(module) {
        return keep(format!("--skip {pattern:?}").into());
    }
    if let Some(Override { pattern, to: Setting::Keep }) = set {
        return keep(format!("--set {pattern:?}").into());
    }
    let scheme = match schemes.experts {
        _ if !is_expert(module) => schemes.dense,
        Some(scheme) => scheme,
        None => return keep("an expert, which loaders can't join quantized".into()),
    };
    match scheme.accepts(tensor.dtype, &tensor.shape) {
        Ok(()) => Decision::Quantize(scheme),
        Err(reason) => keep(reason.into()),
    }
}

/// Keeps the rest of a fused group (q/k/v, gate/up, …) or of a mixture's experts where one of it is
/// kept: loaders read the group as one weight, with one scheme.
fn keep_together(catalog: &Catalog, joined: Joined, decisions: &mut [Decision]) {
    keep_groups(catalog, decisions, |module| joined.mixture(module));
    keep_groups(catalog, decisions, |module| {
        let (parent, family) = vocabulary::fused_group(module)?;
        Some((parent, family))
    });
    // What was kept of one expert for its own gate's sake is kept of all.
    keep_groups(catalog, decisions, |module| joined.mixture(module));
}

fn keep_groups<'a>(
    catalog: &'a Catalog,
    decisions: &mut [Decision],
    group_of: impl Fn(&'a str) -> Option<(&'a str, &'a str)>,
) {
    let group = |id: TensorId| group_of(catalog[id].name.strip_suffix(".weight")?);
    let mut kept = HashMap::new();
    for (id, decision) in decisions.iter().enumerate() {
        if let Decision::Keep { reason, .. } = decision
            && let Some(group) = group(id)
        {
            kept.entry(group).or_insert_with(|| (id, reason.clone()));
        }
    }
    if kept.is_empty() {
        return;
    }
    for (id, decision) in decisions.iter_mut().enumerate() {
        if matches!(decision, Decision::Quantize(_))
            && let Some((kept, reason)) = group(id).and_then(|group| kept.get(&group))
        {
            let leaf = module_of(&catalog[*kept].name).rsplit('.').next().unwrap_or_default();
            let reason = format!("fused with {leaf}, which is kept: {reason}").into();
            *decision = Decision::Keep { reason, linear: true };
        }
    }
}

/// What is to be said of fused experts that stay as they are, in a model that is quantized.
fn fused_experts_kept(
    catalog: &Catalog,
    kinds: &[Kind],
    decisions: &[Decision],
    config: Option<&Value>,
) -> Option<String> {
    let is_kept = |id: &TensorId| {
        kinds[*id].reason() == Some(Reason::FusedExperts)
            && matches!(decisions[*id], Decision::Keep { .. })
    };
    let kept: u64 = (0..kinds.len()).filter(is_kept).map(|id| catalog[id].elements()).sum();
    if kept == 0 {
        return None;
    }
    let all: u64 = catalog.tensors().iter().map(Tensor::elements).sum();
    let is_gpt_oss = model_type(config) == Some("gpt_oss");
    let instead = if is_gpt_oss {
        "--format mxfp4 quantizes them"
    } else {
        "a checkpoint that stores each expert apart is quantized"
    };
    let percent = kept as f64 * 100.0 / all as f64;
    Some(format!("experts fused in one tensor are kept, {percent:.1}% of all weights: {instead}"))
}

/// Every kept Linear by its own name and by those that loaders know it by, and the heads that a
/// loader may make although the checkpoint has none.
fn ignored(catalog: &Catalog, kinds: &[Kind], decisions: &[Decision]) -> Vec<String> {
    let sorted = threads::map_ranges(decisions.len(), |range| {
        let (mut kept, mut quantized) = (Vec::new(), Vec::new());
        for id in range {
            let name = module_of(&catalog[id].name);
            match decisions[id] {
                Decision::Quantize(_) => quantized.push(name),
                Decision::Keep { linear: true, .. } => {
                    kept.push(KeptModule { name, kind: kinds[id] });
                }
                Decision::Keep { .. } => {}
            }
        }
        (kept, quantized)
    });
    let (kept, quantized): (Vec<_>, Vec<_>) = sorted.into_iter().unzip();
    ignore::ignore(&kept.concat(), &quantized.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_has_a_number_below_a_module_named_experts() {
        #[track_caller]
        fn check(module: &str, expected: bool) {
            assert_eq!(is_expert(module), expected, "{module}");
        }
        check("model.layers.3.mlp.experts.17.up_proj", true);
        check("experts.0", true);
        check("model.shared_experts.1.experts.2.up_proj", true);
        check("model.layers.3.mlp.shared_experts.up_proj", false);
        check("model.layers.3.mlp.shared_experts.0.up_proj", false);
        check("model.layers.3.mlp.experts.gate_up_proj", false);
        check("model.layers.3.mlp.experts", false);
        check("model.layers.3.mlp.experts.1a.up_proj", false);
        check("experts..up_proj", false);
    }
}
