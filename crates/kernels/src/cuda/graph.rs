//! Work recorded once and given to the device again as a whole: what a step launches, without the host's time for each
//! launch. Everything that differs from step to step is in device memory at a fixed address.

use super::Cuda;
use super::driver::check;
use super::memory::{Range, lock};
use super::recent::Recorded;
use cudarc::driver::sys;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

/// Held while a step is recorded, and alone by whoever waits for the whole device (memory and handles are freed so):
/// that would break a recording of the same device on another thread.
static RECORDING: RwLock<()> = RwLock::new(());

/// Keeps recordings from beginning, once those under way have ended.
pub(super) fn nobody_records() -> RwLockWriteGuard<'static, ()> {
    RECORDING.write().unwrap_or_else(PoisonError::into_inner)
}

/// Recorded work.
pub struct Graph {
    exec: sys::CUgraphExec,
    /// Memory that a replay writes over.
    ranges: Vec<Range>,
    /// What of it was in use at the recording's end: its results.
    kept: Vec<Range>,
    launches: Arc<Recorded>,
    cuda: Arc<Cuda>,
}

// SAFETY: a handle of the driver, used under the device's stream order.
unsafe impl Send for Graph {}
// SAFETY: as above; replaying takes the device's stream, which orders it.
unsafe impl Sync for Graph {}

impl Cuda {
    /// Records what `f` would give the device, which does none of it. What `f` reads and writes must be there at every
    /// replay, at the same addresses; `f` neither waits nor copies from or to the host.
    pub fn capture<R>(self: &Arc<Self>, f: impl FnOnce() -> R) -> (Graph, R) {
        self.bind();
        let recording = RECORDING.read().unwrap_or_else(PoisonError::into_inner);
        let stream = self.stream.raw();
        // Relaxed: a kernel that is compiled and loaded in between is no part of the recording.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive and records nothing yet.
        self.check("recording a step", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) });
        lock(&self.arena).begin_recording();
        self.recent().begin_recording();
        self.recording.store(true, Ordering::Relaxed);
        let result = f();
        self.recording.store(false, Ordering::Relaxed);
        let (ranges, kept) = lock(&self.arena).end_recording();
        let launches = Arc::new(self.recent().end_recording());
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: ends the recording begun above; the handles are written by the driver and used once.
        unsafe {
            self.check("recording a step", sys::cuStreamEndCapture(stream, &mut graph));
            let made = check(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            sys::cuGraphDestroy(graph);
            if let Err(e) = made {
                self.check("preparing a recorded step", e.0);
            }
        }
        drop(recording);
        (Graph { exec, ranges, kept, launches, cuda: self.clone() }, result)
    }
}

impl Graph {
    /// Gives the device all of it. False, and nothing happens, if memory that the recording used for a while is in use
    /// for something else, or its results are no longer there: record again.
    #[must_use = "what could not be replayed was not done"]
    pub fn replay(&self) -> bool {
        if lock(&self.cuda.arena).in_use(&self.ranges) != self.kept {
            return false;
        }
        self.cuda.bind();
        self.cuda.recent().step(&self.launches);
        self.cuda.counts.replays.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the graph is alive, and the memory that it names is still the arena's.
        let result = unsafe { sys::cuGraphLaunch(self.exec, self.cuda.stream.raw()) };
        self.cuda.check("replaying a step", result);
        self.cuda.launched();
        true
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once; the driver lets a running replay finish.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}
