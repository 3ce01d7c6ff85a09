// Backward of MLA attention in its multi-head form on Hopper: P = 128, R = 64, W = 128, bf16.
//
// One block per (head, tile of 128 keys) walks the tiles of 64 queries that see it, from the diagonal on:
//     S^T = K Q^T,  dP^T = V dO^T,  P^T = exp2(S^T c - lse),  dS^T = P^T (dP^T - D),
//     dV += P^T dO,  dK += dS^T Q,  dQ[queries] += dS K.
// Two warpgroups hold 64 keys each (S^T, dP^T, dK, dV in registers); dS goes through shared memory so that each of them
// computes 96 columns of dQ over all 128 keys, one tile late, so that neither waits for the other. A fourth of a
// warpgroup loads by TMA.
//
// Deterministic: dQ's partial sums lie in f32 in device memory, and a block adds to a tile of queries only when the
// blocks of all later keys have (a counter per tile and head says how many did). Blocks take their work by a ticket, in
// such an order that they wait only for blocks with earlier tickets: those run already, so the chain always moves.
// From the diagonal on, with later keys first, the blocks of one head are each at another tile: in step, none waits.
// dk_pe is summed over heads in the same way.

#define KEYS 128
#define QUERIES 64
#define QK 192
#define NOPE 128
#define ROPE 64
#define VDIM 128

// Shared memory, from a 1024-byte boundary on.
#define AT_K 0                       // 6 boxes of 32 columns (64-byte swizzle), 128 keys
#define K_BOX (KEYS * 64)
#define AT_V (AT_K + 6 * K_BOX)      // 2 boxes of 64 columns, 128 keys
#define V_BOX (KEYS * 128)
#define AT_Q (AT_V + 2 * V_BOX)      // per stage 3 boxes of 64 columns, 64 queries
#define Q_BOX (QUERIES * 128)
#define Q_STAGE (3 * Q_BOX)
#define AT_DO (AT_Q + 2 * Q_STAGE)   // per stage 2 boxes of 64 columns, 64 queries
#define DO_STAGE (2 * Q_BOX)
#define AT_DS (AT_DO + 2 * DO_STAGE) // per stage 128 keys of 64 queries
#define DS_STAGE (KEYS * QUERIES * 2)
#define AT_STATS (AT_DS + 2 * DS_STAGE)
#define STATS 512                    // lse and D of 64 queries
#define AT_BARS (AT_STATS + 2 * STATS)
#define SHARED_BYTES (AT_BARS + 256)

#define BAR_KV 0
#define BAR_Q 1
#define BAR_DO 3
#define BAR_EMPTY 5
#define BAR_DS 7
#define BAR_DS_EMPTY 9
#define BAR_TURN 11
#define BAR_ADDED 13
#define BAR_PASSED 15

#define LOG2E 1.4426950408889634f

// What the kernels share; sequence s owns the tiles of 64 queries from query_base(s) on, and of 128 keys from key_base(s).
DEV int query_base(const int* cu_q, int s) { return cu_q[s] / QUERIES + s; }
DEV int key_base(const int* cu_k, int s) { return cu_k[s] / KEYS + s; }

// The last sequence whose tiles begin at or before `tile`.
template <int SIZE> DEV int sequence_of(const int* cu, int sequences, int tile) {
    int lo = 0, hi = sequences;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (cu[mid] / SIZE + mid <= tile) lo = mid;
        else hi = mid;
    }
    return lo;
}

