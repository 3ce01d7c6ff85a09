use super::*;
use crate::ops::{gemm, moe_permute};
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, ctx, finite_difference, gpu, invariant_gpu, isas, levels, normals,
    older_gpu, op_tolerance, thread_counts,
};
use crate::{Buf, DType, DType::Bf16, DType::F32};

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// Rows beyond the last offset: their contents must be neither read (NaN) nor written.
const SPARE: usize = 3;

struct Case {
    offsets: Vec<i32>,
    rows: usize,
    cols: usize,
    x: Buf,
    dy: Buf,
    w: Buf,
}

impl Case {
    fn new(counts: &[i32], rows: usize, cols: usize, d: DType) -> Self {
        let mut offsets = vec![0];
        counts.iter().for_each(|c| offsets.push(offsets[offsets.len() - 1] + c));
        let n = offsets[counts.len()] as usize;
        let spare = |mut v: Vec<f32>, cols: usize| {
            v.resize(v.len() + SPARE * cols, f32::NAN);
            buf(d, &v)
        };
        Self {
            x: spare(normals(1, n * cols, 1.0), cols),
            dy: spare(normals(2, n * rows, 1.0), rows),
            w: buf(d, &normals(3, counts.len() * rows * cols, 0.1)),
            offsets,
            rows,
            cols,
        }
    }

    fn n(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    fn weight<'a>(&self, w: &'a Buf) -> Weight<'a> {
        Weight { data: w.view(), experts: self.offsets.len() - 1, rows: self.rows, cols: self.cols }
    }

    /// (y, dx, dW); outputs start as 5.
    fn run(&self, ctx: &Ctx) -> (Buf, Buf, Buf) {
        let d = self.w.dtype();
        let fives = |d, len| buf_on(ctx, d, &vec![5.0; len]);
        let (mut y, mut dx) = (fives(d, self.dy.len()), fives(d, self.x.len()));
        let mut dw = fives(F32, self.w.len());
        let here = |b: &Buf| ctx.here(b.clone());
        let (x, dy, w, offsets) = (here(&self.x), here(&self.dy), here(&self.w), ctx.from_i32(&self.offsets));
        grouped(ctx, x.view(), offsets.view(), &self.weight(&w), y.view_mut());
        grouped_backward_input(ctx, dy.view(), offsets.view(), &self.weight(&w), dx.view_mut());
        let (x, dy, offsets) = (x.view(), dy.view(), offsets.view());
        grouped_backward_weight(ctx, x, dy, offsets, self.rows, self.cols, dw.view_mut(), true);
        // Zero and then added to is the same as overwritten.
        let (mut added, mut fresh) = (ctx.zeros(F32, dw.len()), fives(F32, dw.len()));
        grouped_backward_weight(ctx, x, dy, offsets, self.rows, self.cols, added.view_mut(), true);
        grouped_backward_weight(ctx, x, dy, offsets, self.rows, self.cols, fresh.view_mut(), false);
        assert!(added.view().to_f32() == fresh.view().to_f32(), "an overwritten dW");
        (y, dx, dw)
    }
}

/// Rows per expert: even, ragged, all to one, none, one expert, one past a tile.
const COUNTS: [&[i32]; 6] = [&[4, 4, 4], &[1, 0, 17, 33, 0], &[0, 0, 70, 0], &[0, 0], &[241], &[2, 130, 1, 64]];

