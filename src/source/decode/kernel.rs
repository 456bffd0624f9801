//! Decodes runs of codes: unpack, scale, round.

use std::ops::Range;

use super::coded::{Code, Coded, Extra, OPERANDS, Rect, Scale, Unit};
use crate::dtype::Dtype;
use crate::source::elements::{F4, F8_E4M3, F8_E8M0, f16};

/// Elements that are decoded at a time: what is made of them between two steps stays in the first
/// cache.
const TILE: usize = 512;

/// Rows and columns of a transposed tensor that are decoded at a time.
const SQUARE: (u64, u64) = (32, TILE as u64);

/// Columns of that are made rows at a time.
const COLUMNS: usize = 8;

/// Elements of a row of the buffer for that: not a power of two, so that a column's elements don't
/// compete for the same places in the cache.
const PITCH: usize = TILE + 32;

/// Decodes a rectangle of stored codes into `out` in elements of `dtype`. The logical rows that it
/// makes start `stride` elements apart. `operands` are the bytes that [`Coded::ranges`] names.
pub(in crate::source) fn decode(
    coded: &Coded,
    dtype: Dtype,
    rect: &Rect,
    operands: [&[u8]; OPERANDS],
    out: &mut [u8],
    stride: usize,
) {
    let table = Table::new(coded, operands[2]);
    let starts = coded.ranges(rect).map(|range| range.start);
    let global = match coded.scale {
        Scale::OverGlobal => f32_at(operands[2], 0),
        _ => 1.0,
    };
    let decode = Decode { coded, dtype, table: &table, operands, starts, global };
    let size = dtype.bitsize() / 8;
    if coded.transposed {
        match size {
            2 => decode.transposed::<2>(rect, out, stride),
            _ => decode.transposed::<4>(rect, out, stride),
        }
    } else {
        let len = (rect.cols.end - rect.cols.start) as usize * size;
        for (row, i) in rect.rows.clone().zip(0..) {
            decode.row(row, &rect.cols, &mut out[i * stride * size..][..len]);
        }
    }
}

/// The value of every code, in the shape that unpacking likes best.
enum Table {
    /// Of one code.
    One(Box<[f32; 256]>),
    /// Of two codes in a byte.
    Two(Box<[[f32; 2]; 256]>),
}

impl Table {
    fn new(coded: &Coded, operand: &[u8]) -> Self {
        let Unit { bits, high_first, .. } = coded.unit;
        let half = 1 << (bits - 1);
        let value = |code: usize| match coded.code {
            Code::E4m3 => F8_E4M3[code],
            Code::E2m1 => F4[code % 16],
            Code::Signed => f32::from(code as u8 as i8),
            Code::Offset => code as f32 - half as f32,
            Code::Unsigned => code as f32,
            Code::Table => f32_at(operand, code % 16),
        };
        if bits == 4 && coded.unit.codes == 2 {
            let pair = |byte: usize| {
                let (low, high) = (value(byte % 16), value(byte / 16));
                if high_first { [high, low] } else { [low, high] }
            };
            Self::Two(Box::new(std::array::from_fn(pair)))
        } else {
            let values = |code| if code < 1 << bits { value(code) } else { 0.0 };
            Self::One(Box::new(std::array::from_fn(values)))
        }
    }
}

/// What every row of a rectangle needs.
struct Decode<'a> {
    coded: &'a Coded,
    dtype: Dtype,
    table: &'a Table,
    operands: [&'a [u8]; OPERANDS],
    /// Where in its operand each of `operands` starts, in bytes.
    starts: [u64; OPERANDS],
    /// What E4M3 scales are divided by.
    global: f32,
}

