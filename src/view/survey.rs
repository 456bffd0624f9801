//! Surveys of whole weights, each made once by the first who needs it.

use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::Result;
use crate::quant::Survey;

/// Bytes of rows that are remembered: those of several weights of the largest models.
const MOST_ROWS: usize = 8 << 20;

/// What is known of whole weights.
///
/// Most surveys are a few bytes, and kept for good. Those that know something of every row are
/// forgotten, least recently used first, where there are too many of them.
#[derive(Debug)]
pub(super) struct Surveys {
    known: Box<[Mutex<Option<Arc<Survey>>>]>,
    /// Surveys of rows that are known. Locked for a moment, after `known`'s or alone.
    rows: Mutex<Rows>,
    most: usize,
}

#[derive(Debug)]
struct Rows {
    /// Bytes of rows by survey.
    bytes: LruCache<usize, usize>,
    sum: usize,
}

impl Surveys {
    /// Room for `count` surveys.
    pub(super) fn new(count: usize) -> Self {
        Self::with_most(count, MOST_ROWS)
    }

    /// Room for `count` surveys, and `most` bytes of rows beside the newest ones.
    fn with_most(count: usize, most: usize) -> Self {
        Self {
            known: (0..count).map(|_| Mutex::default()).collect(),
            rows: Mutex::new(Rows { bytes: LruCache::unbounded(), sum: 0 }),
            most,
        }
    }

    /// One of them, made by `make` where it isn't there. Of several callers one makes it, and the
    /// others wait for that survey alone; where it fails, the next of them tries for itself.
    ///
    /// # Errors
    /// What `make` returns.
    pub(super) fn get(
        &self,
        survey: usize,
        make: impl FnOnce() -> Result<Survey>,
    ) -> Result<Arc<Survey>> {
        let made = {
            let mut known = self.known[survey].lock();
            if let Some(known) = &*known {
                if known.bytes_of_rows() > 0 {
                    self.rows.lock().bytes.promote(&survey);
                }
                return Ok(known.clone());
            }
            let made = Arc::new(make()?);
            *known = Some(made.clone());
            made
        };
        if made.bytes_of_rows() > 0 {
            self.make_room(survey, made.bytes_of_rows());
        }
        Ok(made)
    }

    /// Counts a new survey of rows, and forgets the oldest others until all fit. No survey is locked
    /// here while another one is.
    fn make_room(&self, survey: usize, bytes: usize) {
        let forgotten: Vec<usize> = {
            let mut rows = self.rows.lock();
            rows.sum += bytes;
            if let Some((_, before)) = rows.bytes.push(survey, bytes) {
                rows.sum -= before;
            }
            std::iter::from_fn(|| {
                if rows.sum <= self.most || rows.bytes.len() == 1 {
                    return None;
                }
                let (oldest, bytes) = rows.bytes.pop_lru()?;
                rows.sum -= bytes;
                Some(oldest)
            })
            .collect()
        };
        for survey in forgotten {
            *self.known[survey].lock() = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::error;
    use crate::quant::{
        Granularity, Isa, Quality, Reals, Scheme, Tile, TransposedOrder, TransposedScheme,
    };

    /// A survey of some rows.
    fn of_rows(rows: usize) -> Survey {
        let scheme = Scheme::Transposed(TransposedScheme {
            bits: 4,
            granularity: Granularity::Channel,
            symmetric: true,
            order: TransposedOrder::GptqV2,
            quality: Quality::Reference,
        });
        let source = vec![0; rows * 2];
        let tile = Tile { data: Reals::Bf16(&source), rows, cols: 1, stride: 1, importance: None };
        let mut survey = Survey::default();
        scheme.survey(Isa::detect(), &tile, &mut survey);
        survey
    }

    #[test]
    fn surveys_of_rows_are_forgotten_least_recently_used_first() {
        let ten = of_rows(10).bytes_of_rows();
        let surveys = Surveys::with_most(4, 3 * ten);
        let is_known = |id: usize| surveys.known[id].lock().is_some();
        let get = |id, rows| surveys.get(id, || Ok(of_rows(rows))).expect("made");
        assert_eq!(surveys.get(3, || Ok(Survey::default())).expect("made").bytes_of_rows(), 0);
        get(0, 10);
        get(1, 10);
        get(2, 10);
        assert!((0..4).all(is_known), "all fit");
        get(0, 10);
        // Made again, of more rows than before.
        surveys.known[1].lock().take();
        get(1, 20);
        assert_eq!([0, 1, 2, 3].map(is_known), [true, true, false, true]);
        assert_eq!(get(1, 99).bytes_of_rows(), 2 * ten, "still known");
        get(2, 99);
        assert_eq!([0, 1, 2, 3].map(is_known), [false, false, true, true], "one always stays");
    }

    #[test]
    fn many_threads_make_a_survey_once_and_all_get_it() {
        let surveys = Surveys::new(1);
        let made = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let got = surveys.get(0, || {
                        made.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(100));
                        Ok(Survey::default())
                    });
                    assert_eq!(*got.expect("made"), Survey::default());
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn a_failure_or_panic_reaches_its_maker_and_the_next_tries_again() {
        let surveys = Surveys::new(1);
        let turn = AtomicUsize::new(0);
        let outcomes: Vec<_> = thread::scope(|scope| {
            let callers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        surveys.get(0, || match turn.fetch_add(1, Ordering::Relaxed) {
                            0 => panic!("first"),
                            1 => Err(error::stale("second")),
                            _ => Ok(Survey::default()),
                        })
                    })
                })
                .collect();
            callers.into_iter().map(|caller| caller.join()).collect()
        });
        let ok = outcomes.iter().filter(|o| matches!(o, Ok(Ok(_)))).count();
        let failed = outcomes.iter().filter(|o| matches!(o, Ok(Err(_)))).count();
        assert_eq!((ok, failed), (1, 1), "and one panicked");
    }

    #[test]
    fn a_survey_under_way_holds_up_no_other() {
        let surveys = Surveys::new(2);
        let (begun, done) = (Barrier::new(2), Barrier::new(2));
        thread::scope(|scope| {
            scope.spawn(|| {
                surveys.get(0, || {
                    begun.wait();
                    done.wait();
                    Ok(Survey::default())
                })
            });
            begun.wait();
            surveys.get(1, || Ok(Survey::default())).expect("made");
            done.wait();
        });
    }
}
