//! `aq-fs inspect`: what a view would show of a model, tensor by tensor, and why.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{RecipeArgs, bytes};
use crate::error::{self, Error, Result};
use crate::format::Item;
use crate::recipe::Decision;
use crate::source::Tensor;
use crate::view::{Budget, Model, View};

/// Arguments of `aq-fs inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct InspectArgs {
    /// A model's directory, its index, or its only weight file
    model: PathBuf,

    #[command(flatten)]
    recipe: RecipeArgs,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Leave out the table of tensors
    #[arg(long, conflicts_with = "json")]
    summary: bool,
}

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let view = args.recipe.open(&args.model, Budget::default())?;
    let text = match (args.json, args.summary) {
        (true, _) => serde_json::to_string_pretty(&as_json(&view)).expect("JSON serializes") + "\n",
        (false, summary) => as_text(&view, !summary),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever pipes the table into `head` has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|cause| Error::io("standard output", cause)),
    }
}

/// Sums over a model's tensors.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    tensors: usize,
    quantized: usize,
    elements: u64,
    quantized_elements: u64,
    quantized_source: u64,
    quantized_shown: u64,
}

impl Totals {
    fn of(model: &Model) -> Self {
        let mut totals = Self::default();
        for (tensor, items, decision) in rows(model) {
            totals.tensors += 1;
            totals.elements += tensor.elements();
            if let Decision::Quantize(_) = decision {
                totals.quantized += 1;
                totals.quantized_elements += tensor.elements();
                totals.quantized_source += tensor.stored_len();
                totals.quantized_shown += shown_len(model, &items);
            }
        }
        totals
    }

    /// Bits per quantized weight, scales and all.
    fn bits(&self) -> f64 {
        self.quantized_shown as f64 * 8.0 / self.quantized_elements.max(1) as f64
    }
}

fn rows(model: &Model) -> impl Iterator<Item = (&Tensor, Vec<&Item>, &Decision)> {
    let catalog = model.checkpoint().catalog();
    let assignment = &model.plan().assignment;
    let tensors = catalog.tensors().iter().enumerate();
    tensors
        .zip(model.items_by_tensor())
        .map(|((id, tensor), items)| (tensor, items, &assignment[id]))
}

fn shown_len(model: &Model, items: &[&Item]) -> u64 {
    let catalog = model.checkpoint().catalog();
    // Of what several tensors become, each has its share.
    let share = |item: &&Item| {
        model.plan().byte_len(catalog, item) / model.plan().weights_of(item).len().max(1) as u64
    };
    items.iter().map(share).sum()
}

/// The place of a model below the view's root, `.` for the root itself.
fn place(view: &View, model: &Model) -> String {
    let dir = model.checkpoint().dir();
    let below = dir.strip_prefix(view.root()).unwrap_or(dir);
    if below.as_os_str().is_empty() { ".".to_owned() } else { below.display().to_string() }
}

