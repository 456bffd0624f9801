//! Decodes runs of codes: unpack, scale, round.

use std::ops::Range;

use super::coded::{Code, Coded, Extra, OPERANDS, Rect, Scale, Unit};
use crate::dtype::Dtype;
use crate::isa::{Isa, Kernel};
use crate::source::elements::{F4, F8_E4M3, f16};

/// Elements that are decoded at a time: what is made of them between two steps stays in the first
/// cache.
const TILE: usize = 512;

/// Rows and columns of a transposed tensor that are decoded at a time: enough rows for a column of them
/// to be whole cache lines.
const SQUARE: (usize, usize) = (128, TILE);

/// Elements of a row of the buffer for that: not a power of two, so that a column's elements don't
/// compete for the same places in the cache.
const PITCH: usize = TILE + 32;

/// Decodes a rectangle of stored codes into `out` in elements of `dtype`. The logical rows that it
/// makes start `stride` elements apart. `operands` are the bytes that [`Coded::ranges`] names.
pub(in crate::source) fn decode(
    isa: Isa,
    coded: &Coded,
    dtype: Dtype,
    rect: &Rect,
    operands: [&[u8]; OPERANDS],
    out: &mut [u8],
    stride: usize,
) {
    let values = Values::new(coded, operands[2]);
    let starts = coded.ranges(rect).map(|range| range.start);
    let global = match coded.scale {
        Scale::OverGlobal => f32_at(operands[2], 0),
        _ => 1.0,
    };
    let decode = Decode { coded, dtype, values: &values, operands, starts, global };
    isa.run(Rectangle { decode, rect, out, stride });
}

/// How codes become values, in the shape that unpacking likes best.
enum Values {
    /// Of a byte that is a code, computed.
    Computed(Code),
    /// Of a narrower code, looked up.
    One(Box<[f32; 128]>),
    /// Of two codes in a byte, looked up.
    Two(Box<[[f32; 2]; 256]>),
}

impl Values {
    fn new(coded: &Coded, operand: &[u8]) -> Self {
        let Unit { bits, codes, high_first, .. } = coded.unit;
        let half = 1 << (bits - 1);
        let value = |code: usize| match coded.code {
            Code::E4m3 => F8_E4M3[code],
            Code::E2m1 => F4[code % 16],
            Code::Signed => f32::from(code as u8 as i8),
            Code::Offset => code as f32 - half as f32,
            Code::Unsigned => code as f32,
            Code::Table => f32_at(operand, code % 16),
            Code::Element => unreachable!("it is copied"),
        };
        match (bits, codes) {
            (8 | 16 | 32, _) => Self::Computed(coded.code),
            (4, 2) => Self::Two(Box::new(std::array::from_fn(|byte| {
                let (low, high) = (value(byte % 16), value(byte / 16));
                if high_first { [high, low] } else { [low, high] }
            }))),
            _ => Self::One(Box::new(std::array::from_fn(value))),
        }
    }
}

/// What every row of a rectangle needs.
struct Decode<'a> {
    coded: &'a Coded,
    dtype: Dtype,
    values: &'a Values,
    operands: [&'a [u8]; OPERANDS],
    /// Where in its operand each of `operands` starts, in bytes.
    starts: [u64; OPERANDS],
    /// What E4M3 scales are divided by.
    global: f32,
}

/// What a tile is made in.
struct Buffers {
    values: [f32; TILE],
    /// One for each block, of which there may be as many as elements.
    numbers: [f32; TILE],
    /// One for each element.
    spread: [f32; TILE],
}

/// All of a rectangle.
struct Rectangle<'a> {
    decode: Decode<'a>,
    rect: &'a Rect,
    out: &'a mut [u8],
    stride: usize,
}

impl Kernel for Rectangle<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { decode, rect, out, stride } = self;
        let [values, numbers, spread] = [[0.0; TILE]; 3];
        let mut buffers = Buffers { values, numbers, spread };
        let size = decode.dtype.bitsize() / 8;
        if decode.coded.transposed {
            match size {
                2 => decode.transposed::<2>(rect, &mut buffers, out, stride),
                _ => decode.transposed::<4>(rect, &mut buffers, out, stride),
            }
        } else {
            let len = (rect.cols.end - rect.cols.start) as usize * size;
            for (row, i) in rect.rows.clone().zip(0..) {
                decode.row(row, &rect.cols, &mut buffers, &mut out[i * stride * size..][..len]);
            }
        }
    }
}

