//! How a quantized checkpoint is written down: one file per format.
//!
//! A format turns names, element types and shapes into a [`Plan`]: which tensors each shard shows,
//! where their bytes come from, and what `config.json` declares. Planning is pure; no weight is
//! read.

mod awq;
mod bitsandbytes;
mod compressed_tensors;
mod ct_config;
mod ct_float;
mod dense;
mod fp8_block;
mod fused_experts;
mod gptq;
mod mlx;
mod mlx_mixtures;
mod mlx_sanitize;
mod mxfp4;
mod skip;
mod takes;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::dtype::{self, Dtype};
use crate::error::{self, Result};
use crate::quant::{CastScheme, Grid, Isa, Part, Real, Scheme, Survey, Tile};
use crate::recipe::{Assignment, Job, fused_group, module_of};
use crate::source::{Catalog, Edit, Tensor, TensorId};
pub use fused_experts::KeptExperts;
pub use takes::{Grain, Takes, ranges};

/// One way of writing down a quantized checkpoint.
pub trait Format: Debug + Sync {
    /// The name that `--format` takes.
    fn name(&self) -> &'static str;

    /// One line: what it is, and who reads it.
    fn about(&self) -> &'static str;

    /// What of a request it takes, and its defaults.
    fn takes(&self) -> Takes;

    /// The loaders that read it, and how that is known.
    fn readers(&self) -> &'static [Reader];

    /// What happens to every tensor.
    ///
    /// # Errors
    /// `Invalid` for a request that the format can't express, `Unsupported` for a model that it can't.
    fn assign(&self, job: Job<'_>) -> Result<Assignment>;

    /// What every shard shows, given what [`assign`](Self::assign) made of the same job.
    fn lay_out(&self, job: Job<'_>, assignment: Assignment) -> Plan;

    /// How the format's loaders take a mixture whose experts are stored fused, given the value of the
    /// model's `config.json`; `None` where they take no codes of such.
    fn fused_experts(&self, _config: Option<&Value>) -> Option<KeptExperts> {
        None
    }

    /// What every shard shows of a checkpoint.
    ///
    /// # Errors
    /// As [`assign`](Self::assign).
    fn plan(&self, job: Job<'_>) -> Result<Plan> {
        Ok(self.lay_out(job, self.assign(job)?))
    }

    /// As [`plan`](Self::plan), for a view that can show parts of a stored tensor as tensors: the plan,
    /// and the catalog that it is of, where that isn't the one given.
    ///
    /// # Errors
    /// As [`assign`](Self::assign).
    fn plan_in_parts(&self, job: Job<'_>) -> Result<(Plan, Option<Catalog>)> {
        fused_experts::plan(self, job)
    }
}

/// A loader that reads a format, and how that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader {
    /// The loader's name, as documentation spells it.
    pub loader: &'static str,
    /// The versions that were run on mounts, and on which models; `None` where what the format shows
    /// was only compared with what the loader's code reads.
    pub ran: Option<&'static str>,
}

/// A loader that was run.
const fn ran(loader: &'static str, what: &'static str) -> Reader {
    Reader { loader, ran: Some(what) }
}

/// A loader that was not.
const fn by_layout(loader: &'static str) -> Reader {
    Reader { loader, ran: None }
}

/// Every format, in the order in which they are listed to users.
pub static FORMATS: &[&dyn Format] = &[
    &dense::Dense,
    &compressed_tensors::PACK_QUANTIZED,
    &compressed_tensors::INT_QUANTIZED,
    &ct_float::FP8,
    &ct_float::FP8_TENSOR,
    &ct_float::FP8_BLOCK,
    &ct_float::NVFP4,
    &ct_float::MXFP4,
    &ct_float::MXFP8,
    &bitsandbytes::NF4,
    &bitsandbytes::FP4,
    &bitsandbytes::INT8,
    &mlx::AFFINE,
    &mlx::MXFP4,
    &mlx::MXFP8,
    &mlx::NVFP4,
    &fp8_block::Fp8Block,
    &gptq::V1,
    &gptq::V2,
    &awq::Awq,
    &mxfp4::Mxfp4,
];

/// The format of that name.
///
/// # Errors
/// `Invalid` with the names there are.
pub fn find(name: &str) -> Result<&'static dyn Format> {
    FORMATS.iter().copied().find(|format| format.name() == name).ok_or_else(|| {
        let names: Vec<&str> = FORMATS.iter().map(|format| format.name()).collect();
        error::invalid(format!("no format {name:?}: there are {}", names.join(", ")))
    })
}

