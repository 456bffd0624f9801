//! MXFP4, MXFP8 and NVFP4: small floats with a one-byte scale per group.
//!
//! A weight is about `code * scale`. Two tools choose the scale of a group of 32, 2^e, from its
//! largest magnitude `m` and the largest code `M` (6 or 448):
//!
//! ```text
//! compressed-tensors  e = floor(log2(m)) - floor(log2(M)), and one more where m >= 1.75 * 2^floor
//! MLX                 e = ceil(log2(m / M)), and 0 where m is 0
//! ```
//!
//! and the code nearest to `x / scale`, clamped to `M`; ties go to the even code, but in MLX's E2M1
//! to the smaller magnitude. compressed-tensors has a -0 for a negative number that rounds to zero,
//! MLX has one in E4M3 alone. compressed-tensors takes a subnormal for zero (from three
//! quarters of the smallest normal number on, for that), and a scale that F16 can't hold becomes 1. MLX's NVFP4
//! has groups of 16 and the scale `m / 6` in E4M3, whose group is all zeros where it is 0.
//!
//! compressed-tensors' NVFP4 has groups of 16 and one more scale, `g`, for a whole weight, or for
//! several that engines fuse; `M` is their largest magnitude, `r` rounds to the source's element type:
//!
//! ```text
//! g = r(r(1 / M) * 2688), M at least the smallest normal number; 1 where that is infinite
//! scale = e4m3(g * r(m / 6)), 0.125 where that is 0
//! q = e2m1(x / (scale / g)), all in f32
//! ```
//!
//! A group with a NaN or an infinity has the scale NaN and codes 0; `g` is then 1.
//!
//! The search tries the neighbouring scales of E2M1 codes for the least squared error, and finds `g`
//! in f32 where the source's type can't hold it. E4M3 codes have the same relative error at every
//! scale, so there it is the reference.

use std::marker::PhantomData;

use crate::dtype::Dtype;

use super::chunks::Rows;
use super::extremes::{Bits, magnitudes_of_groups};
use super::grid::Grid;
use super::importance::Importance;
use super::isa::{Isa, Kernel, prefetch};
use super::micro_search::Search;
use super::minifloat::{
    E2M1_MAX, E4M3_MAX, E4M3_NAN, E8M0_NAN, e2m1, e2m1_down, e2m1_value, e4m3, e4m3_value,
    e8m0_ceil, e8m0_value, within,
};
use super::pack::pack;
use super::shape::{bands, grouped, part};
use super::survey::Survey;
use super::thresholds::{Limits, by_magnitude};
use super::tile::{Element, F32, Tile, for_element};
use super::{Part, Quality, Role};

/// The type of a code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MicroFloat {
    /// 4 bits, up to 6.
    E2m1,
    /// 8 bits, up to 448.
    E4m3,
}

/// Whose scales and layout.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MicroDialect {
    /// compressed-tensors: powers of two for groups of 32; two E2M1 codes to a byte.
    CompressedTensors,
    /// compressed-tensors: E4M3 scales for groups of 16 and one scale for the weight; two E2M1 codes to
    /// a byte.
    TensorGroup,
    /// MLX: powers of two for groups of 32; codes in 32-bit words.
    MlxPower,
    /// MLX: E4M3 scales for groups of 16; codes in 32-bit words.
    MlxE4m3,
}

/// Small floats with a one-byte scale per group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MicroScheme {
    /// The type of a code.
    pub float: MicroFloat,
    /// Whose scales and layout.
    pub dialect: MicroDialect,
    /// How scales are chosen.
    pub quality: Quality,
}

impl MicroScheme {
    /// Weights that share a scale.
    pub fn group_size(&self) -> u32 {
        if self.has_e4m3_scales() { 16 } else { 32 }
    }

    /// Whether scales are not powers of two.
    #[inline(always)]
    pub(super) fn has_e4m3_scales(&self) -> bool {
        matches!(self.dialect, MicroDialect::TensorGroup | MicroDialect::MlxE4m3)
    }

