//! GPTQ's and AWQ's integers: packed along the input features, or across the output features.
//!
//! Codes `q` run from 0 to `n = 2^b - 1`; a weight is about `(q - zero) * scale`. Every part is
//! transposed, one line per input feature, group of them, or word of codes down the inputs. All
//! arithmetic is in f32, whatever the source. Over a group, `min` and `max` are widened to include
//! zero; where both are zero they stand for -1 and 1:
//!
//! ```text
//! symmetric   m = max(-min, max); scale = 2m / n, but m / n where min is 0
//!             zero = 2^(b-1)
//! asymmetric  scale = (max - min) / n
//!             zero = rint(-min / scale)
//! q = clamp(rint(x / scale) + zero)
//! ```
//!
//! Scales are rounded to F16 when they are stored, after the codes were made with them. A group with
//! a NaN or an infinity has a scale that isn't finite, and codes of its zero wherever one comes out
//! as NaN.
//!
//! Lines of codes hold some inputs of every output, so chunks are stripes of columns. Where a scale is
//! a whole row's, scales and zero points are surveyed row by row first.
//!
//! GPTQ's first version stores zeros less 1, subtracted from whole words: a zero of 0 borrows from
//! its neighbour, and loaders differ in how they undo that, so the search has no such zeros there.

use crate::dtype::Dtype;

use super::chunks::Rows;
use super::extremes::{Extremes, extremes};
use super::grid::Grid;
use super::int::{Codes, Fit, Granularity};
use super::isa::{Isa, Kernel};
use super::lanes::{ROUNDING, round};
use super::nearest::{Divided, Nearest, Tool, codes as codes_of};
use super::pack::{pack, packed_len, unpack, word_of};
use super::refine::{Refiner, Refining};
use super::search::Search;
use super::shape::{grouped, matrix, part, stripes};
use super::survey::Survey;
use super::tile::{Element, F16, Tile, for_element, widen};
use super::{Part, Quality, Role};

/// Transposed integers with a scale and a zero point per group or channel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TransposedScheme {
    /// Bits of a code: 2, 3, 4 or 8; 4 in AWQ's order.
    pub bits: u8,
    /// Which weights share a scale. Groups are a multiple of 32.
    pub granularity: Granularity,
    /// Whether every zero is `2^(b-1)`.
    pub symmetric: bool,
    /// How codes and zeros lie in memory.
    pub order: TransposedOrder,
    /// How scales are chosen.
    pub quality: Quality,
}

/// How codes and zeros of a weight `[R, C]` lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TransposedOrder {
    /// Codes `[C * b / 32, R]`, a bit stream down the inputs of each output; zeros `[G, R * b / 32]`,
    /// a bit stream along the outputs, each less 1.
    GptqV1,
    /// As `GptqV1`, with the zeros themselves.
    GptqV2,
    /// Codes `[C, R / 8]`, a word for eight outputs, the even ones in its lower half. Zeros
    /// `[G, R / 8]` likewise.
    AwqGemm,
}

/// The output, of eight, whose code stands in each four bits of a word, lowest first.
const GEMM: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Words that are transposed together: a line of the cache.
const LANES: usize = 16;

