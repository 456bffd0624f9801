//! What the errors of a weight's input features count for in a search.

/// What the squared error of each element of a tile counts for, by the element's input feature.
///
/// Only ratios matter. What is less than 2^-24 of the largest counts for that much: a search then has
/// something to go by where no feature of a group counts at all.
#[derive(Clone, Copy, Debug)]
pub struct Importance<'a> {
    /// Of every input feature of the weight, the largest near 1.
    features: &'a [f32],
    /// The input feature of the tile's first element.
    first: usize,
}

/// The least that a feature counts for, of the largest.
const LEAST: f32 = 1.0 / 16_777_216.0;

impl<'a> Importance<'a> {
    /// What the errors of all input features of a weight count for; none of `features` is negative,
    /// infinite or NaN. `None` where they are equal: a search then finds what it finds without.
    pub fn new(features: &'a mut [f32]) -> Option<Self> {
        let largest = features.iter().copied().fold(0.0, f32::max);
        if features.iter().all(|feature| *feature == largest) {
            return None;
        }
        // A power of two, so that nothing is rounded.
        let exponent = largest.to_bits() >> 23;
        let factor = f32::from_bits((254 - exponent).max(1) << 23);
        let least = largest * factor * LEAST;
        for feature in &mut *features {
            *feature = (*feature * factor).max(least);
        }
        Some(Self { features, first: 0 })
    }

    /// The same for a tile whose first element has that input feature.
    pub fn starting_at(self, first: usize) -> Self {
        Self { first: first % self.features.len(), ..self }
    }

    /// The same for a tile that starts so many elements further on in a row, or in a run of rows.
    pub(super) fn skip(self, elements: usize) -> Self {
        self.starting_at(self.first + elements)
    }

    /// What the elements of a row of the tile, or a run of rows, count for.
    pub(super) fn of_row(self, len: usize) -> Vec<f32> {
        let mut row = vec![0.0; len];
        self.fill(&mut row);
        row
    }

    /// Fills `out` with what a run of elements count for, from the tile's first one on; after the last
    /// input feature comes the first.
    pub(super) fn fill(self, out: &mut [f32]) {
        let mut rest = out;
        let mut from = self.first;
        while !rest.is_empty() {
            let features = &self.features[from..];
            let (run, after) = rest.split_at_mut(features.len().min(rest.len()));
            run.copy_from_slice(&features[..run.len()]);
            (rest, from) = (after, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_features_are_as_good_as_none() {
        for equal in [0.0, 1e-40, 0.37, f32::MAX] {
            assert!(Importance::new(&mut [equal; 5]).is_none(), "{equal}");
        }
    }

    #[test]
    fn features_keep_their_ratios_whatever_their_unit() {
        for unit in [1e-36, 2f32.powi(-100), 1.0, 2f32.powi(100), 1e38] {
            let mut features = [1.0, 0.25, 0.0, 2.0, 0.5].map(|feature| feature * unit);
            let importance = Importance::new(&mut features).expect("not equal");
            let mut found = [0.0; 7];
            importance.starting_at(3).fill(&mut found);
            let largest = found[0];
            assert!((0.5..4.0).contains(&largest), "{unit}: {largest}");
            let ratios = found.map(|feature| feature / largest);
            let expected = [1.0, 0.25, 0.5, 0.125, LEAST, 1.0, 0.25];
            for (ratio, expected) in ratios.into_iter().zip(expected) {
                assert!((ratio / expected - 1.0).abs() < 1e-6, "{unit}: {ratios:?}");
            }
        }
    }
}
