//! What must be known of whole weights before a chunk can be encoded.

use super::extremes::magnitude;
use super::int::Fit;
use super::isa::{Isa, Kernel};
use super::tile::{Element, F32, Tile, for_element};

/// Statistics of a weight, or of several that share a scale, gathered window by window.
///
/// Windows come in the order of [`Scheme::survey_grid`], one weight after the other. However they are
/// cut, the outcome is the same.
///
/// [`Scheme::survey_grid`]: super::Scheme::survey_grid
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Survey {
    magnitude: f32,
    /// Of the largest magnitudes of blocks.
    sum: f64,
    blocks: u64,
    /// Scale and zero point of every row.
    fits: Vec<Fit>,
}

impl Survey {
    /// Bytes of memory beyond the survey itself: what it knows of every row.
    pub fn bytes_of_rows(&self) -> usize {
        size_of_val(&self.fits[..])
    }

    /// Scale and zero point of every row, as [`add_fits`](Self::add_fits) had them.
    pub(super) fn fits(&self) -> &[Fit] {
        &self.fits
    }

    /// Adds the scales and zero points of the next rows.
    pub(super) fn add_fits(&mut self, fits: &[Fit]) {
        self.fits.extend_from_slice(fits);
    }

    /// The largest magnitude; NaN if there is any NaN.
    pub(super) fn magnitude(&self) -> f32 {
        self.magnitude
    }

    /// The mean of the largest magnitudes of blocks; NaN or infinite if one of them is.
    pub(super) fn mean(&self) -> f32 {
        F32::round((self.sum / self.blocks as f64) as f32)
    }

    /// Adds the blocks of `size` weights in a run of them, one after the other: the order is the
    /// same however a weight is cut.
    pub(super) fn add_blocks(&mut self, isa: Isa, tile: &Tile<'_>, size: usize) {
        for_element!(tile.data.dtype(), E => isa.run(Blocks::<E> {
            source: &E::split(tile.data.bytes())[..tile.cols],
            size,
            survey: self,
        }));
    }

    /// Adds the magnitudes of a window.
    pub(super) fn add_magnitudes(&mut self, isa: Isa, tile: &Tile<'_>) {
        for_element!(tile.data.dtype(), E => isa.run(Magnitudes::<E> {
            source: E::split(tile.data.bytes()),
            rows: tile.rows,
            cols: tile.cols,
            stride: tile.stride,
            largest: &mut self.magnitude,
        }));
    }
}

struct Magnitudes<'a, E: Element> {
    source: &'a [E::Raw],
    rows: usize,
    cols: usize,
    stride: usize,
    largest: &'a mut f32,
}

impl<E: Element> Kernel for Magnitudes<'_, E> {
    #[inline(always)]
    fn run(self) {
        let row = |r: usize| &self.source[r * self.stride..][..self.cols];
        let bits = (0..self.rows).map(|r| magnitude::<E>(row(r)).to_bits());
        // Bit patterns of magnitudes order as integers, NaNs last.
        *self.largest = f32::from_bits(bits.fold(self.largest.to_bits(), u32::max));
    }
}

struct Blocks<'a, E: Element> {
    source: &'a [E::Raw],
    size: usize,
    survey: &'a mut Survey,
}

impl<E: Element> Kernel for Blocks<'_, E> {
    #[inline(always)]
    fn run(self) {
        for block in self.source.chunks(self.size) {
            self.survey.sum += f64::from(magnitude::<E>(block));
            self.survey.blocks += 1;
        }
    }
}