impl Decode<'_> {
    /// Some columns of a stored row.
    #[inline(always)]
    fn row(&self, row: u64, cols: &Range<u64>, buffers: &mut Buffers, out: &mut [u8]) {
        let coded = self.coded;
        let size = self.dtype.bitsize() / 8;
        let width = coded.block.1;
        let codes =
            &self.operands[0][(row * coded.row_bytes).saturating_sub(self.starts[0]) as usize..];
        // Where `codes` starts in its row.
        let skipped = self.starts[0].saturating_sub(row * coded.row_bytes);
        let scale_row = coded.scale_row(row);
        for (first, out) in (cols.start..).step_by(TILE).zip(out.chunks_mut(TILE * size)) {
            let n = out.len() / size;
            let run = first..first + n as u64;
            let bytes = coded.unit.bytes_of(&run, coded.row_bytes);
            let bytes = &codes[(bytes.start - skipped) as usize..(bytes.end - skipped) as usize];
            if coded.is_elements() {
                out.copy_from_slice(bytes);
                continue;
            }
            let values = &mut buffers.values[..n];
            let spread = &mut buffers.spread[..n];
            unpack(coded.unit, self.values, bytes, first, values);
            let blocks = first / width..(run.end - 1) / width + 1;
            let numbers = &mut buffers.numbers[..(blocks.end - blocks.start) as usize];
            // The first of them in the order in which scales are stored.
            let at = scale_row * coded.scale_cols() + blocks.start;
            let blocks = Blocks { first, width };
            match coded.extra {
                Extra::ZeroDown(unit) => {
                    let col = at - scale_row * coded.scale_cols();
                    for (number, col) in numbers.iter_mut().zip(col..) {
                        *number = self.zero_down(unit, scale_row, col);
                    }
                    blocks.combine(values, numbers, spread, |value, zero| value - zero);
                }
                Extra::ZeroBytes => {
                    for (number, byte) in numbers.iter_mut().zip(self.from(2, at)) {
                        *number = f32::from(*byte as i8);
                    }
                    blocks.combine(values, numbers, spread, |value, zero| value - zero);
                }
                Extra::None | Extra::Bias | Extra::Factor(_) => {}
            }
            self.scales(at, numbers);
            blocks.combine(values, numbers, spread, |value, scale| value * scale);
            match coded.extra {
                Extra::Bias => {
                    round(self.dtype, values);
                    self.numbers(2, at, numbers);
                    blocks.combine(values, numbers, spread, |value, bias| value + bias);
                }
                Extra::Factor(factor) => {
                    for value in values.iter_mut() {
                        *value *= factor;
                    }
                }
                Extra::None | Extra::ZeroDown(_) | Extra::ZeroBytes => {}
            }
            if let Some(dtype) = coded.rounded {
                round(dtype, values);
            }
            store(self.dtype, values, out);
        }
    }

    /// A stored rectangle with its rows as columns.
    #[inline(always)]
    fn transposed<const SIZE: usize>(
        &self,
        rect: &Rect,
        buffers: &mut Buffers,
        out: &mut [u8],
        stride: usize,
    ) {
        let mut square = vec![[0; SIZE]; SQUARE.0 * PITCH];
        for top in rect.rows.clone().step_by(SQUARE.0) {
            let height = (rect.rows.end - top).min(SQUARE.0 as u64) as usize;
            for left in rect.cols.clone().step_by(SQUARE.1) {
                let width = (rect.cols.end - left).min(SQUARE.1 as u64) as usize;
                for (row, line) in (top..).zip(square.chunks_exact_mut(PITCH)).take(height) {
                    let line = line[..width].as_flattened_mut();
                    self.row(row, &(left..left + width as u64), buffers, line);
                }
                let first = (left - rect.cols.start) as usize * stride;
                let first = first + (top - rect.rows.start) as usize;
                // Four columns at a time, which lie next to one another in a row.
                for j in (0..width).step_by(4) {
                    let mut columns = [[[[0; SIZE]; 4]; SQUARE.0 / 4]; 4];
                    for (i, lines) in square.chunks_exact(4 * PITCH).enumerate() {
                        let corner = std::array::from_fn(|k| {
                            *lines[k * PITCH + j..].first_chunk().expect("lines have room to spare")
                        });
                        for (column, elements) in columns.iter_mut().zip(transpose(corner)) {
                            column[i] = elements;
                        }
                    }
                    for (k, column) in columns.iter().take(width - j).enumerate() {
                        let at = (first + (j + k) * stride) * SIZE;
                        let column = column.as_flattened().as_flattened();
                        out[at..at + height * SIZE].copy_from_slice(&column[..height * SIZE]);
                    }
                }
            }
        }
    }

    /// The bytes of an operand from a position on.
    #[inline(always)]
    fn from(&self, operand: usize, at: u64) -> &[u8] {
        &self.operands[operand][(at - self.starts[operand]) as usize..]
    }

    /// Scales that follow one another, from the position `at` among them.
    #[inline(always)]
    fn scales(&self, at: u64, out: &mut [f32]) {
        let bytes = out.iter_mut().zip(self.from(1, at * self.coded.scale.bytes()));
        match self.coded.scale {
            Scale::Bf16 | Scale::F16 | Scale::F32 => self.numbers(1, at, out),
            Scale::E4m3 => bytes.for_each(|(scale, byte)| *scale = e4m3(*byte)),
            Scale::OverGlobal => {
                bytes.for_each(|(scale, byte)| *scale = e4m3(*byte) / self.global);
            }
            Scale::E8m0 => bytes.for_each(|(scale, byte)| {
                *scale = if *byte == 255 { f32::NAN } else { power(*byte) };
            }),
            Scale::Absent => unreachable!("elements have none"),
            Scale::Power => bytes.for_each(|(scale, byte)| *scale = power(*byte)),
            Scale::Nested { block, offset } => {
                for ((scale, byte), at) in bytes.zip(at..) {
                    let outer =
                        f32_at(self.operands[3], (at / block - self.starts[3] / 4) as usize);
                    *scale = f32_at(self.operands[4], usize::from(*byte)) * outer + offset;
                }
            }
        }
    }

    /// Numbers of an operand that is stored as scales are, as [`scales`](Self::scales).
    #[inline(always)]
    fn numbers(&self, operand: usize, at: u64, out: &mut [f32]) {
        let bytes = self.from(operand, at * self.coded.scale.bytes());
        match self.coded.scale {
            Scale::Bf16 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(number, raw)| {
                *number = f32::from_bits(u32::from(u16::from_le_bytes(*raw)) << 16);
            }),
            Scale::F16 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(number, raw)| {
                *number = f16(u16::from_le_bytes(*raw));
            }),
            _ => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(number, raw)| {
                *number = f32::from_le_bytes(*raw);
            }),
        }
    }

    /// The zero point of a block, of those that are packed down the columns.
    #[inline(always)]
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

