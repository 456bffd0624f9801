//! Integer scales and zero points made better: for weighed errors, and at best quality.
//!
//! What the search has found is the first guess. Candidates clip the group further than that search
//! would, for the outermost weights may count for little; each is worth what the best scale for its
//! codes is, `sum(w x q)^2 / sum(w q q)` less than the error of no scale at all. The few best are
//! refitted in turn, codes to scale and scale to codes, and measured as they are stored. Only a
//! smaller error replaces what the search has found, so the outcome is never worse than that.

use super::Quality;
use super::int::{Codes, Fit, MODERATE};
use super::isa::{Isa, Kernel};
use super::lanes::round;
use super::search::{at_least, clamp};
use super::tile::Tile;
use super::weighed::{BATCH, Candidate, Levels, Loaded, Weighed};

/// Integers from `low` to `high`: codes less a zero point.
#[derive(Clone, Copy, Debug)]
struct Integers {
    low: f32,
    high: f32,
}

impl Levels for Integers {
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        round(clamp(y, self.low, self.high))
    }
}

/// Parts of a group's range that candidates cover.
const CLIPS: [f32; 16] =
    [0.15, 0.2, 0.26, 0.33, 0.4, 0.47, 0.54, 0.6, 0.66, 0.72, 0.78, 0.84, 0.9, 0.95, 1.0, 1.04];

/// The same, of codes so fine that little is clipped.
const FINE_CLIPS: [f32; 16] =
    [0.4, 0.5, 0.6, 0.7, 0.77, 0.82, 0.86, 0.9, 0.93, 0.95, 0.965, 0.98, 0.99, 0.995, 1.0, 1.01];

/// Those that the search may have missed where all errors count for the same, as they did there.
const LATER: std::ops::RangeFrom<usize> = 4..;

/// From a scale to its neighbours, and theirs, when it is stored as coarsely as BF16.
const NEIGHBOURS: [f32; BATCH] =
    [1.0 - 1.2 / 128.0, 1.0 - 0.6 / 128.0, 1.0 + 0.6 / 128.0, 1.0 + 1.2 / 128.0];

/// What the rows of a tile are refined with.
#[derive(Debug)]
pub(super) struct Refining {
    /// What refining is compiled for: it is no part of the kernel that calls it, so that it is compiled
    /// once for all element types.
    pub(super) isa: Isa,
    /// Room for a row's exact values.
    pub(super) row: Vec<f32>,
    /// What the errors of a row count for.
    pub(super) importance: Vec<f32>,
    /// Whether that is not the same for all.
    pub(super) is_weighed: bool,
}

impl Refining {
    /// For the rows of a tile; `None` where what the search finds is left as it is.
    pub(super) fn new(isa: Isa, quality: Quality, tile: &Tile<'_>) -> Option<Self> {
        let importance = match (quality, tile.importance) {
            (Quality::Reference, _) | (Quality::Search, None) => return None,
            (Quality::Best, None) => vec![1.0; tile.cols],
            (_, Some(importance)) => importance.of_row(tile.cols),
        };
        let is_weighed = tile.importance.is_some();
        Some(Self { isa, row: vec![0.0; tile.cols], importance, is_weighed })
    }
}

/// What makes fits better, with its memory.
#[derive(Debug)]
pub(super) struct Refiner {
    range: Codes,
    symmetric: bool,
    /// The smallest zero point there is.
    lowest_zero: f32,
    /// Weights of a group.
    len: usize,
    clips: &'static [f32],
    /// Times that codes and scale are fitted to each other.
    rounds: usize,
    weighed: Weighed,
    candidates: Vec<Fit>,
}

/// A fit, in a group's unit, and its error.
#[derive(Clone, Copy, Debug)]
struct Best {
    fit: Fit,
    error: f32,
}

impl Refiner {
    /// For groups of `len` weights, whose errors count for different amounts if they are weighed.
    pub(super) fn new(range: Codes, symmetric: bool, len: usize, is_weighed: bool) -> Self {
        let clips = if range.steps() > 32.0 { &FINE_CLIPS } else { &CLIPS };
        let (clips, rounds) = if is_weighed { (&clips[..], 3) } else { (&clips[LATER], 2) };
        Self {
            range,
            symmetric,
            lowest_zero: range.low,
            len,
            clips,
            rounds,
            weighed: Weighed::new(len),
            candidates: Vec::new(),
        }
    }

    /// The same, less zero points of the smallest code.
    pub(super) fn without_lowest_zero(mut self) -> Self {
        self.lowest_zero += 1.0;
        self
    }

    /// Makes the codes and fits of the groups of a row better, as a search has left them, given what
    /// its errors count for, and what is left of a scale when it is stored.
    pub(super) fn refine_row(
        &mut self,
        isa: Isa,
        row: &[f32],
        importance: &[f32],
        stored: fn(f32) -> f32,
        out: &mut [u8],
        fits: &mut [Fit],
    ) {
        isa.run(Row { refiner: self, row, importance, stored, out, fits });
    }

