//! From files into arenas: every part is checked before the first byte is read, then read and widened on all cores.

use super::IoError;
use super::checkpoint::{Checkpoint, Source, check_shape, mtp_copies};
use super::error::printable;
use super::shard::is_float;
use crate::{Layout, ModelConfig, Params, Precision, Scope};
use hadal_kernels::{Ctx, Device};
use std::path::Path;
use std::sync::Arc;

/// Reads the weights in `dir` for the part of the model that `layout` covers; see [`Checkpoint::load`].
pub fn load_params(
    ctx: &Ctx,
    config: &ModelConfig,
    layout: Arc<Layout>,
    precision: Precision,
    dir: &Path,
) -> Result<(Params, Vec<String>), IoError> {
    Checkpoint::open(dir)?.load(ctx, config, layout, precision)
}

/// One part to read: where from, where to, and what came of it.
struct Job<'a> {
    source: Source<'a>,
    out: &'a mut [f32],
    result: Result<(), IoError>,
}

impl Checkpoint {
    /// Reads the masters of `layout`, widened to f32, and rounds the compute copy. A tensor that is missing, or has
    /// another shape, or is no float, is an error; tensors that the model has no use for are warnings, one line each.
    pub fn load(
        &self,
        ctx: &Ctx,
        config: &ModelConfig,
        layout: Arc<Layout>,
        precision: Precision,
    ) -> Result<(Params, Vec<String>), IoError> {
        let sources = self.sources(config, &layout)?;
        let warnings = self.warnings(config)?;
        let mut params = Params::zeros(ctx, layout.clone(), precision);
        let mut jobs = Vec::with_capacity(sources.len());
        let (mut rest, mut at) = (params.master.view_mut().f32(), 0);
        for ((_, p), source) in layout.published().zip(sources) {
            let (_, tail) = rest.split_at_mut(p.offset - at);
            let (out, tail) = tail.split_at_mut(p.len());
            (rest, at) = (tail, p.range().end);
            jobs.push(Job { source, out, result: Ok(()) });
        }
        match &ctx.device {
            Device::Cpu(cpu) => cpu.chunks_mut(&mut jobs, 1, |_, one| {
                let Job { source, out, result } = &mut one[0];
                *result = source.shard.read(source.stored, source.first, out);
            }),
        }
        jobs.into_iter().try_for_each(|job| job.result)?;
        params.refresh(ctx);
        Ok((params, warnings))
    }

    fn sources(&self, config: &ModelConfig, layout: &Layout) -> Result<Vec<Source<'_>>, IoError> {
        let (mut sources, mut missing) = (Vec::new(), Vec::new());
        for (t, p) in layout.published() {
            match self.find(config, t, p)? {
                None => missing.push(&p.name),
                Some(s) if !is_float(s.stored.dtype) => {
                    let found = format!("{:?}", s.stored.dtype);
                    return Err(IoError::tensor(&s.shard.path, &s.name, "BF16, F16 or F32", found));
                }
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
            .map(|name| format!("{dir}: {}: the configuration has no such tensor: ignored", printable(name)))
            .collect();
        out.extend(
            self.unlisted()
                .map(|(file, name)| format!("{}: {}: not in the index: ignored", file.display(), printable(&name))),
        );
        Ok(out)
    }
}
