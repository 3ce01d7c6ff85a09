//! Gradients in a flat arena under the weights' table of offsets.

use crate::{Layout, ParamId};
use hadal_kernels::{Buf, Ctx, DType, ViewMut};
use std::sync::Arc;

/// Gradients: one f32 arena, and beside it a buffer for each further use of a shared table (MTP's uses of embedding and
/// head), so that no use depends on another's order; [`Grads::fold`] sums them in the order of use.
pub struct Grads {
    /// The table.
    pub layout: Arc<Layout>,
    /// f32 arena.
    pub arena: Buf,
    /// Buffers of uses 1 ..= MTP depth, of the embedding then of the head.
    uses: Vec<(ParamId, Buf)>,
    depth: usize,
    /// Tensors that nothing was added to since [`Grads::clear`], which has not made them zero: most are overwritten by
    /// the first product, and a pass over all of them is a pass over memory.
    unwritten: Vec<bool>,
}

impl Grads {
    /// All zeros.
    pub fn zeros(ctx: &Ctx, layout: Arc<Layout>) -> Self {
        let depth = layout.scope.mtp;
        let mut uses = Vec::new();
        for id in [layout.embedding, layout.head].into_iter().flatten() {
            for _ in 0..depth {
                uses.push((id, ctx.zeros(DType::F32, layout.info(id).len())));
            }
        }
        let unwritten = vec![false; layout.tensors.len()];
        Self { arena: ctx.zeros(DType::F32, layout.len), uses, depth, unwritten, layout }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.arena.bytes() + self.uses.iter().map(|(_, b)| b.bytes()).sum::<usize>()
    }

    /// Where a tensor's gradient accumulates.
    pub fn of(&mut self, id: ParamId) -> ViewMut<'_> {
        self.settle(id.0);
        let r = self.layout.info(id).range();
        self.arena.view_mut().slice(r)
    }

    /// Where a tensor's gradient goes, all of it: false if it is to be overwritten, as nothing was added yet.
    pub(crate) fn first_of(&mut self, id: ParamId) -> (ViewMut<'_>, bool) {
        let first = std::mem::take(&mut self.unwritten[id.0]);
        let r = self.layout.info(id).range();
        (self.arena.view_mut().slice(r), !first)
    }

    /// Makes a tensor zero that was to be.
    fn settle(&mut self, i: usize) {
        if std::mem::take(&mut self.unwritten[i]) {
            let r = self.layout.tensors[i].range();
            self.arena.view_mut().slice(r).clear();
        }
    }

    /// Where use `n` of a shared table accumulates: 0 the main model, k the MTP layer of depth k.
    pub fn of_use(&mut self, id: ParamId, n: usize) -> ViewMut<'_> {
        if n == 0 {
            return self.of(id);
        }
        assert!(n <= self.depth, "use {n} of a shared table, the layout has {} MTP layers", self.depth);
        let first = self.uses.iter().position(|(i, _)| *i == id).expect("embedding and head are the shared tables");
        self.uses[first + n - 1].1.view_mut()
    }

    /// As [`Grads::of_use`], all of it: false if it is to be overwritten, as nothing was added yet.
    pub(crate) fn first_of_use(&mut self, id: ParamId, n: usize) -> (ViewMut<'_>, bool) {
        if n == 0 { self.first_of(id) } else { (self.of_use(id, n), true) }
    }

    /// Adds the further uses of shared tables onto the first, in order of use, and clears them.
    pub fn fold(&mut self, ctx: &Ctx) {
        (0..self.unwritten.len()).for_each(|i| self.settle(i));
        for (id, buf) in &mut self.uses {
            let r = self.layout.info(*id).range();
            hadal_kernels::ops::add::accumulate(ctx, buf.view(), self.arena.view_mut().slice(r));
            buf.clear();
        }
    }

    /// Forgets everything for the next step; the arena can be read again after [`Grads::fold`].
    pub fn clear(&mut self) {
        self.unwritten.fill(true);
        for (_, buf) in &mut self.uses {
            buf.clear();
        }
    }
}
