// Hopper's own instructions (sm_90a): barriers that count bytes, bulk tensor copies (TMA), the warpgroup matrix
// product (wgmma) and registers moved between warpgroups. Names and semantics are PTX's. Shared memory is addressed by
// the 32-bit `shared::cta` address (`smem(p)`).

// What `Cuda::tensor_map` encodes; a kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    u64 words[16];
};

DEV u32 smem(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// True in one lane of a converged warp, the same one every time.
DEV bool elect_one() {
    u32 chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen != 0;
}

// mbarriers. A phase ends when `count` arrivals and all expected bytes have come; `parity` is that of the phase waited
// for: 0 for the first. Waiting for parity 1 on a fresh barrier passes at once (a ring's "empty" side starts so).
DEV void mbar_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes the initialised barriers visible to the copy engine and to the cluster; a __syncthreads (or cluster_sync) follows.
DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives once and expects so many bytes of this phase.
DEV void mbar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEV void mbar_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
// Arrives at the same barrier of block `rank` of the cluster (its own included). It orders what the barrier itself is
// for, reads by wgmma before writes by TMA; ordinary stores would need a wider scope, which costs a fence of all memory.
DEV void mbar_arrive_at(u32 bar, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(rank) : "memory");
}
DEV bool mbar_try(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done != 0;
}
DEV void mbar_wait(u32 bar, u32 parity) {
    while (!mbar_try(bar, parity)) {
    }
}
// The same, ordered after ordinary stores that other blocks of the cluster made before they arrived.
DEV void mbar_wait_cluster(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}

// Makes this thread's ordinary stores to shared memory visible to TMA and wgmma; a barrier follows.
DEV void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
DEV void bar_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void bar_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

DEV u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEV void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A launch that may begin before the one before it has ended (`Grid::early`): all of a kernel's threads wait before they
// touch memory that others write or read; without such a launch that does nothing. A kernel may let the next one begin
// when each of its blocks has said so or left.
DEV void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Registers per thread of the calling warpgroup, a multiple of 8 in 24..256. The kernel needs
// __launch_bounds__(threads, 1), and each role must be one branch of a single if/else.
template <int count> DEV void regs_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> DEV void regs_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }

// TMA. Coordinates are elements, innermost first, may lie outside the tensor: loads give zeros there, stores skip.
// Shared addresses are 128-byte aligned, 1024-byte with 128-byte swizzle. Loads complete on an mbarrier by the box's full
// size in bytes. One thread issues.
DEV void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Brings a box into L2.
DEV void tma_ahead(const TensorMap* map, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
DEV void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
            "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(bar)
        : "memory");
}
DEV void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar)
        : "memory");
}
DEV void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::
            "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(bar)
        : "memory");
}
// To the same address of every block in `blocks` (a bit per rank of the cluster), each one's own `bar` counting.
DEV void tma_load_to(u16 blocks, u32 to, const TensorMap* map, u32 bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::
            "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(bar), "h"(blocks)
        : "memory");
}
DEV void tma_load_to(u16 blocks, u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::
            "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar), "h"(blocks)
        : "memory");
}
DEV void tma_load_to(u16 blocks, u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::
            "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(bar), "h"(blocks)
        : "memory");
}
DEV void tma_store(const TensorMap* map, u32 from, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1)
        : "memory");
}
DEV void tma_store(const TensorMap* map, u32 from, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%1, {%2, %3, %4}], [%0];" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
DEV void tma_store(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Adds the tile to memory instead. Each element must be added to by one block only, for results that repeat.
DEV void tma_add(const TensorMap* map, u32 from, int c0, int c1) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3}], [%0];" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1)
        : "memory");
}
DEV void tma_add(const TensorMap* map, u32 from, int c0, int c1, int c2) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3, %4}], [%0];" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
DEV void tma_add(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
DEV void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `count` committed groups of this thread still read shared memory.
template <int count> DEV void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(count) : "memory"); }
// Until at most `count` committed groups of this thread are incomplete (their writes not yet visible).
template <int count> DEV void tma_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(count) : "memory"); }

