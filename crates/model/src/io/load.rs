//! From files into arenas: every part is checked before the first byte is read, then read and widened on all cores.

use super::IoError;
use super::checkpoint::{Checkpoint, check_shape, derived, mtp_copies};
use super::error::printable;
use super::source::Source;
use crate::{Layout, ModelConfig, Params, Precision, Scope};
use hadal_kernels::{Ctx, Elem, bf16};
use std::ops::Range;
use std::sync::Arc;

/// One part to read: where from, where to, and what came of it.
struct Job<'a> {
    source: Source<'a>,
    out: Out<'a>,
    result: Result<(), IoError>,
}

/// The arena's part that a published part fills.
enum Out<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

/// Elements read at once on their way to bf16.
const PIECE: usize = 1 << 16;

impl Job<'_> {
    fn run(&mut self) -> Result<(), IoError> {
        match &mut self.out {
            Out::F32(out) => self.source.read(0, out),
            Out::Bf16(out) => {
                let mut piece = vec![0.0; PIECE.min(out.len())];
                for (i, out) in out.chunks_mut(PIECE).enumerate() {
                    let piece = &mut piece[..out.len()];
                    self.source.read(i * PIECE, piece)?;
                    out.iter_mut().zip(piece).for_each(|(o, x)| *o = <bf16 as Elem>::round(*x));
                }
                Ok(())
            }
        }
    }
}

/// Takes the elements `range` off the front of what is left of an arena that begins at `at`.
fn take<'a, T>(rest: &mut &'a mut [T], at: &mut usize, range: Range<usize>) -> &'a mut [T] {
    let (_, tail) = std::mem::take(rest).split_at_mut(range.start - *at);
    let (out, tail) = tail.split_at_mut(range.len());
    (*rest, *at) = (tail, range.end);
    out
}

impl Checkpoint {
    /// Reads the masters of `layout`, widened or dequantised to f32, and rounds the compute copy. A tensor that is
    /// missing, or has another shape, or is no float, or lacks its scales, is an error; tensors that the model has no
    /// use for are warnings, one line each.
    pub fn load(
        &self,
        ctx: &Ctx,
        config: &ModelConfig,
        layout: Arc<Layout>,
        precision: Precision,
    ) -> Result<(Params, Vec<String>), IoError> {
        self.fill(ctx, config, layout, |layout| Params::zeros(&ctx.on_host(), layout, precision))
    }

    /// As [`Checkpoint::load`], without masters where bf16 is computed with.
    pub fn load_for_inference(
        &self,
        ctx: &Ctx,
        config: &ModelConfig,
        layout: Arc<Layout>,
        precision: Precision,
    ) -> Result<(Params, Vec<String>), IoError> {
        self.fill(ctx, config, layout, |layout| Params::zeros_for_inference(&ctx.on_host(), layout, precision))
    }

    fn fill(
        &self,
        ctx: &Ctx,
        config: &ModelConfig,
        layout: Arc<Layout>,
        arenas: impl FnOnce(Arc<Layout>) -> Params,
    ) -> Result<(Params, Vec<String>), IoError> {
        let mut sources = self.sources(config, &layout)?.into_iter();
        let warnings = self.warnings(config)?;
        // Only now that all is there.
        let mut params = arenas(layout.clone());
        let mut jobs = Vec::new();
        let kept = params.kept.clone();
        let (mut f32s, mut f32_at) = (params.master.view_mut().f32(), 0);
        let (mut bf16s, mut bf16_at) = (params.compute.as_mut().map_or(&mut [][..], |c| c.view_mut().bf16()), 0);
        for (i, t) in layout.tensors.iter().enumerate() {
            for (p, source) in t.published.iter().zip(&mut sources) {
                let out = match kept.as_ref().map(|k| k[i]) {
                    Some(None) => Out::Bf16(take(&mut bf16s, &mut bf16_at, p.range())),
                    Some(Some(at)) => {
                        let first = at + p.offset - t.offset;
                        Out::F32(take(&mut f32s, &mut f32_at, first..first + p.len()))
                    }
                    None => Out::F32(take(&mut f32s, &mut f32_at, p.range())),
                };
                jobs.push(Job { source, out, result: Ok(()) });
            }
        }
        ctx.host().chunks_mut(&mut jobs, 1, |_, one| one[0].result = one[0].run());
        jobs.into_iter().try_for_each(|job| job.result)?;
        let mut params = params.here(ctx);
        params.refresh(ctx);
        Ok((params, warnings))
    }

    /// Where each published part of `layout` lies, in its order.
    pub(super) fn sources(&self, config: &ModelConfig, layout: &Layout) -> Result<Vec<Source<'_>>, IoError> {
        let (mut sources, mut missing) = (Vec::new(), Vec::new());
        for (t, p) in layout.published() {
            match self.find(config, t, p)? {
                None => missing.push(&p.name),
                Some(s) => sources.push(s),
            }
        }
        match missing.first() {
            None => Ok(sources),
            Some(&first) => Err(IoError::Missing {
                path: self.dir().to_path_buf(),
                missing: missing.len(),
                wanted: missing.len() + sources.len(),
                first: first.clone(),
            }),
        }
    }

    fn warnings(&self, config: &ModelConfig) -> Result<Vec<String>, IoError> {
        let whole = Layout::new(config, Scope::whole(config));
        for (name, _) in mtp_copies(config, config.num_nextn_predict_layers) {
            if let Some((shard, stored)) = self.stored(&name) {
                check_shape(shard, &name, &[config.vocab_size, config.hidden_size], stored)?;
            }
        }
        let dir = self.dir().display();
        let mut out: Vec<String> = self
            .unused(config, &whole)
            .into_iter()
            .filter(|name| !derived(name))
            .map(|name| format!("{dir}: {}: the configuration has no such tensor: ignored", printable(name)))
            .collect();
        out.extend(
            self.unlisted()
                .map(|(file, name)| format!("{}: {}: not in the index: ignored", file.display(), printable(&name))),
        );
        Ok(out)
    }
}
