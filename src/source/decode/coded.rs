//! How codes are laid out, and which bytes of which operand a rectangle takes.

use std::ops::Range;

use crate::dtype::Dtype;

/// The most operands that a tensor is decoded from.
pub(in crate::source) const OPERANDS: usize = 5;

/// A weight stored as codes with a scale for each block of them.
///
/// An element is `code * scale`, computed in f32 and rounded once to the logical element type,
/// unless `extra` or `rounded` say more. The first operand holds the codes, the second the scales.
/// Elements that are only stored in another order are codes that are copied.
///
/// Codes stand in a matrix of `rows` x `cols`, which is the logical tensor's view as a matrix, or
/// its flat run of elements (one row), or, where `transposed`, has each slab of it transposed.
#[derive(Clone, Debug, PartialEq)]
pub struct Coded {
    pub(super) code: Code,
    /// How codes are packed.
    pub(super) unit: Unit,
    pub(super) rows: u64,
    pub(super) cols: u64,
    /// Bytes from a row of codes to the next.
    pub(super) row_bytes: u64,
    /// Rows of one of several matrices that stand below one another; blocks don't reach from one
    /// into the next.
    pub(super) slab_rows: u64,
    /// Whether the logical tensor has rows and columns of each slab exchanged.
    pub(super) transposed: bool,
    pub(super) scale: Scale,
    /// Rows and columns of a block.
    pub(super) block: (u64, u64),
    pub(super) extra: Extra,
    /// What a product is rounded to before the logical element type.
    pub(super) rounded: Option<Dtype>,
}

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// An 8-bit float.
    E4m3,
    /// A 4-bit float.
    E2m1,
    /// A signed byte.
    Signed,
    /// An unsigned integer, less half of their number.
    Offset,
    /// An unsigned integer.
    Unsigned,
    /// An entry of the table of 16 f32 that the third operand is.
    Table,
    /// The element itself, of which there is no more to be made.
    Element,
}

/// The smallest run of codes that fills whole bytes: a little-endian word of them, the first in the
/// lowest bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) bits: u8,
    pub(super) codes: u8,
    pub(super) bytes: u8,
    /// Of two codes in a byte, the first is in the high bits instead.
    pub(super) high_first: bool,
}

impl Unit {
    /// Codes that follow one another without gaps.
    pub(super) fn dense(bits: u8) -> Self {
        let (codes, bytes) = match bits {
            8 => (1, 1),
            4 => (2, 1),
            _ => (8, bits),
        };
        Self { bits, codes, bytes, high_first: false }
    }

    /// As many whole codes as fit in 32 bits.
    pub(super) fn word(bits: u8) -> Self {
        if 32_u8.is_multiple_of(bits) {
            return Self::dense(bits);
        }
        Self { bits, codes: 32 / bits, bytes: 4, high_first: false }
    }

    /// The bytes that a run of codes in a row of so many bytes lies in.
    pub(super) fn bytes_of(self, codes: &Range<u64>, row_bytes: u64) -> Range<u64> {
        let (per, bytes) = (u64::from(self.codes), u64::from(self.bytes));
        codes.start / per * bytes..(codes.end.div_ceil(per) * bytes).min(row_bytes)
    }
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    /// There are none.
    Absent,
    Bf16,
    F16,
    F32,
    E4m3,
    /// A power of two; the last code is a NaN.
    E8m0,
    /// A power of two; the last code is 2^128, which is infinite.
    Power,
    /// E4M3 over the one f32 that the third operand is.
    OverGlobal,
    /// An entry of the table of 256 f32 that the fifth operand is, times an f32 of the fourth for
    /// each `block` scales, plus `offset`.
    Nested {
        block: u64,
        offset: f32,
    },
}

impl Scale {
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            _ => 1,
        }
    }
}

/// What else an element is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Extra {
    None,
    /// A zero point for each block, taken from the code: the third operand has them as unsigned
    /// integers less half of their number, packed down each column in words of `unit`.
    ZeroDown(Unit),
    /// A zero point for each block, taken from the code: the third operand has them as signed bytes.
    ZeroBytes,
    /// A bias for each block, added to the rounded product: the third operand has them as the
    /// second has scales.
    Bias,
    /// The product is multiplied by this too.
    Factor(f32),
}

/// Part of the matrix of codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) struct Rect {
    pub(in crate::source) rows: Range<u64>,
    pub(in crate::source) cols: Range<u64>,
}

impl Coded {
    /// Codes that have a scale for each row, or for blocks that need no slabs.
    pub(super) fn new(code: Code, unit: Unit, (rows, cols): (u64, u64), scale: Scale) -> Self {
        Self {
            code,
            unit,
            rows,
            cols,
            row_bytes: unit.bytes_of(&(0..cols), u64::MAX).end,
            slab_rows: rows.max(1),
            transposed: false,
            scale,
            block: (1, cols.max(1)),
            extra: Extra::None,
            rounded: None,
        }
    }