impl TransposedScheme {
    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        let (rows, cols) = matrix(dtype, shape)?;
        let bits: &[u8] = if self.is_gemm() { &[4] } else { &[2, 3, 4, 8] };
        if !bits.contains(&self.bits) {
            return Err(format!("{} bits are not among {bits:?}", self.bits));
        }
        if let Granularity::Group(size) = self.granularity {
            if !size.is_multiple_of(32) {
                return Err(format!("group size {size} is not a multiple of 32"));
            }
            grouped(dtype, shape, size.into())?;
        }
        // Kernels and packing want both.
        for (count, features) in [(cols, "input"), (rows, "output")] {
            if count % 32 != 0 {
                return Err(format!("{count} {features} features are not a multiple of 32"));
            }
        }
        Ok(())
    }

    pub(super) fn parts(&self, _: Dtype, shape: &[u64]) -> Vec<Part> {
        let (rows, cols) = (shape[0], shape[1]);
        let groups = cols / self.group(cols);
        let words = |codes: u64| (codes * u64::from(self.bits)).div_ceil(32);
        let codes = if self.is_gemm() { [cols, words(rows)] } else { [words(cols), rows] };
        vec![
            part(Role::Codes, Dtype::I32, codes),
            part(Role::Scale, Dtype::F16, [groups, rows]),
            part(Role::ZeroPoint, Dtype::I32, [groups, words(rows)]),
        ]
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        let unit = match self.granularity {
            Granularity::Group(size) => size.into(),
            // Whole words of codes.
            Granularity::Channel => 32,
        };
        stripes(dtype, shape, unit, |shape| self.parts(dtype, shape), source_bytes)
    }

    /// Adds scales and zero points of whole rows.
    pub(super) fn survey(&self, isa: Isa, tile: &Tile<'_>, survey: &mut Survey) {
        for_element!(tile.data.dtype(), E => isa.run(FitRows::<E> {
            scheme: self,
            source: E::split(tile.data.bytes()),
            rows: tile.rows,
            cols: tile.cols,
            stride: tile.stride,
            finder: self.finder(isa, tile),
            survey,
        }));
    }

    /// Encodes a tile: whole rows, or some columns of all rows whose scales and zero points were
    /// surveyed. Of the latter only the first stripe has scales and zero points to write.
    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, survey: &Survey, out: &mut [&mut [u8]]) {
        let dtype = tile.data.dtype();
        let fits = survey.fits();
        let [codes, scales, zeros] = out else { unreachable!("three parts") };
        for_element!(dtype, E => isa.run(Encode::<E> {
            isa,
            scheme: self,
            source: E::split(tile.data.bytes()),
            rows: tile.rows,
            cols: tile.cols,
            stride: tile.stride,
            finder: if fits.is_empty() { self.finder(isa, tile) } else { None },
            fits,
            codes,
            scales,
            zeros,
        }));
    }

    pub(super) fn decode(
        &self,
        dtype: Dtype,
        (rows, cols): (usize, usize),
        parts: &[&[u8]],
        out: &mut [f32],
    ) {
        let &[codes, scales, zeros] = parts else { unreachable!("three parts") };
        let group = self.group(cols as u64) as usize;
        let row_words = packed_len(rows, self.bits) / 4;
        let gemm = |bytes: &[u8], line: usize, r: usize| {
            let place = GEMM.iter().position(|row| *row == r % 8).expect("eight of them");
            (word_of(bytes, line * row_words + r / 8) >> (4 * place) & 15) as u8
        };
        let one = if self.order == TransposedOrder::GptqV1 { 1 } else { 0 };
        let zero_at = |g: usize, r: usize| {
            if self.is_gemm() {
                return gemm(zeros, g, r);
            }
            let word = |w: usize| {
                let word = word_of(zeros, g * row_words + w);
                word.wrapping_add(one * ones_of_words(self.bits))
            };
            let zero = unpack(self.bits, r, word);
            let one = if self.bits == 3 { one as u8 } else { 0 };
            zero.wrapping_add(one) & (u8::MAX >> (8 - self.bits))
        };
        for_element!(dtype, E => for (r, out) in out.chunks_exact_mut(cols).enumerate() {
            for (c, out) in out.iter_mut().enumerate() {
                let g = c / group;
                let code = if self.is_gemm() {
                    gemm(codes, c, r)
                } else {
                    unpack(self.bits, c, |w| word_of(codes, w * rows + r))
                };
                let scale = F16::widen(F16::split(scales)[g * rows + r]);
                *out = E::round((f32::from(code) - f32::from(zero_at(g, r))) * scale);
            }
        });
    }

    /// What finds scales and zero points for whole rows of a tile; none at reference quality.
    fn finder(&self, isa: Isa, tile: &Tile<'_>) -> Option<Finder> {
        if self.quality == Quality::Reference {
            return None;
        }
        let (range, len) = (Codes::offset(self.bits), self.group(tile.cols as u64) as usize);
        let mut search = Search::new(range, self.symmetric, len);
        let has_lowest_zero = self.order != TransposedOrder::GptqV1;
        if !has_lowest_zero {
            search = search.without_lowest_zero();
        }
        let refining = Refining::new(isa, self.quality, tile).map(|refining| {
            let refiner = Refiner::new(range, self.symmetric, len, refining.is_weighed);
            (if has_lowest_zero { refiner } else { refiner.without_lowest_zero() }, refining)
        });
        Some(Finder { search, refining })
    }

    fn is_gemm(&self) -> bool {
        self.order == TransposedOrder::AwqGemm
    }

    /// Elements that share a scale, in rows of `cols`.
    fn group(&self, cols: u64) -> u64 {
        match self.granularity {
            Granularity::Group(size) => u64::from(size),
            Granularity::Channel => cols,
        }
    }
}

