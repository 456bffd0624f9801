//! Bytes per second, from counts and the times at which somebody asked.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The shortest time that a rate is taken over.
const SHORTEST: Duration = Duration::from_secs(1);

/// How fast a mount was read, in the time since its status was last asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Milliseconds that the rates are taken over.
    pub over_ms: u64,
    /// Bytes per second that were returned to readers.
    pub output: u64,
    /// Bytes per second that were read from the source.
    pub source: u64,
}

/// The counts at the last two times that somebody asked, which lie [`SHORTEST`] apart at least.
#[derive(Debug)]
pub(super) struct Speed(Mutex<[Count; 2]>);

#[derive(Clone, Copy, Debug)]
struct Count {
    at: Instant,
    output: u64,
    source: u64,
}

impl Speed {
    /// Counts from zero, from now on.
    pub(super) fn new() -> Self {
        Self(Mutex::new([Count { at: Instant::now(), output: 0, source: 0 }; 2]))
    }

    /// The rates since somebody last asked, who now has, with these bytes read up to now.
    pub(super) fn since_asked(&self, at: Instant, output: u64, source: u64) -> Rates {
        let mut asked = self.0.lock();
        let age = |count: &Count| at.saturating_duration_since(count.at);
        // Of those who ask in quick succession, each hears of a time that is long enough.
        let recent = age(&asked[1]) < SHORTEST;
        let since = asked[usize::from(!recent)];
        if !recent {
            *asked = [since, Count { at, output, source }];
        }
        let over = age(&since).max(Duration::from_millis(1));
        let per_second = |bytes: u64| (bytes as f64 / over.as_secs_f64()) as u64;
        Rates {
            over_ms: over.as_millis() as u64,
            output: per_second(output - since.output),
            source: per_second(source - since.source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_taken_over_the_time_since_the_last_question_but_a_second_at_least() {
        let start = Instant::now();
        let speed = Speed(Mutex::new([Count { at: start, output: 0, source: 0 }; 2]));
        // Milliseconds and bytes at each question; over which time, at which rate.
        let cases = [
            (500, 1000, 500, 2000),
            (2000, 4000, 2000, 2000),
            (2500, 6500, 2500, 2600),
            (3500, 7000, 1500, 2000),
            (103_500, 7000, 100_000, 0),
        ];
        for (ms, bytes, over_ms, rate) in cases {
            let got = speed.since_asked(start + Duration::from_millis(ms), bytes, 2 * bytes);
            assert_eq!(got, Rates { over_ms, output: rate, source: 2 * rate }, "at {ms}");
        }
    }
}
