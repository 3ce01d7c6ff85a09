//! Faults on demand, for tests of what a save leaves behind.

use std::io::{Error, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering};

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This operation fails, later ones do not.
    Once(ErrorKind),
    /// From here on nothing can be created or written; names can still be changed and removed.
    Full,
    /// In the middle of it the process dies: half of it happens, and nothing after it. The caller sees errors.
    Death,
}

/// One fault at operation number `at`, counted from 0. Without a fault it only counts.
#[derive(Debug, Default)]
pub struct Faults {
    planned: Option<(u64, Fault)>,
    count: AtomicU64,
}

/// What an operation has to do.
pub(crate) enum Verdict {
    Proceed,
    Fail(Error),
    /// Half of the operation happens.
    Half,
}

/// Whether an operation takes room.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takes {
    Room,
    Nothing,
}

impl Faults {
    /// Counts operations.
    pub fn none() -> Self {
        Self::default()
    }

    /// `fault` at operation `at`.
    pub fn at(at: u64, fault: Fault) -> Self {
        Self { planned: Some((at, fault)), count: AtomicU64::new(0) }
    }

    /// Operations so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    pub(crate) fn verdict(&self, takes: Takes) -> Verdict {
        let n = self.count.fetch_add(1, Ordering::SeqCst);
        match self.planned {
            Some((at, Fault::Once(kind))) if n == at => Verdict::Fail(Error::new(kind, "a planned fault")),
            Some((at, Fault::Death)) if n == at => Verdict::Half,
            Some((at, Fault::Death)) if n > at => Verdict::Fail(Error::other("dead")),
            Some((at, Fault::Full)) if n >= at && takes == Takes::Room => Verdict::Fail(ErrorKind::StorageFull.into()),
            _ => Verdict::Proceed,
        }
    }
}
