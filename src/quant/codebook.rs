//! bitsandbytes' 4 bits: an entry of a table, and the largest magnitude of a block.
//!
//! Blocks run over the flattened weight and may cross rows. With `m` the largest magnitude of a
//! block, all in f32:
//!
//! ```text
//! y = clamp(x * (1 / max(m, 1e-38)), -1, 1)
//! q = the entry after the last midpoint of two neighbouring entries that is less than y
//! ```
//!
//! so that a midpoint itself belongs to the lower entry; a weight is `table[q] * m`. A NaN has the
//! code 0, in a block whose scale is NaN or infinity.
//!
//! Scales may be quantized in turn; then one that is no number makes all of the weight NaN.
//!
//! The search replaces `m` by the scale with the least squared error among some shrunken ones. Where
//! scales are quantized, it then picks the best of three neighbouring codes, and encodes with the
//! scale that a loader will have.

use crate::dtype::Dtype;

use super::codebook_search::Search;
use super::grid::{Axis, Grid, PartBytes};
use super::isa::{Isa, Kernel};
use super::nested::{self, SCALES};
use super::shape::{matrix, part};
use super::survey::Survey;
use super::tile::{Element, F32, Tile, for_element};
use super::{Part, Quality, Role};

/// A table of 16 numbers from -1 to 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Codebook {
    /// The quantiles of a normal distribution.
    Nf4,
    /// A float of 4 bits: 0, 1/192 and 1/6 to 1.
    Fp4,
}

/// The element type that pairs of codes are declared as. Never changes a byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Storage {
    /// A pair to each.
    U8,
    /// Two pairs.
    Bf16,
    /// Two pairs.
    F16,
    /// Four pairs.
    F32,
}

impl Storage {
    /// The element type.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::U8 => Dtype::U8,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }
}

/// Entries of a table with a scale per block of the flattened weight.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CodebookScheme {
    /// The table.
    pub codebook: Codebook,
    /// Weights that share a scale, a multiple of 4.
    pub block_size: u32,
    /// What codes are declared as.
    pub storage: Storage,
    /// Whether scales are quantized in turn.
    pub double: bool,
    /// How scales are chosen.
    pub quality: Quality,
}

impl Codebook {
    /// The table, in the order of codes.
    pub fn table(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => FP4,
        }
    }

    /// The codes by rising entries; equal ones in the order of codes.
    const fn order(self) -> [u8; 16] {
        match self {
            Self::Nf4 => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
            Self::Fp4 => [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
        }
    }

    /// What the search for the nearest entry needs.
    #[inline(always)]
    pub(super) fn steps(self) -> Steps {
        let (table, order) = (self.table(), self.order());
        let entry = |i: usize| table[usize::from(order[i])];
        Steps {
            midpoint: std::array::from_fn(|i| (entry(i) + entry(i + 1)) / 2.0),
            lowest: entry(0),
            height: std::array::from_fn(|i| entry(i + 1) - entry(i)),
        }
    }
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const FP4: [f32; 16] = {
    const TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut table = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        table[i] = TWELFTHS[i] / 12.0;
        table[i + 8] = -table[i];
        i += 1;
    }
    // Not the negative zero that a float would have here.
    table[8] = 0.0;
    table
};

/// A table as a staircase: where it steps up, from one code and entry to the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) midpoint: [f32; 15],
    /// The entry below all midpoints.
    pub(super) lowest: f32,
    /// From an entry to the next.
    pub(super) height: [f32; 15],
}

