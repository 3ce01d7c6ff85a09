//! Checkpoints beside training: the arenas are copied, a thread writes the copy while the next steps run, and then looks
//! after which checkpoints stay. At most one is being written; the next waits for it.

use crate::TrainError;
use crate::state::{Arenas, Progress, State, Writer, checkpoints, name};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keep {
    /// The newest so many.
    pub last: u64,
    /// And the one with the lowest bits per byte of those at whose step there was a validation.
    pub best: bool,
    /// And the initial weights.
    pub initial: bool,
}

/// A copy of the arenas, its memory used again from save to save.
#[derive(Default)]
struct Copy {
    master: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    ema: Option<Vec<f32>>,
}

impl Copy {
    fn take(&mut self, a: &Arenas<'_>) {
        let fill = |to: &mut Vec<f32>, from: &[f32]| {
            to.clear();
            to.extend_from_slice(from);
        };
        fill(&mut self.master, a.master);
        fill(&mut self.m, a.m);
        fill(&mut self.v, a.v);
        match a.ema {
            Some(ema) => fill(self.ema.get_or_insert_default(), ema),
            None => self.ema = None,
        }
    }

    fn arenas(&self) -> Arenas<'_> {
        Arenas { master: &self.master, m: &self.m, v: &self.v, ema: self.ema.as_deref() }
    }
}

type Valid = BTreeMap<u64, Option<f64>>;
type Written = Result<PathBuf, TrainError>;

/// What the thread works with, and gives back.
struct Desk {
    writer: Arc<Writer>,
    keep: Keep,
    copy: Copy,
    /// Checkpoints there are, with their validation.
    valid: Valid,
}

/// Writes the checkpoints of a run.
pub(crate) struct Saver {
    desk: Option<Desk>,
    /// Train on while a copy is being written.
    beside: bool,
    running: Option<JoinHandle<(Desk, Written)>>,
}

impl Saver {
    /// For a run whose directory may hold checkpoints already.
    pub fn new(writer: Writer, keep: Keep, beside: bool) -> Result<Self, TrainError> {
        let mut valid = Valid::new();
        for (step, dir) in checkpoints(&writer.out)? {
            // One that cannot be read is none that was measured; whoever resumes from it is told what is wrong.
            valid.insert(step, State::open(&dir).ok().and_then(|s| s.progress().valid_bits_per_byte));
        }
        let mut desk = Desk { writer: Arc::new(writer), keep, copy: Copy::default(), valid };
        // A run that was killed after a checkpoint had its name may not have come to this.
        desk.tidy()?;
        Ok(Self { desk: Some(desk), beside, running: None })
    }

    /// Saves a step, now or beside what follows; returns the checkpoints that are on the disk since the last call.
    pub fn save(&mut self, a: &Arenas<'_>, progress: Progress, updates: u64) -> Result<Vec<PathBuf>, TrainError> {
        let mut done = self.wait()?;
        let mut desk = self.desk.take().expect("nothing is being written");
        if !self.beside {
            let written = desk.write(a, &progress, updates);
            self.desk = Some(desk);
            done.extend(Some(written?));
            return Ok(done);
        }
        desk.copy.take(a);
        let out = desk.writer.out.clone();
        let work = move || {
            let copy = std::mem::take(&mut desk.copy);
            let written = desk.write(&copy.arenas(), &progress, updates);
            desk.copy = copy;
            (desk, written)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        self.running = Some(thread.map_err(|e| TrainError::write(&out, &e))?);
        Ok(done)
    }

    /// The checkpoint that has been finished since the last call, if any; does not wait.
    pub fn poll(&mut self) -> Result<Vec<PathBuf>, TrainError> {
        if self.running.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { Ok(Vec::new()) }
    }

    /// Waits for what is being written.
    pub fn wait(&mut self) -> Result<Vec<PathBuf>, TrainError> {
        let Some(thread) = self.running.take() else { return Ok(Vec::new()) };
        let (desk, written) = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        self.desk = Some(desk);
        Ok(vec![written?])
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // Whatever ended the run has been told; a checkpoint under way is still worth finishing.
        if let Some(thread) = self.running.take() {
            let _ = thread.join();
        }
    }
}

impl Desk {
    fn write(&mut self, a: &Arenas<'_>, progress: &Progress, updates: u64) -> Written {
        let dir = self.writer.write(a, progress, updates)?;
        self.valid.insert(progress.step, progress.valid_bits_per_byte);
        self.tidy()?;
        Ok(dir)
    }

    /// Points `latest` and `best` at what they name, and removes the checkpoints that need not stay.
    fn tidy(&mut self) -> Result<(), TrainError> {
        let (disk, out) = (&self.writer.disk, &self.writer.out);
        let best = if self.keep.best { best(&self.valid) } else { None };
        let newest = self.valid.keys().next_back().copied();
        for (link, step) in [("latest", newest), ("best", best)] {
            let Some(step) = step else { continue };
            let name = name(step);
            if std::fs::read_link(out.join(link)).is_ok_and(|to| to == Path::new(&name)) {
                continue;
            }
            disk.point(&out.join(link), &name)?;
        }
        for step in superfluous(&self.valid, self.keep) {
            disk.remove_dir(&out.join(name(step)))?;
            self.valid.remove(&step);
        }
        Ok(())
    }
}

/// The step with the lowest bits per byte; the later of two equal ones.
fn best(valid: &Valid) -> Option<u64> {
    let measured = valid.iter().filter_map(|(step, bits)| Some((*step, (*bits)?)));
    measured.min_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map(|(step, _)| step)
}

/// Steps whose checkpoints go.
fn superfluous(valid: &Valid, keep: Keep) -> Vec<u64> {
    let best = if keep.best { best(valid) } else { None };
    let mut old: Vec<u64> = valid.keys().copied().filter(|&step| !(keep.initial && step == 0)).collect();
    old.truncate(old.len().saturating_sub(usize::try_from(keep.last).unwrap_or(usize::MAX)));
    old.retain(|step| Some(*step) != best);
    old
}

/// The newest checkpoint in a run's directory.
pub(crate) fn newest(out: &Path) -> Result<Option<PathBuf>, TrainError> {
    Ok(checkpoints(out)?.into_values().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_the_best_stay() {
        let valid: Valid = [(1, Some(2.0)), (2, Some(1.0)), (3, None), (4, Some(1.0)), (5, Some(1.5))].into();
        assert_eq!(best(&valid), Some(4));
        let keep = |last, best| superfluous(&valid, Keep { last, best, initial: false });
        assert_eq!(keep(1, true), [1, 2, 3]);
        assert_eq!(keep(1, false), [1, 2, 3, 4]);
        assert_eq!(keep(4, true), [1]);
        assert!(keep(9, true).is_empty());
        assert!(keep(u64::MAX, false).is_empty());
        assert_eq!(best(&[(1, None)].into()), None);
        let from_0: Valid = [(0, None), (1, Some(2.0)), (2, Some(1.0))].into();
        let keep = |initial| superfluous(&from_0, Keep { last: 1, best: false, initial });
        assert_eq!((keep(true), keep(false)), (vec![1], vec![0, 1]));
    }
}