impl Decode<'_> {
    /// Some columns of a stored row.
    fn row(&self, row: u64, cols: &Range<u64>, out: &mut [u8]) {
        let coded = self.coded;
        let size = self.dtype.bitsize() / 8;
        let mut values = [0.0; TILE];
        let mut spread = [0.0; TILE];
        let codes =
            &self.operands[0][(row * coded.row_bytes).saturating_sub(self.starts[0]) as usize..];
        // Where `codes` starts in its row.
        let skipped = self.starts[0].saturating_sub(row * coded.row_bytes);
        for (first, out) in (cols.start..).step_by(TILE).zip(out.chunks_mut(TILE * size)) {
            let n = out.len() / size;
            let run = first..first + n as u64;
            let (values, spread) = (&mut values[..n], &mut spread[..n]);
            let bytes = coded.unit.bytes_of(&run, coded.row_bytes);
            let bytes = &codes[(bytes.start - skipped) as usize..(bytes.end - skipped) as usize];
            unpack(coded.unit, self.table, bytes, first, values);
            match coded.extra {
                Extra::ZeroDown(unit) => {
                    self.spread(row, &run, spread, |row, col, _| self.zero_down(unit, row, col));
                    subtract(values, spread);
                }
                Extra::ZeroBytes => {
                    let zeros = self.operands[2];
                    self.spread(row, &run, spread, |_, _, at| {
                        f32::from(zeros[(at - self.starts[2]) as usize] as i8)
                    });
                    subtract(values, spread);
                }
                _ => {}
            }
            self.spread(row, &run, spread, |_, _, at| self.scale(at));
            multiply(values, spread);
            match coded.extra {
                Extra::Bias => {
                    round(self.dtype, values);
                    self.spread(row, &run, spread, |_, _, at| self.number(2, at));
                    add(values, spread);
                }
                Extra::Factor(factor) => {
                    for value in values.iter_mut() {
                        *value *= factor;
                    }
                }
                _ => {}
            }
            if let Some(dtype) = coded.rounded {
                round(dtype, values);
            }
            store(self.dtype, values, out);
        }
    }

    /// A stored rectangle with its rows as columns.
    fn transposed<const SIZE: usize>(&self, rect: &Rect, out: &mut [u8], stride: usize) {
        let mut square = vec![[0; SIZE]; SQUARE.0 as usize * PITCH];
        for top in rect.rows.clone().step_by(SQUARE.0 as usize) {
            let height = SQUARE.0.min(rect.rows.end - top) as usize;
            for left in rect.cols.clone().step_by(SQUARE.1 as usize) {
                let width = SQUARE.1.min(rect.cols.end - left) as usize;
                for (row, line) in (top..).zip(square.chunks_exact_mut(PITCH)).take(height) {
                    let line = line[..width].as_flattened_mut();
                    self.row(row, &(left..left + width as u64), line);
                }
                let first = (left - rect.cols.start) as usize * stride;
                let first = first + (top - rect.rows.start) as usize;
                // A few columns at a time, which lie next to one another in a row.
                for j in (0..width).step_by(COLUMNS) {
                    let n = COLUMNS.min(width - j);
                    let mut columns = [[[0; SIZE]; SQUARE.0 as usize]; COLUMNS];
                    for (i, line) in square.chunks_exact(PITCH).take(height).enumerate() {
                        let elements: &[[u8; SIZE]; COLUMNS] =
                            line[j..].first_chunk().expect("lines have room beyond a tile");
                        for (column, element) in columns.iter_mut().zip(elements) {
                            column[i] = *element;
                        }
                    }
                    for (k, column) in columns.iter().take(n).enumerate() {
                        let at = (first + (j + k) * stride) * SIZE;
                        out[at..at + height * SIZE]
                            .copy_from_slice(column[..height].as_flattened());
                    }
                }
            }
        }
    }

    /// Fills `out` with a number for every element of a run: one for each block, of which `number` is
    /// told the row and column among the blocks and the place in their order.
    #[inline(always)]
    fn spread(
        &self,
        row: u64,
        run: &Range<u64>,
        out: &mut [f32],
        number: impl Fn(u64, u64, u64) -> f32,
    ) {
        let width = self.coded.block.1;
        let row = self.coded.scale_row(row);
        let base = row * self.coded.scale_cols();
        let mut col = run.start / width;
        let mut rest = out;
        // Small blocks in loops of a known length.
        if run.start.is_multiple_of(width) {
            let number = |col| number(row, col, base + col);
            let done = match width {
                16 => fill::<16>(rest, col, number),
                32 => fill::<32>(rest, col, number),
                64 => fill::<64>(rest, col, number),
                _ => 0,
            };
            rest = &mut rest[done * width as usize..];
            col += done as u64;
        }
        let mut len = (width - run.start % width) as usize;
        while !rest.is_empty() {
            let (block, after) = rest.split_at_mut(len.min(rest.len()));
            block.fill(number(row, col, base + col));
            rest = after;
            len = width as usize;
            col += 1;
        }
    }

    #[inline(always)]
    fn scale(&self, at: u64) -> f32 {
        match self.coded.scale {
            Scale::Bf16 | Scale::F16 | Scale::F32 => self.number(1, at),
            Scale::E4m3 => F8_E4M3[self.byte(1, at)],
            Scale::OverGlobal => F8_E4M3[self.byte(1, at)] / self.global,
            Scale::E8m0 => F8_E8M0[self.byte(1, at)],
            Scale::Power => match self.byte(1, at) {
                255 => f32::INFINITY,
                code => F8_E8M0[code],
            },
            Scale::Nested { block, offset } => {
                let outer = f32_at(self.operands[3], (at / block - self.starts[3] / 4) as usize);
                f32_at(self.operands[4], self.byte(1, at)) * outer + offset
            }
        }
    }

    /// The byte of an operand at a position.
    #[inline(always)]
    fn byte(&self, operand: usize, at: u64) -> usize {
        self.operands[operand][(at - self.starts[operand]) as usize].into()
    }

    /// The number at a position of an operand that is stored as scales are.
    #[inline(always)]
    fn number(&self, operand: usize, at: u64) -> f32 {
        let size = self.coded.scale.bytes();
        let bytes = &self.operands[operand][(at * size - self.starts[operand]) as usize..];
        match self.coded.scale {
            Scale::Bf16 => {
                f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
            }
            Scale::F16 => f16(u16::from_le_bytes([bytes[0], bytes[1]])),
            _ => f32_at(bytes, 0),
        }
    }

    /// The zero point of a block, of those that are packed down the columns.
    fn zero_down(&self, unit: Unit, row: u64, col: u64) -> f32 {
        let words = unit.words(row);
        let word = |row: u64| {
            let at = (row * self.coded.scale_cols() + col) * 4 - self.starts[2];
            let bytes = &self.operands[2][at as usize..][..4];
            u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let low = word(words.start);
        let high = if words.end - words.start > 1 { word(words.start + 1) } else { 0 };
        let code = (high << 32 | low) >> unit.shift(row) & ((1 << unit.bits) - 1);
        code as f32 - (1u32 << (unit.bits - 1)) as f32
    }
}

