//! How a weight is cut into chunks, and the bytes that each makes.

use std::ops::Range;

/// The axis of a weight's 2-D view along which chunks follow one another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Axis {
    /// A chunk is a band of whole rows.
    Rows,
    /// A chunk is a stripe of columns, across all rows of a slab.
    Cols,
}

/// The rectangle of a weight's 2-D view that a chunk is encoded from, in elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// The first row.
    pub first_row: u64,
    /// Number of rows.
    pub rows: u64,
    /// The first column.
    pub first_col: u64,
    /// Number of columns.
    pub cols: u64,
}

/// The work split of one weight: chunks of a source rectangle each, which together tile the weight,
/// and in each part contiguous byte ranges, some of them empty, which together tile the part.
///
/// The weight is viewed as `slabs` equal matrices below one another, `slabs * rows` x `cols` (a
/// matrix is one slab, `[E, in, out]` experts are `E`, a flat run of blocks is one row). Each slab
/// is cut along one axis into *units*, the smallest pieces whose bytes are contiguous and whole in
/// every part; the last unit of a slab may be partial. A chunk is one or more units of one slab.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Grid {
    slabs: u64,
    rows: u64,
    cols: u64,
    axis: Axis,
    /// Rows or columns of a chunk, a multiple of those of a unit.
    step: u64,
    parts: Vec<Spread>,
}

/// How one part spreads over the chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Spread {
    /// Bytes that a whole chunk makes.
    chunk: u64,
    /// Bytes that a slab makes.
    slab: u64,
}

/// What [`Grid::new`] needs to know of one part, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartBytes {
    /// Made by a whole unit.
    pub unit: u64,
    /// Made by a slab. At most `unit` times its units, and more than `unit` times its whole units if
    /// there is a partial one; or `unit`, where the first unit makes all of it.
    pub slab: u64,
}

impl Grid {
    /// Cuts `slabs` matrices of `rows` x `cols` into chunks along `axis`.
    ///
    /// A unit has `unit` rows or columns. A chunk has as many units as fit in `source_bytes` at
    /// `element_bytes` each, at least one. No argument but `parts` may be zero or empty.
    pub fn new(
        (slabs, rows, cols): (u64, u64, u64),
        axis: Axis,
        unit: u64,
        parts: &[PartBytes],
        element_bytes: u64,
        source_bytes: u64,
    ) -> Self {
        let across = match axis {
            Axis::Rows => cols,
            Axis::Cols => rows,
        };
        let units = (source_bytes / (unit * across * element_bytes)).max(1);
        let parts =
            parts.iter().map(|p| Spread { chunk: p.unit.saturating_mul(units), slab: p.slab });
        Self { slabs, rows, cols, axis, step: unit.saturating_mul(units), parts: parts.collect() }
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.slabs * self.chunks_of_slab()
    }

    /// Rows and columns of the weight's 2-D view.
    pub fn view(&self) -> (u64, u64) {
        (self.slabs * self.rows, self.cols)
    }

    /// The source of chunk `k`.
    pub fn window(&self, k: u64) -> Window {
        self.window_of(k..k + 1)
    }

    /// The source of some chunks of one slab, which follow one another.
    ///
    /// # Panics
    /// If there are none, or they are not of one slab.
    pub fn window_of(&self, chunks: Range<u64>) -> Window {
        assert!(!chunks.is_empty() && chunks.end <= self.slab_end(chunks.start), "{chunks:?}");
        let (slab, place) = self.locate(chunks.start);
        let first = place * self.step;
        let step = self.step.saturating_mul(chunks.end - chunks.start);
        let slab_row = slab * self.rows;
        match self.axis {
            Axis::Rows => Window {
                first_row: slab_row + first,
                rows: step.min(self.rows - first),
                first_col: 0,
                cols: self.cols,
            },
            Axis::Cols => Window {
                first_row: slab_row,
                rows: self.rows,
                first_col: first,
                cols: step.min(self.cols - first),
            },
        }
    }

    /// The first chunk that is not of the slab of chunk `k`.
    pub fn slab_end(&self, k: u64) -> u64 {
        k - self.locate(k).1 + self.chunks_of_slab()
    }

    /// The bytes of part `part` that chunk `k` makes; none where the first of its slab makes all.
    pub fn range(&self, part: usize, k: u64) -> Range<u64> {
        let (slab, place) = self.locate(k);
        let Spread { chunk, slab: slab_bytes } = self.parts[part];
        let base = slab * slab_bytes;
        let is_last = place + 1 == self.chunks_of_slab();
        let end = if is_last { slab_bytes } else { slab_bytes.min((place + 1) * chunk) };
        base + end.min(place * chunk)..base + end
    }

