//! What ranks say to each other. Stages know only [`Exchange`]; whether it is the identity, threads of one process or a
//! network is decided by whoever builds the model.

mod in_process;

pub use in_process::{InProcess, group};

use hadal_kernels::{Buf, Ctx};

/// An expert's number in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GlobalExpert(pub usize);

/// An expert's slot on the rank that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalExpert(pub usize);

/// Consecutive experts, by their numbers in the model: what one rank holds. A slot counts from the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertRange {
    first: usize,
    len: usize,
}

impl ExpertRange {
    /// `len` experts from `first`.
    pub fn new(first: GlobalExpert, len: usize) -> Self {
        Self { first: first.0, len }
    }

    /// All experts of a model.
    pub fn all(experts: usize) -> Self {
        Self::new(GlobalExpert(0), experts)
    }

    /// Their numbers in the model, ascending.
    pub fn global(self) -> impl Iterator<Item = GlobalExpert> {
        (self.first..self.first + self.len).map(GlobalExpert)
    }

    /// Their slots, in the same order.
    pub fn local(self) -> impl Iterator<Item = LocalExpert> {
        (0..self.len).map(LocalExpert)
    }
}

/// How one dispatch went; combine and the backward passes need it to go the same way.
#[derive(Debug)]
pub struct Route {
    /// i32 `[local experts + 1]`: where each local expert's rows begin on this side.
    pub offsets: Buf,
    /// `received[source][local expert]`: rows.
    received: Vec<Vec<usize>>,
    /// `sent[destination]`: rows.
    sent: Vec<usize>,
}

impl Route {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.offsets.bytes() + 8 * (self.sent.len() + self.received.iter().map(Vec::len).sum::<usize>())
    }
}

/// Moves token rows to the ranks that hold their experts and back. Every rank of a group makes the same calls in the
/// same order. Rows arrive sorted by local expert, then by source rank, then in the source's order, so that two ranks
/// see what one rank would with both batches one after the other.
pub trait Exchange: Send + Sync {
    /// The experts held here.
    fn experts(&self) -> ExpertRange;

    /// The route of rows that all stay where they are, `offsets` as in `dispatch`; None where rows come and go. Rows that
    /// stay need not be sorted: whoever multiplies them may read them where their tokens lie.
    fn stay(&self, _offsets: &Buf) -> Option<Route> {
        None
    }

    /// `rows` `[n, dim]`, sorted by global expert with `offsets` (i32 `[E + 1]`), to the experts' ranks: the rows of
    /// the local experts and the route.
    fn dispatch(&self, ctx: &Ctx, rows: Buf, offsets: &Buf, dim: usize) -> (Buf, Route);

    /// More rows along a known route, from the tokens' side to the experts' side (backward of combine).
    fn redispatch(&self, ctx: &Ctx, rows: Buf, route: &Route, dim: usize) -> Buf;

    /// Rows from the experts' side back to the tokens' side, in the order they were sent (also backward of dispatch).
    fn combine(&self, ctx: &Ctx, rows: Buf, route: &Route, dim: usize) -> Buf;

    /// Sums counts over all ranks.
    fn sum_counts(&self, counts: &mut [i64]);
}

/// One rank that holds all experts: nothing moves.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// E.
    pub experts: usize,
}

impl Exchange for Identity {
    fn experts(&self) -> ExpertRange {
        ExpertRange::all(self.experts)
    }

    fn stay(&self, offsets: &Buf) -> Option<Route> {
        Some(Route { offsets: offsets.clone(), received: Vec::new(), sent: Vec::new() })
    }

    fn dispatch(&self, _: &Ctx, rows: Buf, offsets: &Buf, _: usize) -> (Buf, Route) {
        (rows, Route { offsets: offsets.clone(), received: Vec::new(), sent: Vec::new() })
    }

    fn redispatch(&self, _: &Ctx, rows: Buf, _: &Route, _: usize) -> Buf {
        rows
    }

    fn combine(&self, _: &Ctx, rows: Buf, _: &Route, _: usize) -> Buf {
        rows
    }

    fn sum_counts(&self, _: &mut [i64]) {}
}