/// Blocks of a run of columns.
#[derive(Clone, Copy)]
struct Blocks {
    /// The run's first column.
    first: u64,
    /// Columns of a block.
    width: u64,
}

impl Blocks {
    /// Replaces every value by what `f` makes of it and its block's number. `spread` is of the same
    /// length as `values`, and is overwritten.
    #[inline(always)]
    fn combine(
        self,
        values: &mut [f32],
        numbers: &[f32],
        spread: &mut [f32],
        f: impl Fn(f32, f32) -> f32,
    ) {
        let width = self.width as usize;
        let left = (self.first % self.width) as usize;
        let head = if left == 0 { 0 } else { values.len().min(width - left) };
        let (first, numbers) = numbers.split_at(usize::from(left > 0));
        // Loops over 16 or 32 values would be unrolled, and then no longer be vectorized.
        if width == 16 || width == 32 {
            let (head, rest) = spread.split_at_mut(head);
            if let [number] = first {
                head.fill(*number);
            }
            match width {
                16 => spread_over::<16>(numbers, rest),
                _ => spread_over::<32>(numbers, rest),
            }
            for (value, number) in values.iter_mut().zip(&*spread) {
                *value = f(*value, *number);
            }
            return;
        }
        let (head, rest) = values.split_at_mut(head);
        let blocks = head.chunks_mut(width).zip(first).chain(rest.chunks_mut(width).zip(numbers));
        for (block, number) in blocks {
            for value in block {
                *value = f(*value, *number);
            }
        }
    }
}

/// Fills blocks of `N`, the last of which may be cut, with a number each.
#[inline(always)]
fn spread_over<const N: usize>(numbers: &[f32], out: &mut [f32]) {
    let (blocks, last) = out.as_chunks_mut::<N>();
    let (whole, rest) = numbers.split_at(blocks.len());
    for (block, number) in blocks.iter_mut().zip(whole) {
        *block = [*number; N];
    }
    if let [number] = rest {
        last.fill(*number);
    }
}