    /// Elements of `size` bytes, in rows that lie `row_bytes` apart: the columns of the logical matrix.
    pub(in crate::source) fn columns((rows, cols): (u64, u64), size: u8, row_bytes: u64) -> Self {
        let unit = Unit { bits: size * 8, codes: 1, bytes: size, high_first: false };
        Self {
            row_bytes,
            transposed: true,
            ..Self::new(Code::Element, unit, (rows, cols), Scale::Absent)
        }
    }

    /// Whether elements are stored as they are, in another order.
    pub(in crate::source) fn is_elements(&self) -> bool {
        self.code == Code::Element
    }

    /// Elements in a row of the logical tensor, as a matrix.
    pub(in crate::source) fn width(&self) -> u64 {
        if self.transposed { self.slab_rows } else { self.cols }
    }

    /// Rows and columns of each logical matrix, where its codes are transposed.
    pub(in crate::source) fn transposed(&self) -> Option<(u64, u64)> {
        self.transposed.then_some((self.cols, self.slab_rows))
    }

    /// Stored bytes that a rectangle is decoded from.
    pub(in crate::source) fn stored_len(&self, rect: &Rect) -> u64 {
        let codes = self.unit.bytes_of(&rect.cols, self.row_bytes);
        let rows = rect.rows.end - rect.rows.start;
        let down = self.scale_row(rect.rows.end - 1) - self.scale_row(rect.rows.start) + 1;
        let across = (rect.cols.end - 1) / self.block.1 - rect.cols.start / self.block.1 + 1;
        let each = self.scale.bytes()
            + match self.extra {
                Extra::Bias => self.scale.bytes(),
                Extra::ZeroBytes | Extra::ZeroDown(_) => 1,
                Extra::None | Extra::Factor(_) => 0,
            };
        rows * (codes.end - codes.start) + down * across * each
    }

    /// Scales in a row of them.
    pub(super) fn scale_cols(&self) -> u64 {
        self.cols.div_ceil(self.block.1)
    }

    /// The row of scales that a row of codes has.
    pub(super) fn scale_row(&self, row: u64) -> u64 {
        let per_slab = self.slab_rows.div_ceil(self.block.0);
        row / self.slab_rows * per_slab + row % self.slab_rows / self.block.0
    }

    /// The first and last scale of a rectangle, in the order in which they are stored.
    fn scales(&self, rect: &Rect) -> Range<u64> {
        let at = |row, col| self.scale_row(row) * self.scale_cols() + col / self.block.1;
        at(rect.rows.start, rect.cols.start)..at(rect.rows.end - 1, rect.cols.end - 1) + 1
    }

    /// The bytes of each operand that a rectangle, which isn't empty, is decoded from.
    pub(in crate::source) fn ranges(&self, rect: &Rect) -> [Range<u64>; OPERANDS] {
        let mut ranges = [const { 0..0 }; OPERANDS];
        let codes = self.unit.bytes_of(&rect.cols, self.row_bytes);
        let last = rect.rows.end - 1;
        ranges[0] =
            rect.rows.start * self.row_bytes + codes.start..last * self.row_bytes + codes.end;
        let scales = self.scales(rect);
        let size = self.scale.bytes();
        ranges[1] = scales.start * size..scales.end * size;
        match self.extra {
            Extra::None | Extra::Factor(_) => {}
            Extra::Bias => ranges[2] = ranges[1].clone(),
            Extra::ZeroBytes => ranges[2] = scales.clone(),
            Extra::ZeroDown(unit) => {
                let words = unit.words(self.scale_row(rect.rows.start)).start
                    ..unit.words(self.scale_row(last)).end;
                let row = self.scale_cols() * 4;
                ranges[2] = words.start * row..words.end * row;
            }
        }
        if self.code == Code::Table {
            ranges[2] = 0..16 * 4;
        }
        match self.scale {
            Scale::OverGlobal => ranges[2] = 0..4,
            Scale::Nested { block, .. } => {
                ranges[3] = scales.start / block * 4..((scales.end - 1) / block + 1) * 4;
                ranges[4] = 0..256 * 4;
            }
            _ => {}
        }
        ranges
    }
}

impl Unit {
    /// The 32-bit words that the code at a position of a column lies in.
    pub(super) fn words(self, at: u64) -> Range<u64> {
        let (codes, bytes) = (u64::from(self.codes), u64::from(self.bytes));
        let bit = at / codes * bytes * 8 + at % codes * u64::from(self.bits);
        bit / 32..(bit + u64::from(self.bits)).div_ceil(32)
    }

    /// Where in the first of its words a code starts, in bits.
    pub(super) fn shift(self, at: u64) -> u32 {
        let (codes, bytes) = (u64::from(self.codes), u64::from(self.bytes));
        ((at / codes * bytes * 8 + at % codes * u64::from(self.bits)) % 32) as u32
    }
}