impl Steps {
    /// How many midpoints are less than `y`.
    #[inline(always)]
    fn below(&self, y: f32) -> u32 {
        // Selections rather than a lookup, for the compiler to do many at a time.
        let m = &self.midpoint;
        let a = y > m[7];
        let b = y > if a { m[11] } else { m[3] };
        let (low, high) = (if a { m[9] } else { m[1] }, if a { m[13] } else { m[5] });
        let c = y > if b { high } else { low };
        let (low, high) = (if a { m[8] } else { m[0] }, if a { m[12] } else { m[4] });
        let first = if b { high } else { low };
        let (low, high) = (if a { m[10] } else { m[2] }, if a { m[14] } else { m[6] });
        let second = if b { high } else { low };
        let d = y > if c { second } else { first };
        let bit = |set: bool, value: u32| if set { value } else { 0 };
        bit(a, 8) + bit(b, 4) + bit(c, 2) + bit(d, 1)
    }

    /// The code of FP4 nearest to `y`, a number: its entries are symmetric, so half of the midpoints
    /// do.
    #[inline(always)]
    fn fp4(&self, y: f32) -> u32 {
        let bits = y.to_bits();
        // A midpoint belongs to the lower entry, which is the larger magnitude if it is negative.
        let magnitude = (bits & 0x7fff_ffff) + (bits >> 31);
        // In the uppermost bit, whether a midpoint is less; arithmetic alone, for the compiler to do
        // many at a time.
        let m: [u32; 7] =
            std::array::from_fn(|i| self.midpoint[8 + i].to_bits().wrapping_sub(magnitude));
        // The magnitudes rise in the order of codes 0, 1, 6, 7, 4, 5, 2, 3.
        let one = m[0] ^ m[1] ^ m[2] ^ m[3] ^ m[4] ^ m[5] ^ m[6];
        let (two, four) = (m[1] ^ m[3] ^ m[5], m[1] ^ m[5]);
        // Next to zero the other entry that is zero is the one above.
        let above = bits.wrapping_neg() & !bits;
        let eight = (m[0] & bits) | (!m[0] & above);
        one >> 31 | (two >> 30 & 2) | (four >> 29 & 4) | (eight >> 28 & 8)
    }
}

impl CodebookScheme {
    /// The table of quantized scales, in the order of codes.
    pub fn nested_table() -> [f32; 256] {
        nested::TABLE
    }

    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        let (rows, cols) = matrix(dtype, shape)?;
        if self.block_size == 0 || !self.block_size.is_multiple_of(4) {
            return Err(format!("block size {} is not a multiple of 4", self.block_size));
        }
        let pairs = self.storage.dtype().bitsize() as u64 / 8;
        if !(rows * cols).is_multiple_of(2 * pairs) {
            return Err(format!(
                "{} weights don't fill elements of {}, {} to each",
                rows * cols,
                self.storage.dtype(),
                2 * pairs
            ));
        }
        Ok(())
    }

    pub(super) fn parts(&self, _: Dtype, shape: &[u64]) -> Vec<Part> {
        let weights = shape[0] * shape[1];
        let pairs = self.storage.dtype().bitsize() as u64 / 8;
        let codes = part(Role::Codes, self.storage.dtype(), [weights / (2 * pairs), 1]);
        let blocks = weights.div_ceil(self.block_size.into());
        if !self.double {
            return vec![codes, part(Role::Scale, Dtype::F32, [blocks])];
        }
        let nested = part(Role::Scale, Dtype::F32, [blocks.div_ceil(SCALES as u64)]);
        vec![codes, part(Role::Scale, Dtype::U8, [blocks]), nested]
    }

    /// The mean of all scales.
    pub(super) fn scalar(&self) -> Option<Part> {
        self.double.then(|| part(Role::Bias, Dtype::F32, [1]))
    }

    pub(super) fn scalar_bytes(&self, survey: &Survey) -> Vec<u8> {
        if self.double { survey.mean().to_le_bytes().into() } else { Vec::new() }
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        let weights = shape[0] * shape[1];
        let unit = self.unit();
        let bytes = |weights: u64| self.parts(dtype, &[1, weights]).into_iter().map(|p| p.bytes());
        let parts: Vec<PartBytes> =
            bytes(unit).zip(bytes(weights)).map(|(unit, slab)| PartBytes { unit, slab }).collect();
        let element = (dtype.bitsize() / 8) as u64;
        Grid::new((1, 1, weights), Axis::Cols, unit, &parts, element, source_bytes)
    }

    /// Weights of the blocks that fill a line of the cache with codes, or whose scales belong
    /// together.
    pub(super) fn unit(&self) -> u64 {
        u64::from(self.block_size) * if self.double { SCALES as u64 } else { 2 }
    }

    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, survey: &Survey, out: &mut [&mut [u8]]) {
        let weights = tile.cols;
        assert_eq!(tile.rows, 1, "a run of the flattened weight");
        let (codes, scales) = match out {
            [codes, scales] => (codes, Scales::Plain(scales)),
            [codes, scales, largest] => {
                (codes, Scales::Nested { offset: survey.mean(), codes: scales, largest })
            }
            _ => unreachable!("two parts or three"),
        };
        for_element!(tile.data.dtype(), E => isa.run(Encode::<E> {
            scheme: self,
            source: &E::split(tile.data.bytes())[..weights],
            codes,
            scales,
        }));
    }

    pub(super) fn decode(&self, dtype: Dtype, parts: &[&[u8]], out: &mut [f32]) {
        let codes = parts[0];
        let number = |bytes: &[u8], i: usize| F32::widen(F32::split(bytes)[i]);
        let scale = |block: usize| match *parts {
            [_, scales, largest, offset] => {
                nested::value(scales[block], number(largest, block / SCALES), number(offset, 0))
            }
            _ => number(parts[1], block),
        };
        let table = self.codebook.table();
        for_element!(dtype, E => for (i, out) in out.iter_mut().enumerate() {
            // The first of a pair is in the upper half.
            let code = codes[i / 2] >> (4 - i % 2 * 4) & 15;
            let scale = scale(i / self.block_size as usize);
            *out = E::round(table[usize::from(code)] * scale);
        });
    }
}