    pub(super) fn accepts(&self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        grouped(dtype, shape, self.group_size().into())
    }

    pub(super) fn parts(&self, _: Dtype, shape: &[u64]) -> Vec<Part> {
        let (rows, cols) = (shape[0], shape[1]);
        let bits = u64::from(self.bits());
        let codes = match (self.dialect, self.float) {
            (MicroDialect::MlxPower | MicroDialect::MlxE4m3, _) => (Dtype::U32, cols * bits / 32),
            (_, MicroFloat::E2m1) => (Dtype::U8, cols / 2),
            (_, MicroFloat::E4m3) => (Dtype::F8_E4M3, cols),
        };
        let scale = match self.dialect {
            MicroDialect::TensorGroup => Dtype::F8_E4M3,
            _ => Dtype::U8,
        };
        vec![
            part(Role::Codes, codes.0, [rows, codes.1]),
            part(Role::Scale, scale, [rows, cols / u64::from(self.group_size())]),
        ]
    }

    pub(super) fn scalar(&self) -> Option<Part> {
        let has_one = self.dialect == MicroDialect::TensorGroup;
        has_one.then(|| part(Role::Scale, Dtype::F32, [1]))
    }

    pub(super) fn scalar_bytes(&self, dtype: Dtype, survey: &Survey) -> Vec<u8> {
        match self.scalar() {
            Some(_) => for_element!(dtype, E => self.global::<E>(survey)).to_le_bytes().into(),
            None => Vec::new(),
        }
    }

    /// The scale of the whole weight; 1 where there is none.
    fn global<E: Element>(&self, survey: &Survey) -> f32 {
        const LARGEST: f32 = E4M3_MAX * E2M1_MAX;
        let magnitude = survey.magnitude();
        if self.dialect != MicroDialect::TensorGroup || !magnitude.is_finite() {
            return 1.0;
        }
        let magnitude = if magnitude < E::SMALLEST { E::SMALLEST } else { magnitude };
        let global = E::round(E::round(1.0 / magnitude) * LARGEST);
        let global = match self.quality {
            Quality::Search | Quality::Best if !global.is_finite() => LARGEST / magnitude,
            _ => global,
        };
        if global.is_finite() { global } else { 1.0 }
    }

    pub(super) fn grid(&self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        bands(dtype, shape, 1, |shape| self.parts(dtype, shape), source_bytes)
    }

    pub(super) fn encode(&self, isa: Isa, tile: &Tile<'_>, survey: &Survey, out: &mut [&mut [u8]]) {
        let dtype = tile.data.dtype();
        let [codes, scales] = out else { unreachable!("two parts") };
        for_element!(dtype, E => isa.run(Encode::<E> {
            scheme: self,
            global: self.global::<E>(survey),
            source: E::split(tile.data.bytes()),
            cols: tile.cols,
            stride: tile.stride,
            importance: tile.importance,
            codes,
            scales,
        }));
    }

    pub(super) fn decode(&self, dtype: Dtype, parts: &[&[u8]], out: &mut [f32]) {
        let (codes, scales) = (parts[0], parts[1]);
        let global = parts.get(2).map_or(1.0, |global| F32::widen(F32::split(global)[0]));
        let group = self.group_size() as usize;
        for_element!(dtype, E => for (i, out) in out.iter_mut().enumerate() {
            let value = match self.float {
                MicroFloat::E2m1 => e2m1_value(codes[i / 2] >> (i % 2 * 4) & 15),
                MicroFloat::E4m3 => e4m3_value(codes[i]),
            };
            *out = E::round(value * self.scale_value(scales[i / group], global));
        });
    }

    fn bits(&self) -> u8 {
        match self.float {
            MicroFloat::E2m1 => 4,
            MicroFloat::E4m3 => 8,
        }
    }