/// Fills whole blocks of `N` with a number for each, and returns how many there were.
#[inline(always)]
fn fill<const N: usize>(out: &mut [f32], first: u64, number: impl Fn(u64) -> f32) -> usize {
    let (blocks, _) = out.as_chunks_mut::<N>();
    for (col, block) in (first..).zip(blocks.iter_mut()) {
        *block = [number(col); N];
    }
    blocks.len()
}

/// The values of codes from column `first` on, of which `bytes` are the units.
#[inline(always)]
fn unpack(unit: Unit, table: &Table, bytes: &[u8], first: u64, out: &mut [f32]) {
    match table {
        Table::One(table) if unit.bits == 8 => {
            for (value, byte) in out.iter_mut().zip(bytes) {
                *value = table[usize::from(*byte)];
            }
        }
        Table::Two(table) => {
            let (mut bytes, mut out) = (bytes, out);
            if first % 2 == 1
                && let (Some((byte, after)), Some((value, rest))) =
                    (bytes.split_first(), std::mem::take(&mut out).split_first_mut())
            {
                *value = table[usize::from(*byte)][1];
                (bytes, out) = (after, rest);
            }
            let (pairs, last) = out.as_chunks_mut::<2>();
            let whole = pairs.len();
            for (pair, byte) in pairs.iter_mut().zip(bytes) {
                *pair = table[usize::from(*byte)];
            }
            if let [value] = last {
                *value = table[usize::from(bytes[whole])][0];
            }
        }
        Table::One(table) if unit == Unit::dense(unit.bits) && first.is_multiple_of(8) => {
            match unit.bits {
                1 => unpack_dense::<1>(table, bytes, out),
                2 => unpack_dense::<2>(table, bytes, out),
                3 => unpack_dense::<3>(table, bytes, out),
                5 => unpack_dense::<5>(table, bytes, out),
                6 => unpack_dense::<6>(table, bytes, out),
                _ => unpack_dense::<7>(table, bytes, out),
            }
        }
        Table::One(table) => {
            let codes = usize::from(unit.codes);
            let mask = (1 << unit.bits) - 1;
            let mut skip = first as usize % codes;
            let mut rest = out;
            for bytes in bytes.chunks(unit.bytes.into()) {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                let word = u64::from_le_bytes(word) >> (skip * usize::from(unit.bits));
                let (now, after) = rest.split_at_mut((codes - skip).min(rest.len()));
                for (i, value) in now.iter_mut().enumerate() {
                    let code = word >> (i * usize::from(unit.bits)) & mask;
                    *value = table[code as usize & 0xff];
                }
                (skip, rest) = (0, after);
            }
        }
    }
}