/// Weights that are encoded at a time, more or less.
const BATCH: usize = 4096;

/// The encoding of one run of blocks.
struct Encode<'a, E: Element> {
    scheme: &'a CodebookScheme,
    source: &'a [E::Raw],
    codes: &'a mut [u8],
    scales: Scales<'a>,
}

/// Where scales go.
enum Scales<'a> {
    Plain(&'a mut [u8]),
    Nested { offset: f32, codes: &'a mut [u8], largest: &'a mut [u8] },
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        let block = self.scheme.block_size as usize;
        let codebook = self.scheme.codebook;
        let steps = codebook.steps();
        let mut search = match self.scheme.quality {
            Quality::Reference => None,
            Quality::Search => Some(Search::new(steps, block)),
        };
        let batch = (BATCH / block).max(1);
        let mut encoder = Encoder::new(codebook, batch * block);
        let mut stored = self.scales;
        let blocks = if matches!(stored, Scales::Plain(_)) { batch } else { SCALES };
        let mut scales = vec![0.0; blocks];
        let runs = self.source.chunks(blocks * block);
        let runs = runs.zip(self.codes.chunks_mut(blocks * block / 2));
        for (i, (run, codes)) in runs.enumerate() {
            let scales = &mut scales[..run.len().div_ceil(block)];
            for (xs, scale) in run.chunks(block).zip(&mut *scales) {
                let magnitude = E::magnitude(xs);
                *scale = match &mut search {
                    None => magnitude,
                    Some(search) => search.scale::<E>(xs, magnitude),
                };
            }
            match &mut stored {
                Scales::Plain(stored) => {
                    let stored = stored.as_chunks_mut::<4>().0[i * blocks..].iter_mut();
                    for (scale, stored) in scales.iter().zip(stored) {
                        F32::store(F32::round(*scale), stored);
                    }
                }
                Scales::Nested { offset, codes, largest } => {
                    let codes = &mut codes[i * SCALES..][..scales.len()];
                    let n = nested::encode(scales, *offset, codes);
                    F32::store(n, &mut largest[i * 4..]);
                    if let Some(search) = &mut search {
                        let places = scales.iter_mut().zip(codes);
                        for (xs, (scale, code)) in run.chunks(block).zip(places) {
                            let near = [*code, code.saturating_sub(1), code.saturating_add(1)];
                            let values = near.map(|code| nested::value(code, n, *offset));
                            let best = search.best::<E>(xs, values);
                            *code = near[best];
                            // What is no magnitude makes zeros of all.
                            *scale = if values[best] > 0.0 { values[best] } else { f32::INFINITY };
                        }
                    }
                }
            }
            let batches = run.chunks(batch * block).zip(scales.chunks(batch));
            for ((xs, scales), codes) in batches.zip(codes.chunks_mut(batch * block / 2)) {
                encoder.encode::<E>(xs, block, scales, codes);
            }
        }
    }
}