// 64-byte swizzle: K-major, rows of 32 k; MN-major, boxes of 32 n, `block` bytes apart.
DEV u64 desc64_k(u32 at) { return u64((at & 0x3ffff) >> 4) | u64(1) << 16 | u64(512 >> 4) << 32 | u64(2) << 62; }
DEV u64 desc64_mn(u32 at, u32 block) {
    return u64((at & 0x3ffff) >> 4) | u64(block >> 4) << 16 | u64(512 >> 4) << 32 | u64(2) << 62;
}
DEV void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar) : "memory");
}
DEV u32 acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Orders everything this thread has seen (other threads' stores included) before the flag.
DEV void release(u32* p, u32 v) {
    asm volatile("fence.acq_rel.gpu;\nst.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void await(const u32* p, u32 v) {
    while (acquire(p) < v) __nanosleep(32);
}
DEV void add4(float* p, float a, float b, float c, float d) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEV void put4(float* p, float a, float b, float c, float d) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// Not from the first-level cache: other processors have written there.
DEV float4 get4(const float* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// lse in powers of two and D = dout . out, per head and tile of 64 queries; for queries that see nothing and rows past
// the end lse = inf (so that probabilities are 0). Writes the zeros of dq where a query sees no key, and of `counters`.
// Grid: tiles of queries x groups of 4 heads, 256 threads.
#define STAT_HEADS 4
extern "C" __global__ void __launch_bounds__(256)
mla_backward_stats(const bf16* out, const bf16* dout, const float* lse, bf16* dq, float* stats, u32* counters,
                   int counter_count, const int* cu_q, int sequences, int heads) {
    __shared__ float both[STAT_HEADS][2 * QUERIES];
    int blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
    for (int i = block * 256 + threadIdx.x; i < counter_count; i += blocks * 256) counters[i] = 0;
    int tile = blockIdx.x, s = sequence_of<QUERIES>(cu_q, sequences, tile);
    int first = cu_q[s] + (tile - query_base(cu_q, s)) * QUERIES, count = min(cu_q[s + 1] - first, QUERIES);
    if (count <= 0) return;
    int lane = threadIdx.x % 16, h0 = blockIdx.y * STAT_HEADS;
#pragma unroll 4
    for (int i = threadIdx.x / 16; i < QUERIES * STAT_HEADS; i += 16) {
        int h = i % STAT_HEADS, r = i / STAT_HEADS;
        float d = 0, l = INF;
        if (r < count && h0 + h < heads) {
            i64 row = i64(first + r) * heads + h0 + h;
            Vec<bf16> a, b;
            a.load(out + row * VDIM + lane * 8), b.load(dout + row * VDIM + lane * 8);
            float x[8], y[8];
            a.to(x), b.to(y);
#pragma unroll
            for (int e = 0; e < 8; e++) d += x[e] * y[e];
            l = lse[row];
            if (l == -INF) {
                l = INF;
                uint4* p = reinterpret_cast<uint4*>(dq + row * QK);
                for (int e = lane; e < QK / 8; e += 16) p[e] = make_uint4(0, 0, 0, 0);
            } else {
                l *= LOG2E;
            }
        }
#pragma unroll
        for (int m = 8; m > 0; m >>= 1) d += __shfl_xor_sync(ALL_LANES, d, m);
        if (lane == 0) both[h][r] = l, both[h][QUERIES + r] = d;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < STAT_HEADS * 2 * QUERIES; i += 256) {
        int h = i / (2 * QUERIES);
        if (h0 + h < heads) stats[(i64(h0 + h) * gridDim.x + tile) * (2 * QUERIES) + i % (2 * QUERIES)] = both[h][i % (2 * QUERIES)];
    }
}

// The work of one block.
struct Work {
    int head, tile;        // tile: of 128 keys, counted over all sequences
    int j;                 // within its sequence
    int key, keys;         // its first row, and how many rows are the sequence's
    int query, queries;    // the sequence's first row, its length
    int offset;            // query i sees keys 0 ..= offset + i
    int first, steps;      // tiles of queries
    int query_tile;        // counted over all sequences, of the first step
};

// How many tiles of keys the tile `i` of queries sees.
DEV int tiles_seen(int i, int queries, int offset) {
    return (min(i * QUERIES + QUERIES, queries) - 1 + offset) / KEYS + 1;
}

DEV bool find_work(volatile Work& w, u32 ticket, int tiles, int heads, int group, const int* cu_q, const int* cu_k, int sequences) {
    int g = ticket / u32(group * tiles), r = ticket % u32(group * tiles);
    int in_group = min(group, heads - g * group);
    w.head = g * group + r % in_group;
    w.tile = r / in_group;
    int s = sequence_of<KEYS>(cu_k, sequences, w.tile);
    int k0 = cu_k[s], keys = cu_k[s + 1] - k0, base = key_base(cu_k, s);
    int count = (keys + KEYS - 1) / KEYS;
    // Later keys first.
    w.j = count - 1 - (w.tile - base);
    if (w.j < 0) return false;
    w.tile = base + w.j;
    w.key = k0 + w.j * KEYS, w.keys = min(keys - w.j * KEYS, KEYS);
    w.query = cu_q[s], w.queries = cu_q[s + 1] - w.query;
    w.offset = keys - w.queries;
    w.first = max(w.j * KEYS - w.offset, 0) / QUERIES;
    w.steps = max((w.queries + QUERIES - 1) / QUERIES - w.first, 0);
    w.query_tile = query_base(cu_q, s) + w.first;
    return true;
}

// sums: f32 [tiles of queries][slots][2][12][128][4], the fragments of dQ; pe_sums: f32 [tiles of keys][2][8][128][4].
// counters: the ticket, then slots per tile of queries, then 2 per tile of keys.
struct Params {
    const float* stats;
    float* sums;
    float* pe_sums;
    u32* counters;
    bf16* dq;
    bf16* dkv_up;
    bf16* dk_pe;
    const int* cu_q;
    const int* cu_k;
    i64 dk_pe_stride;
    int sequences, heads, group, slots, query_tiles, key_tiles;
    float scale;
};

struct Turns {
    u32* counter;
    u32 target;
    bool alone;
};
// Which value the counter of a tile of queries must have for this block to add, and where it is.
DEV Turns turn_of(const Params& p, const volatile Work& w, int n) {
    int seen = tiles_seen(w.first + n, w.queries, w.offset);
    Turns t;
    t.counter = p.counters + 1 + i64(w.query_tile + n) * p.slots + w.head % p.slots;
    t.target = u32(w.head / p.slots) * seen + (seen - 1 - w.j);
    t.alone = seen == 1;
    return t;
}

// The thread within its warpgroup, read anew where registers are short.
DEV int own_thread() {
    u32 t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t & 127;
}

// Rounds 64 x 128 fragments and writes the rows that exist, 16 bytes at a time, by way of shared memory (two boxes of
// 64 x 128 bytes, `box` apart).
DEV void write_rows(const float* d, float scale, u32 at, u32 box, bf16* to, i64 stride, int rows, int t, int bar) {
    int lane = t % WARP, matrix = lane / 8;
    u32 row = at + (t / WARP * 16 + (matrix & 1) * 8 + lane % 8) * 128;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        u32 chunk = ((n % 4) * 2 + (matrix >> 1)) ^ (lane % 8);
        const float* x = d + n * 8;
        stmatrix4(row + n / 4 * box + chunk * 16, narrow2(x[0] * scale, x[1] * scale), narrow2(x[2] * scale, x[3] * scale),
                  narrow2(x[4] * scale, x[5] * scale), narrow2(x[6] * scale, x[7] * scale));
    }
    bar_sync(bar, 128);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        int r = k * 8 + t / 16, c = t % 16;
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(at + c / 8 * box + r * 128 + ((c % 8) ^ (r % 8)) * 16) : "memory");
        if (r < rows) *reinterpret_cast<uint4*>(to + r * stride + c * 8) = v;
    }
    bar_sync(bar, 128);
}