// wgmma. All 128 threads of a warpgroup (its first warp's index a multiple of 4) issue together:
//     wgmma_fence(); wgmma<cols>(d, a, b, accumulate) ...; wgmma_commit(); ... wgmma_wait<0>();
// Between commit and wait, neither the accumulators nor register operands may be touched.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int count> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(count) : "memory"); }
// Keeps the compiler from moving what it knows of these registers across this point. Placed after a wait, before the
// first use of its results, and around register operands.
template <int count> DEV void wgmma_pin(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int count> DEV void wgmma_pin(u32 (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(d[i])::"memory");
}

// Operands in shared memory with 128-byte swizzle, as TMA writes boxes of 64 bf16 (128 bytes) by so many lines, each box
// 1024-byte aligned. Swizzled: the 16-byte chunk c of line l lies at l * 128 + ((c ^ (l & 7)) << 4).
//
// K-major (a line is a row m or n with 64 consecutive k; one box of all rows): the next 16 k are 32 bytes on. Rows
// start at a multiple of 8 (1024 bytes).
DEV u64 desc_k(u32 at) { return u64((at & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62; }
// MN-major (a line is a k with 64 consecutive m or n; boxes of the next 64 m or n are `block` bytes apart: LINES * 128 of
// a box of LINES k): the next 16 k are 2048 bytes on. Pass ta or tb = 1.
DEV u64 desc_mn(u32 at, u32 block) {
    return u64((at & 0x3ffff) >> 4) | u64(block >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
// A descriptor of an address so many bytes on.
DEV u64 desc_add(u64 desc, u32 bytes) { return desc + (bytes >> 4); }

// Where thread t (0..127) of the warpgroup holds d[i] of the 64 x cols result:
// row = t / 32 * 16 + t % 32 / 4 + (i & 2) * 4; column = i / 4 * 8 + t % 4 * 2 + (i & 1).
// A in registers (64 x 16 of bf16 pairs): a[0] = row r, k = t % 4 * 2; a[1] = row r + 8; a[2] = row r, k + 8;
// a[3] = row r + 8, k + 8. So results narrowed pairwise are the next product's A: for k block j of 16,
// a[q] = narrow2(d[8 j + 2 q], d[8 j + 2 q + 1]).
#define WG_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WG_OUT_16(i) WG_OUT_4(i), WG_OUT_4(i + 4), WG_OUT_4(i + 8), WG_OUT_4(i + 12)
#define WG_OUTS_32 WG_OUT_16(0)
#define WG_REGS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WG_OUTS_64 WG_OUTS_32, WG_OUT_16(16)
#define WG_REGS_64 WG_REGS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WG_OUTS_96 WG_OUTS_64, WG_OUT_16(32)
#define WG_REGS_96 WG_REGS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WG_OUTS_128 WG_OUTS_96, WG_OUT_16(48)
#define WG_REGS_128 WG_REGS_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WG_OUTS_192 WG_OUTS_128, WG_OUT_16(64), WG_OUT_16(80)
#define WG_REGS_192 WG_REGS_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WG_OUTS_256 WG_OUTS_192, WG_OUT_16(96), WG_OUT_16(112)
#define WG_REGS_256 WG_REGS_192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WG_SHAPE(N, A0, A1, A2, A3, A4, A5, A6)                                                                        \
    template <int ta, int tb> DEV void wgmma_shared(float (&d)[N / 2], u64 a, u64 b, int accumulate) {                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A2 ", 0;\n"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WG_REGS_##N "}, " A0 ", " A1          \
                     ", p, 1, 1, " A3 ", " A4 ";\n}"                                                                   \
                     : WG_OUTS_##N                                                                                     \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(ta), "n"(tb));                                             \
    }                                                                                                                  \
    template <int tb> DEV void wgmma_regs(float (&d)[N / 2], const u32 (&a)[4], u64 b, int accumulate) {               \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A5 ", 0;\n"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WG_REGS_##N "}, {" A0 ", " A1 ", " A2 \
                     ", " A3 "}, " A4 ", p, 1, 1, " A6 ";\n}"                                                          \
                     : WG_OUTS_##N                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(tb));                  \
    }
WG_SHAPE(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
WG_SHAPE(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WG_SHAPE(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
WG_SHAPE(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WG_SHAPE(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
WG_SHAPE(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef WG_SHAPE
#undef WG_OUTS_32
#undef WG_REGS_32
#undef WG_OUTS_64
#undef WG_REGS_64
#undef WG_OUTS_96
#undef WG_REGS_96
#undef WG_OUTS_128
#undef WG_REGS_128
#undef WG_OUTS_192
#undef WG_REGS_192
#undef WG_OUTS_256
#undef WG_REGS_256
#undef WG_OUT_16
#undef WG_OUT_4

// d[64 x cols] = A[64 x 16] B[16 x cols] (+ d if `accumulate`), f32 from bf16. ta, tb: 0 for K-major operands, 1 for MN-major.
template <int cols, int ta = 0, int tb = 0> DEV void wgmma(float (&d)[cols / 2], u64 a, u64 b, int accumulate) {
    wgmma_shared<ta, tb>(d, a, b, accumulate);
}
// A from registers (K-major by nature).
template <int cols, int tb = 0> DEV void wgmma(float (&d)[cols / 2], const u32 (&a)[4], u64 b, int accumulate) {
    wgmma_regs<tb>(d, a, b, accumulate);
}

// Stores four 8 x 8 matrices of bf16 pairs: lane 8 i + r gives the address of row r of matrix i; lane l's register i is
// the pair (row l / 4, columns l % 4 * 2 and + 1) of matrix i. The _t form stores them transposed.
DEV void stmatrix4(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c),
                 "r"(d) : "memory");
}
DEV void stmatrix4_t(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
                 "r"(c), "r"(d) : "memory");
}

DEV void store_pair(u32 at, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}

// A piece of f32 results in shared memory, of which a thread has x (`wgmma`'s layout); `lines` are its warp's 16 rows.
// The lanes of odd rows take the blocks of 8 columns in another order than those of even rows: otherwise rows 0 and 1,
// which the swizzle leaves within the same 32 bytes, would meet in the same banks.
struct FloatPiece {
    u32 lines;
    int lane;

    // Where columns 2 t and 2 t + 1 of block c (c ^ 2 in odd rows) are, 8 h rows down.
    DEV u32 at(int c, int h) const {
        int line = lane / 4;
        return lines + line * 128 + h * 1024 + (c * 32 + lane % 4 * 8 ^ line << 4 ^ (line & 1) << 6);
    }
    DEV void put(const float* x) const {
        bool odd = lane & 4;
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float *y = x + 4 * c + 2 * h, *z = y + 8;
                store_pair(at(c, h), odd ? z[0] : y[0], odd ? z[1] : y[1]);
                store_pair(at(c, h) ^ 64, odd ? y[0] : z[0], odd ? y[1] : z[1]);
            }
    }
    DEV void add_to(float* x) const {
        bool odd = lane & 4;
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float *y = x + 4 * c + 2 * h, *z = y + 8, a0, a1, b0, b1;
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a0), "=f"(a1) : "r"(at(c, h)));
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(b0), "=f"(b1) : "r"(at(c, h) ^ 64));
                y[0] += odd ? b0 : a0, y[1] += odd ? b1 : a1;
                z[0] += odd ? a0 : b0, z[1] += odd ? a1 : b1;
            }
    }
};

// A place in a ring of `stages` slots of `bytes` each, with the parity of its round. TMA fills a slot, which is done when
// its barrier in `full` is; it may be filled again when that in `empty` is.
template <int stages, int bytes> struct RingSlot {
    u32 ring, full, empty;
    int index;
    u32 phase;

    DEV u32 data() const { return ring + index * bytes; }
    DEV u32 filled() const { return full + 8 * index; }
    DEV u32 emptied() const { return empty + 8 * index; }
    DEV void next() {
        if (++index == stages) index = 0, phase ^= 1;
    }
    DEV void skip(int count) {
        int sum = index + count, rounds = sum / stages;
        index = sum - rounds * stages, phase ^= rounds & 1;
    }
};

// By one lane of each warp that multiplies (a lane for each of the cluster's `blocks`): it has read the slot.
template <int blocks> DEV void ring_release(u32 emptied) {
    int lane = threadIdx.x % WARP;
    if (blocks == 1 && lane == 0) mbar_arrive(emptied);
    if (blocks > 1 && lane < blocks) mbar_arrive_at(emptied, lane);
}
