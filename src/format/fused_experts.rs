//! Experts that a checkpoint stores fused, one by one.
//!
//! For the experts `X` (`...mlp.experts`), of which there are `E`:
//!
//! ```text
//! X.gate_up_proj  [E, 2*I, H]   or transposed  [E, H, 2*I]
//! X.down_proj     [E, H, I]                    [E, I, H]
//! ```
//!
//! become, for each number `N`, `X.N.gate_proj.weight` and `X.N.up_proj.weight` of shape `[I, H]`, the
//! first and the second half, and `X.N.down_proj.weight` of shape `[H, I]`. Which of both it is, the two
//! shapes tell together.
//!
//! Upstream: the `Experts` modules of transformers 5.23, where `gate, up = ....chunk(2, dim=-1)`. Models
//! where gate and up alternate have biases too (gpt-oss).

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::Value;

use super::{Format, Plan};
use crate::error::Result;
use crate::recipe::{Assignment, Decision, Job, model_type, module_of};
use crate::source::{Catalog, Matrices, Order, Tensor, TensorId};

/// Types of models whose loader joins experts that are stored one by one: `experts.*.gate_proj.weight`
/// and `up_proj`. (`conversion_mapping.py` of transformers 5.23.)
const JOINED: &[&str] = &[
    "afmoe",
    "axk1",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm_moe_dsa",
    "hunyuan_v1_moe",
    "laguna",
    "mellum",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
];

/// How transformers reads the experts of a model if not fused: those that they join, or Llama-4's, which are
/// Linears to them where the checkpoint is quantized. (`quantizers/base.py` of transformers 5.23.)
pub(super) fn in_transformers(config: Option<&Value>) -> Option<KeptExperts> {
    match model_type(config)? {
        "llama4" | "llama4_text" => Some(KeptExperts::Single),
        kind => JOINED.contains(&kind).then_some(KeptExperts::Fused),
    }
}

/// A catalog with every expert on its own.
#[derive(Debug)]
struct Split {
    catalog: Catalog,
    /// For each of its tensors the stored one that it is of.
    origins: Vec<TensorId>,
    /// The mixtures of fused tensors, by stored tensor.
    mixtures: HashMap<TensorId, usize>,
}

/// How loaders of a format that takes experts one by one, or joined from such, take a mixture of which
/// something is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptExperts {
    /// As it is stored.
    Fused,
    /// One by one all the same.
    Single,
}

/// [`Format::plan_in_parts`]: of a format that shows fused experts one by one, or joins them again.
///
/// # Errors
/// What the format's `assign` complains of.
pub(super) fn plan<F: Format + ?Sized>(
    format: &F,
    job: Job<'_>,
) -> Result<(Plan, Option<Catalog>)> {
    let kept = format.fused_experts(job.config);
    let Some(split) = kept.and_then(|_| split(job.catalog)) else {
        return Ok((format.plan(job)?, None));
    };
    let assign = |catalog| format.assign(Job { catalog, ..job });
    let assignment = assign(&split.catalog)?;
    let is_quantized = |id| matches!(assignment[id], Decision::Quantize(_));
    let is_plain = !(0..split.origins.len()).any(is_quantized);
    let rejoined = if kept == Some(KeptExperts::Fused) || is_plain {
        split.rejoined(job.catalog, &assignment)
    } else {
        None
    };
    let (catalog, assignment) = match rejoined {
        None => (split.catalog, assignment),
        Some((catalog, reasons)) => {
            let rejoined = assign(&catalog)?.explained(reasons, &assignment);
            (catalog, rejoined)
        }
    };
    let plan = format.lay_out(Job { catalog: &catalog, ..job }, assignment);
    Ok((plan, Some(catalog)))
}

/// A catalog's tensors with its fused experts one by one; `None` where it has none.
fn split(catalog: &Catalog) -> Option<Split> {
    let mut fused = HashMap::new();
    let mut mixtures = HashMap::new();
    for (id, tensor) in catalog.tensors().iter().enumerate() {
        let Some((name, down, parts)) = mixture(catalog, tensor) else { continue };
        let [gate, up, down_parts] = parts;
        let number = fused.len() / 2;
        mixtures.extend([(id, number), (down, number)]);
        fused.insert(id, (name, vec![("gate_proj", gate), ("up_proj", up)]));
        fused.insert(down, (name, vec![("down_proj", down_parts)]));
    }
    if fused.is_empty() {
        return None;
    }
    let (mut tensors, mut origins) = (Vec::new(), Vec::new());
    for (id, tensor) in catalog.tensors().iter().enumerate() {
        match fused.get(&id) {
            None => tensors.push(tensor.clone()),
            Some((mixture, parts)) => {
                for expert in 0..tensor.shape[0] {
                    tensors.extend(parts.iter().map(|(projection, matrices)| {
                        let name = format!("{mixture}.{expert}.{projection}.weight");
                        matrices.tensor(expert, name)
                    }));
                }
            }
        }
        origins.resize(tensors.len(), id);
    }
    // Experts that are stored fused and one by one are nobody's.
    let catalog = Catalog::new(tensors).ok()?;
    Some(Split { catalog, origins, mixtures })
}

