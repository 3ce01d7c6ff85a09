//! What products take of the device's memory is what is said before.

use super::*;

/// What a product takes of the device's memory is what `scratch` says: of shapes with several tiles of rows and with one,
/// of either type, on any number of threads.
#[test]
fn scratch_is_what_is_taken() {
    for (ctx, dtype) in isas().into_iter().flat_map(thread_counts).flat_map(|ctx| [(ctx.clone(), Bf16), (ctx, F32)]) {
        let workers = ctx.host().workers();
        let mut most = 0;
        for (n, rows, cols) in [(2000, 96, 70), (700, 40, 33), (64, 800, 128), (100, 64, 64), (500, 600, 300)] {
            let (x, w) = (buf(dtype, &normals(7, n * cols, 1.0)), buf(dtype, &normals(8, rows * cols, 0.1)));
            let dy = buf(dtype, &normals(9, n * rows, 1.0));
            let weight = Weight { data: w.view(), experts: 1, rows, cols };
            let (mut y, mut dx) = (ctx.zeros(dtype, n * rows), ctx.zeros(dtype, n * cols));
            let mut dw = ctx.zeros(F32, rows * cols);
            for direction in [Direction::Forward, Direction::Input, Direction::Weight] {
                let taken = taken(&ctx, || match direction {
                    Direction::Forward => linear(&ctx, x.view(), &weight, y.view_mut()),
                    Direction::Input => linear_backward_input(&ctx, dy.view(), &weight, dx.view_mut(), false),
                    Direction::Weight => {
                        let c = MatMut { data: dw.view_mut(), ld: cols };
                        linear_backward_weight(&ctx, x.view(), dy.view(), rows, cols, c, true);
                    }
                });
                let said = counted(scratch(workers, dtype, direction, &[n], (rows, cols), false));
                assert_eq!(taken, said, "{workers:?} {dtype:?} {n} x {rows} x {cols} {direction:?}");
                most = most.max(said);
            }
        }
        assert!(most > 0, "{workers:?} {dtype:?}");
    }
}

/// More than the memory that is in use before.
fn taken(ctx: &Ctx, f: impl FnOnce()) -> usize {
    ctx.device.release();
    let before = ctx.host().memory().peak;
    f();
    ctx.host().memory().peak - before
}

/// The device keeps no count of what is smaller than a page.
fn counted(bytes: usize) -> usize {
    if bytes < 4096 { 0 } else { bytes }
}

/// As above, of one part of the columns that is more than a round is to pack, and of several rounds.
#[test]
fn scratch_of_several_rounds() {
    for isa in isas() {
        let ctx = crate::testing::ctx_of(2, isa);
        for (m, n, k) in [(500, 80, 70_000), (484, 1600, 4000)] {
            let (a, b) = (ctx.zeros(F32, m * k), ctx.zeros(F32, k * n));
            let weight = Weight { data: b.view(), experts: 1, rows: n, cols: k };
            let mut y = ctx.zeros(F32, m * n);
            let found = taken(&ctx, || linear(&ctx, a.view(), &weight, y.view_mut()));
            assert_eq!(
                found,
                scratch(ctx.host().workers(), F32, Direction::Forward, &[m], (n, k), false),
                "{m}, {n}, {k}"
            );
        }
    }
}

/// DeepSeek-V3's dense layer, and experts with 4,096 rows each: on tiles the right operand of each, once.
#[test]
fn scratch_of_large_products() {
    let (workers, v3) = (Workers { level: Level::Amx, threads: 2 }, (18432, 7168));
    let all = |direction, rows: &[usize], size| scratch(workers, Bf16, direction, rows, size, false);
    assert_eq!(all(Direction::Forward, &[4096], v3), 2 * 18432 * 7168);
    assert_eq!(all(Direction::Input, &[4096], v3), 2 * 18432 * 7168);
    // The rows' gradients are packed too.
    assert_eq!(all(Direction::Weight, &[4096], v3), 2 * 4096 * (7168 + 18432));
    assert_eq!(all(Direction::Forward, &[4096; 8], (4096, 7168)), 8 * 2 * 4096 * 7168);
    assert_eq!(all(Direction::Forward, &[100; 8], (4096, 7168)), 0, "one tile of rows for each");
}

/// The same on vectors: as many parts of 512 columns as 16 MiB hold.
#[test]
fn scratch_of_large_products_on_vectors() {
    for (level, dtype) in Level::ALL.into_iter().flat_map(|level| [(level, Bf16), (level, F32)]) {
        if (level, dtype) == (Level::Amx, Bf16) {
            continue;
        }
        let all = |direction, rows: &[usize], size| {
            scratch(Workers { level, threads: 2 }, dtype, direction, rows, size, false)
        };
        let pairs = dtype == Bf16 && level == Level::Avx512Bf16;
        let group = if level >= Level::Avx512 { 32 } else { 16 };
        // Groups of lanes, each a line longer for each piece of 128 cells.
        let packed = |columns: usize, k: usize| {
            let cells = if pairs { k / 2 } else { k };
            columns / group * (cells * group + cells / 128 * 16) * 4
        };
        let parts = if pairs { 2 } else { 1 };
        let forward = [all(Direction::Forward, &[4096], (18432, 7168)), all(Direction::Input, &[4096], (7168, 18432))];
        assert_eq!(forward, [parts * packed(512, 7168); 2], "{level:?} {dtype:?}");
        // One part of the columns alone may have more.
        let gradient = all(Direction::Weight, &[1 << 16], (18432, 7168));
        assert_eq!(gradient, packed(512, 1 << 16), "{level:?} {dtype:?}");
        assert_eq!(all(Direction::Forward, &[480; 8], (4096, 7168)), 0, "one tile of rows for each");
        // Of sizes that no memory holds.
        for direction in [Direction::Forward, Direction::Input, Direction::Weight] {
            let huge = usize::MAX / 2;
            assert!(all(direction, &[huge; 64], (huge, huge)) >= 16 << 20, "{level:?} {dtype:?} {direction:?}");
        }
    }
}
