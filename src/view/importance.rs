//! What the errors of a model's weights count for, as a file says.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::error::{self, Result};
use crate::format::{Plan, Weight};
use crate::quant::{Importance, Window};
use crate::recipe::{fused_name, llama_cpp_names, module_of};
use crate::source::{Catalog, ImportanceEntry, ImportanceFile, SourceFiles, Tensor};

/// Where a file says what the errors of each weight count for. The numbers stay in the file.
#[derive(Debug)]
pub(super) struct Importances {
    file: Arc<ImportanceFile>,
    /// Of each of the plan's weights, if the file has it.
    of_weights: Vec<Option<Features>>,
    /// Weights that what errors count for has a say in.
    pub(super) searched: usize,
    /// Those of them that the file has.
    pub(super) covered: usize,
    /// The first of those that it has not.
    missing: Option<String>,
    /// Of the names and numbers of those that it has.
    pub(super) digest: u64,
}

/// The input features of a weight, in a file.
#[derive(Clone, Copy, Debug)]
struct Features {
    entry: ImportanceEntry,
    /// Where they begin in the entry.
    first: u64,
    /// Whether each of stacked matrices has its own.
    stacked: bool,
}

impl Importances {
    /// Finds what `file` says of a plan's weights, and looks at every number.
    ///
    /// # Errors
    /// `Invalid` where it has another number of them than the weight has input features, or one that is
    /// negative or not finite; `Stale` or `Io` where it can't be read.
    pub(super) fn new(file: Arc<ImportanceFile>, catalog: &Catalog, plan: &Plan) -> Result<Self> {
        let files = SourceFiles::new(NonZeroUsize::MIN);
        let mut hash = DefaultHasher::new();
        let mut numbers = Vec::new();
        let (mut searched, mut covered, mut missing) = (0, 0, None);
        let mut of_weights = Vec::with_capacity(plan.weights.len());
        for weight in &plan.weights {
            let tensor = &catalog[weight.tensor];
            if !weight.scheme.is_searched() {
                of_weights.push(None);
                continue;
            }
            searched += 1;
            let features = Features::find(&file, weight, tensor)?;
            of_weights.push(features);
            let Some(features) = features else {
                missing.get_or_insert_with(|| tensor.name.clone());
                continue;
            };
            covered += 1;
            let inputs = weight.scheme.inputs(&tensor.shape);
            let len = if features.stacked { inputs * tensor.shape[0] } else { inputs };
            numbers.clear();
            file.read(&files, features.entry, features.first, len, &mut numbers)?;
            if let Some(odd) =
                numbers.iter().find(|number| !(number.is_finite() && **number >= 0.0))
            {
                return Err(error::invalid(format!(
                    "{}: an input feature of `{}` has the importance {odd}",
                    file.name(),
                    tensor.name
                )));
            }
            tensor.name.hash(&mut hash);
            numbers.iter().for_each(|number| hash.write_u32(number.to_bits()));
        }
        let digest = hash.finish();
        Ok(Self { file, of_weights, searched, covered, missing, digest })
    }

    /// What the user should know.
    pub(super) fn warning(&self) -> Option<String> {
        let Self { covered, searched, .. } = self;
        let missing = self.missing.as_ref().filter(|_| *covered > 0)?;
        Some(format!(
            "{} has the importance of {covered} of {searched} weights; one that it has not is \
             `{missing}`",
            self.file.name()
        ))
    }

    /// What the errors of a weight's chunk count for, given the window that it is encoded from.
    /// `numbers` lends the memory.
    ///
    /// # Errors
    /// `Stale` or `Io` where the file can't be read any more.
    pub(super) fn of_window<'a>(
        &self,
        files: &SourceFiles,
        (position, weight, tensor): (usize, &Weight, &Tensor),
        window: &Window,
        numbers: &'a mut Vec<f32>,
    ) -> Result<Option<Importance<'a>>> {
        let Some(Features { entry, mut first, stacked }) = self.of_weights[position] else {
            return Ok(None);
        };
        let inputs = weight.scheme.inputs(&tensor.shape);
        let (matrix, input) = weight.scheme.first_input(&tensor.shape, window);
        if stacked {
            first += matrix * inputs;
        }
        numbers.clear();
        self.file.read(files, entry, first, inputs, numbers)?;
        Ok(Importance::new(numbers).map(|importance| importance.starting_at(input as usize)))
    }
}

impl Features {
    /// What a file says of a weight: by its name, by its module's, by the name that llama.cpp has for it,
    /// or, of an expert, by that of the tensor that holds all experts. There it has a row for each, or one
    /// that they share.
    fn find(file: &ImportanceFile, weight: &Weight, tensor: &Tensor) -> Result<Option<Self>> {
        let inputs = weight.scheme.inputs(&tensor.shape);
        let own = [tensor.name.as_str(), module_of(&tensor.name)];
        let own = own.into_iter().map(|name| (name.to_owned(), None));
        let theirs = llama_cpp_names(&tensor.name).into_iter();
        let theirs = theirs.map(|theirs| (theirs.name, theirs.expert));
        let fused = fused_name(&tensor.name).map(|(name, expert)| (name, Some(expert)));
        let mut names = own.chain(theirs).chain(fused);
        let found = names.find_map(|(name, expert)| Some((file.find(&name)?, name, expert)));
        let Some((entry, name, expert)) = found else { return Ok(None) };
        let matrices = if tensor.shape.len() > 2 { tensor.shape[0] } else { 1 };
        let features = match expert {
            Some(_) if entry.len == inputs => Some(Self { entry, first: 0, stacked: false }),
            Some(expert) => {
                let first = expert.saturating_mul(inputs);
                let fits = entry.len.is_multiple_of(inputs) && first < entry.len;
                fits.then_some(Self { entry, first, stacked: false })
            }
            None if entry.len == inputs => Some(Self { entry, first: 0, stacked: false }),
            None if entry.len == inputs * matrices => Some(Self { entry, first: 0, stacked: true }),
            None => None,
        };
        if features.is_none() {
            return Err(error::invalid(format!(
                "{}: {} numbers of `{name}` are not for `{}`, which has {inputs} input features",
                file.name(),
                entry.len,
                tensor.name
            )));
        }
        Ok(features)
    }
}
