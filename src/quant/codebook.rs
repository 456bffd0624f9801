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
//! scales are quantized, codes are then made for the scale that a loader will have.

use crate::dtype::Dtype;

use super::chunks::Rows;
use super::codebook_codes::Encoder;
use super::codebook_refine::Refiner;
use super::codebook_search::Search;
use super::extremes::{Bits, magnitudes_of_groups};
use super::grid::{Axis, Grid, PartBytes};
use super::importance::Importance;
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
    pub const fn table(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => FP4,
        }
    }

    /// The codes by rising entries; equal ones in the order of codes.
    pub(super) const fn order(self) -> [u8; 16] {
        match self {
            Self::Nf4 => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
            Self::Fp4 => [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
        }
    }

    /// The table by rising entries.
    pub(super) const fn staircase(self) -> Staircase {
        let (table, order) = (self.table(), self.order());
        let (mut entries, mut midpoints) = ([0.0; 16], [0.0; 15]);
        let mut i = 0;
        while i < 16 {
            entries[i] = table[order[i] as usize];
            if i > 0 {
                midpoints[i - 1] = (entries[i - 1] + entries[i]) / 2.0;
            }
            i += 1;
        }
        Staircase { entries, midpoints }
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

/// A table by rising entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Staircase {
    entries: [f32; 16],
    /// Between each entry and the next.
    pub(super) midpoints: [f32; 15],
}

/// One of two numbers. As bits, or compilers select where it lies in memory, for one at a time.
#[inline(always)]
const fn pick(upper: bool, high: f32, low: f32) -> f32 {
    let mask = (upper as u32).wrapping_neg();
    let (high, low) = (high.to_bits(), low.to_bits());
    f32::from_bits(low ^ (low ^ high) & mask)
}

impl Staircase {
    /// The entry nearest to `y`.
    #[inline(always)]
    pub(super) const fn entry(&self, y: f32) -> f32 {
        // Halves of halves, for the compiler to do many at a time.
        let (m, e) = (&self.midpoints, &self.entries);
        let a = y > m[7];
        let m = [
            pick(a, m[8], m[0]),
            pick(a, m[9], m[1]),
            pick(a, m[10], m[2]),
            pick(a, m[11], m[3]),
            pick(a, m[12], m[4]),
            pick(a, m[13], m[5]),
            pick(a, m[14], m[6]),
        ];
        let e = [
            pick(a, e[8], e[0]),
            pick(a, e[9], e[1]),
            pick(a, e[10], e[2]),
            pick(a, e[11], e[3]),
            pick(a, e[12], e[4]),
            pick(a, e[13], e[5]),
            pick(a, e[14], e[6]),
            pick(a, e[15], e[7]),
        ];
        let b = y > m[3];
        let m = [pick(b, m[4], m[0]), pick(b, m[5], m[1]), pick(b, m[6], m[2])];
        let e =
            [pick(b, e[4], e[0]), pick(b, e[5], e[1]), pick(b, e[6], e[2]), pick(b, e[7], e[3])];
        let c = y > m[1];
        let (m, e) = (pick(c, m[2], m[0]), [pick(c, e[2], e[0]), pick(c, e[3], e[1])]);
        pick(y > m, e[1], e[0])
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
            refining: self.is_refined(tile).then(|| {
                let block = self.block_size as usize;
                (Refiner::new(isa, self.codebook.staircase(), block), tile.importance)
            }),
            codes,
            scales,
        }));
    }

    /// Whether what the search finds for a tile is made better. Scales that are quantized in turn are
    /// too coarse for what is left of an error that counts the same everywhere.
    fn is_refined(&self, tile: &Tile<'_>) -> bool {
        match self.quality {
            Quality::Reference => false,
            Quality::Search => tile.importance.is_some(),
            Quality::Best => tile.importance.is_some() || !self.double,
        }
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
const BATCH: usize = 2048;

/// The encoding of one run of blocks.
struct Encode<'a, E: Element> {
    scheme: &'a CodebookScheme,
    source: &'a [E::Raw],
    refining: Option<(Refiner, Option<Importance<'a>>)>,
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
        let mut refining = self.refining;
        let batch = (BATCH / block).max(1);
        let mut encoder = Encoder::new(codebook, block, batch);
        let mut stored = self.scales;
        let blocks = if matches!(stored, Scales::Plain(_)) { batch } else { SCALES };
        let mut scales = vec![0.0; blocks];
        let mut magnitudes = vec![E::Bits::ZERO; blocks];
        let mut search = match self.scheme.quality {
            Quality::Reference => None,
            Quality::Search | Quality::Best => Some(Search::new(codebook, block, blocks)),
        };
        let runs = self.source.chunks(blocks * block);
        let runs = runs.zip(self.codes.chunks_mut(blocks * block / 2));
        for (i, (run, codes)) in runs.enumerate() {
            let scales = &mut scales[..run.len().div_ceil(block)];
            let parts = || run.chunks(block).zip((i * blocks * block..).step_by(block));
            magnitudes_of_groups::<E>(run, block, &mut magnitudes, scales);
            if let Some(search) = &mut search {
                search.scales::<E>(run, scales);
                if let Some((refiner, importance)) = &mut refining {
                    for ((xs, first), scale) in parts().zip(&mut *scales) {
                        let importance = importance.map(|importance| importance.skip(first));
                        *scale = refiner.refined::<E>(xs, importance, *scale);
                    }
                }
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
                    if search.is_some() {
                        let places = scales.iter_mut().zip(codes);
                        for ((xs, first), (scale, code)) in parts().zip(places) {
                            let near = [*code, code.saturating_sub(1), code.saturating_add(1)];
                            let values = near.map(|code| nested::value(code, n, *offset));
                            let best = match &mut refining {
                                None => 0,
                                Some((refiner, importance)) => {
                                    let importance = importance.map(|i| i.skip(first));
                                    refiner.best::<E>(xs, importance, values)
                                }
                            };
                            *code = near[best];
                            // What is no magnitude makes zeros of all.
                            *scale = if values[best] > 0.0 { values[best] } else { f32::INFINITY };
                        }
                    }
                }
            }
            let batches = scales.chunks(batch).zip(codes.chunks_mut(batch * block / 2));
            for (k, (scales, codes)) in batches.enumerate() {
                let len = 2 * codes.len();
                let source = &self.source[(i * blocks + k * batch) * block..];
                encoder.encode::<E>(Rows::new(source, (len, blocks * block), 0), scales, codes);
            }
        }
    }
}
