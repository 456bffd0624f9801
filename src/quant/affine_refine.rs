//! Affine scales and biases made better: for weighed errors, and at best quality.
//!
//! As for integers without a bias (`refine`), but that the best line through a candidate's codes has
//! two unknowns.

use super::affine::{Line, code};
use super::int::MODERATE;
use super::isa::{Isa, Kernel};
use super::lanes::{clamp, round};
use super::weighed::{BATCH, Candidate, Levels, Loaded, Moments, Weighed};

/// Integers from 0 to a highest one.
#[derive(Clone, Copy, Debug)]
struct UpTo(f32);

impl Levels for UpTo {
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        round(clamp(y, self.0))
    }
}

/// Parts of a group's range that candidates cover.
const CLIPS: [f32; 8] = [0.25, 0.36, 0.48, 0.6, 0.7, 0.8, 0.9, 1.0];

/// The same, of codes so fine that little is clipped.
const FINE_CLIPS: [f32; 8] = [0.6, 0.75, 0.85, 0.91, 0.95, 0.975, 0.99, 1.005];

/// Where in what a clip leaves out its range lies: 0 at the lower end.
const PLACES: [f32; 3] = [0.5, 0.25, 0.75];

/// A step from one of those to its neighbour.
const PLACE_STEP: f32 = 0.125;

/// Steps of clip and place from the best candidate to those that are tried next, and so on.
const NEARER: [[(f32, f32); BATCH]; 3] = [
    [(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)],
    [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)],
    [(-0.5, 0.0), (0.5, 0.0), (0.0, -0.5), (0.0, 0.5)],
];

/// Times that codes and line are fitted to each other.
const ROUNDS: usize = 2;

/// A step from a number to its neighbour when it is stored as coarsely as BF16.
const STEP: f32 = 0.6 / 128.0;

/// What makes lines better, with its memory.
#[derive(Debug)]
pub(super) struct Refiner {
    high: f32,
    /// Whether what is near the best candidate is tried as well.
    thorough: bool,
    weighed: Weighed,
    candidates: Vec<Part>,
}

/// A part of a group's range.
#[derive(Clone, Copy, Debug)]
struct Part {
    clip: f32,
    /// Where in what the clip leaves out it lies.
    place: f32,
}

/// How well the codes of a part fit, the line that fits them best, and the part.
type Nominee = (f32, Line, Part);

/// A line, in a group's unit, and its error.
#[derive(Clone, Copy, Debug)]
struct Best {
    line: Line,
    error: f32,
}

impl Refiner {
    /// For groups of `len` weights, whose errors count for different amounts if they are weighed. Where it
    /// is thorough, more candidates are tried.
    pub(super) fn new(bits: u8, len: usize, is_weighed: bool, thorough: bool) -> Self {
        let high = ((1u32 << bits) - 1) as f32;
        let clips = if bits > 4 { &FINE_CLIPS } else { &CLIPS };
        // The search has been at the middle only, and knows the rest of it well.
        let places = if is_weighed { &PLACES[..] } else { &PLACES[..1] };
        let parts = places.iter().flat_map(|&place| clips.map(|clip| Part { clip, place }));
        Self { high, thorough, weighed: Weighed::new(len), candidates: parts.collect() }
    }

    /// Makes the codes and lines of the groups of a row better, as a search has left them, given what
    /// its errors count for, and what is left of a number when it is stored.
    pub(super) fn refine_row(
        &mut self,
        isa: Isa,
        row: &[f32],
        importance: &[f32],
        stored: fn(f32) -> f32,
        out: &mut [u8],
        (scales, biases): (&mut [f32], &mut [f32]),
    ) {
        isa.run(Row { refiner: self, row, importance, stored, out, scales, biases });
    }