/// The values of codes of `BITS` bits that follow one another from the first bit on.
#[inline(always)]
fn unpack_dense<const BITS: usize>(table: &[f32; 256], bytes: &[u8], out: &mut [f32]) {
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    let value = |word: u64, i: usize| table[(word >> (i * BITS)) as usize & ((1 << BITS) - 1)];
    let (units, rest) = bytes.as_chunks::<BITS>();
    let (whole, last) = out.as_chunks_mut::<8>();
    for (out, unit) in whole.iter_mut().zip(units) {
        let word = word(unit);
        *out = std::array::from_fn(|i| value(word, i));
    }
    // The end of a row may be cut in the middle of a unit.
    let tail = units.get(whole.len()).map_or(rest, |unit| unit);
    let word = word(tail);
    for (i, out) in last.iter_mut().enumerate() {
        *out = value(word, i);
    }
}

fn subtract(values: &mut [f32], others: &[f32]) {
    for (value, other) in values.iter_mut().zip(others) {
        *value -= other;
    }
}

fn multiply(values: &mut [f32], others: &[f32]) {
    for (value, other) in values.iter_mut().zip(others) {
        *value *= other;
    }
}

fn add(values: &mut [f32], others: &[f32]) {
    for (value, other) in values.iter_mut().zip(others) {
        *value += other;
    }
}

/// Rounds to the nearest values of a type, ties to even.
fn round(dtype: Dtype, values: &mut [f32]) {
    match dtype {
        Dtype::BF16 => {
            for value in values {
                *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
            }
        }
        Dtype::F16 => {
            for value in values {
                *value = f16(f16_bits(*value));
            }
        }
        _ => {}
    }
}

/// Stores values as elements of a type, rounded to nearest, ties to even.
fn store(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    match dtype {
        Dtype::BF16 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = bf16_bits(*value).to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = f16_bits(*value).to_le_bytes();
            }
        }
        Dtype::F32 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = value.to_le_bytes();
            }
        }
        other => unreachable!("nothing is decoded to {other}"),
    }
}

#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded as u16 }
}

#[inline(always)]
fn f16_bits(x: f32) -> u16 {
    let magnitude = x.abs();
    let bits = magnitude.to_bits();
    // Below 2^-14 multiples of 2^-24, which a sum in [0.5, 1) has in its last bits.
    let small = (magnitude + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let normal = (bits.wrapping_add(0xfff + (bits >> 13 & 1)) >> 13).wrapping_sub(112 << 10);
    let finite = if magnitude < f32::from_bits(113 << 23) { small } else { normal };
    let bounded = if magnitude >= 65520.0 { 0x7c00 } else { finite };
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    if x.is_nan() { 0x7e00 } else { bounded as u16 | sign }
}

#[inline(always)]
fn f32_at(bytes: &[u8], at: usize) -> f32 {
    let bytes = &bytes[at * 4..][..4];
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