/// The mixture that a tensor holds gate and up of, the tensor that holds down, and what they hold: gate,
/// up and down.
fn mixture<'a>(
    catalog: &'a Catalog,
    gate_up: &'a Tensor,
) -> Option<(&'a str, TensorId, [Matrices<'a>; 3])> {
    let name = gate_up.name.strip_suffix(".gate_up_proj")?;
    let is_named = name == "experts" || name.ends_with(".experts");
    let has_biases = catalog.find(&format!("{}_bias", gate_up.name)).is_some();
    if !is_named || has_biases {
        return None;
    }
    let id = catalog.find(&format!("{name}.down_proj"))?;
    let down = &catalog[id];
    let (&[experts, a, b], &[as_many, c, d]) = (&*gate_up.shape, &*down.shape) else {
        return None;
    };
    let order = match () {
        () if experts != as_many => return None,
        () if c == b && d.checked_mul(2) == Some(a) => Order::Rows,
        () if d == a && c.checked_mul(2) == Some(b) => Order::Columns,
        () => return None,
    };
    let (inner, outputs) = if order == Order::Rows { (d, c) } else { (c, d) };
    let gate = Matrices::new(gate_up, order, 0..inner)?;
    let up = Matrices::new(gate_up, order, inner..2 * inner)?;
    Some((name, id, [gate, up, Matrices::new(down, order, 0..outputs)?]))
}

impl Split {
    /// The catalog with mixtures of which something is kept as they are in the catalog `stored`, and, by
    /// position in it, why; `None` where nothing of any is kept.
    fn rejoined(
        &self,
        stored: &Catalog,
        assignment: &Assignment,
    ) -> Option<(Catalog, HashMap<TensorId, Cow<'static, str>>)> {
        // Of each mixture the first that is kept, and of each stored tensor.
        let (mut kept, mut own) = (HashMap::new(), HashMap::new());
        for (id, origin) in self.origins.iter().enumerate() {
            if let (Decision::Keep { reason, .. }, Some(mixture)) =
                (&assignment[id], self.mixtures.get(origin))
            {
                kept.entry(mixture).or_insert((id, reason));
                own.entry(*origin).or_insert(reason);
            }
        }
        if kept.is_empty() {
            return None;
        }
        let (mut tensors, mut reasons) = (Vec::new(), HashMap::new());
        let mut rejoined = None;
        for (id, origin) in self.origins.iter().enumerate() {
            let Some((first, reason)) = self.mixtures.get(origin).and_then(|it| kept.get(it))
            else {
                tensors.push(self.catalog[id].clone());
                continue;
            };
            if rejoined == Some(*origin) {
                continue;
            }
            rejoined = Some(*origin);
            let reason = match own.get(origin) {
                Some(own) => (*own).clone(),
                None => {
                    let first = module_of(&self.catalog[*first].name).rsplit('.').next();
                    let first = first.unwrap_or_default();
                    format!("split with {first}, which is kept: {reason}").into()
                }
            };
            reasons.insert(tensors.len(), reason);
            tensors.push(stored[*origin].clone());
        }
        let catalog = Catalog::new(tensors).expect("a subset of names, and stored ones");
        Some((catalog, reasons))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::source::{Decoder, Extent};

    /// The names and shapes of what stored tensors become; `None` where they stay.
    #[track_caller]
    fn check(stored: &[(&str, &[u64])], expected: Option<&[(&str, &[u64])]>) {
        let tensor = |(name, shape): &(&str, &[u64])| Tensor {
            name: (*name).to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: 0, start: 0, len: 2 * shape.iter().product::<u64>() }],
        };
        let catalog = Catalog::new(stored.iter().map(tensor).collect()).expect("unique");
        let split = split(&catalog);
        let found: Option<Vec<(&str, &[u64])>> = split.as_ref().map(|split| {
            let tensors = split.catalog.tensors().iter();
            tensors.map(|tensor| (&*tensor.name, &*tensor.shape)).collect()
        });
        assert_eq!(found.as_deref(), expected, "{stored:?}");
    }

    #[test]
    fn experts_are_split_where_their_shapes_tell_how() {
        let parts: &[(&str, &[u64])] = &[
            ("norm.weight", &[6]),
            ("a.experts.0.gate_proj.weight", &[4, 6]),
            ("a.experts.0.up_proj.weight", &[4, 6]),
            ("a.experts.1.gate_proj.weight", &[4, 6]),
            ("a.experts.1.up_proj.weight", &[4, 6]),
            ("a.experts.0.down_proj.weight", &[6, 4]),
            ("a.experts.1.down_proj.weight", &[6, 4]),
        ];
        let norm: (&str, &[u64]) = ("norm.weight", &[6]);
        let (gate_up, down) = ("a.experts.gate_up_proj", "a.experts.down_proj");
        check(&[norm, (gate_up, &[2, 8, 6]), (down, &[2, 6, 4])], Some(parts));
        check(&[norm, (gate_up, &[2, 6, 8]), (down, &[2, 4, 6])], Some(parts));
        check(&[norm, (gate_up, &[2, 8, 6]), (down, &[2, 4, 6])], None);
        check(&[norm, (gate_up, &[2, 8, 6]), (down, &[3, 6, 4])], None);
        check(&[norm, (gate_up, &[8, 6]), (down, &[6, 4])], None);
        check(&[norm, (gate_up, &[2, 8, 6])], None);
        check(&[("a.gate_up_proj", &[2, 8, 6]), ("a.down_proj", &[2, 6, 4])], None);
        let bias: (&str, &[u64]) = ("a.experts.gate_up_proj_bias", &[2, 8]);
        check(&[bias, (gate_up, &[2, 8, 6]), (down, &[2, 6, 4])], None);
        let twin: (&str, &[u64]) = ("a.experts.1.up_proj.weight", &[4, 6]);
        check(&[twin, (gate_up, &[2, 8, 6]), (down, &[2, 6, 4])], None);
    }
}