/// What a format shows of a checkpoint.
#[derive(Debug)]
pub struct Plan {
    /// What happens to every tensor.
    pub assignment: Assignment,
    /// The weights that are encoded, in source order, and then whatever else is not stored as it is
    /// shown.
    pub weights: Vec<Weight>,
    /// Weights whose parts are shown as one.
    pub stacks: Vec<Stack>,
    /// The source tensors, of one scheme, that are surveyed together before any of them can be
    /// encoded.
    pub surveys: Vec<Vec<TensorId>>,
    /// The tensors shown, in source order, a weight's parts next to each other.
    pub items: Vec<Item>,
    /// Members that `config.json` gets, and which replace its own; none where nothing is quantized
    /// and it stays as it is.
    pub config: Map<String, Value>,
    /// What changes within objects that are members of `config.json`.
    pub nested: Vec<(String, Edit)>,
    /// The `format` of every shard's metadata.
    pub framework: &'static str,
    /// Metadata that the next weights may have too.
    inlines: Vec<Arc<Inline>>,
}

/// Metadata that is remembered to be shared; a layer has weights of few shapes.
const INLINES: usize = 16;

/// A weight that is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight {
    /// The source tensor.
    pub tensor: TensorId,
    /// How it becomes codes.
    pub scheme: Scheme,
    /// Position in [`Plan::surveys`], if the scheme needs one.
    pub survey: Option<usize>,
    /// The element type of the numbers that it is decoded to again, where those are shown instead
    /// of its codes.
    pub decoded: Option<Real>,
}

impl Weight {
    /// The tensors that it becomes.
    pub fn parts(&self, tensor: &Tensor) -> Vec<Part> {
        match self.decoded {
            None => self.scheme.parts(tensor.dtype, &tensor.shape),
            Some(to) => vec![self.scheme.decoded_part(&tensor.shape, to)],
        }
    }

    /// How it is cut into chunks of about `source_bytes`.
    pub fn grid(&self, tensor: &Tensor, source_bytes: u64) -> Grid {
        let (dtype, shape) = (tensor.dtype, &tensor.shape);
        match self.decoded {
            None => self.scheme.grid(dtype, shape, source_bytes),
            Some(to) => self.scheme.decoded_grid(dtype, shape, to, source_bytes),
        }
    }

    /// Encodes the window of one chunk of [`grid`](Self::grid), all parts in one pass.
    pub fn encode(&self, isa: Isa, tile: &Tile<'_>, survey: &Survey, out: &mut [&mut [u8]]) {
        match self.decoded {
            None => self.scheme.encode(isa, tile, survey, out),
            Some(to) => self.scheme.encode_decoded(isa, tile, survey, to, out[0]),
        }
    }
}

/// Weights of one shape and scheme whose parts are shown one after the other, as one tensor with a
/// dimension more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// The module that holds them.
    pub module: String,
    /// Positions in [`Plan::weights`].
    pub weights: Vec<usize>,
}

/// One tensor that a view shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The source tensor that it comes from, and whose shard shows it.
    pub tensor: TensorId,
    /// What follows its module and a dot in its name or, where it begins with an underscore, the
    /// source tensor's own name; just that name where `None`.
    pub suffix: Option<&'static str>,
    /// Where its bytes come from.
    pub content: Content,
}