#[test]
fn reference_gradients() {
    let (offsets, rows, cols) = ([0, 2, 2, 5], 3, 4);
    let wide = |s, len| normals(s, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (x, dy, w) = (wide(1, 5 * cols), wide(2, 5 * rows), wide(3, 3 * rows * cols));
    let loss = |y: &[f64]| y.iter().zip(&dy).map(|(a, b)| a * b).sum::<f64>();
    let (dx, dw) = reference::backward(&x, &dy, &offsets, &w, rows, cols);
    finite_difference("dx", &x, &dx, |x| loss(&reference::forward(x, &offsets, &w, rows, cols)));
    finite_difference("dw", &w, &dw, |w| loss(&reference::forward(&x, &offsets, w, rows, cols)));
}

#[test]
fn matches_reference() {
    for ctx in levels().into_iter().chain(older_gpu()) {
        for counts in COUNTS {
            for (rows, cols) in [(48, 64), (33, 257), (1, 5), (136, 264)] {
                for d in [F32, Bf16] {
                    let case = Case::new(counts, rows, cols, d);
                    let n = case.n();
                    let (y, dx, dw) = case.run(&ctx);
                    let ey = reference::forward(&wide(&case.x), &case.offsets, &wide(&case.w), rows, cols);
                    let (ex, ew) =
                        reference::backward(&wide(&case.x), &wide(&case.dy), &case.offsets, &wide(&case.w), rows, cols);
                    let spare = |mut v: Vec<f64>, cols| {
                        v.resize((n + SPARE) * cols, 5.0);
                        v
                    };
                    assert_close("y", &y, &spare(ey, rows), op_tolerance(d));
                    assert_close("dx", &dx, &spare(ex, cols), op_tolerance(d));
                    assert_close("dw", &dw, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
                }
            }
        }
    }
}

#[test]
fn rows_beyond_the_last_offset_stay_untouched() {
    for ctx in [Some(ctx()), gpu(), older_gpu()].into_iter().flatten() {
        for d in [F32, Bf16] {
            let case = Case::new(&[3, 0, 2], 8, 16, d);
            let (y, dx, _) = case.run(&ctx);
            assert!(y.view().to_f32()[5 * 8..].iter().all(|x| *x == 5.0));
            assert!(dx.view().to_f32()[5 * 16..].iter().all(|x| *x == 5.0));
        }
    }
}

#[test]
fn same_bits_for_every_thread_count() {
    for isa in isas() {
        let contexts = thread_counts(isa);
        for counts in COUNTS {
            let case = Case::new(counts, 65, 300, Bf16);
            let first = case.run(&contexts[0]);
            for ctx in &contexts[1..] {
                let other = case.run(ctx);
                assert_same_bits("y", &first.0, &other.0);
                assert_same_bits("dx", &first.1, &other.1);
                assert_same_bits("dw", &first.2, &other.2);
            }
        }
    }
}

/// Every expert's rows have the bits of a plain product of those rows alone, whatever the others got.
#[test]
fn a_row_does_not_depend_on_the_split() {
    for ctx in [Some(ctx()), invariant_gpu(), older_gpu()].into_iter().flatten() {
        for (rows, cols) in [(40, 300), (64, 256)] {
            for d in [F32, Bf16] {
                rows_alone(&ctx, &Case::new(&[1, 0, 17, 33, 130, 1, 7], rows, cols, d));
            }
        }
    }
}

fn rows_alone(ctx: &Ctx, case: &Case) {
    let (rows, cols, d) = (case.rows, case.cols, case.w.dtype());
    let (y, dx, _) = case.run(ctx);
    let (y, dx) = (y.view().to_f32(), dx.view().to_f32());
    let (x, dy, w) = (ctx.here(case.x.clone()), ctx.here(case.dy.clone()), ctx.here(case.w.clone()));
    for e in 0..case.offsets.len() - 1 {
        let w = case.weight(&w).expert(e);
        for t in case.offsets[e] as usize..case.offsets[e + 1] as usize {
            let (mut y1, mut dx1) = (ctx.zeros(d, rows), ctx.zeros(d, cols));
            gemm::linear(ctx, x.view().slice(t * cols..(t + 1) * cols), &w, y1.view_mut());
            let dy = dy.view().slice(t * rows..(t + 1) * rows);
            gemm::linear_backward_input(ctx, dy, &w, dx1.view_mut(), false);
            assert_eq!(y1.view().to_f32(), y[t * rows..(t + 1) * rows], "y of row {t}");
            assert_eq!(dx1.view().to_f32(), dx[t * cols..(t + 1) * cols], "dx of row {t}");
        }
    }
}

/// Many experts, most of them with few rows or none, as a trained router leaves them; the same bits when run again.
#[test]
fn many_experts() {
    let counts: Vec<i32> = (0..96).map(|e| if e % 3 == 0 { 0 } else { 40 / (1 + e) }).chain([200]).collect();
    for ctx in levels().into_iter().chain(older_gpu()) {
        for d in [F32, Bf16] {
            let case = Case::new(&counts, 24, 40, d);
            let (y, dx, dw) = case.run(&ctx);
            let (wx, wdy, ww) = (wide(&case.x), wide(&case.dy), wide(&case.w));
            let n = case.n();
            let ey = reference::forward(&wx, &case.offsets, &ww, 24, 40);
            let (ex, ew) = reference::backward(&wx, &wdy, &case.offsets, &ww, 24, 40);
            let first = |b: &Buf, len: usize| buf(d, &b.view().to_f32()[..len]);
            assert_close("y", &first(&y, n * 24), &ey, op_tolerance(d));
            assert_close("dx", &first(&dx, n * 40), &ex, op_tolerance(d));
            assert_close("dw", &dw, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
            let again = case.run(&ctx);
            assert_same_bits("y twice", &y, &again.0);
            assert_same_bits("dx twice", &dx, &again.1);
            assert_same_bits("dw twice", &dw, &again.2);
        }
    }
}

/// As a router at the start of training may: one expert with most of the rows, whose gradient many compute together.
#[test]
fn an_expert_with_most_of_the_rows() {
    for ctx in levels().into_iter().chain(older_gpu()) {
        for d in [F32, Bf16] {
            let case = Case::new(&[300, 0, 3001, 1500, 5, 64, 0, 750], 24, 72, d);
            let (_, _, dw) = case.run(&ctx);
            let (_, ew) = reference::backward(&wide(&case.x), &wide(&case.dy), &case.offsets, &wide(&case.w), 24, 72);
            assert_close("dw", &dw, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
            assert_same_bits("dw twice", &dw, &case.run(&ctx).2);
        }
    }
}

#[test]
#[should_panic(expected = "9 rows of 4 in a buffer of 20")]
fn more_rows_than_the_capacity_are_refused() {
    let ctx = ctx();
    let (x, w, mut y) = (ctx.zeros(F32, 20), ctx.zeros(F32, 24), ctx.zeros(F32, 27));
    let weight = Weight { data: w.view(), experts: 2, rows: 3, cols: 4 };
    grouped(&ctx, x.view(), ctx.from_i32(&[0, 4, 9]).view(), &weight, y.view_mut());
}

/// Tokens and a plan of where they go; of the experts one has no tokens, and of the others the first have the most.
struct Routed {
    top_k: usize,
    experts: usize,
    size: (usize, usize),
    /// `[N, cols]` and `[N, rows]`.
    x: Buf,
    dy: Buf,
    w: Buf,
    offsets: Buf,
    plan: [Buf; 2],
}

impl Routed {
    fn new(ctx: &Ctx, (tokens, top_k): (usize, usize), (rows, cols): (usize, usize), d: DType) -> Self {
        let experts = 2 * top_k + 2;
        let chosen = |slot: usize| match (slot / top_k, slot % top_k) {
            // All but the first tokens have the same experts, in an order of their own.
            (n, k) if n > tokens / 3 => (n + k) % top_k,
            (n, k) => (n / 2 + 2 * k) % (experts - 1),
        };
        let indices: Vec<i32> = (0..tokens * top_k).map(|slot| chosen(slot) as i32).collect();
        let mut offsets = ctx.zeros(DType::I32, experts + 1);
        let mut plan = [0; 2].map(|_| ctx.zeros(DType::I32, indices.len()));
        let [r, s] = plan.each_mut().map(Buf::view_mut);
        moe_permute::plan(ctx, ctx.from_i32(&indices).view(), experts, offsets.view_mut(), r, s);
        let x = buf(d, &normals(1, tokens * cols, 1.0));
        let dy = buf(d, &normals(2, tokens * rows, 1.0));
        let w = buf(d, &normals(3, experts * rows * cols, 0.1));
        Self { top_k, experts, size: (rows, cols), x, dy, w, offsets, plan }
    }

    fn slots(&self) -> usize {
        self.plan[1].len()
    }

    /// The rows of tokens, by the plan or sorted into `room`.
    fn rows<'a>(&'a self, ctx: &Ctx, tokens: &'a Buf, room: Option<&'a mut Buf>) -> Rows<'a> {
        let (slot_of_row, top_k) = (self.plan[1].view(), self.top_k);
        let Some(room) = room else { return Rows::Tokens { x: tokens.view(), slot_of_row, top_k } };
        let dim = tokens.len() * top_k / self.slots();
        *room = ctx.zeros(tokens.dtype(), self.slots() * dim);
        moe_permute::permute(ctx, tokens.view(), dim, top_k, self.plan.each_ref().map(Buf::view), room.view_mut());
        room.view().into()
    }

    /// y, dx, dW added to 5 and overwritten; x and dy are sorted before if `sorted` says so.
    fn run(&self, ctx: &Ctx, sorted: [bool; 2]) -> [Buf; 4] {
        let ((rows, cols), d, offsets) = (self.size, self.w.dtype(), self.offsets.view());
        let w = Weight { data: self.w.view(), experts: self.experts, rows, cols };
        let mut rooms = [0; 2].map(|_| ctx.zeros(d, 0));
        let [a, b] = &mut rooms;
        let x = self.rows(ctx, &self.x, sorted[0].then_some(a));
        let dy = self.rows(ctx, &self.dy, sorted[1].then_some(b));
        let (mut y, mut dx) = (ctx.zeros(d, self.slots() * rows), ctx.zeros(d, self.slots() * cols));
        let mut dw = [0; 2].map(|_| buf(F32, &vec![5.0; self.w.len()]));
        grouped(ctx, x, offsets, &w, y.view_mut());
        grouped_backward_input(ctx, dy, offsets, &w, dx.view_mut());
        for (dw, accumulate) in dw.iter_mut().zip([true, false]) {
            grouped_backward_weight(ctx, x, dy, offsets, rows, cols, dw.view_mut(), accumulate);
        }
        let [added, fresh] = dw;
        [y, dx, added, fresh]
    }
}

/// Tokens and experts of each: few rows, and ragged.
const ROUTED: [(usize, usize); 6] = [(1, 1), (5, 3), (9, 1), (40, 2), (70, 6), (150, 4)];

/// Products of tokens by their plan match the reference, and have the bits of the same rows sorted: rows shorter and longer
/// than a step or a piece of k, and 4 KiB apart.
#[test]
fn rows_of_tokens() {
    for isa in isas() {
        let ctx = crate::testing::ctx_of(2, isa);
        for routing in ROUTED {
            for size in [(48, 64), (33, 257), (1, 5), (136, 264), (20, 2048), (1100, 17)] {
                for d in [F32, Bf16] {
                    let case = Routed::new(&ctx, routing, size, d);
                    let sorted = case.run(&ctx, [true, true]);
                    for which in [[false, false], [false, true], [true, false]] {
                        for (name, (a, b)) in
                            ["y", "dx", "dw", "new dw"].iter().zip(sorted.iter().zip(&case.run(&ctx, which)))
                        {
                            assert_same_bits(
                                &format!("{name}, {isa:?}, {routing:?}, {size:?}, {d:?}, {which:?}"),
                                a,
                                b,
                            );
                        }
                    }
                    if routing.0 * size.0 * size.1 < 1 << 20 {
                        routed_reference(&case, &sorted);
                    }
                }
            }
        }
    }
}

fn routed_reference(case: &Routed, [y, dx, added, fresh]: &[Buf; 4]) {
    let ((rows, cols), d, offsets) = (case.size, case.w.dtype(), case.offsets.view().i32());
    let sorted = |tokens, dim| reference::sorted(&wide(tokens), case.plan[1].view().i32(), case.top_k, dim);
    let (x, dy, w) = (sorted(&case.x, cols), sorted(&case.dy, rows), wide(&case.w));
    assert_close("y", y, &reference::forward(&x, offsets, &w, rows, cols), op_tolerance(d));
    let (ex, ew) = reference::backward(&x, &dy, offsets, &w, rows, cols);
    assert_close("dx", dx, &ex, op_tolerance(d));
    assert_close("dw", added, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
    assert_close("new dw", fresh, &ew, op_tolerance(F32));
}

/// Also of experts with more rows than a tile has.
#[test]
fn rows_of_tokens_have_the_same_bits_for_every_thread_count() {
    for isa in isas() {
        let contexts = thread_counts(isa);
        let case = Routed::new(&contexts[0], (900, 3), (130, 300), Bf16);
        let first = case.run(&contexts[0], [true, true]);
        for ctx in &contexts {
            first.iter().zip(&case.run(ctx, [false, false])).for_each(|(a, b)| assert_same_bits("threads", a, b));
        }
    }
}

/// What products of tokens take of the device's memory is what `scratch` says, of columns that sorted rows would have cut.
#[test]
fn scratch_of_tokens_is_what_is_taken() {
    let (rows, cols) = (530, 1030);
    for (isa, d) in isas().into_iter().flat_map(|isa| [(isa, F32), (isa, Bf16)]) {
        let ctx = crate::testing::ctx_of(2, isa);
        let case = Routed::new(&ctx, (800, 1), (rows, cols), d);
        let (offsets, workers) = (case.offsets.view(), ctx.host().workers());
        let counts: Vec<_> = offsets.i32().windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let w = Weight { data: case.w.view(), experts: case.experts, rows, cols };
        let (mut y, mut dx) = (ctx.zeros(d, case.slots() * rows), ctx.zeros(d, case.slots() * cols));
        let mut dw = ctx.zeros(F32, case.w.len());
        let (x, dy) = (case.rows(&ctx, &case.x, None), case.rows(&ctx, &case.dy, None));
        for direction in [gemm::Direction::Forward, gemm::Direction::Input, gemm::Direction::Weight] {
            ctx.device.release();
            let before = ctx.host().memory().peak;
            match direction {
                gemm::Direction::Forward => grouped(&ctx, x, offsets, &w, y.view_mut()),
                gemm::Direction::Input => grouped_backward_input(&ctx, dy, offsets, &w, dx.view_mut()),
                gemm::Direction::Weight => {
                    grouped_backward_weight(&ctx, x, dy, offsets, rows, cols, dw.view_mut(), true);
                }
            }
            let taken = ctx.host().memory().peak - before;
            let said = gemm::scratch(workers, d, direction, &counts, (rows, cols), true);
            assert_eq!(taken, said, "{workers:?} {d:?} {direction:?}");
        }
    }
}

#[test]
#[should_panic(expected = "6 slots of top 2, D 4: 8 elements of tokens")]
fn a_plan_of_other_tokens_is_refused() {
    let ctx = ctx();
    let (x, w, mut y) = (ctx.zeros(F32, 8), ctx.zeros(F32, 12), ctx.zeros(F32, 18));
    let weight = Weight { data: w.view(), experts: 1, rows: 3, cols: 4 };
    let slots = ctx.from_i32(&[0, 1, 2, 3, 4, 5]);
    let rows = Rows::Tokens { x: x.view(), slot_of_row: slots.view(), top_k: 2 };
    grouped(&ctx, rows, ctx.from_i32(&[0, 6]).view(), &weight, y.view_mut());
}

/// A slot that no token has is never read, whichever kernel would.
#[test]
fn slots_of_no_token_are_refused() {
    for isa in isas() {
        let ctx = crate::testing::ctx_of(1, isa);
        for (wrong, d) in [(-1, F32), (-1, Bf16), (64, F32), (64, Bf16)] {
            let mut slots: Vec<i32> = (0..64).collect();
            slots[40] = wrong;
            let (slots, offsets) = (ctx.from_i32(&slots), ctx.from_i32(&[0, 64]));
            let (x, w) = (ctx.zeros(d, 64 * 64), ctx.zeros(d, 64 * 64));
            let rows = Rows::Tokens { x: x.view(), slot_of_row: slots.view(), top_k: 1 };
            let refused = |f: &mut dyn FnMut()| {
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).expect_err("a slot of no token was read");
            };
            let weight = Weight { data: w.view(), experts: 1, rows: 64, cols: 64 };
            let (mut y, mut dw) = (ctx.zeros(d, 64 * 64), ctx.zeros(F32, 64 * 64));
            refused(&mut || grouped(&ctx, rows, offsets.view(), &weight, y.view_mut()));
            let dy = x.view();
            refused(&mut || grouped_backward_weight(&ctx, rows, dy, offsets.view(), 64, 64, dw.view_mut(), true));
            refused(&mut || grouped_backward_weight(&ctx, dy, rows, offsets.view(), 64, 64, dw.view_mut(), true));
        }
    }
}

/// A GPU's kernels read sorted rows, and do not take tokens for them.
#[test]
fn a_gpu_refuses_rows_of_tokens() {
    let Some(ctx) = gpu() else { return };
    assert!(!gathers(&ctx.device));
    let (x, w, mut y) = (ctx.zeros(F32, 16), ctx.zeros(F32, 16), ctx.zeros(F32, 16));
    let (slots, offsets) = (ctx.from_i32(&[0, 1, 2, 3]), ctx.from_i32(&[0, 4]));
    let rows = Rows::Tokens { x: x.view(), slot_of_row: slots.view(), top_k: 1 };
    let weight = Weight { data: w.view(), experts: 1, rows: 4, cols: 4 };
    let refused = std::panic::AssertUnwindSafe(|| grouped(&ctx, rows, offsets.view(), &weight, y.view_mut()));
    std::panic::catch_unwind(refused).expect_err("rows of tokens on a GPU");
}
