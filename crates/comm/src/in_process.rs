//! Ranks as threads of one process: mailboxes in shared memory. The order of everything is fixed by rank, so results do
//! not depend on which thread runs when. A rank that goes away (returns early or panics) is noticed by the others.

use crate::{Exchange, ExpertRange, GlobalExpert, LocalExpert, Route};
use hadal_kernels::{Buf, Ctx, DType, View, ViewMut};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

enum Message {
    Rows { counts: Vec<usize>, rows: Buf },
    Counts(Vec<i64>),
}

struct Mail {
    /// `queue[source * ranks + destination]`.
    queues: Vec<VecDeque<Message>>,
    left: Vec<bool>,
}

struct Hub {
    ranks: usize,
    mail: Mutex<Mail>,
    arrived: Condvar,
}

/// One rank of a group made by [`group`].
pub struct InProcess {
    rank: usize,
    experts: usize,
    hub: Arc<Hub>,
}

/// `ranks` ranks that share `experts` experts in contiguous equal parts. Panics unless the parts are equal.
pub fn group(ranks: usize, experts: usize) -> Vec<InProcess> {
    assert!(ranks > 0 && experts.is_multiple_of(ranks), "{experts} experts over {ranks} ranks");
    let mail = Mail { queues: (0..ranks * ranks).map(|_| VecDeque::new()).collect(), left: vec![false; ranks] };
    let hub = Arc::new(Hub { ranks, mail: Mutex::new(mail), arrived: Condvar::new() });
    (0..ranks).map(|rank| InProcess { rank, experts, hub: hub.clone() }).collect()
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.lock().left[self.rank] = true;
        self.hub.arrived.notify_all();
    }
}

impl InProcess {
    /// The experts that a rank holds.
    fn held(&self, rank: usize) -> ExpertRange {
        let len = self.experts / self.hub.ranks;
        ExpertRange::new(GlobalExpert(rank * len), len)
    }

    /// A rank that panicked while holding the lock leaves queues intact (they are only pushed and popped whole).
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.hub.mail.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn send(&self, to: usize, message: Message) {
        self.lock().queues[self.rank * self.hub.ranks + to].push_back(message);
        self.hub.arrived.notify_all();
    }

