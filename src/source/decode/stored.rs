//! The tensors that a checkpoint stores, while dialects claim them.

use std::fmt::Display;
use std::sync::Arc;

use super::coded::Coded;
use crate::dtype::{Dtype, byte_len};
use crate::error::{self, Error, Result};
use crate::source::catalog::{Catalog, Decoder, Tensor, TensorId};

/// The stored tensors, and what has been made of them so far.
pub(super) struct Stored<'a> {
    catalog: &'a Catalog,
    /// What the config says the model's element type is.
    model_dtype: Option<Dtype>,
    read: &'a dyn Fn(&Tensor) -> Result<Vec<u8>>,
    fates: Vec<Fate>,
    /// How the last weights are stored, which others may be stored as too.
    known: Vec<Arc<Coded>>,
}

/// Kinds of weights that are remembered; a layer has few.
const KINDS: usize = 16;

/// What becomes of a stored tensor.
enum Fate {
    /// Nobody has claimed it: it is a logical tensor as it stands.
    Plain,
    /// It is an operand of another, or means nothing once decoded.
    Gone,
    /// It holds the codes of this.
    Codes(Box<Tensor>),
}

impl<'a> Stored<'a> {
    pub(super) fn new(
        catalog: &'a Catalog,
        model_dtype: Option<Dtype>,
        read: &'a dyn Fn(&Tensor) -> Result<Vec<u8>>,
    ) -> Self {
        let fates = catalog.tensors().iter().map(|_| Fate::Plain).collect();
        Self { catalog, model_dtype, read, fates, known: Vec::new() }
    }

    /// The element type of the model's weights, as far as its config says.
    pub(super) fn model_dtype(&self) -> Option<Dtype> {
        self.model_dtype
    }

    /// Every stored tensor whose name ends so, with what stands before.
    pub(super) fn ending(
        &self,
        ending: &'static str,
    ) -> impl Iterator<Item = (TensorId, &'a str)> + use<'a> {
        let tensors = self.catalog.tensors().iter().enumerate();
        tensors.filter_map(move |(id, tensor)| Some((id, tensor.name.strip_suffix(ending)?)))
    }

    /// The stored tensor of that name.
    pub(super) fn find(&self, name: impl Display) -> Option<TensorId> {
        self.catalog.find(&name.to_string())
    }

    /// The stored tensor of that name, which `whose` can't be decoded without.
    pub(super) fn require(&self, name: impl Display, whose: &str) -> Result<TensorId> {
        let name = name.to_string();
        self.catalog
            .find(&name)
            .ok_or_else(|| error::corrupt(format!("`{whose}`: without `{name}` it has no meaning")))
    }

    pub(super) fn tensor(&self, id: TensorId) -> &'a Tensor {
        &self.catalog.tensors()[id]
    }

    /// The bytes of small metadata.
    pub(super) fn read(&self, id: TensorId) -> Result<Vec<u8>> {
        (self.read)(self.tensor(id))
            .map_err(|e| e.within(format_args!("`{}`", self.tensor(id).name)))
    }

    /// Complains of a stored tensor: its type and shape, and what is wrong with them.
    pub(super) fn misfit(&self, id: TensorId, what: impl Display) -> Error {
        let Tensor { name, dtype, shape, .. } = self.tensor(id);
        error::corrupt(format!("`{name}`: {dtype} {shape:?} {what}"))
    }

    /// Makes a logical tensor of stored ones, the codes first.
    ///
    /// # Errors
    /// `Corrupt` where it has more bytes than can be counted.
    pub(super) fn claim(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: Vec<u64>,
        coded: Coded,
        operands: &[TensorId],
    ) -> Result<()> {
        if byte_len(dtype, &shape).is_none() {
            return Err(
                self.misfit(operands[0], format_args!("decodes to {shape:?}, which overflows"))
            );
        }
        for id in operands {
            self.fates[*id] = Fate::Gone;
        }
        self.fates[operands[0]] = Fate::Codes(Box::new(Tensor {
            name: name.to_owned(),
            dtype,
            shape,
            decoder: Decoder::Coded(self.shared(coded)),
            operands: operands.iter().map(|id| self.tensor(*id).operands[0]).collect(),
        }));
        Ok(())
    }

    fn shared(&mut self, coded: Coded) -> Arc<Coded> {
        if let Some(known) = self.known.iter().find(|known| ***known == coded) {
            return known.clone();
        }
        if self.known.len() == KINDS {
            self.known.remove(0);
        }
        let coded = Arc::new(coded);
        self.known.push(coded.clone());
        coded
    }

    /// Leaves a stored tensor out, which means nothing once decoded.
    pub(super) fn discard(&mut self, id: TensorId) {
        self.fates[id] = Fate::Gone;
    }

    /// The stored tensors that are logical ones as they stand.
    pub(super) fn unclaimed(&self) -> impl Iterator<Item = &'a Tensor> {
        let tensors = self.catalog.tensors().iter().zip(&self.fates);
        tensors.filter(|(_, fate)| matches!(fate, Fate::Plain)).map(|(tensor, _)| tensor)
    }

    /// Whether a stored tensor is a logical one as it stands.
    pub(super) fn is_unclaimed(&self, id: TensorId) -> bool {
        matches!(self.fates[id], Fate::Plain)
    }

    /// Whether nothing has been claimed.
    pub(super) fn is_untouched(&self) -> bool {
        self.fates.iter().all(|fate| matches!(fate, Fate::Plain))
    }

    /// The logical tensors, each in the place of its codes.
    pub(super) fn into_tensors(self) -> Vec<Tensor> {
        let tensors = self.catalog.tensors().iter().zip(self.fates);
        tensors
            .filter_map(|(tensor, fate)| match fate {
                Fate::Plain => Some(tensor.clone()),
                Fate::Gone => None,
                Fate::Codes(tensor) => Some(*tensor),
            })
            .collect()
    }
}
