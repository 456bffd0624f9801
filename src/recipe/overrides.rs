//! Schemes for some modules: `--set PATTERN=BITS`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::str::FromStr;

use super::linear::{Kind, Reason};
use super::pattern::Patterns;
use super::{Request, is_expert, module_of, vocabulary};
use crate::error::Result;
use crate::quant::Granularity;
use crate::source::Catalog;

/// What some modules become instead of what the request says of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Their names: a glob, or a regex after `re:`.
    pub pattern: String,
    /// What they become.
    pub to: Setting,
}

/// What an [`Override`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// They are shown as they are.
    Keep,
    /// They are quantized to that many bits, in groups that are the request's where there are none.
    Bits(u8, Option<Granularity>),
}

impl FromStr for Override {
    type Err = String;

    /// Reads `PATTERN=BITS`, `PATTERN=BITS/GROUP`, `PATTERN=BITS/channel`, or `PATTERN=keep`, of which
    /// 16 bits are another spelling.
    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, to) = text.rsplit_once('=').ok_or("no `=`: write PATTERN=BITS")?;
        let to = match to.split_once('/') {
            None if matches!(to, "keep" | "16") => Setting::Keep,
            None => Setting::Bits(bits(to)?, None),
            Some((number, group)) => Setting::Bits(bits(number)?, Some(group.parse()?)),
        };
        Ok(Self { pattern: pattern.to_owned(), to })
    }
}

fn bits(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(bits @ 1..=16) => Ok(bits),
        _ => Err(format!("{text:?} is neither a number of bits nor `keep`")),
    }
}

impl Override {
    /// The request as it would be if all modules were set so; `None` where they are kept.
    pub fn applied(&self, request: &Request) -> Option<Request> {
        match self.to {
            Setting::Keep => None,
            Setting::Bits(bits, granularity) => Some(Request {
                bits: Some(bits),
                granularity: granularity.or(request.granularity),
                set: Vec::new(),
                ..request.clone()
            }),
        }
    }

    /// Whether it names the part of the model that keeps a module otherwise.
    pub(super) fn opts_in(&self, reason: Reason) -> bool {
        let words = self.pattern.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        reason.is_opt_in() && words.filter_map(vocabulary::part_named).any(|part| part == reason)
    }
}

/// Weights that loaders of a format read as one, beyond what is kept together everywhere: they
/// share one scheme.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// Those of a fused projection (q/k/v, gate/up), and all experts of the model.
    Projections,
    /// The same projection of all experts of a mixture.
    Stacks,
}

impl Joined {
    /// What a module is joined by.
    fn key(self, module: &str) -> Option<(&str, &str)> {
        match self {
            Self::Projections if is_expert(module) => Some(("", "experts")),
            Self::Projections => vocabulary::fused_group(module),
            Self::Stacks => stack_of(module),
        }
    }

    /// The experts that are kept or quantized together.
    pub(super) fn mixture(self, module: &str) -> Option<(&str, &str)> {
        let (mixture, projection) = stack_of(module)?;
        Some((mixture, if self == Self::Stacks { projection } else { "" }))
    }
}

/// The mixture of an expert that is stored on its own, and what of an expert the module is:
/// `model.layers.0.mlp.experts` and `gate_proj`.
pub fn stack_of(module: &str) -> Option<(&str, &str)> {
    let mut rest = module;
    while let Some(dot) = vocabulary::last_dot(rest) {
        let (above, component) = (&rest[..dot], &rest[dot + 1..]);
        let is_experts = above == "experts" || above.ends_with(".experts");
        if is_experts
            && component.bytes().all(|byte| byte.is_ascii_digit())
            && !component.is_empty()
        {
            return Some((above, module.get(rest.len() + 1..)?));
        }
        rest = above;
    }
    None
}

/// The tensor that holds what an expert's weight is a part of, where a checkpoint stores all experts
/// of a mixture in one, and the expert's number: `X.gate_up_proj` for `X.3.up_proj.weight`.
pub fn fused_name(weight: &str) -> Option<(String, u64)> {
    let module = weight.strip_suffix(".weight")?;
    let (mixture, projection) = stack_of(module)?;
    let expert = module[mixture.len() + 1..].strip_suffix(projection)?.strip_suffix('.')?;
    let leaf = match projection {
        "gate_proj" | "up_proj" => "gate_up_proj",
        "down_proj" => projection,
        _ => return None,
    };
    Some((format!("{mixture}.{leaf}"), expert.parse().ok()?))
}

