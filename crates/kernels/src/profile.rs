//! Where the time goes: seconds by op, of one device. A device has no profile until somebody asks for one, and then an
//! op's timer costs two looks at the clock (on a GPU two marks in its stream); before, one load. It is a stopwatch and
//! not a sampler: what an op's callers do between ops, and what they wait for, is not in it.

use crate::cuda::{Cuda, Event};
use crate::sizes::{Named, list};
use crate::{Ctx, Device};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Seconds spent in each op of a device. An op that runs while another of the same device does (because that one calls
/// it, or on another thread) is a part of the other, so that the sum is never more than the time that has passed.
#[derive(Debug, Default)]
pub struct Profile {
    running: AtomicBool,
    spent: Mutex<BTreeMap<Op, Spent>>,
    /// Ops of a GPU that may not be over: each with the marks before and behind it.
    marks: Mutex<Vec<(Op, [Event; 2])>>,
}

/// An op by its name and the sizes of its arguments.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Op {
    /// As the module is called, and the direction.
    pub name: &'static str,
    /// As errors list them: `x bf16[512], heads 4`.
    pub sizes: String,
}

/// What calls of an op took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// All of them together.
    pub seconds: f64,
    /// How many.
    pub calls: usize,
}

impl Profile {
    /// What was counted since the last call, or since the profile began.
    fn take(&self) -> BTreeMap<Op, Spent> {
        std::mem::take(&mut self.spent.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Counts for an op from its making to its end.
#[must_use = "a timer counts until it is dropped"]
pub(crate) struct Timer<'a> {
    counts: Option<(&'a Profile, Op, Begin<'a>)>,
    /// Where the op was noted.
    noted: Option<&'a Cuda>,
}

enum Begin<'a> {
    Host(Instant),
    Cuda(&'a Cuda, Event),
}

impl Device {
    /// The time that this device spends in each op, kept from the first call on.
    pub fn profile(&self) -> &Profile {
        match self {
            Self::Cpu(cpu) => cpu.profile.get_or_init(Profile::default),
            Self::Cuda(cuda) => cuda.profile.get_or_init(Profile::default),
        }
    }

    /// Time by op since the last call, or since the profile began; waits for what a GPU has not done yet.
    pub fn take_profile(&self) -> BTreeMap<Op, Spent> {
        let profile = self.profile();
        if let Self::Cuda(cuda) = self {
            cuda.synchronize();
            let marks = std::mem::take(&mut *profile.marks.lock().unwrap_or_else(PoisonError::into_inner));
            for (op, [begin, end]) in marks {
                profile.count(op, cuda.between(&begin, &end));
            }
        }
        profile.take()
    }

    fn started(&self) -> Option<&Profile> {
        match self {
            Self::Cpu(cpu) => cpu.profile.get(),
            Self::Cuda(cuda) => cuda.profile.get(),
        }
    }
}

impl Profile {
    fn count(&self, op: Op, seconds: f64) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = spent.entry(op).or_default();
        spent.seconds += seconds;
        spent.calls += 1;
    }
}

impl Ctx {
    /// A timer for the op of this name, whose arguments have these sizes; it counts nothing without a profile, or within
    /// another op. An error of a GPU names the op and the sizes.
    pub(crate) fn timer(&self, name: &'static str, sizes: &[Named]) -> Timer<'_> {
        let noted = self.device.as_cuda().map(|cuda| &**cuda);
        if let Some(cuda) = noted {
            cuda.op_begins(name, sizes);
        }
        let profile = self.device.started().filter(|p| !p.running.swap(true, Ordering::Acquire));
        let begin = || match &self.device {
            Device::Cpu(_) => Begin::Host(Instant::now()),
            Device::Cuda(cuda) => Begin::Cuda(cuda, cuda.mark()),
        };
        Timer { counts: profile.map(|p| (p, Op { name, sizes: list(sizes) }, begin())), noted }
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        if let Some(cuda) = self.noted {
            cuda.op_ends();
        }
        let Some((profile, op, begin)) = self.counts.take() else { return };
        match begin {
            Begin::Host(begin) => profile.count(op, begin.elapsed().as_secs_f64()),
            // A device that has failed has no more marks, and a second panic would hide the message of the first.
            Begin::Cuda(..) if std::thread::panicking() => {}
            Begin::Cuda(cuda, begin) => {
                let marks = [begin, cuda.mark()];
                profile.marks.lock().unwrap_or_else(PoisonError::into_inner).push((op, marks));
            }
        }
        profile.running.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::add;
    use crate::sizes::sizes;
    use crate::testing::ctx;

    #[test]
    fn ops_count_once_and_only_when_asked_for() {
        let (ctx, other) = (ctx(), ctx());
        let ones = ctx.from_f32(&[1.0; 4]);
        let mut sum = ones.clone();
        add::accumulate(&ctx, ones.view(), sum.view_mut());
        let (profile, silent) = (ctx.device.profile(), other.device.profile());
        assert!(profile.take().is_empty());
        {
            let _timer = ctx.timer("outer", sizes![sum.view()]);
            add::accumulate(&ctx, ones.view(), sum.view_mut());
        }
        add::convert(&ctx, ones.view(), sum.view_mut());
        let taken = profile.take();
        let ops: Vec<_> = taken.iter().map(|(op, spent)| (op.name, op.sizes.as_str(), spent.calls)).collect();
        assert_eq!(ops, [("add", "a f32[4], out f32[4]", 1), ("outer", "view() f32[4]", 1)]);
        assert!(taken.values().all(|s| s.seconds >= 0.0) && profile.take().is_empty() && silent.take().is_empty());
    }
}