    #[inline(always)]
    fn scale_value(&self, code: u8, global: f32) -> f32 {
        match self.dialect {
            MicroDialect::TensorGroup => e4m3_value(code) / global,
            MicroDialect::MlxE4m3 => e4m3_value(code),
            _ => e8m0_value(code),
        }
    }

    /// The scales' codes for groups of those largest magnitudes.
    #[inline(always)]
    fn scales<E: Element>(&self, magnitudes: &[f32], global: f32, scales: &mut [u8]) {
        // A dialect that is known makes each a loop without branches.
        for dialect in [
            MicroDialect::CompressedTensors,
            MicroDialect::TensorGroup,
            MicroDialect::MlxPower,
            MicroDialect::MlxE4m3,
        ] {
            if self.dialect == dialect {
                let scheme = Self { dialect, ..*self };
                for (scale, magnitude) in scales.iter_mut().zip(magnitudes) {
                    *scale = scheme.scale::<E>(*magnitude, global);
                }
            }
        }
    }

    /// The scales' values.
    #[inline(always)]
    pub(super) fn values(&self, scales: &[u8], global: f32, values: &mut [f32]) {
        let pairs = values.iter_mut().zip(scales);
        match self.dialect {
            MicroDialect::TensorGroup => {
                pairs.for_each(|(value, code)| *value = e4m3_value(*code) / global);
            }
            MicroDialect::MlxE4m3 => pairs.for_each(|(value, code)| *value = e4m3_value(*code)),
            _ => pairs.for_each(|(value, code)| *value = e8m0_value(*code)),
        }
    }

    /// The scale's code for a group of that largest magnitude.
    #[inline(always)]
    fn scale<E: Element>(&self, magnitude: f32, global: f32) -> u8 {
        let largest = match self.float {
            MicroFloat::E2m1 => E2M1_MAX,
            MicroFloat::E4m3 => E4M3_MAX,
        };
        match self.dialect {
            MicroDialect::CompressedTensors => {
                // The exponent field of the element type, which subnormals have none of.
                let magnitude = if magnitude.is_nan() || magnitude >= E::SMALLEST {
                    magnitude
                } else if magnitude >= 0.75 * E::SMALLEST {
                    E::SMALLEST
                } else {
                    0.0
                };
                // Rounds up what is at least 1.75 times a power of two.
                let exponent = (magnitude.to_bits() + (1 << 21)) >> 23;
                let exponent = exponent.saturating_sub((largest.to_bits() >> 23) - 127);
                let unspoilt = magnitude < f32::INFINITY;
                let exponent = if unspoilt { exponent as u8 } else { E8M0_NAN };
                if unspoilt && E::round(e8m0_value(exponent)) == 0.0 { 127 } else { exponent }
            }
            MicroDialect::TensorGroup => {
                /// What stands for a scale of zero, 0.125.
                const EPSILON: u8 = 4 << 3;
                let scale = global * E::round(magnitude / largest);
                let scale = if scale > E4M3_MAX { E4M3_MAX } else { scale };
                match e4m3(scale) {
                    _ if !magnitude.is_finite() => E4M3_NAN,
                    0 => EPSILON,
                    code => code,
                }
            }
            MicroDialect::MlxPower if magnitude == 0.0 => 127,
            MicroDialect::MlxPower => e8m0_ceil(magnitude / largest),
            MicroDialect::MlxE4m3 => {
                let scale = magnitude / largest;
                let scale = if scale > E4M3_MAX { E4M3_MAX } else { scale };
                if magnitude < f32::INFINITY { e4m3(scale) } else { E4M3_NAN }
            }
        }
    }
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    scheme: &'a MicroScheme,
    global: f32,
    source: &'a [E::Raw],
    cols: usize,
    stride: usize,
    importance: Option<Importance<'a>>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        // Constants, for the compiler to unroll.
        if self.scheme.group_size() == 16 { self.encode::<16, 4>() } else { self.encode::<32, 2>() }
    }
}