/// Encodes runs of blocks.
struct Encoder {
    codebook: Codebook,
    steps: Steps,
    /// One over each weight's scale: a block is too short for a loop of its own.
    reciprocals: Vec<f32>,
    /// The codes of a run, each a byte.
    codes: Vec<u8>,
}

impl Encoder {
    /// For runs of at most `len` weights.
    #[inline(always)]
    fn new(codebook: Codebook, len: usize) -> Self {
        let steps = codebook.steps();
        Self { codebook, steps, reciprocals: vec![0.0; len], codes: vec![0; len] }
    }

    #[inline(always)]
    fn encode<E: Element>(
        &mut self,
        run: &[E::Raw],
        block: usize,
        scales: &[f32],
        packed: &mut [u8],
    ) {
        let mut all_finite = true;
        for (reciprocals, &scale) in self.reciprocals.chunks_mut(block).zip(scales) {
            all_finite &= scale.is_finite();
            reciprocals.fill(1.0 / if scale < 1e-38 { 1e-38 } else { scale });
        }
        // No need to clamp: beyond the last midpoint all is the last entry.
        let pairs = run.iter().zip(&self.reciprocals).zip(&mut self.codes);
        match self.codebook {
            // A NaN is beyond no midpoint.
            Codebook::Nf4 => {
                for ((&raw, reciprocal), code) in pairs {
                    *code = self.steps.below(E::widen(raw) * reciprocal) as u8;
                }
            }
            Codebook::Fp4 => {
                for ((&raw, reciprocal), code) in pairs {
                    *code = self.steps.fp4(E::widen(raw) * reciprocal) as u8;
                }
                if !all_finite {
                    // Products with one over such a scale are zeros and NaNs.
                    for (codes, scale) in self.codes.chunks_mut(block).zip(scales) {
                        if !scale.is_finite() {
                            codes.fill(0);
                        }
                    }
                }
            }
        }
        for (byte, [first, second]) in packed.iter_mut().zip(self.codes.as_chunks::<2>().0) {
            *byte = first << 4 | second;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The code by definition: each midpoint in turn, lowest first.
    fn nearest(codebook: Codebook, y: f32) -> u32 {
        let midpoints = codebook.steps().midpoint;
        codebook.order()[midpoints.iter().filter(|midpoint| **midpoint < y).count()].into()
    }

    #[test]
    fn codes_next_to_midpoints_and_at_the_ends_of_the_scale_are_as_defined() {
        let ends = [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 1.0, 1.001, f32::MAX, f32::INFINITY];
        for codebook in [Codebook::Nf4, Codebook::Fp4] {
            let steps = codebook.steps();
            let near = steps.midpoint.into_iter().flat_map(|m| [m.next_down(), m, m.next_up()]);
            let grid = (0..=1 << 14).map(|i| i as f32 / 16384.0);
            for y in near.chain(ends).chain(grid).flat_map(|y| [y, -y]) {
                let code = match codebook {
                    Codebook::Nf4 => steps.below(y),
                    Codebook::Fp4 => steps.fp4(y),
                };
                assert_eq!(code, nearest(codebook, y), "{codebook:?} of {y:e}");
            }
        }
    }
}