/// A word with 1 in each of its fields, of which it has a whole number; else 0.
fn ones_of_words(bits: u8) -> u32 {
    if 32 % u32::from(bits) == 0 { u32::MAX / ((1 << bits) - 1) } else { 0 }
}

/// How gptqmodel rounds to nearest.
#[derive(Clone, Copy, Debug)]
struct GptqModel;

impl Tool for GptqModel {
    #[inline(always)]
    fn fit<E: Element>(range: Codes, symmetric: bool, extremes: Extremes) -> Fit {
        let Extremes { min, max } = extremes;
        let magnitude = extremes.magnitude();
        let max = if symmetric { magnitude } else { max };
        let min = if symmetric && min < 0.0 { -magnitude } else { min };
        let is_zero = (min == 0.0) & (max == 0.0);
        let (min, max) = if is_zero { (-1.0, 1.0) } else { (min, max) };
        let scale = (max - min) / range.steps();
        let zero = round(-min / scale);
        let zero_point =
            if symmetric || zero.is_nan() { 0.0 } else { range.clamp(zero + range.low) };
        Fit { scale, zero_point }
    }

    #[inline(always)]
    fn divisor<E: Element>(scale: f32) -> f32 {
        scale
    }

    #[inline(always)]
    fn code<E: Element>(range: Codes, symmetric: bool, divided: Divided, x: f32) -> u8 {
        code(range, symmetric, x / divided.by, divided.zero_point)
    }

    #[inline(always)]
    fn code_at_any<E: Element>(range: Codes, symmetric: bool, fit: Fit, x: f32) -> u8 {
        let x = x / fit.scale;
        code(range, symmetric, if x.is_nan() { 0.0 } else { x }, fit.zero_point)
    }

    #[inline(always)]
    fn stored<E: Element>(scale: f32) -> f32 {
        F16::round(scale)
    }
}

/// The stored byte of a quotient that is a number.
#[inline(always)]
fn code(range: Codes, symmetric: bool, x: f32, zero_point: f32) -> u8 {
    let stored = ROUNDING + range.offset;
    // Codes lie where sums have a spacing of 1. The zero is added to what was rounded, not before; without
    // one the offset may be, which is even.
    let sum = if symmetric { x + stored } else { (x + ROUNDING) + (zero_point + range.offset) };
    // Constants, where those of a quotient would depend on the zero.
    let (low, high) = (stored + range.low, stored + range.high);
    let sum = if sum < low { low } else { sum };
    let sum = if sum > high { high } else { sum };
    sum.to_bits() as u8
}

/// What finds scales and zero points with less error than gptqmodel's.
#[derive(Debug)]
struct Finder {
    search: Search,
    refining: Option<(Refiner, Refining)>,
}