impl<E: Element> Encode<'_, E> {
    #[inline(always)]
    fn encode<const GROUP: usize, const COUNT: usize>(self) {
        let (scheme, global) = (*self.scheme, self.global);
        let bits = scheme.bits();
        let searched = scheme.quality != Quality::Reference && scheme.float == MicroFloat::E2m1;
        let importance = self.importance.map(|importance| importance.of_row(self.cols));
        let mut search = searched.then(|| Search::new(scheme, global, importance));
        let mut finder = Finder::<E, GROUP, COUNT>::new(&scheme, self.cols);
        let groups_of_row = self.cols / GROUP;
        let mut magnitudes = vec![0.0; groups_of_row];
        let mut magnitude_bits = vec![E::Bits::ZERO; groups_of_row];
        let mut values = vec![0.0; groups_of_row];
        let mut factors = vec![0.0; groups_of_row];
        let rows = self.codes.chunks_exact_mut(self.cols * usize::from(bits) / 8);
        let scales = self.scales.chunks_exact_mut(self.cols / GROUP);
        for (r, (codes, scales)) in rows.zip(scales).enumerate() {
            let rows = Rows::new(self.source, (self.cols, self.stride), r);
            let row = rows.row;
            let groups = row.as_chunks::<GROUP>().0;
            magnitudes_of_groups::<E>(row, GROUP, &mut magnitude_bits, &mut magnitudes);
            scheme.scales::<E>(&magnitudes, global, scales);
            if let Some(search) = &mut search {
                search.improve::<E>(row, scales);
            }
            scheme.values(scales, global, &mut values);
            let mut all_moderate = true;
            for value in &values {
                all_moderate &= is_moderate(*value);
            }
            for (factor, value) in factors.iter_mut().zip(&values) {
                let reciprocal = 1.0 / value;
                *factor = match scheme.dialect {
                    MicroDialect::TensorGroup => *value,
                    MicroDialect::MlxE4m3 if E::SIZE == 4 => *value,
                    MicroDialect::MlxE4m3 => reciprocal * SHORT,
                    _ => reciprocal,
                };
            }
            finder.encode_row(rows, &values, &factors, codes);
            if !all_moderate {
                let out = codes.chunks_exact_mut(GROUP * usize::from(bits) / 8);
                for ((group, out), scale) in groups.iter().zip(out).zip(scales) {
                    let scale = scheme.scale_value(*scale, global);
                    if !is_moderate(scale) {
                        let mut codes = [0; GROUP];
                        encode_odd_group::<E, GROUP>(&scheme, group, scale, &mut codes);
                        pack(bits, &codes, out);
                    }
                }
            }
        }
    }
}

/// Whether codes are right that are made with a scale's reciprocal.
#[inline(always)]
fn is_moderate(scale: f32) -> bool {
    (f32::from_bits(27 << 23)..=1.0).contains(&scale)
}

/// A little less than 1. What is next to a tie between two E2M1 codes, of a quotient of two 16-bit
/// elements' significands, is farther from it than a part in 2^12. So a product with one over the
/// scale that falls short by a part in 2^20 has the quotient's code, and ties have the smaller one.
const SHORT: f32 = 1.0 - 1.0 / 1_048_576.0;

/// What finds the codes of rows with moderate scales, with the memory for it. Of elements of 16 bits, `COUNT`
/// groups, two lines of the cache, are done together, for the compiler to do many weights at a time.
struct Finder<E: Element, const GROUP: usize, const COUNT: usize> {
    scheme: MicroScheme,
    /// For each midpoint, of each block of groups.
    thresholds: Vec<[i32; COUNT]>,
    short: Vec<u16>,
    /// Of each lane: a group is too short for a loop of its own.
    spread: Vec<f32>,
    wide: Vec<u32>,
    element: PhantomData<E>,
}

