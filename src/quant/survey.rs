//! What must be known of whole weights before a chunk can be encoded.

use super::isa::{Isa, Kernel};
use super::tile::{Element, Tile, for_element};

/// Statistics of a weight, or of several that share a scale, gathered window by window.
///
/// Windows come in the grid's order, one weight after the other. However they are cut, the outcome is
/// the same.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Survey {
    magnitude: f32,
}

impl Survey {
    /// The largest magnitude; NaN if there is any NaN.
    pub(super) fn magnitude(&self) -> f32 {
        self.magnitude
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
        let bits = (0..self.rows).map(|r| E::magnitude(row(r)).to_bits());
        // Bit patterns of magnitudes order as integers, NaNs last.
        *self.largest = f32::from_bits(bits.fold(self.largest.to_bits(), u32::max));
    }
}
