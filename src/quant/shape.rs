//! Which weights schemes take, and grids of whole rows or columns.

use crate::dtype::Dtype;

use super::grid::{Axis, Grid, PartBytes};
use super::tile::Reals;
use super::{Part, Role};

/// Whether schemes encode elements of that type.
pub(super) fn is_real(dtype: Dtype) -> Result<(), String> {
    match Reals::new(dtype, &[]) {
        Some(_) => Ok(()),
        None => Err(format!("element type {dtype:?} is not one of BF16, F16, F32")),
    }
}

/// Rows and columns of a matrix that has elements, of a type that schemes encode.
pub(super) fn matrix(dtype: Dtype, shape: &[u64]) -> Result<(u64, u64), String> {
    is_real(dtype)?;
    let &[rows, cols] = shape else {
        return Err(format!("shape {shape:?} is not a matrix"));
    };
    if rows == 0 || cols == 0 {
        return Err(format!("shape {shape:?} has no elements"));
    }
    Ok((rows, cols))
}

/// As [`matrix`], of rows that are whole groups of `size`.
pub(super) fn grouped(dtype: Dtype, shape: &[u64], size: u64) -> Result<(), String> {
    let (_, cols) = matrix(dtype, shape)?;
    if size == 0 {
        Err("group size 0".to_owned())
    } else if cols % size != 0 {
        Err(format!("group size {size} does not divide {cols} input features"))
    } else {
        Ok(())
    }
}

/// Bands of whole rows, in units of `unit` of them. `parts` are those of a matrix of the shape
/// given.
pub(super) fn bands(
    dtype: Dtype,
    shape: &[u64],
    unit: u64,
    parts: impl Fn(&[u64]) -> Vec<Part>,
    source_bytes: u64,
) -> Grid {
    let (rows, cols) = (shape[0], shape[1]);
    let bytes = |rows| parts(&[rows, cols]).into_iter().map(|part| part.bytes());
    let parts: Vec<_> =
        bytes(unit).zip(bytes(rows)).map(|(unit, slab)| PartBytes { unit, slab }).collect();
    let element = (dtype.bitsize() / 8) as u64;
    Grid::new((1, rows, cols), Axis::Rows, unit, &parts, element, source_bytes)
}

/// Stripes of columns across all rows, in units of `unit` columns, which divide them. `parts` are
/// those of a matrix of the shape given.
pub(super) fn stripes(
    dtype: Dtype,
    shape: &[u64],
    unit: u64,
    parts: impl Fn(&[u64]) -> Vec<Part>,
    source_bytes: u64,
) -> Grid {
    let (rows, cols) = (shape[0], shape[1]);
    let bytes = |cols| parts(&[rows, cols]).into_iter().map(|part| part.bytes());
    let parts: Vec<_> =
        bytes(unit).zip(bytes(cols)).map(|(unit, slab)| PartBytes { unit, slab }).collect();
    let element = (dtype.bitsize() / 8) as u64;
    let source_bytes = stripe_bytes(source_bytes);
    Grid::new((1, rows, cols), Axis::Cols, unit, &parts, element, source_bytes)
}

/// Bytes of source that a stripe may have where a band has `source_bytes`: the wider it is, the fewer of
/// them meet every row again.
pub(super) fn stripe_bytes(source_bytes: u64) -> u64 {
    const TIMES: u64 = 16;
    const ENOUGH: u64 = 8 << 20;
    source_bytes.saturating_mul(TIMES).min(source_bytes.max(ENOUGH))
}

/// A part of that shape.
pub(super) fn part<const N: usize>(role: Role, dtype: Dtype, shape: [u64; N]) -> Part {
    Part { role, dtype, shape: shape.into() }
}

/// Panics where `lens` are not the lengths of `parts`.
pub(super) fn assert_lengths(parts: &[Part], lens: impl ExactSizeIterator<Item = usize>) {
    assert_eq!(parts.len(), lens.len(), "number of parts");
    for (part, len) in parts.iter().zip(lens) {
        assert_eq!(part.bytes(), len as u64, "bytes of {:?}", part.role);
    }
}