impl<E: Element, const GROUP: usize, const COUNT: usize> Finder<E, GROUP, COUNT> {
    fn new(scheme: &MicroScheme, cols: usize) -> Self {
        let by_thresholds = E::SIZE == 2 && scheme.float == MicroFloat::E2m1;
        let (short, lanes) = if by_thresholds { (cols, 0) } else { (0, cols / E::PER_LANE) };
        Self {
            scheme: *scheme,
            thresholds: vec![[0; COUNT]; MIDPOINTS.len() * (short / GROUP).div_ceil(COUNT)],
            short: vec![0; short],
            spread: vec![0.0; lanes],
            wide: vec![0; lanes],
            element: PhantomData,
        }
    }

    /// Packed codes of a row. Given for each group are its scale and one over that, for with a power of two
    /// the product is exact in any element type; of an E4M3 scale and 32 bits the scale twice.
    #[inline(always)]
    fn encode_row(
        &mut self,
        row: Rows<'_, E::Raw>,
        scales: &[f32],
        factors: &[f32],
        out: &mut [u8],
    ) {
        let MicroScheme { float, dialect, .. } = self.scheme;
        if float == MicroFloat::E4m3 {
            self.find(row, factors, |x, r| e4m3_code(x * r));
            for (out, codes) in out.chunks_exact_mut(E::PER_LANE).zip(&self.wide) {
                out.copy_from_slice(&codes.to_le_bytes()[..E::PER_LANE]);
            }
        } else if E::SIZE == 2 {
            match dialect {
                MicroDialect::CompressedTensors => {
                    self.compare(&EVEN, row, (scales, factors), |x, r| x * r, signed);
                }
                MicroDialect::TensorGroup => {
                    self.compare(&EVEN, row, (scales, factors), |x, scale| x / scale, signed);
                }
                MicroDialect::MlxPower | MicroDialect::MlxE4m3 => {
                    self.compare(&DOWN, row, (scales, factors), |x, r| x * r, signed_down);
                }
            }
            for (out, &[first, second]) in out.iter_mut().zip(self.short.as_chunks::<2>().0) {
                // A lane of 32 bits, as they lie.
                let pair = u32::from(first) | u32::from(second) << 16;
                *out = (pair | pair >> 12) as u8;
            }
        } else {
            match dialect {
                MicroDialect::CompressedTensors => self.find(row, factors, |x, r| e2m1_code(x * r)),
                MicroDialect::TensorGroup => self.find(row, factors, |x, s| e2m1_code(x / s)),
                MicroDialect::MlxPower => self.find(row, factors, |x, r| e2m1_down_code(x * r)),
                MicroDialect::MlxE4m3 => self.find(row, factors, |x, s| e2m1_down_code(x / s)),
            }
            for (out, [first, second]) in out.iter_mut().zip(self.wide.as_chunks::<2>().0) {
                *out = (first | second << 4) as u8;
            }
        }
    }

