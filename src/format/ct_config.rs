//! What compressed-tensors declares: `quantization_config` and its groups.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::Plan;
use crate::quant::Scheme;
use crate::recipe::{Decision, is_expert, module_of, names_in_loaders};
use crate::source::Catalog;
use crate::threads;

/// The loader finds the experts' group by the word in its pattern.
const EXPERTS: &str = r"re:(?:.*\.)?experts\.\d+\..*";

/// Declares a plan in `quantization_config`, as compressed-tensors 0.20 writes it, less its null fields: older readers
/// refuse fields that they don't know.
///
/// Of the weights that are quantized, most have the scheme `base`, which becomes the group of all
/// Linears. `group` says how a scheme is described, given what it is for.
pub(super) fn declare(
    plan: &mut Plan,
    catalog: &Catalog,
    base: Scheme,
    group: impl Fn(Scheme, String) -> Value,
) {
    let mut dense: Vec<(Scheme, Vec<&str>)> = Vec::new();
    let mut experts = None;
    let of_experts = threads::map_ranges(plan.weights.len(), |range| {
        let modules =
            plan.weights[range].iter().map(|weight| module_of(&catalog[weight.tensor].name));
        modules.map(is_expert).collect::<Vec<_>>()
    });
    for (weight, is_expert) in plan.weights.iter().zip(of_experts.into_iter().flatten()) {
        if is_expert {
            experts = Some(weight.scheme);
            continue;
        }
        let module = module_of(&catalog[weight.tensor].name);
        match dense.iter_mut().find(|(scheme, _)| *scheme == weight.scheme) {
            Some((_, modules)) => modules.push(module),
            None => dense.push((weight.scheme, vec![module])),
        }
    }
    // What a loader that knows one dense scheme takes for it comes first.
    dense.sort_by_key(|(scheme, modules)| (*scheme != base, std::cmp::Reverse(modules.len())));
    let base = dense.first().map_or(base, |(scheme, _)| *scheme);
    let mut groups = vec![group(base, "Linear".to_owned())];
    let takes_float8 =
        groups[0]["weights"]["type"] == "float" && groups[0]["weights"]["num_bits"] == 8;
    let keeps_experts = catalog.tensors().iter().enumerate().any(|(id, tensor)| {
        let is_linear = matches!(plan.assignment[id], Decision::Keep { linear: true, .. });
        is_linear && is_expert(module_of(&tensor.name))
    });
    match experts {
        Some(experts) if experts != base || dense.len() > 1 => {
            groups.push(group(experts, EXPERTS.to_owned()));
        }
        // Experts that have no scales are only let through where their group is of 8-bit floats.
        None if keeps_experts && !takes_float8 => {
            let weights = json!({
                "num_bits": 8,
                "type": "float",
                "symmetric": true,
                "strategy": "channel",
                "dynamic": false,
            });
            let format = groups[0]["format"].as_str().unwrap_or_default().to_owned();
            groups.push(self::group(&format, EXPERTS.to_owned(), weights, Value::Null));
        }
        _ => {}
    }
    if experts.is_some() && keeps_experts && !takes_float8 {
        plan.assignment.warn(
            "some experts are kept and some are not: transformers 5 can't load both".to_owned(),
        );
    }
    if dense.len() > 1 {
        plan.assignment.warn(
            "several schemes: load with transformers 5.23 without `dequantize=True`, which reads all \
             modules but experts with the first"
                .to_owned(),
        );
    }
    for (scheme, modules) in dense.iter().skip(1) {
        let others = dense.iter().filter(|(other, _)| other != scheme);
        let others: Vec<&str> = others.flat_map(|(_, modules)| modules).copied().collect();
        groups.push(group(*scheme, target(modules, &others)));
    }
    let first = &groups[0]["format"];
    let alike = groups.iter().all(|group| group["format"] == *first);
    let format = if alike { first.clone() } else { "mixed-precision".into() };
    let named = groups.into_iter().enumerate();
    let groups: Map<String, Value> =
        named.map(|(i, group)| (format!("group_{i}"), group)).collect();
    let value = json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plan.assignment.ignore(),
    });
    plan.declare("quantization_config", value);
}

/// One of `config_groups`.
pub(super) fn group(format: &str, target: String, weights: Value, activations: Value) -> Value {
    json!({
        "format": format,
        "targets": [target],
        "weights": weights,
        "input_activations": activations,
        "output_activations": null,
    })
}

/// A pattern for these modules, under every name that a loader may know them by, and for none of
/// the others.
///
/// Numbers are only spelled out where one of the others differs in nothing else.
fn target(modules: &[&str], others: &[&str]) -> String {
    let shapes: HashSet<String> = others.iter().map(|module| any_number(module)).collect();
    let others: HashSet<&str> = others.iter().copied().collect();
    let mut seen = HashSet::new();
    let mut paths = Vec::new();
    for module in modules {
        let mut names = names_in_loaders(module);
        names.retain(|name| !others.contains(name.as_str()));
        names.insert(0, (*module).to_owned());
        let exact = shapes.contains(&any_number(module));
        for name in names {
            let path = if exact { regex::escape(&name) } else { any_number(&name) };
            if seen.insert(path.clone()) {
                paths.push(path);
            }
        }
    }
    format!("re:(?:{})$", paths.join("|"))
}

/// A pattern for a module in any layer, and any expert.
fn any_number(module: &str) -> String {
    let component = |component: &str| match component.bytes().all(|byte| byte.is_ascii_digit()) {
        true => r"\d+".to_owned(),
        false => regex::escape(component),
    };
    module.split('.').map(component).collect::<Vec<_>>().join(r"\.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use regex::Regex;

    #[test]
    fn a_target_matches_its_modules_under_every_name_and_no_other() {
        #[track_caller]
        fn check(modules: &[&str], others: &[&str], also: &[&str], len: usize) {
            let target = target(modules, others);
            let pattern = target.strip_prefix("re:").expect("a pattern");
            let regex = Regex::new(&format!("^(?:{pattern})")).expect("it compiles");
            for module in modules.iter().chain(also) {
                assert!(regex.is_match(module), "{target} misses {module}");
            }
            for module in others {
                assert!(!regex.is_match(module), "{target} matches {module}");
            }
            assert!(target.len() < len, "{target} is long");
        }
        let down = ["model.layers.0.mlp.down_proj", "model.layers.11.mlp.down_proj"];
        check(
            &down,
            &["model.layers.0.mlp.up_proj", "model.layers.0.mlp.xdown_proj"],
            &["layers.0.mlp.down_proj", "model.language_model.layers.3.mlp.down_proj"],
            200,
        );
        check(&down[..1], &down[1..], &["layers.0.mlp.down_proj"], 200);
        check(
            &["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"],
            &["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"],
            &["model.layers.0.self_attn.qkv_proj"],
            600,
        );
        check(
            &["model.language_model.layers.0.mlp.up_proj"],
            &["model.language_model.layers.0.mlp.down_proj"],
            &["language_model.model.layers.0.mlp.gate_up_proj"],
            400,
        );
    }
}