/// Where the bytes of a tensor come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Straight from the source tensor.
    Source,
    /// Small metadata, here.
    Inline(Arc<Inline>),
    /// A part of an encoded weight.
    Part {
        /// Position in [`Plan::weights`].
        weight: usize,
        /// Position in the scheme's parts.
        part: u8,
    },
    /// The same part of several encoded weights.
    Stacked {
        /// Position in [`Plan::stacks`].
        stack: usize,
        /// Position in the scheme's parts.
        part: u8,
    },
    /// The scalar that a survey of an encoded weight yields.
    Scalar {
        /// Position in [`Plan::weights`].
        weight: usize,
    },
    /// That scalar as the last member of a JSON object.
    Json(Box<JsonScalar>),
}

/// A scalar in JSON.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonScalar {
    /// Position in [`Plan::weights`].
    pub weight: usize,
    /// What stands before it.
    pub begin: Box<str>,
}

// A large mixture has hundreds of thousands.
const _: () = assert!(size_of::<Item>() <= 40);

/// Small metadata. Weights that are alike share theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inline {
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Box<[u64]>,
    /// Its bytes.
    pub bytes: Box<[u8]>,
}

impl Plan {
    /// A plan with nothing in it yet.
    fn new(assignment: Assignment, tensors: usize) -> Self {
        Self {
            assignment,
            weights: Vec::new(),
            stacks: Vec::new(),
            surveys: Vec::new(),
            items: Vec::with_capacity(tensors),
            config: Map::new(),
            nested: Vec::new(),
            framework: "pt",
            inlines: Vec::new(),
        }
    }

    /// Shows a source tensor as it is.
    fn keep(&mut self, id: TensorId) {
        self.items.push(Item { tensor: id, suffix: None, content: Content::Source });
    }

