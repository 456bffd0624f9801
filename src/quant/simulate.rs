//! What a loader makes of a weight's codes, as plain numbers again.
//!
//! A weight is encoded and decoded a few rows, or a few blocks, at a time. The numbers carry the
//! whole error of the scheme, so any program can measure what it costs.

use crate::dtype::Dtype;

use super::cast::run_grid;
use super::grid::{Axis, Grid, PartBytes};
use super::isa::Isa;
use super::survey::Survey;
use super::tile::{Element, Real, Tile, for_element};
use super::{Part, Role, Scheme};

/// The smallest pieces of a weight that a scheme encodes as it would the whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unit {
    /// Bands of so many rows.
    Rows(u64),
    /// Runs of so many weights, which may cross rows.
    Run(u64),
}

/// Weights that are encoded and decoded at a time, more or less: they fit in the second-level cache.
const BATCH: usize = 1 << 14;

impl Scheme {
    /// The one part of a weight that is shown decoded, as elements of type `to`.
    pub fn decoded_part(&self, shape: &[u64], to: Real) -> Part {
        Part { role: Role::Reals, dtype: to.dtype(), shape: shape.to_vec() }
    }

    /// How an accepted weight is cut that is shown decoded, as elements of type `to`.
    pub fn decoded_grid(&self, dtype: Dtype, shape: &[u64], to: Real, source_bytes: u64) -> Grid {
        match self.unit(shape) {
            Unit::Run(unit) => run_grid(dtype, to.dtype(), shape, unit, source_bytes),
            Unit::Rows(unit) => {
                let [above @ .., rows, cols] = shape else {
                    unreachable!("`accepts` refuses what has no rows")
                };
                let [from, to] = [dtype, to.dtype()].map(|dtype| dtype.bitsize() as u64 / 8);
                let part = PartBytes { unit: unit * cols * to, slab: rows * cols * to };
                let view = (above.iter().product(), *rows, *cols);
                Grid::new(view, Axis::Rows, unit, &[part], from, source_bytes)
            }
        }
    }

    /// Encodes the window of one chunk of that grid, decodes it as a loader of the tile's element
    /// type does, and stores the numbers as elements of type `to`.
    ///
    /// # Panics
    ///
    /// If the tile or the output has another size than the chunk's.
    pub fn encode_decoded(
        &self,
        isa: Isa,
        tile: &Tile<'_>,
        survey: &Survey,
        to: Real,
        out: &mut [u8],
    ) {
        let none = Survey::default();
        let survey = if self.is_surveyed_by_row() { &none } else { survey };
        let dtype = tile.data.dtype();
        let element = dtype.bitsize() / 8;
        let (rows, cols) = match self.unit(&[tile.rows as u64, tile.cols as u64]) {
            Unit::Run(unit) => (1, (BATCH / unit as usize).max(1) * unit as usize),
            Unit::Rows(unit) => {
                ((BATCH / (unit as usize * tile.cols)).max(1) * unit as usize, tile.cols)
            }
        };
        let size = to.dtype().bitsize() / 8;
        assert_eq!(out.len(), tile.rows * tile.cols * size, "bytes of numbers");
        let scalar = self.scalar(dtype).map(|_| self.scalar_bytes(dtype, survey));
        let mut parts = Vec::new();
        let mut values = Vec::new();
        for first_row in (0..tile.rows).step_by(rows) {
            for first_col in (0..tile.cols).step_by(cols) {
                let at = first_row * tile.stride + first_col;
                // Experts have their input features one below the other.
                let skipped = match self {
                    Self::Experts(_) => first_row,
                    _ => first_col,
                };
                let piece = Tile {
                    data: tile.data.skip(at * element),
                    rows: rows.min(tile.rows - first_row),
                    cols: cols.min(tile.cols - first_col),
                    stride: tile.stride,
                    importance: tile.importance.map(|importance| importance.skip(skipped)),
                };
                let shape = [piece.rows as u64, piece.cols as u64];
                parts.resize_with(self.parts(dtype, &shape).len(), Vec::new);
                for (bytes, part) in parts.iter_mut().zip(self.parts(dtype, &shape)) {
                    bytes.resize(part.bytes() as usize, 0);
                }
                let mut encoded: Vec<&mut [u8]> = parts.iter_mut().map(|p| &mut p[..]).collect();
                self.encode(isa, &piece, survey, &mut encoded);
                values.resize(piece.rows * piece.cols, 0.0);
                let encoded: Vec<&[u8]> =
                    parts.iter().chain(&scalar).map(|part| &part[..]).collect();
                self.decode(dtype, (piece.rows, piece.cols), &encoded, &mut values);
                // A piece is whole rows or part of the only one.
                let start = (first_row * tile.cols + first_col) * size;
                for_element!(to.dtype(), T => {
                    let out = out[start..].chunks_exact_mut(T::SIZE);
                    for (out, &value) in out.zip(&values) {
                        T::store(T::round(value), out);
                    }
                });
            }
        }
    }

    /// What is encoded at a time, of a weight of that shape.
    fn unit(&self, shape: &[u64]) -> Unit {
        match self {
            Self::Int(scheme) => Unit::Rows(scheme.rows_of_unit()),
            Self::Affine(_) | Self::Micro(_) | Self::LlmInt8(_) | Self::Transposed(_) => {
                Unit::Rows(1)
            }
            Self::Experts(_) => Unit::Rows(32),
            Self::Fp8(scheme) => Unit::Rows(scheme.block(shape[shape.len() - 1]).0),
            Self::Codebook(scheme) => Unit::Run(scheme.unit()),
            Self::Cast(_) => Unit::Run(64),
        }
    }
}
