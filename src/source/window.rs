//! Parts of a tensor as a matrix of any width, in what is stored.

use std::ops::Range;

use super::decode::{Coded, Rect};

/// A rectangle of a tensor viewed as a row-major matrix of a given width, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Columns of the matrix.
    pub width: u64,
    /// The first row.
    pub first_row: u64,
    /// Number of rows.
    pub rows: u64,
    /// The first column.
    pub first_col: u64,
    /// Number of columns.
    pub cols: u64,
}

/// A rectangle of stored codes, and where its elements go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) rect: Rect,
    /// The element of the window that the first one becomes, and how many lie between the starts of
    /// two of its logical rows.
    pub(super) at: u64,
    pub(super) stride: u64,
}

impl Window {
    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.rows * self.cols
    }

    /// What of the codes the window takes, with the window's rows next to one another.
    pub(super) fn places(&self, coded: &Coded) -> Vec<Placed> {
        let Self { width, first_row, rows, first_col, cols } = *self;
        let mut places = Vec::new();
        if self.elements() == 0 {
            return places;
        }
        if width == coded.width() {
            let rect = (first_row..first_row + rows, first_col..first_col + cols);
            place(coded, rect, 0, cols, &mut places);
        } else if cols == width {
            run(coded, first_row * width..(first_row + rows) * width, 0, &mut places);
        } else {
            for row in 0..rows {
                let start = (first_row + row) * width + first_col;
                run(coded, start..start + cols, row * cols, &mut places);
            }
        }
        places
    }
}

/// A flat run of elements as rectangles: what is left of a row, whole rows, and the start of one.
fn run(coded: &Coded, elements: Range<u64>, at: u64, places: &mut Vec<Placed>) {
    let width = coded.width();
    let mut start = elements.start;
    while start < elements.end {
        let (row, col) = (start / width, start % width);
        let whole = (elements.end - start) / width;
        let rect = if col == 0 && whole > 0 {
            (row..row + whole, 0..width)
        } else {
            (row..row + 1, col..width.min(col + elements.end - start))
        };
        let len = (rect.0.end - rect.0.start) * (rect.1.end - rect.1.start);
        place(coded, rect, at + start - elements.start, width, places);
        start += len;
    }
}

/// A rectangle of the logical matrix, by rows and columns, as rectangles of codes.
fn place(
    coded: &Coded,
    (rows, cols): (Range<u64>, Range<u64>),
    at: u64,
    stride: u64,
    places: &mut Vec<Placed>,
) {
    let Some((height, width)) = coded.transposed() else {
        places.push(Placed { rect: Rect { rows, cols }, at, stride });
        return;
    };
    let mut row = rows.start;
    while row < rows.end {
        let slab = row / height;
        let end = rows.end.min((slab + 1) * height);
        let rect = Rect {
            rows: slab * width + cols.start..slab * width + cols.end,
            cols: row - slab * height..end - slab * height,
        };
        places.push(Placed { rect, at: at + (row - rows.start) * stride, stride });
        row = end;
    }
}