    /// Finds E2M1 codes of elements of 16 bits.
    #[inline(always)]
    fn compare(
        &mut self,
        limits: &Limits<8>,
        Rows { row, next }: Rows<'_, E::Raw>,
        (scales, factors): (&[f32], &[f32]),
        product: impl Fn(f32, f32) -> f32,
        code: impl Fn(bool, bool, u16) -> u16,
    ) {
        let blocks = self.thresholds.len() / MIDPOINTS.len();
        for (k, all) in self.thresholds.chunks_exact_mut(blocks).enumerate() {
            let groups = scales.iter().zip(factors);
            for (threshold, (&scale, &factor)) in all.as_flattened_mut().iter_mut().zip(groups) {
                *threshold = limits.threshold::<E>(k, scale, |x| product(x, factor));
            }
        }
        let code = |bits: E::Bits, rank| {
            code(bits < E::Bits::ZERO, bits.magnitude() > E::Bits::ZERO, rank)
        };
        let (groups, rest) = row.as_chunks::<GROUP>().0.as_chunks::<COUNT>();
        let (out, rest_out) = self.short.as_chunks_mut::<GROUP>().0.as_chunks_mut::<COUNT>();
        let nexts = next.as_chunks::<GROUP>().0.as_chunks::<COUNT>().0;
        let mut thresholds = [&[0; COUNT]; MIDPOINTS.len()];
        let mut take = |block: usize| {
            for (k, of_block) in thresholds.iter_mut().enumerate() {
                *of_block = &self.thresholds[k * blocks + block];
            }
            thresholds
        };
        let full = groups.len();
        for (block, ((groups, next), out)) in groups.iter().zip(nexts).zip(out).enumerate() {
            prefetch(next);
            *out = by_magnitude::<E, _, GROUP, COUNT>(take(block), groups, code);
        }
        for (g, (group, out)) in rest.iter().zip(rest_out).enumerate() {
            let thresholds = take(full).map(|of_block| std::array::from_ref(&of_block[g]));
            [*out] = by_magnitude::<E, _, GROUP, 1>(thresholds, std::array::from_ref(group), code);
        }
    }

    /// Finds codes among numbers: one to a lane, or two, of E4M3.
    #[inline(always)]
    fn find(
        &mut self,
        Rows { row, next }: Rows<'_, E::Raw>,
        factors: &[f32],
        code: impl Fn(f32, f32) -> u32,
    ) {
        for (spread, factor) in self.spread.chunks_exact_mut(GROUP / E::PER_LANE).zip(factors) {
            // Whole vectors, which a fill of unknown length would not be.
            for part in spread.as_chunks_mut::<8>().0 {
                *part = [*factor; 8];
            }
        }
        let Self { spread, wide, .. } = self;
        if E::PER_LANE == 2 {
            let pairs = Rows { row: row.as_chunks::<2>().0, next: next.as_chunks::<2>().0 };
            find_lanes(pairs, spread, wide, |pair, scale| {
                let [first, second] = E::widen_pair(pair);
                code(first, scale) | code(second, scale) << 8
            });
        } else {
            find_lanes(Rows { row, next }, spread, wide, |raw, scale| code(E::widen(raw), scale));
        }
    }
}

/// Between E2M1's magnitudes.
pub(super) const MIDPOINTS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

/// Ties to even codes.
pub(super) const EVEN: Limits<8> = Limits::even(&MIDPOINTS);

/// Ties to the smaller magnitude.
const DOWN: Limits<8> = Limits::below(&MIDPOINTS);

/// The E2M1 code of a magnitude's, of a number that is negative or not, and zero or not.
#[inline(always)]
pub(super) fn signed(is_negative: bool, is_nonzero: bool, magnitude: u16) -> u16 {
    magnitude | u16::from(is_negative & is_nonzero) << 3
}

/// The same where what is rounded to zero has no sign.
#[inline(always)]
fn signed_down(is_negative: bool, _: bool, magnitude: u16) -> u16 {
    magnitude | u16::from(is_negative & (magnitude > 0)) << 3
}

#[inline(always)]
fn find_lanes<T: Copy>(
    Rows { row, next }: Rows<'_, T>,
    spread: &[f32],
    found: &mut [u32],
    code: impl Fn(T, f32) -> u32,
) {
    /// Lanes that fill a line of the cache.
    const LANES: usize = 16;
    let (lines, rest) = row.as_chunks::<LANES>();
    let (spread, spread_rest) = spread.as_chunks::<LANES>();
    let (found, found_rest) = found.as_chunks_mut::<LANES>();
    let sources = lines.iter().zip(next.as_chunks::<LANES>().0);
    for (((line, next), spread), found) in sources.zip(spread).zip(found) {
        prefetch(next);
        for ((found, &x), &scale) in found.iter_mut().zip(line).zip(spread) {
            *found = code(x, scale);
        }
    }
    for ((found, &x), &scale) in found_rest.iter_mut().zip(rest).zip(spread_rest) {
        *found = code(x, scale);
    }
}