DEV void consume(const Params& p, const volatile Work& w, const u32 base, const int wg) {
    const u32 bars = base + AT_BARS;
    float dk[96], dv[64];
#pragma unroll
    for (int i = 0; i < 96; i++) dk[i] = 0;
#pragma unroll
    for (int i = 0; i < 64; i++) dv[i] = 0;
    const float c = p.scale * LOG2E;
    const int steps = w.steps;
    const u64 desc_key = desc64_k(base + AT_K + wg * 64 * 64);
    const u64 desc_value = desc_k(base + AT_V + wg * 64 * 128);
    const u64 desc_key_t = desc64_mn(base + AT_K + wg * 3 * K_BOX, K_BOX);
    mbar_wait(bars + BAR_KV * 8, 0);
#pragma unroll 1
    for (int n = 0; n <= steps; n++) {
        if (n < steps) {
            const int stage = n & 1, parity = n >> 1 & 1;
            const u32 q = base + AT_Q + stage * Q_STAGE, dout = base + AT_DO + stage * DO_STAGE;
            // The rounded probabilities serve dS too: with 160 sums a thread, there is no room for both forms and dP.
            u32 pb[16];
            mbar_wait(bars + (BAR_Q + stage) * 8, parity);
            const u32 stats = base + AT_STATS + stage * STATS + own_thread() % 4 * 8;
            const u64 desc_q = desc_k(q), desc_do = desc_k(dout);
            {
                float s[32];
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 12; k++)
                    wgmma<64>(s, desc_add(desc_key, k / 2 * K_BOX + k % 2 * 32), desc_add(desc_q, k / 4 * Q_BOX + k % 4 * 32), k > 0);
                wgmma_commit();
                const int limit = (w.first + n) * QUERIES + w.offset - w.j * KEYS;
                wgmma_wait<0>();
                wgmma_pin(s);
#pragma unroll
                for (int b = 0; b < 8; b++) {
                    float l0, l1;
                    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(l0), "=f"(l1) : "r"(stats + b * 32));
                    s[4 * b] = exp2_fast(s[4 * b] * c - l0), s[4 * b + 1] = exp2_fast(s[4 * b + 1] * c - l1);
                    s[4 * b + 2] = exp2_fast(s[4 * b + 2] * c - l0), s[4 * b + 3] = exp2_fast(s[4 * b + 3] * c - l1);
                }
                if (limit < wg * 64 + 63) {
                    // Key r is seen by query x of the tile if r - x <= limit.
                    const int t = own_thread(), seen = limit + t % 4 * 2 - (wg * 64 + t / WARP * 16 + t % WARP / 4);
#pragma unroll
                    for (int i = 0; i < 32; i++)
                        if (seen + i / 4 * 8 + (i & 1) - (i & 2) * 4 < 0) s[i] = 0;
                }
#pragma unroll
                for (int i = 0; i < 16; i++) pb[i] = narrow2(s[2 * i], s[2 * i + 1]);
                wgmma_pin(pb);
            }
            mbar_wait(bars + (BAR_DO + stage) * 8, parity);
            const u64 desc_do_t = desc_mn(dout, Q_BOX), desc_q_t = desc_mn(q, Q_BOX);
            u32 sb[16];
            {
                float dp[32];
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 8; k++)
                    wgmma<64>(dp, desc_add(desc_value, k / 4 * V_BOX + k % 4 * 32), desc_add(desc_do, k / 4 * Q_BOX + k % 4 * 32), k > 0);
                wgmma_commit();
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const u32 a[4] = {pb[4 * k], pb[4 * k + 1], pb[4 * k + 2], pb[4 * k + 3]};
                    wgmma<128, 1>(dv, a, desc_add(desc_do_t, k * 2048), 1);
                }
                wgmma_commit();
                wgmma_wait<1>();
                wgmma_pin(dp);