    /// Encodes a source tensor, and shows its parts by the suffixes given, in the scheme's order.
    fn encode(&mut self, id: TensorId, scheme: Scheme, suffixes: &[&'static str]) {
        let weight = self.weights.len();
        let survey = scheme.is_surveyed().then(|| {
            self.surveys.push(vec![id]);
            self.surveys.len() - 1
        });
        self.weights.push(Weight { tensor: id, scheme, survey, decoded: None });
        for (part, suffix) in (0..).zip(suffixes) {
            let content = Content::Part { weight, part };
            self.items.push(Item { tensor: id, suffix: Some(suffix), content });
        }
    }

    /// Surveys weights together that engines fuse into one.
    fn fuse_surveys(&mut self, catalog: &Catalog) {
        let mut fused = HashMap::new();
        let mut surveys: Vec<Vec<TensorId>> = Vec::new();
        for weight in self.weights.iter_mut().filter(|weight| weight.survey.is_some()) {
            let mut own = || {
                surveys.push(Vec::new());
                surveys.len() - 1
            };
            let survey = match fused_group(module_of(&catalog[weight.tensor].name)) {
                Some(group) => *fused.entry((group, weight.scheme)).or_insert_with(own),
                None => own(),
            };
            surveys[survey].push(weight.tensor);
            weight.survey = Some(survey);
        }
        self.surveys = surveys;
    }

    /// Encodes a source tensor into the next place of a stack. The first one's shard shows the stack.
    fn encode_stacked(
        &mut self,
        id: TensorId,
        scheme: Scheme,
        (stack, place): (usize, usize),
        suffixes: &[&'static str],
    ) {
        self.stacks[stack].weights[place] = self.weights.len();
        self.weights.push(Weight { tensor: id, scheme, decoded: None, survey: None });
        if place == 0 {
            for (part, suffix) in (0..).zip(suffixes) {
                let content = Content::Stacked { stack, part };
                self.items.push(Item { tensor: id, suffix: Some(suffix), content });
            }
        }
    }

    /// Shows the scalar of the weight encoded last, as the last member of a JSON object that begins
    /// so, or bare.
    fn scalar(&mut self, suffix: &'static str, json: Option<Box<str>>) {
        let weight = self.weights.len() - 1;
        let tensor = self.weights[weight].tensor;
        let content = match json {
            None => Content::Scalar { weight },
            Some(begin) => Content::Json(Box::new(JsonScalar { weight, begin })),
        };
        self.items.push(Item { tensor, suffix: Some(suffix), content });
    }

    /// Shows a source tensor with elements of type `to`.
    fn cast(&mut self, id: TensorId, to: Real) {
        let scheme = Scheme::Cast(CastScheme { to });
        self.show(Weight { tensor: id, scheme, survey: None, decoded: None });
    }

    /// Shows a weight of one part by the source tensor's own name.
    fn show(&mut self, weight: Weight) {
        let content = Content::Part { weight: self.weights.len(), part: 0 };
        self.items.push(Item { tensor: weight.tensor, suffix: None, content });
        self.weights.push(weight);
    }

    /// Has every kept tensor that is stored quantized shown as the numbers that it stands for.
    pub(crate) fn decode_kept(&mut self, catalog: &Catalog) {
        for item in self.items.iter_mut().filter(|item| item.content == Content::Source) {
            let tensor = &catalog[item.tensor];
            if tensor.is_plain() || tensor.shape.contains(&0) {
                continue;
            }
            let to = Real::new(tensor.dtype).expect("what is decoded are reals");
            let scheme = Scheme::Cast(CastScheme { to });
            let weight = Weight { tensor: item.tensor, scheme, survey: None, decoded: None };
            item.content = Content::Part { weight: self.weights.len(), part: 0 };
            self.weights.push(weight);
        }
    }

    /// Declares the quantization, if there is any.
    fn declare(&mut self, member: &str, value: Value) {
        if !self.weights.is_empty() {
            self.config.insert(member.to_owned(), value);
        }
    }

    /// Shows small metadata of a source tensor's module.
    fn inline(
        &mut self,
        id: TensorId,
        suffix: &'static str,
        (dtype, shape): (Dtype, &[u64]),
        bytes: impl AsRef<[u8]>,
    ) {
        let bytes = bytes.as_ref();
        let is_alike = |known: &&Arc<Inline>| {
            *known.bytes == *bytes && *known.shape == *shape && known.dtype == dtype
        };
        let inline = self.inlines.iter().find(is_alike).cloned().unwrap_or_else(|| {
            let inline = Arc::new(Inline { dtype, shape: shape.into(), bytes: bytes.into() });
            self.inlines.truncate(INLINES - 1);
            self.inlines.push(inline.clone());
            inline
        });
        let content = Content::Inline(inline);
        self.items.push(Item { tensor: id, suffix: Some(suffix), content });
    }

    /// The weights that an item shows a part of, one after the other.
    pub fn weights_of<'a>(&'a self, item: &'a Item) -> &'a [usize] {
        match &item.content {
            Content::Source | Content::Inline { .. } => &[],
            Content::Part { weight, .. } | Content::Scalar { weight } => {
                std::slice::from_ref(weight)
            }
            Content::Json(scalar) => std::slice::from_ref(&scalar.weight),
            Content::Stacked { stack, .. } => &self.stacks[*stack].weights,
        }
    }

    /// The name of an item in three parts: the source's, what joins them, and the suffix.
    pub fn name_parts<'a>(
        &'a self,
        catalog: &'a Catalog,
        item: &Item,
    ) -> (&'a str, &'static str, &'static str) {
        let name = catalog[item.tensor].name.as_str();
        match (item.suffix, &item.content) {
            (None, _) => (name, "", ""),
            (Some(suffix), Content::Stacked { stack, .. }) => {
                (&self.stacks[*stack].module, ".", suffix)
            }
            (Some(suffix), _) if suffix.starts_with('_') => (name, "", suffix),
            (Some(suffix), _) => (module_of(name), ".", suffix),
        }
    }

    /// The name of an item.
    pub fn name<'a>(&'a self, catalog: &'a Catalog, item: &Item) -> Cow<'a, str> {
        match self.name_parts(catalog, item) {
            (name, _, "") => name.into(),
            (name, joint, suffix) => format!("{name}{joint}{suffix}").into(),
        }
    }

    /// The element type and shape of an item.
    pub fn type_of<'a>(&self, catalog: &'a Catalog, item: &'a Item) -> (Dtype, Cow<'a, [u64]>) {
        let tensor = &catalog[item.tensor];
        match &item.content {
            Content::Source => (tensor.dtype, tensor.shape.as_slice().into()),
            Content::Inline(inline) => (inline.dtype, (&*inline.shape).into()),
            Content::Part { weight, part } => {
                let part = self.weights[*weight].parts(tensor).swap_remove(usize::from(*part));
                (part.dtype, part.shape.into())
            }
            Content::Stacked { stack, part } => {
                let weights = &self.stacks[*stack].weights;
                let part = self.weights[weights[0]].parts(tensor).swap_remove(usize::from(*part));
                let mut shape = vec![weights.len() as u64];
                shape.extend(part.shape);
                (part.dtype, shape.into())
            }
            Content::Json(scalar) => (Dtype::U8, vec![json_len(&scalar.begin) as u64].into()),
            Content::Scalar { weight } => {
                let scalar = self.weights[*weight].scheme.scalar(tensor.dtype);
                let scalar = scalar.expect("only surveyed weights have one");
                (scalar.dtype, scalar.shape.into())
            }
        }
    }