    fn receive(&self, from: usize) -> Message {
        let slot = from * self.hub.ranks + self.rank;
        let mut mail = self.lock();
        loop {
            if let Some(m) = mail.queues[slot].pop_front() {
                return m;
            }
            assert!(!mail.left[from], "rank {from} left while rank {} waited for it", self.rank);
            mail = self.hub.arrived.wait(mail).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn receive_rows(&self, from: usize) -> (Vec<usize>, Buf) {
        match self.receive(from) {
            Message::Rows { counts, rows } => (counts, rows),
            Message::Counts(_) => panic!("ranks {from} and {} call different exchanges", self.rank),
        }
    }

    /// Received parts in expert order: `[local expert][source]`.
    fn assemble(&self, ctx: &Ctx, parts: &[Buf], received: &[Vec<usize>], dtype: DType, dim: usize) -> Buf {
        let total: usize = received.iter().flatten().sum();
        let mut out = ctx.empty(dtype, total * dim);
        let mut at = 0;
        let mut read = vec![0; parts.len()];
        for LocalExpert(e) in self.experts().local() {
            for (source, part) in parts.iter().enumerate() {
                let n = received[source][e] * dim;
                copy(part.view().slice(read[source]..read[source] + n), out.view_mut().slice(at..at + n));
                read[source] += n;
                at += n;
            }
        }
        out
    }

    /// Cuts `rows` into one part per destination and sends each.
    fn scatter(&self, ctx: &Ctx, rows: &Buf, counts: impl Iterator<Item = Vec<usize>>, dim: usize) {
        let mut at = 0;
        for (to, counts) in counts.enumerate() {
            let n = counts.iter().sum::<usize>() * dim;
            let mut part = ctx.empty(rows.dtype(), n);
            copy(rows.view().slice(at..at + n), part.view_mut());
            self.send(to, Message::Rows { counts, rows: part });
            at += n;
        }
    }

    fn gather(&self) -> (Vec<Vec<usize>>, Vec<Buf>) {
        (0..self.hub.ranks).map(|from| self.receive_rows(from)).unzip()
    }
}

fn copy(from: View<'_>, to: ViewMut<'_>) {
    match (from, to) {
        (View::F32(a), ViewMut::F32(b)) => b.copy_from_slice(a),
        (View::Bf16(a), ViewMut::Bf16(b)) => b.copy_from_slice(a),
        (View::I32(a), ViewMut::I32(b)) => b.copy_from_slice(a),
        (a, b) => panic!("copy of {:?} to {:?}", a.dtype(), b.dtype()),
    }
}

impl Exchange for InProcess {
    fn experts(&self) -> ExpertRange {
        self.held(self.rank)
    }

    fn dispatch(&self, ctx: &Ctx, rows: Buf, offsets: &Buf, dim: usize) -> (Buf, Route) {
        let offsets = offsets.view().i32();
        assert_eq!(offsets.len(), self.experts + 1, "offsets of {} experts", self.experts);
        let count = |GlobalExpert(e): GlobalExpert| (offsets[e + 1] - offsets[e]) as usize;
        let counts: Vec<Vec<usize>> =
            (0..self.hub.ranks).map(|to| self.held(to).global().map(count).collect()).collect();
        let sent = counts.iter().map(|c| c.iter().sum()).collect();
        self.scatter(ctx, &rows, counts.into_iter(), dim);
        let (received, parts) = self.gather();
        let out = self.assemble(ctx, &parts, &received, rows.dtype(), dim);
        let mut local = vec![0i32];
        for LocalExpert(e) in self.experts().local() {
            local.push(local[e] + received.iter().map(|c| c[e] as i32).sum::<i32>());
        }
        (out, Route { offsets: ctx.from_i32(&local), received, sent })
    }

    fn redispatch(&self, ctx: &Ctx, rows: Buf, route: &Route, dim: usize) -> Buf {
        // The receiver knows its counts from the first dispatch; only the sizes of the parts matter here.
        self.scatter(ctx, &rows, route.sent.iter().map(|&n| vec![n]), dim);
        let (_, parts) = self.gather();
        self.assemble(ctx, &parts, &route.received, rows.dtype(), dim)
    }

    fn combine(&self, ctx: &Ctx, rows: Buf, route: &Route, dim: usize) -> Buf {
        for to in 0..self.hub.ranks {
            let counts = &route.received[to];
            let mut part = ctx.zeros(rows.dtype(), counts.iter().sum::<usize>() * dim);
            let (mut read, mut at) = (0, 0);
            for LocalExpert(e) in self.experts().local() {
                for (source, received) in route.received.iter().enumerate() {
                    let n = received[e] * dim;
                    if source == to {
                        copy(rows.view().slice(read..read + n), part.view_mut().slice(at..at + n));
                        at += n;
                    }
                    read += n;
                }
            }
            self.send(to, Message::Rows { counts: counts.clone(), rows: part });
        }
        let mut out = ctx.zeros(rows.dtype(), route.sent.iter().sum::<usize>() * dim);
        let mut at = 0;
        for from in 0..self.hub.ranks {
            let part = self.receive_rows(from).1;
            copy(part.view(), out.view_mut().slice(at..at + part.len()));
            at += part.len();
        }
        out
    }

    fn sum_counts(&self, counts: &mut [i64]) {
        for to in 0..self.hub.ranks {
            self.send(to, Message::Counts(counts.to_vec()));
        }
        counts.fill(0);
        for from in 0..self.hub.ranks {
            match self.receive(from) {
                Message::Counts(c) => counts.iter_mut().zip(c).for_each(|(a, b)| *a += b),
                Message::Rows { .. } => panic!("ranks {from} and {} call different exchanges", self.rank),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hadal_kernels::Device;

    /// Runs `f` on every rank of a group and returns the results by rank.
    fn on_ranks<R: Send>(ranks: usize, experts: usize, f: impl Fn(usize, InProcess) -> R + Sync) -> Vec<R> {
        std::thread::scope(|s| {
            let f = &f;
            let threads: Vec<_> =
                group(ranks, experts).into_iter().enumerate().map(|(r, x)| s.spawn(move || f(r, x))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn rows_arrive_by_expert_then_source_and_return_in_order() {
        let ctx = Device::cpu(Some(1)).unwrap().ctx();
        // Rank r sends a row tagged 100 r + 10 expert + i; rank 0 sends nothing to expert 2.
        let counts = [[1, 2, 0, 1], [2, 0, 3, 0]];
        let out = on_ranks(2, 4, |r, x| {
            let mut rows = Vec::new();
            let mut offsets = vec![0i32];
            for (e, &n) in counts[r].iter().enumerate() {
                (0..n).for_each(|i| rows.extend([(100 * r + 10 * e + i) as f32; 2]));
                offsets.push(offsets[e] + n as i32);
            }
            let sent = ctx.from_f32(&rows);
            let (got, route) = x.dispatch(&ctx, sent, &ctx.from_i32(&offsets), 2);
            let again = x.redispatch(&ctx, ctx.from_f32(&rows), &route, 2);
            assert_eq!(got.view().f32(), again.view().f32());
            let seen: Vec<f32> = got.view().f32().chunks(2).map(|c| c[0]).collect();
            let back = x.combine(&ctx, got, &route, 2);
            assert_eq!(back.view().f32(), rows);
            let mut sums = vec![r as i64, 1];
            x.sum_counts(&mut sums);
            assert_eq!(sums, [1, 2]);
            (seen, route.offsets.view().i32().to_vec())
        });
        assert_eq!(out[0].0, [0., 100., 101., 10., 11.]);
        assert_eq!(out[0].1, [0, 3, 5]);
        assert_eq!(out[1].0, [120., 121., 122., 30.]);
        assert_eq!(out[1].1, [0, 3, 4]);
    }

    #[test]
    #[should_panic(expected = "rank 1 left")]
    fn a_lost_rank_is_noticed() {
        let mut g = group(2, 2);
        drop(g.pop());
        let mut c = [1];
        g[0].sum_counts(&mut c);
    }
}