impl Finder {
    /// The codes of a whole row, with the scale and zero point of each of its groups.
    #[inline(always)]
    fn encode_row<E: Element>(&mut self, row: &[E::Raw], codes: &mut [u8], fits: &mut [Fit]) {
        self.search.encode_row::<E, GptqModel>(row, codes, fits);
        if let Some((refiner, refining)) = &mut self.refining {
            let Refining { isa, row: xs, importance, .. } = refining;
            widen::<E>(row, xs);
            let stored = GptqModel::stored::<E>;
            refiner.refine_row(*isa, xs, importance, stored, codes, fits);
        }
    }
}

/// The scale and zero point of a row that has one of each, as its codes are made with. Where they are
/// searched for, `codes` is scratch for as many codes as the row has.
#[inline(always)]
fn fit_row<E: Element>(
    scheme: &TransposedScheme,
    finder: &mut Option<Finder>,
    row: &[E::Raw],
    codes: &mut [u8],
) -> Fit {
    let Some(finder) = finder else {
        let range = Codes::offset(scheme.bits);
        return GptqModel::fit::<E>(range, scheme.symmetric, extremes::<E>(row).values::<E>());
    };
    let mut fit = [Fit { scale: 0.0, zero_point: 0.0 }];
    finder.encode_row::<E>(row, codes, &mut fit);
    fit[0]
}

/// The survey of a band of rows.
struct FitRows<'a, E: Element> {
    scheme: &'a TransposedScheme,
    source: &'a [E::Raw],
    rows: usize,
    cols: usize,
    stride: usize,
    finder: Option<Finder>,
    survey: &'a mut Survey,
}

impl<E: Element> Kernel for FitRows<'_, E> {
    #[inline(always)]
    fn run(mut self) {
        let mut codes = vec![0; self.cols];
        for r in 0..self.rows {
            let row = &self.source[r * self.stride..][..self.cols];
            let fit = fit_row::<E>(self.scheme, &mut self.finder, row, &mut codes);
            self.survey.add_fits(&[fit]);
        }
    }
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    isa: Isa,
    scheme: &'a TransposedScheme,
    source: &'a [E::Raw],
    rows: usize,
    cols: usize,
    stride: usize,
    finder: Option<Finder>,
    /// Of every row; none where rows have several, or are whole.
    fits: &'a [Fit],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    zeros: &'a mut [u8],
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(mut self) {
        let TransposedScheme { bits, granularity, symmetric, order, .. } = *self.scheme;
        let (rows, cols) = (self.rows, self.cols);
        let group = self.scheme.group(cols as u64) as usize;
        let groups = cols / group;
        let range = Codes::offset(bits);
        let mut nearest = Nearest::<E>::new(self.isa, range, symmetric, group, cols);
        // Rows whose codes share a word, and words that a row's codes take part in.
        let (sharing, width) = match order {
            TransposedOrder::AwqGemm => (8, cols),
            _ => (1, packed_len(cols, bits) / 4),
        };
        let is_packed = bits == 8;
        // Not a power of two, or all lanes would want the same places of the cache.
        let pitch = width + LANES;
        let mut lines = vec![[0; 4]; LANES * pitch];
        let code_pitch = cols.next_multiple_of(8);
        let mut row_codes = vec![0; sharing * code_pitch];
        let mut fits = vec![Fit { scale: 0.0, zero_point: 0.0 }; groups];
        let mut fit_lines = FitLines::new(groups);
        let zero_pitch = rows.next_multiple_of(8);
        // Those of symmetric codes are all the same, but for the padding.
        let mut zeros = vec![0; groups * zero_pitch];
        if symmetric {
            for line in zeros.chunks_exact_mut(zero_pitch) {
                line[..rows].fill(range.byte(0.0));
            }
        }
        let (words, _) = self.codes.as_chunks_mut::<4>();
        let row_words = words.len() / width;
        let (scales, _) = self.scales.as_chunks_mut::<2>();
        for (block, first) in (0..rows).step_by(LANES * sharing).enumerate() {
            let lanes = (rows - first).div_ceil(sharing).min(LANES);
            for lane in 0..lanes {
                let line = &mut lines[lane * pitch..][..width];
                let first = first + lane * sharing;
                if first + sharing > rows {
                    row_codes.fill(0);
                }
                for r in first..rows.min(first + sharing) {
                    let pair = Rows::new(self.source, (cols, self.stride), r);
                    let row = pair.row;
                    let codes = if is_packed {
                        &mut *line.as_flattened_mut()
                    } else {
                        &mut row_codes[(r - first) * code_pitch..][..cols]
                    };
                    match &mut self.finder {
                        _ if granularity == Granularity::Channel => {
                            fits[0] = match self.fits.get(r) {
                                Some(fit) => *fit,
                                None => fit_row::<E>(self.scheme, &mut self.finder, row, codes),
                            };
                            codes_of::<E, GptqModel>(range, symmetric, fits[0], row, codes);
                        }
                        Some(finder) => finder.encode_row::<E>(row, codes, &mut fits),
                        None => {
                            nearest.encode_row::<GptqModel>(pair, codes, &mut fits);
                        }
                    }
                    fit_lines.set(range, r % LANES, &fits);
                    if r % LANES == LANES - 1 || r + 1 == rows {
                        let zeros = if symmetric { &mut [][..] } else { &mut zeros };
                        fit_lines.write(r / LANES * LANES, (scales, rows), (zeros, zero_pitch));
                    }
                }
                match order {
                    _ if is_packed => {}
                    TransposedOrder::AwqGemm => gather(&row_codes, code_pitch, line),
                    _ => pack(bits, &row_codes, line.as_flattened_mut()),
                }
            }
            transpose(&lines, (pitch, lanes), words, row_words, block * LANES);
        }
        let zero_lines = self.zeros.chunks_exact_mut(packed_len(rows, bits));
        for (zeros, out) in zeros.chunks_exact(zero_pitch).zip(zero_lines) {
            pack_zeros(self.scheme, zeros, out);
        }
    }
}