/// Codes of a group whose scale is not moderate.
fn encode_odd_group<E: Element, const GROUP: usize>(
    scheme: &MicroScheme,
    group: &[E::Raw; GROUP],
    scale: f32,
    out: &mut [u8; GROUP],
) {
    if scale.is_nan() || scale == 0.0 {
        out.fill(0);
        return;
    }
    let is_rounded = scheme.dialect == MicroDialect::CompressedTensors;
    let is_even = is_rounded || scheme.dialect == MicroDialect::TensorGroup;
    for (&raw, out) in group.iter().zip(out) {
        let x = E::widen(raw) / scale;
        let x = if is_rounded { E::round(x) } else { x };
        *out = match (scheme.float, is_even) {
            (MicroFloat::E4m3, _) => e4m3_code(x),
            (MicroFloat::E2m1, true) => e2m1_code(x),
            (MicroFloat::E2m1, false) => e2m1_down_code(x),
        } as u8;
    }
}

#[inline(always)]
fn e4m3_code(x: f32) -> u32 {
    e4m3(within(x.abs(), E4M3_MAX).copysign(x)).into()
}

#[inline(always)]
fn e2m1_code(x: f32) -> u32 {
    let sign = if x < 0.0 { 8 } else { 0 };
    // Of a NaN, too, no more than four bits.
    (e2m1(within(x.abs(), E2M1_MAX)) & 7) | sign
}

#[inline(always)]
fn e2m1_down_code(x: f32) -> u32 {
    // 0.25 itself is rounded to zero, which has no sign.
    let sign = if x < -0.25 { 8 } else { 0 };
    e2m1_down(x.abs()) | sign
}

#[cfg(test)]
mod tests {
    use super::super::tile::{Bf16, F16};
    use super::*;

    /// All weights that are at most `range` scales.
    fn check<E: Element<Raw = [u8; 2]>>(
        limits: &Limits<8>,
        (scale, range): (f32, f32),
        product: impl Fn(f32) -> f32,
        code: impl Fn(bool, bool, u16) -> u16,
        defined: impl Fn(f32) -> u32,
    ) {
        let thresholds: [[i32; 1]; 7] =
            std::array::from_fn(|k| [limits.threshold::<E>(k, scale, &product)]);
        for bits in 0..=u16::MAX {
            let raw = bits.to_le_bytes();
            let x = E::widen(raw);
            if x.abs() <= range * scale {
                let code = |bits: E::Bits, rank| {
                    code(bits < E::Bits::ZERO, bits.magnitude() > E::Bits::ZERO, rank)
                };
                let [[found]] = by_magnitude::<E, _, 1, 1>(thresholds.each_ref(), &[[raw]], code);
                assert_eq!(u32::from(found), defined(x / scale), "{x:e} / {scale:e}");
            }
        }
    }

    fn check_all<E: Element<Raw = [u8; 2]>>() {
        for scale in [1, 27, 64, 110, 126, 127].map(e8m0_value) {
            let product = |x| x / scale;
            check::<E>(&EVEN, (scale, 1e3), product, signed, e2m1_code);
            check::<E>(&DOWN, (scale, 1e3), product, signed_down, e2m1_down_code);
        }
        for code in 1..E4M3_NAN {
            let scale = e4m3_value(code);
            let short = (1.0 / scale) * SHORT;
            check::<E>(&DOWN, (scale, 8.0), |x| x * short, signed_down, e2m1_down_code);
            for global in [1.0, 0.75, 11.1, 12345.0] {
                let scale = scale / global;
                check::<E>(&EVEN, (scale, 1e3), |x| x / scale, signed, e2m1_code);
            }
        }
    }

    #[test]
    fn codes_by_thresholds_are_those_of_quotients() {
        check_all::<Bf16>();
        check_all::<F16>();
    }
}
