//! Codes of groups that are too short for a loop of their own.

use super::isa::prefetch;
use super::tile::Element;

/// Weights that are coded together. Groups are whole chunks.
pub(super) const CHUNK: usize = 32;

const PAIRS: usize = CHUNK / 2;

/// Weights that go through a step together: so few that they stay in the first-level cache, with the
/// row that is fetched meanwhile.
const BLOCK: usize = 16 * CHUNK;

/// The memory for finding a row's codes chunk by chunk, each with something of its group's.
#[derive(Debug)]
pub(super) struct Chunks<P> {
    /// Weights of a group.
    len: usize,
    /// Of each chunk, where a group has several.
    params: Vec<P>,
}

/// Something that starts with a line of the cache: the widest stores would span two, each.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Aligned<T>(T);

impl<P: Copy + Default> Chunks<P> {
    /// For groups of `len` weights, a multiple of `CHUNK`, in rows of `cols`.
    pub(super) fn new(len: usize, cols: usize) -> Self {
        let params = vec![P::default(); if len == CHUNK { 0 } else { cols / CHUNK }];
        Self { len, params }
    }

    /// Writes `code(weight, of_its_group)` for each weight of a row, and fetches the next one into the
    /// cache meanwhile: a row's extremes are found at the pace of memory, its codes are not.
    #[inline(always)]
    pub(super) fn encode<E: Element>(
        &mut self,
        Rows { row, next }: Rows<'_, E::Raw>,
        params: &[P],
        out: &mut [u8],
        code: impl Fn(f32, P) -> u8,
    ) {
        let params = if self.len == CHUNK {
            params
        } else {
            for (chunks, param) in self.params.chunks_exact_mut(self.len / CHUNK).zip(params) {
                chunks.fill(*param);
            }
            &self.params
        };
        // In lanes as wide as those that they are found in: those of a chunk would be narrowed one by one.
        // Here, where compilers know that it is nothing else's memory.
        let mut codes = Aligned([0; BLOCK]);
        let rows = row.chunks(BLOCK).zip(next.chunks(BLOCK)).zip(out.chunks_mut(BLOCK));
        for (((row, next), out), params) in rows.zip(params.chunks(BLOCK / CHUNK)) {
            if E::PER_LANE == 2 {
                let chunks = row.as_chunks::<CHUNK>().0;
                let pairs = codes.0.as_chunks_mut::<PAIRS>().0.iter_mut().zip(params);
                for (((pairs, param), next), chunk) in
                    pairs.zip(next.as_chunks::<CHUNK>().0).zip(chunks)
                {
                    prefetch(next);
                    for (out, &pair) in pairs.iter_mut().zip(chunk.as_chunks::<2>().0) {
                        let [first, second] = E::widen_pair(pair);
                        let (first, second) = (code(first, *param), code(second, *param));
                        *out = u32::from(first) | u32::from(second) << 8;
                    }
                }
                for (pair, out) in codes.0.iter().zip(out.as_chunks_mut::<2>().0) {
                    *out = (*pair as u16).to_le_bytes();
                }
            } else {
                let lanes = codes.0.as_chunks_mut::<CHUNK>().0.iter_mut().zip(params);
                let lanes = lanes.zip(next.as_chunks::<CHUNK>().0);
                for (((lanes, param), next), chunk) in lanes.zip(row.as_chunks::<CHUNK>().0) {
                    prefetch(next);
                    for (out, &raw) in lanes.iter_mut().zip(chunk) {
                        *out = code(E::widen(raw), *param).into();
                    }
                }
                for (code, out) in codes.0.iter().zip(out) {
                    *out = *code as u8;
                }
            }
        }
    }
}

/// A row of a tile, and the one after it; the row itself where there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a, R> {
    pub(super) row: &'a [R],
    pub(super) next: &'a [R],
}

impl<'a, R> Rows<'a, R> {
    /// Row `r` of a tile of rows of `cols`, `stride` from one another.
    #[inline(always)]
    pub(super) fn new(source: &'a [R], (cols, stride): (usize, usize), r: usize) -> Self {
        let row = &source[r * stride..][..cols];
        let next = source.get((r + 1) * stride..).and_then(|rest| rest.get(..cols));
        Self { row, next: next.unwrap_or(row) }
    }
}