/// Four rows of four elements as columns.
#[inline(always)]
fn transpose<const SIZE: usize>(rows: [[[u8; SIZE]; 4]; 4]) -> [[[u8; SIZE]; 4]; 4] {
    let mut columns = [[[0; SIZE]; 4]; 4];
    if SIZE == 2 {
        // Four elements in a word; pairs of them change places.
        const EVEN: u64 = 0x0000_ffff_0000_ffff;
        const LOW: u64 = 0xffff_ffff;
        let word = |row: [[u8; SIZE]; 4]| {
            u64::from_le_bytes(row.as_flattened().try_into().expect("eight bytes"))
        };
        let [a, b, c, d] = rows.map(word);
        let even = |a: u64, b: u64| a & EVEN | (b & EVEN) << 16;
        let odd = |a: u64, b: u64| a >> 16 & EVEN | b & !EVEN;
        let low = |a: u64, c: u64| a & LOW | c << 32;
        let high = |a: u64, c: u64| a >> 32 | c & !LOW;
        let words = [
            low(even(a, b), even(c, d)),
            low(odd(a, b), odd(c, d)),
            high(even(a, b), even(c, d)),
            high(odd(a, b), odd(c, d)),
        ];
        for (column, word) in columns.iter_mut().zip(words) {
            column.as_flattened_mut().copy_from_slice(&word.to_le_bytes());
        }
    } else {
        for (i, column) in columns.iter_mut().enumerate() {
            *column = rows.map(|row| row[i]);
        }
    }
    columns
}

/// The values of codes from column `first` on, of which `bytes` are the units.
#[inline(always)]
fn unpack(unit: Unit, values: &Values, bytes: &[u8], first: u64, out: &mut [f32]) {
    match values {
        Values::Computed(code) => {
            let codes = out.iter_mut().zip(bytes);
            match code {
                Code::E4m3 => codes.for_each(|(value, code)| *value = e4m3(*code)),
                Code::Signed => codes.for_each(|(value, code)| *value = f32::from(*code as i8)),
                Code::Offset => {
                    codes.for_each(|(value, code)| *value = f32::from(*code) - 128.0);
                }
                Code::Unsigned => codes.for_each(|(value, code)| *value = f32::from(*code)),
                Code::E2m1 | Code::Table => unreachable!("its codes have four bits"),
                Code::Element => unreachable!("it is copied"),
            }
        }
        Values::Two(table) => {
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
        Values::One(table) if unit == Unit::dense(unit.bits) && first.is_multiple_of(8) => {
            match unit.bits {
                1 => unpack_dense::<1>(table, bytes, out),
                2 => unpack_dense::<2>(table, bytes, out),
                3 => unpack_dense::<3>(table, bytes, out),
                5 => unpack_dense::<5>(table, bytes, out),
                6 => unpack_dense::<6>(table, bytes, out),
                _ => unpack_dense::<7>(table, bytes, out),
            }
        }
        Values::One(table) => {
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
                    *value = table[code as usize & 0x7f];
                }
                (skip, rest) = (0, after);
            }
        }
    }
}

/// The values of codes of `BITS` bits that follow one another from the first bit on.
#[inline(always)]
fn unpack_dense<const BITS: usize>(table: &[f32; 128], bytes: &[u8], out: &mut [f32]) {
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

/// Rounds to the nearest values of a type, ties to even.
#[inline(always)]
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

/// Stores values as elements of a type, rounded to nearest, ties to even. All NaNs are one: which
/// bits an operation gives them depends on the CPU.
#[inline(always)]
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
                *out = if value.is_nan() { f32::NAN } else { *value }.to_le_bytes();
            }
        }
        other => unreachable!("nothing is decoded to {other}"),
    }
}

/// The value of an E4M3 code, by selection.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    // Multiples of 2^-9, which are the last bits of 2^-6 and more.
    let small = f32::from_bits((magnitude << 20) + (121 << 23)) - f32::from_bits(121 << 23);
    let finite = if magnitude < 8 { small } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { finite };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// 2 to the power of `code - 127`; infinity for the last code.
#[inline(always)]
fn power(code: u8) -> f32 {
    // The only one that is subnormal.
    f32::from_bits(if code == 0 { 1 << 22 } else { u32::from(code) << 23 })
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
