//! Matrices that a checkpoint stores in one tensor, each as a tensor of its own.

use std::ops::Range;
use std::sync::Arc;

use super::catalog::{Decoder, Extent, Tensor};
use super::decode::Coded;
use crate::dtype::Dtype;

/// The order of the dimensions of a tensor of several matrices, outermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[matrices, out, in]`.
    Rows,
    /// `[matrices, in, out]`: each matrix is transposed.
    Columns,
}

/// Some outputs of each of the matrices of a tensor.
#[derive(Clone, Debug)]
pub struct Matrices<'a> {
    tensor: &'a Tensor,
    outputs: Range<u64>,
    inputs: u64,
    decoder: Decoder,
    /// Bytes from one matrix to the next, to the first output within one, and of what holds them.
    pitch: u64,
    first: u64,
    len: u64,
}

impl<'a> Matrices<'a> {
    /// The outputs in the range given; `None` for a tensor that has no such, or whose elements are not
    /// floats of 16 or 32 bits that are stored as they are.
    pub fn new(tensor: &'a Tensor, order: Order, outputs: Range<u64>) -> Option<Self> {
        let &[_, rows, cols] = &*tensor.shape else { return None };
        let is_float = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        if !is_float || !tensor.is_plain() || tensor.elements() == 0 || outputs.is_empty() {
            return None;
        }
        let size = tensor.dtype.bitsize() as u64 / 8;
        let row = cols * size;
        let count = outputs.end - outputs.start;
        let (all, inputs, decoder, first, len) = match order {
            Order::Rows => (rows, cols, Decoder::Plain, outputs.start * row, count * row),
            Order::Columns => {
                let coded = Coded::columns((rows, count), size as u8, row);
                let len = (rows - 1) * row + count * size;
                (cols, rows, Decoder::Coded(Arc::new(coded)), outputs.start * size, len)
            }
        };
        let (is_within, pitch) = (outputs.end <= all, rows * row);
        is_within.then_some(Self { tensor, outputs, inputs, decoder, pitch, first, len })
    }

    /// One of the matrices, `[out, in]`, by a name of its own. There are as many as the tensor's
    /// first dimension says.
    pub fn tensor(&self, matrix: u64, name: String) -> Tensor {
        assert!(matrix < self.tensor.shape[0], "matrix {matrix} of {:?}", self.tensor.shape);
        let Extent { shard, start, .. } = self.tensor.operands[0];
        let start = start + matrix * self.pitch + self.first;
        Tensor {
            name,
            dtype: self.tensor.dtype,
            shape: vec![self.outputs.end - self.outputs.start, self.inputs],
            decoder: self.decoder.clone(),
            operands: vec![Extent { shard, start, len: self.len }],
        }
    }
}
