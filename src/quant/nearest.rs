//! Codes rounded to nearest, as the tools do whose bytes are the reference.

use std::marker::PhantomData;

use super::chunks::{CHUNK, Chunks, Rows};
use super::extremes::{Extremes, GroupExtremes};
use super::int::{Codes, Fit, MODERATE};
use super::isa::{Isa, Kernel};
use super::tile::Element;

/// The tool whose bytes a scheme has at reference quality; what it does is a search's first guess.
pub(super) trait Tool {
    /// Scale and zero point of a group. Chosen by selection, for the compiler to do many groups at a
    /// time.
    fn fit<E: Element>(range: Codes, symmetric: bool, extremes: Extremes) -> Fit;

    /// What [`Self::code`] needs to know of a scale.
    fn divisor<E: Element>(scale: f32) -> f32;

    /// The code of a weight, as a stored byte, in a group whose scale is moderate: then no quotient
    /// is a NaN.
    fn code<E: Element>(range: Codes, symmetric: bool, divided: Divided, x: f32) -> u8;

    /// The code of a weight, as a stored byte, with any scale.
    fn code_at_any<E: Element>(range: Codes, symmetric: bool, fit: Fit, x: f32) -> u8;

    /// What is left of a scale when it is stored.
    fn stored<E: Element>(scale: f32) -> f32;
}

/// What codes are made with.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Divided {
    /// Of the scale, [`Tool::divisor`].
    pub(super) by: f32,
    pub(super) zero_point: f32,
}

impl Divided {
    #[inline(always)]
    fn new<E: Element, T: Tool>(fit: Fit) -> Self {
        Self { by: T::divisor::<E>(fit.scale), zero_point: fit.zero_point }
    }
}

/// Codes of a group, as stored bytes.
#[inline(always)]
pub(super) fn codes<E: Element, T: Tool>(
    range: Codes,
    symmetric: bool,
    fit: Fit,
    group: &[E::Raw],
    out: &mut [u8],
) {
    if is_moderate(&fit) {
        let divided = Divided::new::<E, T>(fit);
        for (&raw, out) in group.iter().zip(out) {
            *out = T::code::<E>(range, symmetric, divided, E::widen(raw));
        }
    } else {
        for (&raw, out) in group.iter().zip(out) {
            *out = T::code_at_any::<E>(range, symmetric, fit, E::widen(raw));
        }
    }
}

/// The encoding of rows at reference quality, with the memory for it.
#[derive(Debug)]
pub(super) struct Nearest<E: Element> {
    isa: Isa,
    range: Codes,
    symmetric: bool,
    /// Weights of a group.
    len: usize,
    extremes: GroupExtremes<E::Bits>,
    /// Of each group.
    divided: Vec<Divided>,
    /// None where groups have loops of their own.
    chunks: Option<Chunks<Divided>>,
}

/// Groups of so many weights or more have loops of their own.
const LONG: usize = 256;

impl<E: Element> Nearest<E> {
    /// For groups of `len` weights, in rows of `cols`.
    pub(super) fn new(isa: Isa, range: Codes, symmetric: bool, len: usize, cols: usize) -> Self {
        let is_chunked = len < LONG && len.is_multiple_of(CHUNK);
        Self {
            isa,
            range,
            symmetric,
            len,
            extremes: GroupExtremes::new(len, cols),
            divided: vec![Divided::default(); cols / len],
            chunks: is_chunked.then(|| Chunks::new(len, cols)),
        }
    }

    /// The codes of a row, as stored bytes, with the scale and zero point of each of its groups.
    #[inline(always)]
    pub(super) fn encode_row<T: Tool>(
        &mut self,
        rows: Rows<'_, E::Raw>,
        out: &mut [u8],
        fits: &mut [Fit],
    ) {
        self.extremes.find::<E>(rows.row);
        // Known to each loop, or it would have branches.
        if self.symmetric {
            self.fit::<T>(true, fits);
            self.isa.run(Write::<E, T, true> { nearest: self, rows, out, fits, tool: PhantomData });
        } else {
            self.fit::<T>(false, fits);
            self.isa.run(Write::<E, T, false> {
                nearest: self,
                rows,
                out,
                fits,
                tool: PhantomData,
            });
        }
    }

    #[inline(always)]
    fn fit<T: Tool>(&mut self, symmetric: bool, fits: &mut [Fit]) {
        let out = fits.iter_mut().zip(&mut self.divided);
        for (bits, (fit, divided)) in self.extremes.iter().zip(out) {
            *fit = T::fit::<E>(self.range, symmetric, bits.values::<E>());
            *divided = Divided::new::<E, T>(*fit);
        }
    }
}

/// The codes of a row whose groups are known. A function of its own, where compilers keep in registers what
/// the loop needs.
struct Write<'a, E: Element, T, const SYMMETRIC: bool> {
    nearest: &'a mut Nearest<E>,
    rows: Rows<'a, E::Raw>,
    out: &'a mut [u8],
    fits: &'a [Fit],
    tool: PhantomData<T>,
}

impl<E: Element, T: Tool, const SYMMETRIC: bool> Kernel for Write<'_, E, T, SYMMETRIC> {
    #[inline(always)]
    fn run(self) {
        let Self { nearest, rows, out, fits, .. } = self;
        let Nearest { range, len, divided, chunks, .. } = nearest;
        let range = *range;
        if let Some(chunks) = chunks {
            chunks.encode::<E>(rows, divided, out, |x, divided| {
                T::code::<E>(range, SYMMETRIC, divided, x)
            });
            if fits.iter().fold(true, |all, fit| all & is_moderate(fit)) {
                return;
            }
        }
        let is_chunked = chunks.is_some();
        let groups = rows.row.chunks_exact(*len).zip(out.chunks_exact_mut(*len));
        for ((group, out), fit) in groups.zip(fits) {
            if !is_chunked || !is_moderate(fit) {
                codes::<E, T>(range, SYMMETRIC, *fit, group, out);
            }
        }
    }
}

#[inline(always)]
fn is_moderate(fit: &Fit) -> bool {
    MODERATE.contains(&fit.scale.abs())
}
