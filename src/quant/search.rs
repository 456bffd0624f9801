//! Scales and zero points chosen by error search, in f32 for every element type.

use super::int::{Codes, Fit, encode_group};
use super::tile::Element;

#[derive(Debug)]
pub(super) struct Search {
    range: Codes,
    symmetric: bool,
}

impl Search {
    pub(super) fn new(range: Codes, symmetric: bool, _group: usize) -> Self {
        Self { range, symmetric }
    }

    #[inline(always)]
    pub(super) fn encode_group<E: Element>(&mut self, group: &[E::Raw], out: &mut [u8]) -> Fit {
        encode_group::<E>(self.range, self.symmetric, group, out)
    }
}
