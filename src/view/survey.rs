//! Surveys of whole weights, each made once by the first who needs it.

use parking_lot::Mutex;

use crate::error::Result;
use crate::quant::Survey;

/// What is known of whole weights. Surveys are a few bytes each, and kept for good.
#[derive(Debug)]
pub(super) struct Surveys(Box<[Mutex<Option<Survey>>]>);

impl Surveys {
    /// Room for `count` surveys.
    pub(super) fn new(count: usize) -> Self {
        Self((0..count).map(|_| Mutex::default()).collect())
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
    ) -> Result<Survey> {
        let mut known = self.0[survey].lock();
        if let Some(survey) = *known {
            return Ok(survey);
        }
        let made = make()?;
        *known = Some(made);
        Ok(made)
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
                    assert_eq!(got.expect("made"), Survey::default());
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