    #[inline(always)]
    fn refine(
        &mut self,
        group: &[f32],
        importance: &[f32],
        stored: fn(f32) -> f32,
        out: &mut [u8],
        found: &mut Line,
    ) {
        let is_searched = MODERATE.contains(&found.scale.abs());
        let Some(Loaded { unit, min, max }) =
            is_searched.then(|| self.weighed.load(group, importance)).flatten()
        else {
            return;
        };
        let store = |line: Line| Line {
            scale: unit.as_stored(stored, line.scale),
            bias: unit.as_stored(stored, line.bias),
        };
        let line = store(Line {
            scale: found.scale * unit.reciprocal,
            bias: found.bias * unit.reciprocal,
        });
        let [error, ..] = self.errors([line; BATCH]);
        // A scale that rounds to zero has an error that is not a number.
        if error.is_nan() || min == max {
            return;
        }
        let mut best = Best { line, error };
        let totals = self.weighed.totals();
        let mut lines = self.nominees(totals, (min, max));
        for round in 1..=ROUNDS {
            self.consider(&mut best, lines.map(store));
            if round < ROUNDS {
                lines = self.fitted(totals, lines).map(|(line, _)| line);
            }
        }
        for steps in [
            [(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)],
            [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)],
        ] {
            let Line { scale, bias } = best.line;
            let near = steps.map(|(of_scale, of_bias)| Line {
                scale: scale * (1.0 + of_scale * STEP),
                bias: bias * (1.0 + of_bias * STEP),
            });
            self.consider(&mut best, near.map(store));
        }
        let Line { scale, bias } = best.line;
        if scale.to_bits() == line.scale.to_bits() && bias.to_bits() == line.bias.to_bits() {
            return;
        }
        let reciprocal = 1.0 / scale;
        for (out, &x) in out.iter_mut().zip(self.weighed.xs()) {
            *out = code((x - bias) * reciprocal, self.high);
        }
        *found = Line { scale: scale * unit.value, bias: bias * unit.value };
    }

    /// The lines that fit the codes of some candidates best, of those that fit best, in a group of those
    /// extremes.
    #[inline(always)]
    fn nominees(&self, totals: (f32, f32), extremes: (f32, f32)) -> [Line; BATCH] {
        let none = (-1.0, self.line(self.candidates[0], extremes), self.candidates[0]);
        let mut kept = [none; BATCH];
        for parts in self.candidates.as_chunks::<BATCH>().0 {
            self.nominate(&mut kept, totals, extremes, *parts);
        }
        if self.thorough {
            for steps in NEARER {
                let (_, _, Part { clip, place }) = kept[0];
                let step = (1.0 - clip).abs() * 0.15 + 0.005;
                let near = steps.map(|(of_clip, of_place)| Part {
                    clip: clip + step * of_clip,
                    place: place + PLACE_STEP * of_place,
                });
                self.nominate(&mut kept, totals, extremes, near);
            }
        }
        kept.map(|(_, line, _)| line)
    }

    /// Puts those of some parts in the place of others that fit less well; the best are the first.
    #[inline(always)]
    fn nominate(
        &self,
        kept: &mut [Nominee; BATCH],
        totals: (f32, f32),
        extremes: (f32, f32),
        parts: [Part; BATCH],
    ) {
        let fitted = self.fitted(totals, parts.map(|part| self.line(part, extremes)));
        for (part, (line, gain)) in parts.into_iter().zip(fitted) {
            let mut next = (gain, line, part);
            for place in &mut *kept {
                // Not so for the NaN of codes that are all the same.
                if next.0 > place.0 {
                    std::mem::swap(place, &mut next);
                }
            }
        }
    }

    /// The line whose codes span a part of the range between two extremes.
    #[inline(always)]
    fn line(&self, Part { clip, place }: Part, (min, max): (f32, f32)) -> Line {
        let width = max - min;
        Line { scale: width * clip / self.high, bias: min + width * (1.0 - clip) * place }
    }

    /// For the codes of each line, the line that fits them best, and by how much that lowers the error
    /// of the mean.
    #[inline(always)]
    fn fitted(&self, (count, total): (f32, f32), lines: [Line; BATCH]) -> [(Line, f32); BATCH] {
        let moments = self.weighed.moments(lines.map(|line| self.candidate(line)));
        moments.map(|Moments { v, vv, xv }| {
            let covariance = xv - total * v / count;
            let variance = vv - v * v / count;
            let scale = covariance / variance;
            (Line { scale, bias: (total - scale * v) / count }, scale * covariance)
        })
    }

    /// Makes those of some lines the best whose errors are smaller.
    #[inline(always)]
    fn consider(&self, best: &mut Best, lines: [Line; BATCH]) {
        for (line, error) in lines.into_iter().zip(self.errors(lines)) {
            // A sum's own rounding must not prefer what is worse.
            if error < best.error * (1.0 - 1.0 / 65536.0) {
                *best = Best { line, error };
            }
        }
    }

    #[inline(always)]
    fn errors(&self, lines: [Line; BATCH]) -> [f32; BATCH] {
        self.weighed.errors(lines.map(|line| self.candidate(line)))
    }

    #[inline(always)]
    fn candidate(&self, Line { scale, bias }: Line) -> Candidate<UpTo> {
        Candidate { levels: UpTo(self.high), scale, offset: bias }
    }
}

/// A row whose groups are made better.
struct Row<'a> {
    refiner: &'a mut Refiner,
    row: &'a [f32],
    importance: &'a [f32],
    stored: fn(f32) -> f32,
    out: &'a mut [u8],
    scales: &'a mut [f32],
    biases: &'a mut [f32],
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { refiner, row, importance, stored, out, scales, biases } = self;
        let len = row.len() / scales.len();
        let groups = row.chunks_exact(len).zip(importance.chunks_exact(len));
        let outs = out.chunks_exact_mut(len).zip(scales.iter_mut().zip(biases));
        for ((group, importance), (out, (scale, bias))) in groups.zip(outs) {
            let mut line = Line { scale: *scale, bias: *bias };
            refiner.refine(group, importance, stored, out, &mut line);
            Line { scale: *scale, bias: *bias } = line;
        }
    }
}