/// Scales and zeros of some rows, to be written together: those of one row belong to lines that are mostly a
/// power of two from one another, and so would all want the same places of the cache.
struct FitLines {
    groups: usize,
    /// Words of a scale and a zero, rows of them [`Self::pitch`] from one another.
    rows: Vec<Word>,
    /// The same, those of a group after one another.
    turned: Vec<Word>,
}

impl FitLines {
    /// For `LANES` rows of so many groups.
    fn new(groups: usize) -> Self {
        let words = |count| vec![[0; 4]; LANES * count];
        Self { groups, rows: words(groups + LANES), turned: words(groups) }
    }

    /// Words from one row to the next; as of lines of codes, no power of two where the groups are one.
    fn pitch(&self) -> usize {
        self.groups + LANES
    }

    /// Takes in a row.
    #[inline(always)]
    fn set(&mut self, range: Codes, lane: usize, fits: &[Fit]) {
        let pitch = self.pitch();
        for (fit, word) in fits.iter().zip(&mut self.rows[lane * pitch..]) {
            let zero = u32::from(range.byte(fit.zero_point));
            *word = (F16::narrow(fit.scale) | zero << 16).to_le_bytes();
        }
    }

    /// Writes what the rows from `first` on have of each group into its lines, of so many elements.
    #[inline(always)]
    fn write(
        &mut self,
        first: usize,
        (scales, rows): (&mut [[u8; 2]], usize),
        (zeros, zero_pitch): (&mut [u8], usize),
    ) {
        let lanes = (rows - first).min(LANES);
        let pitch = self.pitch();
        transpose(&self.rows, (pitch, lanes), &mut self.turned, LANES, 0);
        let (turned, _) = self.turned.as_chunks::<LANES>();
        for (words, line) in turned.iter().zip(scales.chunks_exact_mut(rows)) {
            let scales = words.map(|[a, b, ..]| [a, b]);
            line[first..][..lanes].copy_from_slice(&scales[..lanes]);
        }
        for (words, line) in turned.iter().zip(zeros.chunks_exact_mut(zero_pitch)) {
            let zeros = words.map(|[.., zero, _]| zero);
            line[first..][..lanes].copy_from_slice(&zeros[..lanes]);
        }
    }
}