#pragma unroll
                for (int b = 0; b < 8; b++) {
                    float d0, d1;
                    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(d0), "=f"(d1) : "r"(stats + 256 + b * 32));
                    const u32 p = pb[2 * b], r = pb[2 * b + 1];
                    sb[2 * b] = narrow2(lower(p) * (dp[4 * b] - d0), upper(p) * (dp[4 * b + 1] - d1));
                    sb[2 * b + 1] = narrow2(lower(r) * (dp[4 * b + 2] - d0), upper(r) * (dp[4 * b + 3] - d1));
                }
            }
            wgmma_pin(sb);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 a[4] = {sb[4 * k], sb[4 * k + 1], sb[4 * k + 2], sb[4 * k + 3]};
                wgmma<192, 1>(dk, a, desc_add(desc_q_t, k * 2048), 1);
            }
            wgmma_commit();
            mbar_wait(bars + (BAR_DS_EMPTY + stage) * 8, parity ^ 1);
            const int lane = own_thread() % WARP;
            const u32 ds_row = base + AT_DS + stage * DS_STAGE + (wg * 64 + own_thread() / WARP * 16 + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
            for (int k = 0; k < 4; k++)
                stmatrix4(ds_row ^ (k << 5), sb[4 * k], sb[4 * k + 1], sb[4 * k + 2], sb[4 * k + 3]);
            fence_async();
            __syncwarp();
            if (lane == 0) mbar_arrive(bars + (BAR_DS + stage) * 8);
            wgmma_wait<0>();
            wgmma_pin(dv);
            wgmma_pin(dk);
            if (lane == 0) mbar_arrive(bars + (BAR_EMPTY + stage) * 8);
        }
        if (n > 0) {
            const int m = n - 1, stage = m & 1, parity = m >> 1 & 1;
            float dq[48];
            mbar_wait(bars + (BAR_DS + stage) * 8, parity);
            const u64 desc_ds = desc_mn(base + AT_DS + stage * DS_STAGE, DS_STAGE);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 8; k++) wgmma<96, 1, 1>(dq, desc_add(desc_ds, k * 2048), desc_add(desc_key_t, k * 1024), k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(dq);
            const int t = own_thread(), lane = t % WARP;
            if (lane == 0) mbar_arrive(bars + (BAR_DS_EMPTY + stage) * 8);
            mbar_wait(bars + (BAR_TURN + stage) * 8, parity);
            float* to = p.sums + (i64(w.query_tile + m) * p.slots + w.head % p.slots) * (QUERIES * QK) + wg * (QUERIES * QK / 2) + t * 4;
            const int seen = tiles_seen(w.first + m, w.queries, w.offset);
            if (w.j > 0) {
                if (w.j == seen - 1) {
#pragma unroll
                    for (int i = 0; i < 12; i++) put4(to + i * 512, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
                } else {
#pragma unroll
                    for (int i = 0; i < 12; i++) add4(to + i * 512, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
                }
            } else {
                // The first keys come last: round and write.
                if (seen > 1) {
#pragma unroll
                    for (int i = 0; i < 12; i++) {
                        float4 x = get4(to + i * 512);
                        dq[4 * i] += x.x, dq[4 * i + 1] += x.y, dq[4 * i + 2] += x.z, dq[4 * i + 3] += x.w;
                    }
                }
                const int r = (w.first + m) * QUERIES + t / WARP * 16 + lane / 4;
                bf16* out = p.dq + (i64(w.query + r) * p.heads + w.head) * QK + wg * 96 + lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 12; i++) {
                    if (r < w.queries) *reinterpret_cast<u32*>(out + i * 8) = narrow2(dq[4 * i] * p.scale, dq[4 * i + 1] * p.scale);
                    if (r + 8 < w.queries)
                        *reinterpret_cast<u32*>(out + i64(8) * p.heads * QK + i * 8) = narrow2(dq[4 * i + 2] * p.scale, dq[4 * i + 3] * p.scale);
                }
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(bars + (BAR_ADDED + stage) * 8);
        }
    }
    const int t = own_thread(), lane = t % WARP, row = wg * 64 + t / WARP * 16 + lane / 4;
    // This warpgroup's rows of V are read by nobody any more.
    const int rows = w.keys - wg * 64;
    const i64 stride = i64(p.heads) * (NOPE + VDIM);
    bf16* to = p.dkv_up + (i64(w.key + wg * 64) * p.heads + w.head) * (NOPE + VDIM);
    write_rows(dv, 1.0f, base + AT_V + wg * 8192, V_BOX, to + NOPE, stride, rows, t, 1 + wg);
    write_rows(dk, p.scale, base + AT_V + wg * 8192, V_BOX, to, stride, rows, t, 1 + wg);

    u32* counter = p.counters + 1 + i64(p.query_tiles) * p.slots + w.tile * 2 + wg;
    float* sum = p.pe_sums + i64(w.tile) * (KEYS * ROPE) + wg * (KEYS * ROPE / 2) + t * 4;
    if (w.head > 0) {
        if (t == 0) await(counter, w.head);
        bar_sync(1 + wg, 128);
    }
    if (w.head < p.heads - 1) {
        if (w.head == 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) put4(sum + i * 512, dk[64 + 4 * i], dk[65 + 4 * i], dk[66 + 4 * i], dk[67 + 4 * i]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) add4(sum + i * 512, dk[64 + 4 * i], dk[65 + 4 * i], dk[66 + 4 * i], dk[67 + 4 * i]);
        }
        bar_sync(1 + wg, 128);
        if (t == 0) release(counter, w.head + 1);
    } else {
        if (w.head > 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float4 x = get4(sum + i * 512);
                dk[64 + 4 * i] += x.x, dk[65 + 4 * i] += x.y, dk[66 + 4 * i] += x.z, dk[67 + 4 * i] += x.w;
            }
        }
        bf16* out = p.dk_pe + i64(w.key + row) * p.dk_pe_stride + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // dk_pe's rows may begin at any even element.
            if (row < w.keys) *reinterpret_cast<u32*>(out + i * 8) = narrow2(dk[64 + 4 * i] * p.scale, dk[65 + 4 * i] * p.scale);
            if (row + 8 < w.keys)
                *reinterpret_cast<u32*>(out + 8 * p.dk_pe_stride + i * 8) = narrow2(dk[66 + 4 * i] * p.scale, dk[67 + 4 * i] * p.scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
mla_backward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_do,
             const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
             const __grid_constant__ TensorMap map_pe, const float* stats, float* sums, float* pe_sums, u32* counters,
             bf16* dq, bf16* dkv_up, bf16* dk_pe, const int* cu_q, const int* cu_k, i64 dk_pe_stride, int sequences,
             int heads, int group, int slots, int query_tiles, int key_tiles, float scale) {
    extern __shared__ __align__(1024) u8 raw[];
    __shared__ Work shared_work;
    __shared__ int any;
    const u32 base = (smem(raw) + 1023) & ~1023u, bars = base + AT_BARS;
    const Params p = {stats, sums, pe_sums, counters, dq, dkv_up, dk_pe, cu_q, cu_k, dk_pe_stride, sequences, heads, group, slots, query_tiles, key_tiles, scale};
    if (threadIdx.x == 0) {
        any = find_work(shared_work, atomicAdd(counters, 1u), key_tiles, heads, group, cu_q, cu_k, sequences);
        mbar_init(bars + BAR_KV * 8, 1);
        for (int i = 0; i < 2; i++) {
            mbar_init(bars + (BAR_Q + i) * 8, 1), mbar_init(bars + (BAR_DO + i) * 8, 1);
            mbar_init(bars + (BAR_EMPTY + i) * 8, 8);
            mbar_init(bars + (BAR_DS + i) * 8, 8), mbar_init(bars + (BAR_DS_EMPTY + i) * 8, 8);
            mbar_init(bars + (BAR_TURN + i) * 8, 1), mbar_init(bars + (BAR_ADDED + i) * 8, 8);
            mbar_init(bars + (BAR_PASSED + i) * 8, 1);
        }
        mbar_init_fence();
    }
    __syncthreads();
    if (!any) return;
    const volatile Work& w = shared_work;
    const int wg = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (wg == 0) {
        regs_down<24>();
        const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0);
        if (threadIdx.x % WARP != 0) return;
        if (warp == 0) {
            const int kv = w.head * (NOPE + VDIM);
            mbar_expect(bars + BAR_KV * 8, 6 * K_BOX + 2 * V_BOX);
            for (int i = 0; i < 4; i++) tma_load(base + AT_K + i * K_BOX, &map_k, bars + BAR_KV * 8, kv + i * 32, w.key);
            for (int i = 0; i < 2; i++) tma_load(base + AT_K + (4 + i) * K_BOX, &map_pe, bars + BAR_KV * 8, i * 32, w.key);
            for (int i = 0; i < 2; i++) tma_load(base + AT_V + i * V_BOX, &map_v, bars + BAR_KV * 8, kv + NOPE + i * 64, w.key);
            for (int n = 0; n < w.steps; n++) {
                const int stage = n & 1, parity = n >> 1 & 1;
                const u32 bar_q = bars + (BAR_Q + stage) * 8, bar_do = bars + (BAR_DO + stage) * 8;
                const int query = w.query + (w.first + n) * QUERIES;
                mbar_wait(bars + (BAR_EMPTY + stage) * 8, parity ^ 1);
                mbar_expect(bar_q, Q_STAGE + STATS);
                for (int i = 0; i < 3; i++)
                    tma_load(base + AT_Q + stage * Q_STAGE + i * Q_BOX, &map_q, bar_q, w.head * QK + i * 64, query);
                bulk_load(base + AT_STATS + stage * STATS, stats + (i64(w.head) * query_tiles + w.query_tile + n) * (2 * QUERIES), STATS, bar_q);
                mbar_expect(bar_do, DO_STAGE);
                for (int i = 0; i < 2; i++)
                    tma_load(base + AT_DO + stage * DO_STAGE + i * Q_BOX, &map_do, bar_do, w.head * VDIM + i * 64, query);
            }
        } else if (warp == 1) {
            // Waits for this block's turn at each tile of queries.
            for (int n = 0; n < w.steps; n++) {
                const Turns turn = turn_of(p, w, n);
                if (!turn.alone) await(turn.counter, turn.target);
                if (n >= 2) mbar_wait(bars + (BAR_PASSED + (n & 1)) * 8, (n - 2) >> 1 & 1);
                mbar_arrive(bars + (BAR_TURN + (n & 1)) * 8);
            }
        } else if (warp == 2) {
            // Passes the turn on when both warpgroups have added.
            for (int n = 0; n < w.steps; n++) {
                const Turns turn = turn_of(p, w, n);
                mbar_wait(bars + (BAR_ADDED + (n & 1)) * 8, n >> 1 & 1);
                if (!turn.alone) release(turn.counter, turn.target + 1);
                mbar_arrive(bars + (BAR_PASSED + (n & 1)) * 8);
            }
        }
    } else {
        regs_up<240>();
        consume(p, w, base, wg - 1);
    }
}
