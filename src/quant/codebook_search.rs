//! Scales chosen by error search, for codebooks.
//!
//! Entries `v` of a block `x` fit best with the scale `sum(x v) / sum(v v)`, which lowers the squared
//! error of no scale at all by `sum(x v)^2 / sum(v v)`. So those sums tell the least error of *all*
//! scales with a candidate's entries, and a few candidates are as good as many. A candidate is a part
//! of the block's largest magnitude; what it makes of a weight depends on the weight's part of that
//! alone, so a table tells it for all candidates at once, of 255 such parts.
//!
//! That only nominates: the scale that fits the nominee's entries is measured beside the largest
//! magnitude, which only a smaller error replaces.

use super::codebook::{Codebook, Staircase};
use super::int::MODERATE;
use super::lanes::{LANES, ROUNDING, sum};
use super::tile::Element;

/// Parts of the largest magnitude that are tried as the scale.
const SHRINKS: [f32; CANDIDATES] = [0.70, 0.76, 0.82, 0.87, 0.92, 0.96, 1.0, 1.04];

const CANDIDATES: usize = 8;

/// Parts of the largest magnitude that candidates are nominated by: 127 of either sign around zero,
/// and one that stands for none.
const PARTS: usize = 256;

/// The sums of `x v` for each candidate, and then of `v v`, in units of the largest magnitude.
type Moments = [f32; 2 * CANDIDATES];

/// What a weight of each part adds to the sums.
const fn table(codebook: Codebook) -> [Moments; PARTS] {
    let staircase = codebook.staircase();
    let mut table = [[0.0; 2 * CANDIDATES]; PARTS];
    let mut part = 0;
    while part < PARTS - 1 {
        let x = (part as f32 - 127.0) / 127.0;
        let mut k = 0;
        while k < CANDIDATES {
            let v = staircase.entry(x / SHRINKS[k]);
            table[part][k] = x * v;
            table[part][CANDIDATES + k] = v * v;
            k += 1;
        }
        part += 1;
    }
    table
}

static NF4: [Moments; PARTS] = table(Codebook::Nf4);
static FP4: [Moments; PARTS] = table(Codebook::Fp4);

/// The search for the scales of blocks, with its memory.
#[derive(Debug)]
pub(super) struct Search {
    staircase: Staircase,
    table: &'static [Moments; PARTS],
    /// Weights of a block.
    len: usize,
    /// The part of its block's largest magnitude of each weight.
    parts: Vec<u8>,
    /// Of each block.
    moments: Vec<Moments>,
    /// A block in units of a power of two near its largest magnitude, padded with zeros.
    block: Vec<[f32; LANES]>,
}

impl Search {
    /// For runs of at most so many blocks of `len` weights.
    pub(super) fn new(codebook: Codebook, len: usize, blocks: usize) -> Self {
        let table = match codebook {
            Codebook::Nf4 => &NF4,
            Codebook::Fp4 => &FP4,
        };
        Self {
            staircase: codebook.staircase(),
            table,
            len,
            parts: vec![0; len],
            moments: vec![[0.0; 2 * CANDIDATES]; blocks],
            block: vec![[0.0; LANES]; len.div_ceil(LANES)],
        }
    }

    /// Replaces the largest magnitudes of the blocks of a run by the best scales found.
    #[inline(always)]
    pub(super) fn scales<E: Element>(&mut self, run: &[E::Raw], scales: &mut [f32]) {
        for ((xs, magnitude), stored) in run.chunks(self.len).zip(&*scales).zip(&mut self.moments) {
            let per_part = if MODERATE.contains(magnitude) { 127.0 / magnitude } else { 0.0 };
            let parts = &mut self.parts[..xs.len()];
            for (part, &raw) in parts.iter_mut().zip(xs) {
                // The sum has a spacing of 1.
                *part = (E::widen(raw) * per_part + (ROUNDING + 127.0)).to_bits() as u8;
            }
            // Halves that don't wait for one another.
            let (mut even, mut odd) = ([0.0; 2 * CANDIDATES], [0.0; 2 * CANDIDATES]);
            for [a, b] in parts.as_chunks::<2>().0 {
                let (a, b) = (&self.table[usize::from(*a)], &self.table[usize::from(*b)]);
                for i in 0..2 * CANDIDATES {
                    even[i] += a[i];
                    odd[i] += b[i];
                }
            }
            for i in 0..2 * CANDIDATES {
                stored[i] = even[i] + odd[i];
            }
        }
        for ((xs, scale), b) in run.chunks(self.len).zip(scales).zip(0..) {
            *scale = self.scale::<E>(xs, *scale, b);
        }
    }

    /// The best scale found for a block of that largest magnitude, number `b` of the run.
    #[inline(always)]
    fn scale<E: Element>(&mut self, xs: &[E::Raw], magnitude: f32, b: usize) -> f32 {
        let Some(unit) = self.load::<E>(xs, magnitude) else { return magnitude };
        let largest = magnitude * (1.0 / unit);
        let mut best = (1.0, 0.0);
        for k in 0..CANDIDATES {
            let (xv, vv) = (self.moments[b][k], self.moments[b][CANDIDATES + k]);
            let gain = xv * xv / vv;
            best = if gain > best.1 { (xv / vv, gain) } else { best };
        }
        let scale = largest * best.0;
        if self.error(scale) < self.error(largest) { scale * unit } else { magnitude }
    }

    /// Takes in a block of that largest magnitude, if that is a moderate one, and returns the unit.
    #[inline(always)]
    fn load<E: Element>(&mut self, xs: &[E::Raw], magnitude: f32) -> Option<f32> {
        if !MODERATE.contains(&magnitude) {
            return None;
        }
        let exponent = magnitude.to_bits() >> 23;
        let (unit, per_unit) =
            (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        let flat = self.block.as_flattened_mut();
        flat[xs.len()..].fill(0.0);
        for (x, &raw) in flat.iter_mut().zip(xs) {
            *x = E::widen(raw) * per_unit;
        }
        Some(unit)
    }

    /// The squared error over the block.
    #[inline(always)]
    fn error(&self, scale: f32) -> f32 {
        let reciprocal = 1.0 / scale;
        let mut sums = [0.0; LANES];
        for xs in &self.block {
            for i in 0..LANES {
                let error = xs[i] - self.staircase.entry(xs[i] * reciprocal) * scale;
                sums[i] += error * error;
            }
        }
        sum(sums)
    }
}