/// 32 bits of codes, little-endian.
type Word = [u8; 4];

/// Words of AWQ's order from eight rows of codes, `pitch` from one another.
#[inline(always)]
fn gather(codes: &[u8], pitch: usize, out: &mut [Word]) {
    let rows = GEMM.map(|row| &codes[row * pitch..][..out.len()]);
    for (c, out) in out.iter_mut().enumerate() {
        *out = std::array::from_fn(|i| rows[2 * i][c] | rows[2 * i + 1][c] << 4);
    }
}

/// Words of a line that are transposed at a time; they stay in the first-level cache.
const SPAN: usize = 64;

/// Writes lines of words, `pitch` from one another, as columns from `first` on of a matrix with rows
/// of `row_words`.
#[inline(always)]
fn transpose(
    lines: &[Word],
    (pitch, lanes): (usize, usize),
    out: &mut [Word],
    row_words: usize,
    first: usize,
) {
    if lanes < LANES {
        for (k, out) in out.chunks_exact_mut(row_words).enumerate() {
            for (lane, out) in out[first..first + lanes].iter_mut().enumerate() {
                *out = lines[lane * pitch + k];
            }
        }
        return;
    }
    // Four lines in one, for the compiler to do many words at a time, and then four of those.
    let mut fours = [[[[0; 4]; 4]; SPAN]; LANES / 4];
    for (span, out) in out.chunks_mut(SPAN * row_words).enumerate() {
        let width = out.len() / row_words;
        for (fours, lines) in fours.iter_mut().zip(lines.chunks(4 * pitch)) {
            let line = |i: usize| &lines[i * pitch + span * SPAN..][..width];
            let (a, b, c, d) = (line(0), line(1), line(2), line(3));
            for (k, four) in fours[..width].iter_mut().enumerate() {
                *four = [a[k], b[k], c[k], d[k]];
            }
        }
        for (k, out) in out.chunks_exact_mut(row_words).enumerate() {
            let out = out[first..first + LANES].as_chunks_mut::<4>().0;
            for (out, fours) in out.iter_mut().zip(&fours) {
                *out = fours[k];
            }
        }
    }
}

/// Packs the zeros of a group along the outputs, padded with zeros to a multiple of eight.
fn pack_zeros(scheme: &TransposedScheme, zeros: &[u8], out: &mut [u8]) {
    let TransposedScheme { bits, order, .. } = *scheme;
    match order {
        TransposedOrder::AwqGemm => {
            for (out, zeros) in out.as_chunks_mut::<4>().0.iter_mut().zip(zeros.as_chunks::<8>().0)
            {
                *out = std::array::from_fn(|i| zeros[GEMM[2 * i]] | zeros[GEMM[2 * i + 1]] << 4);
            }
        }
        TransposedOrder::GptqV2 => pack(bits, zeros, out),
        TransposedOrder::GptqV1 if bits == 3 => {
            let less: Vec<u8> = zeros.iter().map(|zero| zero.wrapping_sub(1) & 7).collect();
            pack(bits, &less, out);
        }
        TransposedOrder::GptqV1 => {
            pack(bits, zeros, out);
            for word in out.as_chunks_mut::<4>().0 {
                let less = u32::from_le_bytes(*word).wrapping_sub(ones_of_words(bits));
                *word = less.to_le_bytes();
            }
        }
    }
}