    #[inline(always)]
    fn refine(
        &mut self,
        group: &[f32],
        importance: &[f32],
        stored: fn(f32) -> f32,
        out: &mut [u8],
        fit: &mut Fit,
    ) {
        // A group that was not searched has a scale that isn't one that is stored.
        let is_searched = MODERATE.contains(&fit.scale.abs()) && stored(fit.scale) == fit.scale;
        let Some(Loaded { unit, min, max }) =
            is_searched.then(|| self.weighed.load(group, importance)).flatten()
        else {
            return;
        };
        let found = Fit { scale: fit.scale * unit.reciprocal, ..*fit };
        let [error, ..] = self.errors([found; BATCH]);
        let mut best = Best { fit: found, error };
        let store = |fit: Fit| Fit { scale: unit.as_stored(stored, fit.scale), ..fit };
        self.propose(if min > 0.0 { 0.0 } else { min }, if max < 0.0 { 0.0 } else { max });
        let mut fits = self.nominees();
        for round in 1..=self.rounds {
            self.consider(&mut best, fits.map(store));
            if !self.symmetric {
                for step in [-1.0, 1.0] {
                    let shifted = fits.map(|fit| self.shifted(fit, step));
                    self.consider(&mut best, shifted.map(store));
                }
            }
            if round < self.rounds {
                let moments = self.weighed.moments(fits.map(|fit| self.candidate(fit)));
                for (fit, moments) in fits.iter_mut().zip(moments) {
                    fit.scale = moments.scale();
                }
            }
        }
        let near = NEIGHBOURS.map(|step| Fit { scale: best.fit.scale * step, ..best.fit });
        self.consider(&mut best, near.map(store));
        if best.fit.scale.to_bits() == found.scale.to_bits()
            && best.fit.zero_point == found.zero_point
        {
            return;
        }
        let Fit { scale, zero_point } = best.fit;
        let reciprocal = 1.0 / scale;
        let (low, high) = self.range.less(zero_point);
        for (out, &x) in out.iter_mut().zip(self.weighed.xs()) {
            *out = self.range.byte(clamp(x * reciprocal, low, high) + zero_point);
        }
        *fit = Fit { scale: scale * unit.value, zero_point };
    }

    /// Makes the candidates for a group of those extremes, widened to include zero.
    #[inline(always)]
    fn propose(&mut self, min: f32, max: f32) {
        self.candidates.clear();
        let Codes { low, .. } = self.range;
        let largest = if -min > max { min } else { max };
        for &clip in self.clips {
            if self.symmetric {
                let scale = largest * clip / low;
                self.candidates.push(Fit { scale, zero_point: 0.0 });
                self.candidates.push(Fit { scale: -scale, zero_point: 0.0 });
            } else {
                let (middle, reach) = ((min + max) * 0.5, (max - min) * (0.5 * clip));
                let end = largest.abs() * clip;
                let around_zero = (at_least(min, -end), if max > end { end } else { max });
                for (min, max) in [(middle - reach, middle + reach), around_zero] {
                    let scale = (max - min) / self.range.steps();
                    let zero_point = round(self.range.clamp(low - min / scale));
                    let zero_point = at_least(zero_point, self.lowest_zero);
                    self.candidates.push(Fit { scale, zero_point });
                }
            }
        }
    }

    /// The candidates whose codes fit best, with the scales that fit those best.
    #[inline(always)]
    fn nominees(&self) -> [Fit; BATCH] {
        let mut kept = [(-1.0, self.candidates[0]); BATCH];
        for fits in self.candidates.as_chunks::<BATCH>().0 {
            let moments = self.weighed.moments(fits.map(|fit| self.candidate(fit)));
            for (fit, moments) in fits.iter().zip(moments) {
                let mut next = (moments.gain(), Fit { scale: moments.scale(), ..*fit });
                for place in &mut kept {
                    // Not so for the NaN of codes that are all zero.
                    if next.0 > place.0 {
                        std::mem::swap(place, &mut next);
                    }
                }
            }
        }
        kept.map(|(_, fit)| fit)
    }

    /// A fit with a zero point further on, where there is one.
    #[inline(always)]
    fn shifted(&self, fit: Fit, step: f32) -> Fit {
        let zero_point = at_least(self.range.clamp(fit.zero_point + step), self.lowest_zero);
        Fit { zero_point, ..fit }
    }

    /// Makes those of some fits the best whose errors are smaller.
    #[inline(always)]
    fn consider(&self, best: &mut Best, fits: [Fit; BATCH]) {
        for (fit, error) in fits.into_iter().zip(self.errors(fits)) {
            // Not so for the NaN of a scale that was rounded to zero. A sum's own rounding must not
            // prefer what is worse.
            if error < best.error * (1.0 - 1.0 / 65536.0) {
                *best = Best { fit, error };
            }
        }
    }

    #[inline(always)]
    fn errors(&self, fits: [Fit; BATCH]) -> [f32; BATCH] {
        self.weighed.errors(fits.map(|fit| self.candidate(fit)))
    }

    #[inline(always)]
    fn candidate(&self, Fit { scale, zero_point }: Fit) -> Candidate<Integers> {
        let (low, high) = self.range.less(zero_point);
        Candidate { levels: Integers { low, high }, scale, offset: 0.0 }
    }
}

/// A row whose groups are made better.
struct Row<'a> {
    refiner: &'a mut Refiner,
    row: &'a [f32],
    importance: &'a [f32],
    stored: fn(f32) -> f32,
    out: &'a mut [u8],
    fits: &'a mut [Fit],
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { refiner, row, importance, stored, out, fits } = self;
        let len = refiner.len;
        let groups = row.chunks_exact(len).zip(importance.chunks_exact(len));
        let outs = out.chunks_exact_mut(len).zip(fits);
        for ((group, importance), (out, fit)) in groups.zip(outs) {
            refiner.refine(group, importance, stored, out, fit);
        }
    }
}
