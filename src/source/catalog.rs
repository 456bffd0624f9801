//! Names, element types and shapes of a checkpoint's logical tensors; never their data.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use super::decode::Coded;
use crate::dtype::Dtype;
use crate::threads;

/// Position of a tensor in its [`Catalog`].
pub type TensorId = usize;

/// A range of bytes in one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Position of the shard in the checkpoint.
    pub shard: usize,
    /// Offset of the first byte, from the start of the shard file.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// How a logical tensor's values follow from what is stored.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Decoder {
    /// One operand: the elements themselves.
    Plain,
    /// Codes and what they are scaled by, or elements in another order; weights that are stored alike
    /// share it.
    Coded(Arc<Coded>),
}

/// One logical tensor: what it is, and the stored operands it is decoded from.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The name by which a loader would know it.
    pub name: String,
    /// Its element type once decoded.
    pub dtype: Dtype,
    /// Its shape once decoded, outermost dimension first.
    pub shape: Vec<u64>,
    /// How `operands` become its elements.
    pub decoder: Decoder,
    /// The stored byte ranges; the first one is where the tensor's place in its shard is.
    pub operands: Vec<Extent>,
}

impl Tensor {
    /// Whether it is stored as it is, not to be decoded first.
    pub fn is_plain(&self) -> bool {
        self.decoder == Decoder::Plain
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The shard that shows this tensor.
    pub fn shard(&self) -> usize {
        self.operands[0].shard
    }

    /// Bytes that the tensor takes in the source, all operands together.
    pub fn stored_len(&self) -> u64 {
        match &self.decoder {
            // Others lie in between.
            Decoder::Coded(coded) if coded.is_elements() => {
                self.elements() * self.dtype.bitsize() as u64 / 8
            }
            _ => self.operands.iter().map(|operand| operand.len).sum(),
        }
    }
}

/// Every logical tensor of a checkpoint, in source order: by shard, then by offset.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    tensors: Vec<Tensor>,
    /// The positions of the tensors, by name. Names come from strangers, so the hash is keyed.
    by_name: HashTable<u32>,
    hash: DefaultHashBuilder,
}

impl Catalog {
    /// A catalog of tensors in the order given.
    ///
    /// # Errors
    /// Two tensors of the same name.
    pub fn new(tensors: Vec<Tensor>) -> Result<Self, [Box<Tensor>; 2]> {
        let hash = DefaultHashBuilder::default();
        let hash_of = |tensor: &Tensor| hash.hash_one(tensor.name.as_str());
        let hashes: Vec<Vec<u64>> = threads::map_ranges(tensors.len(), |range| {
            tensors[range].iter().map(hash_of).collect()
        });
        let mut by_name = HashTable::with_capacity(tensors.len());
        for (id, hash) in hashes.into_iter().flatten().enumerate() {
            let same = |twin: &u32| tensors[*twin as usize].name == tensors[id].name;
            let rehash = |_: &u32| unreachable!("there is room for all");
            match by_name.entry(hash, same, rehash) {
                Entry::Occupied(twin) => {
                    let twins = [*twin.get() as usize, id];
                    return Err(twins.map(|id| Box::new(tensors[id].clone())));
                }
                Entry::Vacant(place) => {
                    place.insert(u32::try_from(id).expect("100 MB hold fewer than 2^32 names"));
                }
            }
        }
        Ok(Self { tensors, by_name, hash })
    }

    /// All tensors; a [`TensorId`] is a position in this slice.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        let same = |id: &u32| self.tensors[*id as usize].name == name;
        Some(*self.by_name.find(self.hash.hash_one(name), same)? as TensorId)
    }
}

impl std::ops::Index<TensorId> for Catalog {
    type Output = Tensor;

    fn index(&self, id: TensorId) -> &Tensor {
        &self.tensors[id]
    }
}
