//! Kept modules, as transformers' own quantizers match them.

use super::Plan;
use crate::recipe::module_of;
use crate::source::Catalog;

/// Entries for a list of modules not to convert.
///
/// Upstream takes an entry for the end of a name, and for a regex at its start; older releases even
/// when the match stops amid a word. A name that would so catch a quantized module is anchored.
pub(super) fn modules(plan: &Plan, catalog: &Catalog) -> Vec<String> {
    let quantized: Vec<&str> =
        plan.weights.iter().map(|weight| module_of(&catalog[weight.tensor].name)).collect();
    let entry = |ignored: &String| match ignored.strip_prefix("re:") {
        Some(pattern) => pattern.to_owned(),
        None => {
            let caught = |module: &&str| module.starts_with(ignored) || module.ends_with(ignored);
            if quantized.iter().any(caught) {
                format!("{}$", ignored.replace('.', r"\."))
            } else {
                ignored.clone()
            }
        }
    };
    plan.assignment.ignore().iter().map(entry).collect()
}