fn as_text(view: &View, table: bool) -> String {
    let mut out = String::new();
    for model in view.models() {
        let line = &mut out;
        let totals = Totals::of(model);
        let (source, shown) = (model.source_len(), model.shown_len());
        let percent = shown as f64 * 100.0 / source.max(1) as f64;
        let dir = model.checkpoint().dir().display();
        let _ = writeln!(line, "model      {dir}");
        let _ = writeln!(line, "format     {}: {}", model.format().name(), model.format().about());
        if let Some(weight) = model.plan().weights.first() {
            let _ = writeln!(line, "scheme     {}", weight.scheme);
        }
        let shards = model.checkpoint().shards().len();
        let _ = writeln!(line, "shards     {shards}");
        let _ = writeln!(
            line,
            "tensors    {}: {} quantized, {} kept",
            totals.tensors,
            totals.quantized,
            totals.tensors - totals.quantized
        );
        let _ = writeln!(
            line,
            "size       {} before, {} after ({percent:.1}%)",
            bytes(source),
            bytes(shown)
        );
        if totals.quantized > 0 {
            let _ = writeln!(
                line,
                "quantized  {} before, {} after, {:.3} bits a weight; {:.1}% of all weights",
                bytes(totals.quantized_source),
                bytes(totals.quantized_shown),
                totals.bits(),
                totals.quantized_elements as f64 * 100.0 / totals.elements.max(1) as f64,
            );
        }
        if table {
            out.push('\n');
            out.push_str(&tensor_table(model));
        }
        out.push('\n');
    }
    for hidden in view.hidden() {
        let (path, size) = (hidden.path.display(), bytes(hidden.size));
        let _ = writeln!(out, "hidden     {path} ({size}): {}", hidden.reason);
    }
    for warning in view.warnings() {
        let _ = writeln!(out, "warning    {warning}");
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn tensor_table(model: &Model) -> String {
    let mut cells = vec![["tensor", "dtype", "shape", "before", "after", "what"].map(String::from)];
    for (tensor, items, decision) in rows(model) {
        cells.push([
            error::escaped(&tensor.name),
            tensor.dtype.to_string(),
            format!("{:?}", tensor.shape),
            bytes(tensor.stored_len()),
            bytes(shown_len(model, &items)),
            match decision {
                Decision::Quantize(scheme) => scheme.to_string(),
                Decision::Keep { reason, .. } => {
                    format!("{}: {reason}", if tensor.is_plain() { "kept" } else { "decoded" })
                }
            },
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut out = String::new();
    for [name, dtype, shape, before, after, what] in &cells {
        let [w0, w1, w2, w3, w4, _] = widths;
        let _ = writeln!(
            out,
            "{name:w0$}  {dtype:w1$}  {shape:w2$}  {before:>w3$}  {after:>w4$}  {what}"
        );
    }
    out
}

fn as_json(view: &View) -> Value {
    let models: Vec<Value> = view.models().iter().map(|model| model_json(view, model)).collect();
    let hidden: Vec<Value> = view
        .hidden()
        .iter()
        .map(|h| json!({ "path": h.path.to_string_lossy(), "bytes": h.size, "reason": h.reason }))
        .collect();
    json!({
        "root": view.root().to_string_lossy(),
        "models": models,
        "hidden": hidden,
        "warnings": view.warnings(),
    })
}

fn model_json(view: &View, model: &Model) -> Value {
    let shards = model.checkpoint().shards();
    let (plan, catalog) = (model.plan(), model.checkpoint().catalog());
    let tensors: Vec<Value> = rows(model)
        .map(|(tensor, items, decision)| {
            let parts: Vec<Value> = items
                .iter()
                .map(|item| {
                    let (dtype, shape) = plan.type_of(catalog, item);
                    json!({
                        "name": plan.name(catalog, item),
                        "dtype": dtype.to_string(),
                        "shape": shape,
                        "bytes": plan.byte_len(catalog, item),
                    })
                })
                .collect();
            let (action, scheme, reason) = match decision {
                Decision::Quantize(scheme) => ("quantize", Some(scheme.to_string()), None),
                Decision::Keep { reason, .. } => ("keep", None, Some(reason.clone())),
            };
            json!({
                "name": tensor.name,
                "dtype": tensor.dtype.to_string(),
                "shape": tensor.shape,
                "shard": shards[tensor.shard()].file.name(),
                "action": action,
                "scheme": scheme,
                "reason": reason,
                "bytes_before": tensor.stored_len(),
                "bytes_after": shown_len(model, &items),
                "shown_as": parts,
            })
        })
        .collect();
    let totals = Totals::of(model);
    json!({
        "path": place(view, model),
        "format": model.format().name(),
        "shards": shards.iter().map(|shard| shard.file.name()).collect::<Vec<_>>(),
        "tensors_quantized": totals.quantized,
        "tensors_kept": totals.tensors - totals.quantized,
        "bytes_before": model.source_len(),
        "bytes_after": model.shown_len(),
        "bits_per_quantized_weight": (totals.quantized > 0).then(|| totals.bits()),
        "ignore": model.plan().assignment.ignore(),
        "tensors": tensors,
    })
}