/// The position in `request.set` of what each tensor is set to, if it is, none of none; and what the user should
/// know.
pub(super) fn choose(
    catalog: &Catalog,
    kinds: &[Kind],
    request: &Request,
    joined: Joined,
) -> Result<(Vec<Option<usize>>, Vec<String>)> {
    if request.set.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let texts: Vec<String> = request.set.iter().map(|set| set.pattern.clone()).collect();
    let patterns = Patterns::new("--set", &texts)?;
    let modules = || catalog.tensors().iter().map(|tensor| module_of(&tensor.name));
    let mut choices: Vec<Option<usize>> =
        modules().map(|module| patterns.find_last(module)).collect();
    let unused = patterns.unused(modules());
    let mut warnings: Vec<String> =
        unused.map(|pattern| format!("--set {pattern:?} matches no module")).collect();
    let is_scheme = |choice: &usize| request.set[*choice].to != Setting::Keep;
    let mut groups: HashMap<(&str, &str), Vec<usize>> = HashMap::new();
    for (id, tensor) in catalog.tensors().iter().enumerate() {
        let weight = tensor.name.strip_suffix(".weight").filter(|_| kinds[id].may_be_linear());
        if let Some(key) = weight.and_then(|module| joined.key(module)) {
            groups.entry(key).or_default().push(id);
        }
    }
    let mut widened: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for ids in groups.into_values() {
        let last = ids.iter().filter_map(|id| choices[*id].filter(is_scheme)).max();
        let Some(last) = last else { continue };
        for id in ids {
            let is_kept = choices[id].is_some_and(|choice| !is_scheme(&choice));
            if !is_kept && choices[id] != Some(last) {
                choices[id] = Some(last);
                let module = module_of(&catalog[id].name);
                widened
                    .entry(last)
                    .or_default()
                    .insert(module.rsplit('.').next().unwrap_or(module));
            }
        }
    }
    warnings.extend(widened.into_iter().map(|(choice, leaves)| {
        let leaves: Vec<&str> = leaves.into_iter().collect();
        let pattern = &request.set[choice].pattern;
        format!(
            "--set {pattern:?} takes in {} too: loaders read them as one weight",
            leaves.join(", ")
        )
    }));
    Ok((choices, warnings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_follows_the_last_equals_sign() {
        let set = |pattern: &str, to| Ok(Override { pattern: pattern.to_owned(), to });
        let cases = [
            ("*.down_proj=8", set("*.down_proj", Setting::Bits(8, None))),
            ("a=4/32", set("a", Setting::Bits(4, Some(Granularity::Group(32))))),
            ("a=8/channel", set("a", Setting::Bits(8, Some(Granularity::Channel)))),
            ("a=keep", set("a", Setting::Keep)),
            ("a=16", set("a", Setting::Keep)),
            (r"re:(?=a)b=3", set("re:(?=a)b", Setting::Bits(3, None))),
            ("a", Err("no `=`: write PATTERN=BITS".to_owned())),
            ("a=", Err("\"\" is neither a number of bits nor `keep`".to_owned())),
            ("a=four", Err("\"four\" is neither a number of bits nor `keep`".to_owned())),
            ("a=4/0", Err("neither a number of weights nor `channel`".to_owned())),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), expected, "{text}");
        }
    }

    #[test]
    fn a_tower_is_opted_in_by_its_name_alone() {
        let cases = [
            ("*vision_tower*=8", Reason::VisionTower, true),
            (r"re:model\.visual\.blocks=8", Reason::VisionTower, true),
            ("*.fc1=8", Reason::VisionTower, false),
            ("*=8", Reason::VisionTower, false),
            ("*vision_tower*=8", Reason::Projector, false),
            ("multi_modal_projector.*=8", Reason::Projector, true),
            ("*.gate=8", Reason::Router, false),
        ];
        for (text, reason, expected) in cases {
            let set: Override = text.parse().expect("valid");
            assert_eq!(set.opts_in(reason), expected, "{text} of a {reason}");
        }
    }

    #[test]
    fn an_expert_is_one_of_a_stack() {
        let cases = [
            (
                "model.layers.0.mlp.experts.3.gate_proj",
                Some(("model.layers.0.mlp.experts", "gate_proj")),
            ),
            ("experts.0.w1", Some(("experts", "w1"))),
            ("model.layers.0.mlp.shared_experts.gate_proj", None),
            ("model.layers.0.mlp.experts.gate_up_proj", None),
            ("model.layers.0.mlp.up_proj", None),
        ];
        for (module, expected) in cases {
            assert_eq!(stack_of(module), expected, "{module}");
        }
    }
}
