//! Elements of one floating-point type as those of another.
//!
//! Every element is rounded to nearest, ties to even; what is too large for F16 becomes an infinity,
//! and any NaN the canonical one. Elements that have the type already stay as they are, to the bit.
//!
//! This is what shows a checkpoint in another type, and one that arrives quantized as plain numbers.

use std::marker::PhantomData;

use crate::dtype::Dtype;

use super::grid::{Axis, Grid, PartBytes};
use super::isa::{Isa, Kernel};
use super::shape::is_real;
use super::tile::{Element, Real, Tile, for_element};
use super::{Part, Role};

/// Elements of the floating-point type given.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CastScheme {
    /// The type.
    pub to: Real,
}

impl CastScheme {
    /// Takes tensors of any rank that have elements.
    pub(super) fn accepts(self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        is_real(dtype)?;
        if shape.contains(&0) { Err(format!("shape {shape:?} has no elements")) } else { Ok(()) }
    }

    pub(super) fn parts(self, shape: &[u64]) -> Vec<Part> {
        vec![Part { role: Role::Reals, dtype: self.to.dtype(), shape: shape.to_vec() }]
    }

    pub(super) fn grid(self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        run_grid(dtype, self.to.dtype(), shape, 64, source_bytes)
    }

    pub(super) fn encode(self, isa: Isa, tile: &Tile<'_>, out: &mut [&mut [u8]]) {
        let [out] = out else { unreachable!("one part") };
        for_element!(tile.data.dtype(), E => for_element!(self.to.dtype(), T => {
            let rows = out.chunks_exact_mut(tile.cols * T::SIZE);
            for (out, row) in rows.zip(tile.data.bytes().chunks(tile.stride * E::SIZE)) {
                let row = &row[..tile.cols * E::SIZE];
                if tile.data.dtype() == self.to.dtype() {
                    out.copy_from_slice(row);
                } else {
                    isa.run(Cast::<E, T> { row: E::split(row), out, to: PhantomData });
                }
            }
        }));
    }

    pub(super) fn decode(self, dtype: Dtype, parts: &[&[u8]], out: &mut [f32]) {
        for_element!(self.to.dtype(), T => for_element!(dtype, E => {
            for (out, &raw) in out.iter_mut().zip(T::split(parts[0])) {
                *out = E::round(T::widen(raw));
            }
        }));
    }
}

/// A grid over the flattened tensor of chunks of `unit` elements or more, whose one part is elements
/// of type `to`.
pub(super) fn run_grid(
    dtype: Dtype,
    to: Dtype,
    shape: &[u64],
    unit: u64,
    source_bytes: u64,
) -> Grid {
    let elements: u64 = shape.iter().product();
    let [from, to] = [dtype, to].map(|dtype| dtype.bitsize() as u64 / 8);
    let part = PartBytes { unit: unit * to, slab: elements * to };
    Grid::new((1, 1, elements), Axis::Cols, unit, &[part], from, source_bytes)
}

/// The cast of one row.
struct Cast<'a, E: Element, T: Element> {
    row: &'a [E::Raw],
    out: &'a mut [u8],
    to: PhantomData<T>,
}

impl<E: Element, T: Element> Kernel for Cast<'_, E, T> {
    #[inline(always)]
    fn run(self) {
        let Self { mut row, mut out, .. } = self;
        if E::PER_LANE == 2 && T::PER_LANE == 2 {
            let (pairs, last) = row.as_chunks::<2>();
            let (outs, rest) = out.as_chunks_mut::<4>();
            for (out, &pair) in outs.iter_mut().zip(pairs) {
                let [first, second] = E::widen_pair(pair);
                *out = (T::narrow(first) | T::narrow(second) << 16).to_le_bytes();
            }
            (row, out) = (last, rest);
        }
        for (out, &raw) in out.chunks_exact_mut(T::SIZE).zip(row) {
            out.copy_from_slice(&T::narrow(E::widen(raw)).to_le_bytes()[..T::SIZE]);
        }
    }
}