    /// The chunk that makes byte `offset` of part `part`. The offset lies in the part.
    pub fn chunk_at(&self, part: usize, offset: u64) -> u64 {
        let Spread { chunk, slab } = self.parts[part];
        assert!(offset < slab * self.slabs, "byte {offset} lies beyond the part");
        (offset / slab) * self.chunks_of_slab() + (offset % slab) / chunk
    }

    fn chunks_of_slab(&self) -> u64 {
        match self.axis {
            Axis::Rows => self.rows.div_ceil(self.step),
            Axis::Cols => self.cols.div_ceil(self.step),
        }
    }

    /// Slab of chunk `k`, and its place there.
    fn locate(&self, k: u64) -> (u64, u64) {
        assert!(k < self.chunks(), "chunk {k} of {}", self.chunks());
        (k / self.chunks_of_slab(), k % self.chunks_of_slab())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte of every part is made by one chunk, every element read by one.
    #[track_caller]
    fn check(shape: (u64, u64, u64), axis: Axis, unit: u64, parts: &[PartBytes]) {
        for source_bytes in [0, 1, 64, 1000, 4096, 1 << 20, u64::MAX] {
            let grid = Grid::new(shape, axis, unit, parts, 2, source_bytes);
            let (rows, cols) = grid.view();
            let mut seen = vec![false; (rows * cols) as usize];
            for k in 0..grid.chunks() {
                let w = grid.window(k);
                assert!(
                    w.rows * w.cols * 2 <= source_bytes || w.rows.min(w.cols) <= unit.max(shape.1)
                );
                for r in w.first_row..w.first_row + w.rows {
                    for c in w.first_col..w.first_col + w.cols {
                        let i = (r * cols + c) as usize;
                        assert!(!seen[i], "{grid:?}: ({r}, {c}) twice");
                        seen[i] = true;
                    }
                }
            }
            assert!(seen.iter().all(|&s| s), "{grid:?}");
            for (p, bytes) in parts.iter().enumerate() {
                let mut end = 0;
                for k in 0..grid.chunks() {
                    let range = grid.range(p, k);
                    assert_eq!(range.start, end, "{grid:?}");
                    assert!(range.start < range.end || bytes.unit == bytes.slab, "{grid:?}");
                    assert!(range.clone().all(|o| grid.chunk_at(p, o) == k), "{grid:?}");
                    end = range.end;
                }
                assert_eq!(end, bytes.slab * shape.0, "{grid:?}");
            }
        }
    }

    #[test]
    fn chunks_tile_the_weight_and_every_part() {
        let part = |unit, slab| PartBytes { unit, slab };
        // Rows of codes and scales.
        check((1, 7, 24), Axis::Rows, 1, &[part(12, 84), part(6, 42)]);
        // Zero points of three bits, 32 rows to three words, 70 rows to seven.
        check((1, 70, 8), Axis::Rows, 32, &[part(4 * 32, 4 * 70), part(12, 28)]);
        // Blocks of 64 over a flat run of 200, two codes to a byte.
        check((1, 1, 200), Axis::Cols, 64, &[part(32, 100), part(4, 16)]);
        // Column stripes of 32 inputs, packed down 16 outputs.
        check((1, 16, 96), Axis::Cols, 32, &[part(4 * 4 * 16, 3 * 256), part(32, 96)]);
        // As before, with scales that the first stripe makes for all.
        check((1, 16, 96), Axis::Cols, 32, &[part(4 * 4 * 16, 3 * 256), part(32, 32)]);
        // Five experts of [8, 12], stripes of 4 outputs.
        check((5, 8, 12), Axis::Cols, 4, &[part(16, 48), part(4, 12)]);
        check((5, 9, 4), Axis::Rows, 2, &[part(4, 18)]);
    }

    #[test]
    fn a_unit_larger_than_the_target_is_one_chunk() {
        let parts = [PartBytes { unit: 500, slab: 5000 }];
        let grid = Grid::new((1, 10, 1000), Axis::Rows, 1, &parts, 2, 100);
        assert_eq!(grid.chunks(), 10);
        assert_eq!(grid.window(9), Window { first_row: 9, rows: 1, first_col: 0, cols: 1000 });
    }

    #[test]
    #[should_panic(expected = "beyond the part")]
    fn a_byte_beyond_the_part_has_no_chunk() {
        let parts = [PartBytes { unit: 5, slab: 50 }];
        Grid::new((1, 10, 10), Axis::Rows, 1, &parts, 2, 100).chunk_at(0, 50);
    }
}
