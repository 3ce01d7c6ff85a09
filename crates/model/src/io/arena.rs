//! Arenas that are not the model: moments, masters and averages, by published name and global shape in F32, as
//! [`super::write_arena`] writes them. What is read back is what was written, to the bit.

use super::IoError;
use super::checkpoint::{Checkpoint, check_shape};
use crate::{Layout, Published};
use hadal_kernels::Ctx;
use safetensors::Dtype;
use std::path::Path;

/// Reads `<stem>.safetensors` (or its shards) of `dir` into the f32 arena of `layout`: every published tensor, each of
/// its shape and F32. What lies between tensors stays as it is.
pub fn read_arena(ctx: &Ctx, dir: &Path, stem: &str, layout: &Layout, arena: &mut [f32]) -> Result<(), IoError> {
    assert_eq!(arena.len(), layout.len, "an arena of another layout");
    let checkpoint = Checkpoint::open_stem(dir, stem)?;
    let parts: Vec<&Published> = layout.published().map(|(_, p)| p).collect();
    let missing: Vec<&&Published> = parts.iter().filter(|p| !checkpoint.contains(&p.name)).collect();
    if let Some(first) = missing.first() {
        let (missing, wanted) = (missing.len(), parts.len());
        return Err(IoError::Missing { path: dir.join(stem), missing, wanted, first: first.name.clone() });
    }
    let mut jobs = Vec::new();
    let (mut rest, mut at) = (arena, 0);
    for p in parts {
        let (_, tail) = std::mem::take(&mut rest).split_at_mut(p.offset - at);
        let (out, tail) = tail.split_at_mut(p.len());
        (rest, at) = (tail, p.range().end);
        jobs.push((p, out, Ok(())));
    }
    let cpu = ctx.host();
    cpu.chunks_mut(&mut jobs, 1, |_, job| {
        let (p, out, result) = &mut job[0];
        *result = read(&checkpoint, p, out);
    });
    jobs.into_iter().try_for_each(|(_, _, result)| result)
}

fn read(checkpoint: &Checkpoint, p: &Published, out: &mut [f32]) -> Result<(), IoError> {
    let (shard, stored) = checkpoint.stored(&p.name).expect("looked up before");
    check_shape(shard, &p.name, &p.shape, stored)?;
    if stored.dtype != Dtype::F32 {
        return Err(IoError::tensor(&shard.path, &p.name, "F32", format!("{:?}", stored.dtype)));
    }
    shard.read(&p.name, stored, 0, out)
}
