//! Where the time goes: seconds by op, of one device. A device has no profile until somebody asks for one, and then an
//! op's timer costs two looks at the clock; before, one load. It is a stopwatch and not a sampler: what an op's callers
//! do between ops, and what they wait for, is not in it.

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
    seconds: Mutex<BTreeMap<&'static str, f64>>,
}

impl Profile {
    /// What was spent since the last call, or since the profile began.
    pub fn take(&self) -> BTreeMap<&'static str, f64> {
        std::mem::take(&mut self.seconds.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Counts for an op from its making to its end.
#[must_use = "a timer counts until it is dropped"]
pub(crate) struct Timer<'a>(Option<(&'a Profile, &'static str, Instant)>);

impl Ctx {
    /// A timer for the op of this name; it counts nothing without a profile, or within another op.
    pub(crate) fn timer(&self, op: &'static str) -> Timer<'_> {
        let Device::Cpu(cpu) = &self.device;
        let profile = cpu.profile.get().filter(|p| !p.running.swap(true, Ordering::Acquire));
        Timer(profile.map(|p| (p, op, Instant::now())))
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        if let Some((profile, op, begin)) = self.0 {
            let seconds = begin.elapsed().as_secs_f64();
            *profile.seconds.lock().unwrap_or_else(PoisonError::into_inner).entry(op).or_default() += seconds;
            profile.running.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::ctx;
    use crate::{Device, ops::add};

    #[test]
    fn ops_count_once_and_only_when_asked_for() {
        let (ctx, other) = (ctx(), ctx());
        let ones = ctx.from_f32(&[1.0; 4]);
        let mut sum = ones.clone();
        add::accumulate(&ctx, ones.view(), sum.view_mut());
        let [Device::Cpu(cpu), Device::Cpu(beside)] = [&ctx.device, &other.device];
        let (profile, silent) = (cpu.profile(), beside.profile());
        assert!(profile.take().is_empty());
        {
            let _timer = ctx.timer("outer");
            add::accumulate(&ctx, ones.view(), sum.view_mut());
        }
        add::convert(&ctx, ones.view(), sum.view_mut());
        let taken = profile.take();
        assert_eq!(taken.keys().copied().collect::<Vec<_>>(), ["add", "outer"]);
        assert!(taken.values().all(|s| *s >= 0.0) && profile.take().is_empty() && silent.take().is_empty());
    }
}
