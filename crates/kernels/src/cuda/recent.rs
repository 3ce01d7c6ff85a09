//! What a device was given last. It works behind the host's back, so that an error shows itself later, at a wait or at
//! the next call, and says nothing of what caused it: the message names the last launches, their ops and the sizes of
//! those. Noting takes a lock and copies what it is given, once an op and a launch; only a failure formats. Ops of one device
//! are called from one thread at a time.

use crate::sizes::{Named, list};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::{self, Write};
use std::sync::Arc;

/// An op that has been called.
#[derive(Clone, Debug)]
struct Op {
    name: &'static str,
    sizes: Arc<[Named]>,
}

/// Something that the device was given.
#[derive(Clone, Debug)]
enum Work {
    Kernel(&'static str, [u32; 3]),
    Library,
    Step(Arc<Recorded>),
}

/// Each with the op that it was for.
type Works = VecDeque<(Option<Op>, Work)>;

/// Launches of a recorded step, by op.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Recorded(BTreeMap<&'static str, usize>);

/// The last that a device was given.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// Ops under way, the innermost last.
    ops: Vec<Op>,
    works: Works,
    /// While a recording is under way, what is launched meanwhile and not done before its replays, and the works before.
    recording: Option<(Recorded, Works)>,
}

impl Recent {
    /// As many as an error's message has room for.
    const KEPT: usize = 6;

    /// An op begins, maybe within another.
    pub fn begin(&mut self, name: &'static str, sizes: &[Named]) {
        self.ops.push(Op { name, sizes: sizes.into() });
    }

    /// The op that began last is over.
    pub fn end(&mut self) {
        self.ops.pop();
    }

    /// A kernel is about to be launched.
    pub fn kernel(&mut self, name: &'static str, blocks: [u32; 3]) {
        self.push(Work::Kernel(name, blocks));
    }

    /// The library for products is about to be called.
    pub fn library(&mut self) {
        self.push(Work::Library);
    }

    /// A recorded step is about to be replayed. Replays of one step are one work, or they would be all that there is.
    pub fn step(&mut self, step: &Arc<Recorded>) {
        if matches!(self.works.back(), Some((_, Work::Step(last))) if Arc::ptr_eq(last, step)) {
            return;
        }
        self.push(Work::Step(step.clone()));
    }

    fn push(&mut self, work: Work) {
        let op = self.ops.last();
        if let Some((recorded, _)) = &mut self.recording {
            *recorded.0.entry(op.map_or(Op::NONE, |op| op.name)).or_default() += 1;
        }
        if self.works.len() == Self::KEPT {
            self.works.pop_front();
        }
        self.works.push_back((op.cloned(), work));
    }

    /// Counts what is launched until the recording ends.
    pub fn begin_recording(&mut self) {
        self.recording = Some((Recorded::default(), std::mem::take(&mut self.works)));
    }

    /// What was launched since.
    pub fn end_recording(&mut self) -> Recorded {
        let (recorded, before) = self.recording.take().unwrap_or_default();
        self.works = before;
        recorded
    }

    /// For the end of a message. With `one` the device has done all but the last, which is therefore what failed if it was
    /// a launch or the wait behind it that reported the error.
    pub fn describe(&self, one: bool) -> String {
        let shown = if one { self.works.len().saturating_sub(1) } else { 0 };
        let works: Vec<_> = self.works.range(shown..).collect();
        let same = |a: &&(Option<Op>, Work), b: &&(Option<Op>, Work)| match (&a.0, &b.0) {
            (Some(a), Some(b)) => Arc::ptr_eq(&a.sizes, &b.sizes),
            _ => false,
        };
        let mut text = String::new();
        for group in works.chunk_by(same) {
            text.push_str(if text.is_empty() { "; launched last: " } else { "; " });
            if let (Some(op), _) = group[0] {
                // Writing to a string does not fail.
                let _ = write!(text, "{op}: ");
            }
            let each: Vec<String> = group.iter().map(|(_, work)| work.to_string()).collect();
            text.push_str(&each.join(", "));
        }
        if !one && !text.is_empty() {
            text.push_str(" (HADAL_CUDA_SYNC=1 waits after each, which tells the one that failed)");
        }
        text
    }
}

impl Op {
    /// Of what is launched outside of every op.
    const NONE: &str = "no op";
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, list(&self.sizes))
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(name, [x, y, z]) => write!(f, "{name}, grid [{x}, {y}, {z}]"),
            Self::Library => write!(f, "cuBLASLt"),
            Self::Step(recorded) => write!(f, "{recorded}"),
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> = self.0.iter().map(|(op, n)| format!("{n} of {op}")).collect();
        write!(f, "replays of a recorded step of {} launches ({})", self.0.values().sum::<usize>(), each.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::sizes::Size;

    const X: &[Named] = &[("a.x", Size::Elements(DType::Bf16, 512)), ("a.heads", Size::Number(4))];
    const Y: &[Named] = &[("w", Size::Matrices(DType::F32, [1, 2, 3]))];
    const HINT: &str = " (HADAL_CUDA_SYNC=1 waits after each, which tells the one that failed)";

    #[test]
    fn launches_are_named_with_their_ops_and_sizes() {
        let mut r = Recent::default();
        assert_eq!(r.describe(false), "");
        r.kernel("fill", [9, 1, 1]);
        r.begin("rope", X);
        r.kernel("rope", [1, 2, 3]);
        r.begin("gemm", Y);
        r.kernel("gemm_mma", [4, 1, 1]);
        r.library();
        r.end();
        r.kernel("turn", [5, 1, 1]);
        r.end();
        let before = "fill, grid [9, 1, 1]; rope (x bf16[512], heads 4): rope, grid [1, 2, 3]; gemm (w f32[2, 3]): \
                      gemm_mma, grid [4, 1, 1], cuBLASLt";
        let last = "rope (x bf16[512], heads 4): turn, grid [5, 1, 1]";
        assert_eq!(r.describe(false), format!("; launched last: {before}; {last}{HINT}"));
        assert_eq!(r.describe(true), format!("; launched last: {last}"));
    }

    #[test]
    fn the_last_few_are_kept() {
        let mut r = Recent::default();
        for i in 0..100 {
            r.begin("rope", X);
            r.kernel("rope", [i, 1, 1]);
            r.end();
        }
        let text = r.describe(false);
        assert_eq!((text.matches("rope (").count(), text.contains("[94, 1, 1]")), (Recent::KEPT, true), "{text}");
    }

    #[test]
    fn a_replay_tells_what_was_recorded() {
        let mut r = Recent::default();
        r.kernel("before", [1, 1, 1]);
        r.begin_recording();
        for op in ["rope", "gemm", "rope"] {
            r.begin(op, Y);
            r.kernel("k", [1, 1, 1]);
            r.kernel("k", [1, 1, 1]);
            r.end();
        }
        r.library();
        let step = Arc::new(r.end_recording());
        r.step(&step);
        r.step(&step);
        let expected = "replays of a recorded step of 7 launches (2 of gemm, 1 of no op, 4 of rope)";
        assert_eq!(r.describe(false), format!("; launched last: before, grid [1, 1, 1]; {expected}{HINT}"));
    }
}
