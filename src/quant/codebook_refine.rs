//! Codebook scales made better: for weighed errors, and at best quality.

use super::codebook::Staircase;
use super::importance::Importance;
use super::isa::{Isa, Kernel};
use super::tile::{Element, widen};
use super::weighed::{BATCH, Candidate, Levels, Loaded, Weighed};

impl Levels for &Staircase {
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        self.entry(y)
    }
}

/// Parts of the largest magnitude that are tried as the scale.
const SHRINKS: [f32; 16] =
    [0.25, 0.32, 0.4, 0.48, 0.55, 0.62, 0.69, 0.75, 0.8, 0.85, 0.9, 0.94, 0.98, 1.02, 1.06, 1.1];

/// Times that codes and scale are fitted to each other.
const ROUNDS: usize = 3;

/// From the scale that a search has found to those that are tried where all errors count for the same,
/// as they did in the search.
const NEAR: [f32; BATCH] = [0.95, 1.0, 1.05, 1.1];

/// What makes scales better, with its memory.
#[derive(Debug)]
pub(super) struct Refiner {
    /// What refining is compiled for: it is no part of the kernel that calls it, so that it is compiled
    /// once for all element types.
    isa: Isa,
    staircase: Staircase,
    weighed: Weighed,
    /// Room for a block's exact values, and for what its errors count for.
    values: Vec<f32>,
    counts: Vec<f32>,
}

/// What is asked about a block.
#[derive(Clone, Copy, Debug)]
enum Question {
    /// A scale that is no worse than this.
    Refined(f32),
    /// The same, where all errors count for the same.
    RefinedNear(f32),
    /// The best of these scales.
    Best([f32; 3]),
}

impl Refiner {
    /// For blocks of at most `block` weights.
    pub(super) fn new(isa: Isa, staircase: Staircase, block: usize) -> Self {
        let room = vec![0.0; block];
        Self { isa, staircase, weighed: Weighed::new(block), values: room.clone(), counts: room }
    }

    /// A scale for a block that is no worse than the one that a search has `found`, given what its
    /// errors count for.
    #[inline(always)]
    pub(super) fn refined<E: Element>(
        &mut self,
        xs: &[E::Raw],
        importance: Option<Importance<'_>>,
        found: f32,
    ) -> f32 {
        let question = match importance {
            Some(_) => Question::Refined(found),
            None => Question::RefinedNear(found),
        };
        self.answer::<E>(xs, importance, question)
    }

    /// The place of the best of some scales for a block, the first of equals; those that are not
    /// positive are none. The first where there is nothing to choose by.
    #[inline(always)]
    pub(super) fn best<E: Element>(
        &mut self,
        xs: &[E::Raw],
        importance: Option<Importance<'_>>,
        scales: [f32; 3],
    ) -> usize {
        let best = self.answer::<E>(xs, importance, Question::Best(scales));
        scales.iter().position(|scale| scale.to_bits() == best.to_bits()).unwrap_or(0)
    }

    #[inline(always)]
    fn answer<E: Element>(
        &mut self,
        xs: &[E::Raw],
        importance: Option<Importance<'_>>,
        question: Question,
    ) -> f32 {
        widen::<E>(xs, &mut self.values);
        let counts = &mut self.counts[..xs.len()];
        match importance {
            Some(importance) => importance.fill(counts),
            None => counts.fill(1.0),
        }
        let mut answer = 0.0;
        let len = xs.len();
        self.isa.run(Block { refiner: self, len, question, answer: &mut answer });
        answer
    }

    /// In units of the block.
    #[inline(always)]
    fn refine_near(&self, found: f32) -> f32 {
        let moments = self.weighed.moments(self.candidates(NEAR.map(|near| found * near)));
        // In the place of the least promising.
        let mut place = 0;
        for k in 1..BATCH {
            place = if moments[k].gain() < moments[place].gain() { k } else { place };
        }
        let mut scales = moments.map(|moments| moments.scale());
        scales[place] = found;
        let errors = self.errors(scales);
        least(scales, errors, (found, errors[place])).0
    }

    /// In units of the block.
    #[inline(always)]
    fn refine(&self, largest: f32, found: f32) -> f32 {
        let [error, ..] = self.errors([found; BATCH]);
        let mut best = (found, error);
        let mut kept = [(-1.0, found); BATCH];
        for shrinks in SHRINKS.as_chunks::<BATCH>().0 {
            let scales = shrinks.map(|shrink| largest * shrink);
            for moments in self.weighed.moments(self.candidates(scales)) {
                let mut next = (moments.gain(), moments.scale());
                for place in &mut kept {
                    // Not so for the NaN of entries that are all zero.
                    if next.0 > place.0 {
                        std::mem::swap(place, &mut next);
                    }
                }
            }
        }
        let mut scales = kept.map(|(_, scale)| scale);
        for _ in 0..ROUNDS {
            best = least(scales, self.errors(scales), best);
            scales = self.weighed.moments(self.candidates(scales)).map(|moments| moments.scale());
        }
        best.0
    }

    /// In units of the block.
    #[inline(always)]
    fn best_of(&self, [a, b, c]: [f32; 3]) -> usize {
        let mut best = (0, f32::INFINITY);
        let scales = [a, b, c, a];
        let errors = self.errors(scales);
        for (i, (scale, error)) in scales.into_iter().zip(errors).enumerate() {
            if scale > 0.0 && error < best.1 {
                best = (i, error);
            }
        }
        best.0
    }

    #[inline(always)]
    fn errors(&self, scales: [f32; BATCH]) -> [f32; BATCH] {
        self.weighed.errors(self.candidates(scales))
    }

    #[inline(always)]
    fn candidates(&self, scales: [f32; BATCH]) -> [Candidate<&Staircase>; BATCH] {
        scales.map(|scale| Candidate { levels: &self.staircase, scale, offset: 0.0 })
    }
}

/// The scale of the least error, with it; the `best` so far where none is less.
#[inline(always)]
fn least(scales: [f32; BATCH], errors: [f32; BATCH], mut best: (f32, f32)) -> (f32, f32) {
    for k in 0..BATCH {
        // A sum's own rounding must not prefer what is worse.
        if errors[k] < best.1 * (1.0 - 1.0 / 65536.0) {
            best = (scales[k], errors[k]);
        }
    }
    best
}

/// A block, which the refiner has room for, and what is asked about it.
struct Block<'a> {
    refiner: &'a mut Refiner,
    len: usize,
    question: Question,
    answer: &'a mut f32,
}

impl Kernel for Block<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { refiner, len, question, answer } = self;
        let Refiner { weighed, values, counts, .. } = refiner;
        let loaded = weighed.load(&values[..len], &counts[..len]);
        *answer = match (question, loaded) {
            (Question::Refined(found) | Question::RefinedNear(found), None) => found,
            (Question::Best(scales), None) => scales[0],
            (Question::Refined(found), Some(Loaded { unit, min, max })) => {
                let largest = if -min > max { -min } else { max };
                refiner.refine(largest, found * unit.reciprocal) * unit.value
            }
            (Question::RefinedNear(found), Some(Loaded { unit, .. })) => {
                refiner.refine_near(found * unit.reciprocal) * unit.value
            }
            (Question::Best(scales), Some(Loaded { unit, .. })) => {
                scales[refiner.best_of(scales.map(|scale| scale * unit.reciprocal))]
            }
        };
    }
}
