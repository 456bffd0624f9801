//! bitsandbytes' LLM.int8: 8-bit codes with the largest magnitude of a row.
//!
//! The weight is cast to F16 first. With `m` the row's largest magnitude, in f32:
//!
//! ```text
//! q = rint(x * ((1 / m) * 127))
//! ```
//!
//! and 0 in a row of zeros; a weight is `q * m / 127`. A row with a NaN has the scale NaN, one with an
//! infinity (as F16 has it: 65520 or more) an infinite scale; all its codes are 0.
//!
//! The search is the reference: at 8 bits a scale that clips the largest weight gains nothing.

use crate::dtype::Dtype;

use super::extremes::magnitude;
use super::grid::Grid;
use super::isa::{Isa, Kernel};
use super::lanes::ROUNDING;
use super::shape::{bands, matrix, part};
use super::tile::{Element, F16, F32, Tile, for_element};
use super::{Part, Role};

/// Signed bytes with a scale per row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LlmInt8Scheme;

impl LlmInt8Scheme {
    pub(super) fn accepts(self, dtype: Dtype, shape: &[u64]) -> Result<(), String> {
        matrix(dtype, shape).map(drop)
    }

    pub(super) fn parts(self, shape: &[u64]) -> Vec<Part> {
        let (rows, cols) = (shape[0], shape[1]);
        vec![part(Role::Codes, Dtype::I8, [rows, cols]), part(Role::Scale, Dtype::F32, [rows])]
    }

    pub(super) fn grid(self, dtype: Dtype, shape: &[u64], source_bytes: u64) -> Grid {
        bands(dtype, shape, 1, |shape| self.parts(shape), source_bytes)
    }

    pub(super) fn encode(self, isa: Isa, tile: &Tile<'_>, out: &mut [&mut [u8]]) {
        let [codes, scales] = out else { unreachable!("two parts") };
        for_element!(tile.data.dtype(), E => isa.run(Encode::<E> {
            source: E::split(tile.data.bytes()),
            cols: tile.cols,
            stride: tile.stride,
            codes,
            scales,
        }));
    }

    pub(super) fn decode(self, dtype: Dtype, cols: usize, parts: &[&[u8]], out: &mut [f32]) {
        let &[codes, scales] = parts else { unreachable!("two parts") };
        for_element!(dtype, E => for (i, out) in out.iter_mut().enumerate() {
            let scale = F32::widen(F32::split(scales)[i / cols]);
            *out = E::round(f32::from(codes[i].cast_signed()) * scale * (1.0 / 127.0));
        });
    }
}

/// The encoding of one tile.
struct Encode<'a, E: Element> {
    source: &'a [E::Raw],
    cols: usize,
    stride: usize,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<E: Element> Kernel for Encode<'_, E> {
    #[inline(always)]
    fn run(self) {
        let rows = self.codes.chunks_exact_mut(self.cols);
        let scales = self.scales.as_chunks_mut::<4>().0;
        for (r, (codes, stored)) in rows.zip(scales).enumerate() {
            let row = &self.source[r * self.stride..][..self.cols];
            let scale = F16::round(magnitude::<E>(row));
            F32::store(scale, stored);
            let factor = (1.0 / scale) * 127.0;
            if scale == 0.0 || scale.is_nan() || scale == f32::INFINITY {
                codes.fill(0);
            } else if scale >= 1.0 / 16.0 {
                // What F16 has as a subnormal is far less than half a code.
                for (&raw, out) in row.iter().zip(codes) {
                    *out = code(F16::round_moderate(E::widen(raw)) * factor);
                }
            } else {
                for (&raw, out) in row.iter().zip(codes) {
                    *out = code(F16::round(E::widen(raw)) * factor);
                }
            }
        }
    }
}

/// `x` as the nearest integer, ties to even.
#[inline(always)]
fn code(x: f32) -> u8 {
    // The sum has a spacing of 1, and the integer, modulo 256, in its lowest byte.
    (x + ROUNDING).to_bits() as u8
}
