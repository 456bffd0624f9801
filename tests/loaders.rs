//! What is quantized, kept and ignored, against hundreds of architectures as transformers builds them.
//!
//! `fixtures/architectures.json` was recorded from transformers 5.23: every model type that it can
//! make from a config, as `save_pretrained` writes it, one row per distinct tensor, with the class of
//! the module that loads it. A row is name, shape, code, count, and the modules that the loader fills
//! where their names differ. Codes: `L` the weight of a Linear, `E` one expert's part of a fused
//! tensor, `S` a Linear kept for the part it plays, `R` a Linear's weight that the loader
//! rearranges, `P` a Linear's weight that is not called so, `N` anything else; `b` adds a bias.

use aq_fs::dtype::Dtype;
use aq_fs::quant::{Granularity, IntScheme, Packing, Quality, Scheme};
use aq_fs::recipe::{Assignment, Decision, Job, Request};
use aq_fs::source::{Catalog, Decoder, Extent, Tensor};
use regex::RegexSet;
use serde_json::Value;

struct Row<'a> {
    name: &'a str,
    shape: Vec<u64>,
    code: char,
    has_bias: bool,
    count: u64,
    modules: Vec<&'a str>,
}

impl<'a> Row<'a> {
    fn new(value: &'a Value) -> Self {
        let name = value[0].as_str().expect("a name");
        let code = value[2].as_str().expect("a code");
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let modules = value[4].as_array().map(|names| names.iter().filter_map(Value::as_str));
        Self {
            name,
            shape: value[1].as_array().expect("a shape").iter().filter_map(Value::as_u64).collect(),
            code: code.chars().next().expect("a code"),
            has_bias: code.ends_with('b'),
            count: value[3].as_u64().unwrap_or(1),
            modules: modules.map_or_else(|| vec![module], Iterator::collect),
        }
    }

    fn weights(&self) -> u64 {
        self.count * self.shape.iter().product::<u64>()
    }
}

struct Architecture<'a> {
    name: String,
    rows: Vec<Row<'a>>,
    decisions: Vec<bool>,
    ignore: Vec<String>,
    value: &'a Value,
}

impl<'a> Architecture<'a> {
    fn new(value: &'a Value, config: Option<&Value>) -> Self {
        let rows: Vec<Row<'_>> =
            value["tensors"].as_array().expect("tensors").iter().map(Row::new).collect();
        let mut tensors = Vec::new();
        for row in &rows {
            tensors.push(tensor(row.name.to_owned(), row.shape.clone()));
        }
        for row in rows.iter().filter(|row| row.has_bias) {
            let module = row.name.strip_suffix("weight").expect("a bias beside a weight");
            tensors.push(tensor(format!("{module}bias"), vec![row.shape[0]]));
        }
        let catalog = Catalog::new(tensors).expect("names are unique");
        let scheme = Scheme::Int(IntScheme {
            bits: 4,
            symmetric: true,
            granularity: Granularity::Group(128),
            packing: Packing::Packed32,
            quality: Quality::Reference,
        });
        let job = Job { catalog: &catalog, config, request: &Request::default() };
        let assignment = Assignment::new(job, scheme).expect("nothing is refused");
        let decisions =
            (0..rows.len()).map(|id| matches!(assignment[id], Decision::Quantize(_))).collect();
        let name = format!("{} {}", value["model_type"], value["architecture"]);
        Self { name, rows, decisions, ignore: assignment.ignore().to_vec(), value }
    }

    fn rows(&self) -> impl Iterator<Item = (&Row<'a>, bool)> {
        self.rows.iter().zip(self.decisions.iter().copied())
    }
}

fn tensor(name: String, shape: Vec<u64>) -> Tensor {
    let operands = vec![Extent { shard: 0, start: 0, len: 0 }];
    Tensor { name, dtype: Dtype::BF16, shape, decoder: Decoder::Plain, operands }
}

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/architectures.json")).expect("the fixture parses")
}

fn each(with_config: bool, check: impl Fn(&Architecture<'_>, &mut Vec<String>)) {
    let fixture = fixture();
    let mut complaints = Vec::new();
    for value in fixture.as_array().expect("a list") {
        let config = with_config.then(|| &value["config"]);
        check(&Architecture::new(value, config), &mut complaints);
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

fn only_linears_are_quantized(architecture: &Architecture<'_>, complaints: &mut Vec<String>) {
    for (row, quantized) in architecture.rows() {
        if quantized && !matches!(row.code, 'L' | 'E') {
            complaints
                .push(format!("{}: quantizes {} ({})", architecture.name, row.name, row.code));
        }
    }
}

#[test]
fn only_what_the_loader_takes_for_a_linear_is_quantized() {
    each(true, only_linears_are_quantized);
}

#[test]
fn nine_tenths_of_what_could_be_quantized_is() {
    each(true, |architecture, complaints| {
        let (mut all, mut taken) = (0, 0);
        // Loaders join experts: all of them are quantized or none.
        let experts_fit =
            architecture.rows().all(|(row, _)| row.code != 'E' || row.shape[1].is_multiple_of(128));
        for (row, quantized) in architecture.rows() {
            let counts = row.code == 'L' || row.code == 'E' && experts_fit;
            if counts && row.shape[1].is_multiple_of(128) {
                all += row.weights();
                taken += if quantized { row.weights() } else { 0 };
            }
        }
        if taken * 10 < all * 9 {
            complaints.push(format!("{}: {taken} of {all} weights", architecture.name));
        }
    });
}

#[test]
fn heads_routers_towers_and_projectors_are_kept() {
    each(true, |architecture, complaints| {
        for (row, quantized) in architecture.rows() {
            if quantized && row.code == 'S' {
                complaints.push(format!("{}: {}", architecture.name, row.name));
            }
        }
    });
}

#[test]
fn ignore_names_every_linear_that_the_loader_must_leave_alone_and_no_other() {
    each(true, |architecture, complaints| {
        if architecture.value["renamed_beyond_reach"] == true {
            return;
        }
        let patterns = architecture.ignore.iter().map(|entry| match entry.strip_prefix("re:") {
            // As Python's `re.match`: from the start, but not to the end.
            Some(pattern) => format!("^(?:{pattern})"),
            None => format!("^{}$", regex::escape(entry)),
        });
        let ignore = RegexSet::new(patterns).expect("patterns compile");
        let mut kept: Vec<&str> = Vec::new();
        let mut taken: Vec<&str> = Vec::new();
        for (row, quantized) in architecture.rows() {
            match row.code {
                'L' | 'S' | 'R' if quantized => taken.extend(&row.modules),
                'L' | 'S' | 'R' => kept.extend(&row.modules),
                _ => {}
            }
        }
        let without = architecture.value["without_tensor"].as_array().into_iter().flatten();
        kept.extend(without.filter_map(Value::as_str));
        for module in kept.iter().filter(|module| !taken.contains(module)) {
            if !ignore.is_match(module) {
                complaints.push(format!("{}: not ignored: {module}", architecture.name));
            }
        }
        for module in taken {
            if ignore.is_match(module) {
                complaints.push(format!("{}: ignored, but quantized: {module}", architecture.name));
            }
        }
    });
}

#[test]
fn names_and_shapes_alone_never_make_an_embedding_a_linear() {
    each(false, |architecture, complaints| {
        for (row, quantized) in architecture.rows() {
            if quantized && row.code == 'N' {
                complaints.push(format!("{}: {}", architecture.name, row.name));
            }
        }
    });
}