    /// The length of an item in bytes.
    pub fn byte_len(&self, catalog: &Catalog, item: &Item) -> u64 {
        let (dtype, shape) = self.type_of(catalog, item);
        dtype::byte_len(dtype, &shape).expect("planned tensors have a size")
    }
}

/// Bytes of a JSON object that begins so and ends with a number: enough for every f32, and what
/// keeps its neighbours aligned.
fn json_len(begin: &str) -> usize {
    const LONGEST: usize = "-1.2345678901234567e-38}".len();
    (begin.len() + LONGEST).next_multiple_of(8)
}

/// A JSON object that begins so and ends with a number, padded with spaces to the length that the
/// header says. What is no number is spelled as Python reads it.
pub(crate) fn json_with(begin: &str, number: f32) -> Vec<u8> {
    // Python's floats are f64, of as many digits as tell them apart.
    let number = match f64::from(number) {
        number if number.is_nan() => "NaN".to_owned(),
        number if number.is_infinite() => "Infinity".to_owned(),
        number => format!("{number:?}"),
    };
    let mut text = format!("{begin}{number}}}").into_bytes();
    assert!(text.len() <= json_len(begin), "the longest number fits");
    text.resize(json_len(begin), b' ');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::recipe::{Decision, Request};
    use crate::source::{Decoder, Extent};

    /// The modules that a format keeps of a model, or why it takes none.
    fn kept(format: &str, config: &Value, modules: &[&str]) -> Result<Vec<String>, String> {
        let tensor = |module: &&str| Tensor {
            name: format!("{module}.weight"),
            dtype: Dtype::BF16,
            shape: vec![256, 256],
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: 0, start: 0, len: 1 << 17 }],
        };
        let catalog = Catalog::new(modules.iter().map(tensor).collect()).expect("unique");
        let request = Request { format: format.to_owned(), ..Request::default() };
        let job = Job { catalog: &catalog, config: Some(config), request: &request };
        let assignment = find(format).and_then(|format| format.assign(job));
        let assignment = assignment.map_err(|error| error.to_string())?;
        let is_kept = |id: &usize| matches!(assignment[*id], Decision::Keep { .. });
        Ok((0..modules.len()).filter(is_kept).map(|id| modules[id].to_owned()).collect())
    }

    #[test]
    fn what_a_loader_of_the_format_can_not_take_quantized_is_kept() {
        #[track_caller]
        fn check(format: &str, model_type: &str, leaves: &[&str], expected: &[&str]) {
            let in_layer = |leaf: &&str| format!("model.layers.0.{leaf}");
            let modules: Vec<String> = leaves.iter().map(in_layer).collect();
            let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
            let config = json!({ "model_type": model_type });
            let found = kept(format, &config, &modules);
            let expected: Vec<String> = expected.iter().map(in_layer).collect();
            assert_eq!(found, Ok(expected), "{format}, {model_type}");
        }
        let t5 = ["self_attn.q_proj", "mlp.wi", "mlp.wo"];
        for format in ["bnb-nf4", "bnb-fp4", "bnb-int8", "fp8-block"] {
            check(format, "t5", &t5, &["mlp.wo"]);
            check(format, "llama", &t5, &[]);
            let indexer = ["self_attn.o_proj", "self_attn.indexer.weights_proj"];
            check(format, "deepseek_v32", &indexer, &indexer[1..]);
        }
        check("compressed-tensors", "t5", &t5, &[]);
        let of_parts = json!({ "model_type": "blip-2", "text_config": { "model_type": "t5" } });
        let wo = "language_model.decoder.block.0.layer.2.DenseReluDense.wo";
        assert_eq!(kept("bnb-nf4", &of_parts, &[wo]), Ok(vec![wo.to_owned()]));
        assert_eq!(kept("bnb-nf4", &json!({ "model_type": "blip-2" }), &[wo]), Ok(vec![]));
        let mla = ["self_attn.o_proj", "self_attn.kv_b_proj"];
        for (format, model_type, expected) in [
            ("mlx", "glm4_moe_lite", &mla[1..]),
            ("mlx-mxfp4", "kimi_k25", &mla[1..]),
            ("mlx", "bailing_hybrid", &mla[1..]),
            ("mlx", "deepseek_v2", &mla[2..]),
        ] {
            check(format, model_type, &mla, expected);
        }
        let dense = ["feed_forward.w1", "feed_forward.w2", "self_attn.o_proj"];
        check("mlx", "lfm2_moe", &dense, &dense[..2]);
        check("mlx", "lfm2", &dense, &[]);
        let shared = ["shared_mlp.input_linear", "self_attn.o_proj"];
        check("mlx", "granitemoehybrid", &shared, &shared[..1]);
        let shared = ["block_sparse_moe.shared_experts.up_proj", "self_attn.o_proj"];
        check("mlx", "kimi_linear", &shared, &shared[..1]);
    }

    #[test]
    fn an_embedding_that_a_loader_takes_for_the_head_too_is_kept() {
        let config = json!({ "model_type": "minicpm", "tie_word_embeddings": false });
        let modules = ["model.embed_tokens", "model.layers.0.self_attn.o_proj", "lm_head"];
        assert_eq!(kept("mlx", &config, &modules), Ok(vec![]));
        assert_eq!(kept("mlx", &config, &modules[..2]), Ok(vec![modules[0].to_owned()]));
    }

    #[test]
    fn models_of_which_a_loader_takes_nothing_quantized_are_refused() {
        let refused = |format: &str, kind: &str| {
            let modules = ["model.layers.0.self_attn.o_proj"];
            kept(format, &json!({ "model_type": kind }), &modules).expect_err("refused")
        };
        assert!(refused("bnb-nf4", "falcon").contains("--format compressed-tensors"));
        assert!(refused("mlx", "falcon_h1").contains("multiplies most weights"));
    }

    #[test]
    fn a_number_in_json_has_one_length_and_is_read_back() {
        let begin = r#"{"a": [1], "offset": "#;
        for number in [0.0, 1.0, 0.107_236_86, f32::MAX, f32::MIN_POSITIVE, 1e-45, -1.1754942e-38] {
            let text = json_with(begin, number);
            assert_eq!(text.len(), json_len(begin));
            serde_json::from_slice::<Value>(&text).expect("JSON");
            // Read by the standard library: the JSON one rounds the last digit as it likes.
            let read = std::str::from_utf8(&text[begin.len()..]).expect("UTF-8");
            let read = read.trim_end().trim_end_matches('}').parse();
            assert_eq!(read, Ok(f64::from(number)), "{number}");
        }
        assert!(json_with(begin, f32::NAN).starts_with(br#"{"a": [1], "offset": NaN}"#));
        assert!(json_with(begin, f32::INFINITY).starts_with(br#"{"a": [1], "offset": Infinity}"#));
    }
}
