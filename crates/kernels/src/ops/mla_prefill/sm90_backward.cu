// Backward of MLA attention in its multi-head form on Hopper: P = 128, R = 64, W = 128, bf16.
//
// A work is a head's tile of 128 keys and the tiles of 64 queries that see it, from the diagonal on:
//     S^T = K Q^T,  P^T = exp2(c S^T - lse),  dP^T = V dO^T,  dS^T = P^T (dP^T - D),
//     dV += P^T dO,  dK += dS^T Q,  dQ[queries] += dS K.
// Two warpgroups hold 64 keys each: S^T, dP^T, dV and dK in registers. dS goes through shared memory, as each of them
// computes 96 columns of dQ over all 128 keys, one tile late, so that neither waits for the other. dK's product runs
// while dQ's sums leave the registers. In the third warpgroup one thread loads (TMA), two pass turns on and fetch sums,
// one takes the block's works and waits for its turns. A block takes work until there is no more; the next work's loads
// begin while the last one's results are written.
//
// Deterministic: dQ's partial sums lie in f32 in device memory, and a block adds to a tile of queries only when the
// blocks of all later keys have; a counter per tile and head says how many did. Works are taken by a ticket, in such an
// order that a work waits only for works with earlier tickets: some block has these, so the chain always moves. From the
// diagonal on, with later keys first, the blocks of a head are each at another tile; in step, none waits. The first keys
// add last, round and write. A head's sums take the place of those of `slots` heads before. dk_pe is summed over heads in
// the same way, as a work's last turn.

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
        if (h0 + h < heads)
            stats[(i64(h0 + h) * gridDim.x + tile) * (2 * QUERIES) + i % (2 * QUERIES)] = both[h][i % (2 * QUERIES)];
    }
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
        if (r < rows) store16(to + r * stride + c * 8, v.x, v.y, v.z, v.w);
    }
    bar_sync(bar, 128);
}

// What a warpgroup has done since the block began: turns it has had, and tiles it wrote as the last to add.
struct Done {
    int turns, written;
};

// Tells the thread that passes the turn on that this warp has added.
DEV void added(u32 base, int wg, Done& done) {
    __syncwarp();
    if (own_thread() % WARP == 0) mbar_arrive(base + AT_BARS + (BAR_ADDED + wg * 2 + (done.turns & 1)) * 8);
    done.turns++;
}

// A warpgroup's sums of a tile go to device memory.
DEV void give(u32 base, int wg, float* to, bool first, const float (&x)[48], Done& done) {
    if (first) {
#pragma unroll
        for (int i = 0; i < 12; i++) put4(to + i * 512, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < 12; i++) add4(to + i * 512, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
    added(base, wg, done);
}

// Adds the third `part` of what the others summed, which has come to shared memory.
DEV void take_part(u32 base, int wg, int part, float* x, int written) {
    const u32 buffer = wg * 2 + part, at = base + AT_SUMS + buffer * SUMS_PART + own_thread() * 16;
    mbar_wait(base + AT_BARS + (BAR_READY + buffer) * 8, written & 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float4 y = load_shared(at + i * 2048);
        x[4 * i] += y.x, x[4 * i + 1] += y.y, x[4 * i + 2] += y.z, x[4 * i + 3] += y.w;
    }
    // The copy engine writes here again as soon as all have arrived: the loads come before that. Without the fence they
    // did not always, beside the products that run.
    fence_async();
    mbar_arrive(base + AT_BARS + (BAR_DONE + buffer) * 8);
}
// Rounds a third of the columns and writes it.
DEV void write_part(const Params& p, bf16* out, int left, const float* x, int lane) {
    u32 a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i] = narrow2(x[4 * i] * p.scale, x[4 * i + 1] * p.scale);
        b[i] = narrow2(x[4 * i + 2] * p.scale, x[4 * i + 3] * p.scale);
    }
    transpose4(a, lane), transpose4(b, lane);
    if (left > 0) store16(out, a[0], a[1], a[2], a[3]);
    if (left > 8) store16(out + i64(8) * p.heads * QK, b[0], b[1], b[2], b[3]);
}

// Where a tile's sums go. Found, and the turn waited for, while the product runs.
struct Where {
    float* sums;
    int at;
    bool first, last;
};
DEV Where where_to(const Params& p, const volatile Work& w, u32 base, int wg, int n, const Done& done) {
    const int at = place(w, n), seen = tiles_seen(at, w.queries, w.offset);
    Where where;
    where.at = at, where.first = adds_first(w, seen), where.last = adds_last(w, seen);
    where.sums = p.sums + (i64(w.query_tile + at) * p.slots + w.slot) * (QUERIES * QK) + wg * (QUERIES * QK / 2) + own_thread() * 4;
    if (!where.last) mbar_wait(base + AT_BARS + (BAR_TURN + (done.turns & 1)) * 8, done.turns >> 1 & 1);
    return where;
}

// A warpgroup's sums of a tile leave; the last to add takes what the others summed and writes the result: two thirds
// come by way of shared memory, the rest it loads itself, as there is no room.
DEV void put(const Params& p, const volatile Work& w, u32 base, int wg, const Where& where, float (&x)[48], Done& done) {
    float* const sums = where.sums;
    if (!where.last) return give(base, wg, sums, where.first, x, done);
    const int t = own_thread(), lane = t % WARP, at = where.at, seen = tiles_seen(at, w.queries, w.offset);
    const int r = at * QUERIES + t / WARP * 16 + lane / 4, left = w.queries - r;
    bf16* out = p.dq + (i64(w.query + r) * p.heads + w.head) * QK + wg * 96 + lane % 4 * 8;
    if (seen > 1) take_part(base, wg, 0, x, done.written);
    write_part(p, out, left, x, lane);
    if (seen > 1) {
        float4 y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) y[i] = get4(sums + (8 + i) * 512);
        take_part(base, wg, 1, x + 16, done.written++);
        write_part(p, out + 32, left, x + 16, lane);
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[32 + 4 * i] += y[i].x, x[33 + 4 * i] += y[i].y, x[34 + 4 * i] += y[i].z, x[35 + 4 * i] += y[i].w;
        added(base, wg, done);
    } else {
        write_part(p, out + 32, left, x + 16, lane);
    }
    write_part(p, out + 64, left, x + 32, lane);
}

// Issues this warpgroup's half of dQ of the tile in `stage`, when both warpgroups' dS are there.
DEV void issue_dq(float (&dq)[48], u32 base, u32 wg, int stage, int parity) {
    mbar_wait(base + AT_BARS + (BAR_DS + stage) * 8, parity);
    const u64 desc_ds = desc_mn(base + AT_DS + stage * DS_STAGE, DS_STAGE);
    const u64 desc_key = desc64_mn(base + AT_K + wg * 3 * K_BOX, K_BOX);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; k++) wgmma<96, 1, 1>(dq, desc_add(desc_ds, k * 2048), desc_add(desc_key, k * 1024), k > 0);
    wgmma_commit();
}

// One tile of queries: its part of dV and dK (the latter still runs at the end), and dQ of the tile before.
template <bool FIRST>
DEV void step(const Params& p, const volatile Work& w, const u32 base, const int wg, const u32 turn, const int before,
              const int n, Done& done, float (&dk)[96], float (&dv)[64]) {
    const u32 bars = base + AT_BARS;
    const float c = p.scale * LOG2E;
    const u64 desc_key = desc64_k(base + AT_K + wg * 64 * 64);
    const u64 desc_value = desc_k(base + AT_V + wg * 64 * 128);
    const int stage = (before + n) & 1, parity = (before + n) >> 1 & 1;
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
        if (!FIRST) {
            wgmma_wait<1>();
            wgmma_pin(dk);
            if (own_thread() % WARP == 0) mbar_arrive(bars + (BAR_EMPTY + (stage ^ 1)) * 8);
        }
        const int limit = place(w, n) * QUERIES + w.offset - w.j * KEYS;
        float l[16];
#pragma unroll
        for (int b = 0; b < 8; b++) l[2 * b] = load2(stats + b * 32, l[2 * b + 1]);
        wgmma_wait<0>();
        wgmma_pin(s);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const float l0 = l[2 * b], l1 = l[2 * b + 1];
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
    if (FIRST) mbar_wait(bars + BAR_V * 8, turn);
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
        float d[16];   // D: half of it comes before dP, as far as registers go
#pragma unroll
        for (int b = 0; b < 4; b++) d[2 * b] = load2(stats + 256 + b * 32, d[2 * b + 1]);
        wgmma_wait<1>();
        wgmma_pin(dp);
        if (n == w.steps - 1 && own_thread() % WARP == 0) mbar_arrive(bars + BAR_V_EMPTY * 8);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            float d0, d1;
            if (b < 4) d0 = d[2 * b], d1 = d[2 * b + 1];
            else d0 = load2(stats + 256 + b * 32, d1);
            const u32 p = pb[2 * b], r = pb[2 * b + 1];
            sb[2 * b] = narrow2(lower(p) * (dp[4 * b] - d0), upper(p) * (dp[4 * b + 1] - d1));
            sb[2 * b + 1] = narrow2(lower(r) * (dp[4 * b + 2] - d0), upper(r) * (dp[4 * b + 3] - d1));
        }
    }
    mbar_wait(bars + (BAR_DS_EMPTY + stage) * 8, parity ^ 1);
    const u32 ds = base + AT_DS + stage * DS_STAGE + wg * 64 * 128;
    const int t = own_thread();
    const u32 ds_row = ds + (t / WARP * 16 + (t & 15)) * 128 + (((t >> 4 & 1) ^ (t & 7)) << 4);
#pragma unroll
    for (int k = 0; k < 4; k++)
        stmatrix4(ds_row ^ (k << 5), sb[4 * k], sb[4 * k + 1], sb[4 * k + 2], sb[4 * k + 3]);
    fence_async();
    // Every thread for itself: what it has loaded of lse and D, another proxy will overwrite.
    mbar_arrive(bars + (BAR_STATS_EMPTY + stage) * 8);
    wgmma_wait<0>();
    wgmma_pin(dv);
    bar_sync(1 + wg, 128);
    if (own_thread() % WARP == 0) mbar_arrive(bars + (BAR_DS + stage) * 8);
    float dq[48];
    if (!FIRST) issue_dq(dq, base, wg, stage ^ 1, (before + n - 1) >> 1 & 1);
    else wgmma_fence();
    // dK runs while dQ's sums leave.
    const u64 desc_ds = desc_k(ds);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<192, 0, 1>(dk, desc_add(desc_ds, k * 32), desc_add(desc_q_t, k * 2048), 1);
    wgmma_commit();
    if (!FIRST) {
        const Where where = where_to(p, w, base, wg, n - 1, done);
        wgmma_wait<1>();
        wgmma_pin(dq);
        if (own_thread() % WARP == 0) mbar_arrive(bars + (BAR_DS_EMPTY + (stage ^ 1)) * 8);
        put(p, w, base, wg, where, dq, done);
    }
}

// A warpgroup's part of a work: the `turn`-th of the block, modulo 2, after `before` tiles of others.
DEV void consume(const Params& p, const volatile Work& w, const u32 base, const int wg, const u32 turn, const int before,
                 Done& done) {
    const u32 bars = base + AT_BARS;
    float dk[96], dv[64];
#pragma unroll
    for (int i = 0; i < 96; i++) dk[i] = 0;
#pragma unroll
    for (int i = 0; i < 64; i++) dv[i] = 0;
    const int steps = w.steps;
    mbar_wait(bars + BAR_K * 8, turn);
    if (steps > 0) {
        step<true>(p, w, base, wg, turn, before, 0, done, dk, dv);
#pragma unroll 1
        for (int n = 1; n < steps; n++) step<false>(p, w, base, wg, turn, before, n, done, dk, dv);
        wgmma_wait<0>();
        wgmma_pin(dk);
        const int n = steps, stage = (before + n - 1) & 1;
        if (own_thread() % WARP == 0) mbar_arrive(bars + (BAR_EMPTY + stage) * 8);
        float dq[48];
        issue_dq(dq, base, wg, stage, (before + n - 1) >> 1 & 1);
        const Where where = where_to(p, w, base, wg, n - 1, done);
        wgmma_wait<0>();
        wgmma_pin(dq);
        if (own_thread() % WARP == 0) {
            mbar_arrive(bars + (BAR_DS_EMPTY + stage) * 8);
            mbar_arrive(bars + BAR_K_EMPTY * 8);
        }
        put(p, w, base, wg, where, dq, done);
    }
    const int t = own_thread(), lane = t % WARP, row = wg * 64 + t / WARP * 16 + lane / 4;
    if (steps == 0) {
        // Nobody asked for these: they must have come before the next may.
        mbar_wait(bars + BAR_V * 8, turn);
        if (lane == 0) mbar_arrive(bars + BAR_K_EMPTY * 8), mbar_arrive(bars + BAR_V_EMPTY * 8);
    }
    float* sum = p.pe_sums + i64(w.tile) * (KEYS * ROPE) + wg * (KEYS * ROPE / 2) + t * 4;
    mbar_wait(bars + (BAR_TURN + (done.turns & 1)) * 8, done.turns >> 1 & 1);
    if (w.head < p.heads - 1) {
        if (w.head == 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) put4(sum + i * 512, dk[64 + 4 * i], dk[65 + 4 * i], dk[66 + 4 * i], dk[67 + 4 * i]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) add4(sum + i * 512, dk[64 + 4 * i], dk[65 + 4 * i], dk[66 + 4 * i], dk[67 + 4 * i]);
        }
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
                *reinterpret_cast<u32*>(out + 8 * p.dk_pe_stride + i * 8) =
                    narrow2(dk[66 + 4 * i] * p.scale, dk[67 + 4 * i] * p.scale);
        }
    }
    added(base, wg, done);
    // Both warpgroups have made dQ of the last tiles: nobody reads dS any more, and its room serves what is written.
    const int last = before + steps - 1;
    mbar_wait(bars + (BAR_DS_EMPTY + (last & 1)) * 8, last >> 1 & 1);
    mbar_wait(bars + (BAR_DS_EMPTY + (last & 1 ^ 1)) * 8, (last - 1) >> 1 & 1);
    const int rows = w.keys - wg * 64;
    const i64 stride = i64(p.heads) * (NOPE + VDIM);
    bf16* to = p.dkv_up + (i64(w.key + wg * 64) * p.heads + w.head) * (NOPE + VDIM);
    write_rows(dv, 1.0f, base + AT_DS + wg * 8192, DS_STAGE, to + NOPE, stride, rows, t, 1 + wg);
    write_rows(dk, p.scale, base + AT_DS + wg * 8192, DS_STAGE, to, stride, rows, t, 1 + wg);
}

// The next work there is, if any.
DEV bool take_work(volatile Work& w, const Params& p) {
    for (;;) {
        u32 ticket;
        asm volatile("atom.global.relaxed.gpu.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(p.counters) : "memory");
        if (ticket >= u32(p.heads) * p.key_tiles) return false;
        if (find_work(w, ticket, p.key_tiles, p.heads, p.group, p.slots, p.cu_q, p.cu_k, p.sequences)) return true;
    }
}

// The block's `it`-th work, as soon as all are done with the last but one; steps = -1 if there is none.
DEV void take(const Params& p, volatile Work* works, u32 bars, int it) {
    mbar_wait(bars + (BAR_WORK_EMPTY + (it & 1)) * 8, (it >> 1 & 1) ^ 1);
    if (!take_work(works[it & 1], p)) works[it & 1].steps = -1;
    mbar_arrive(bars + (BAR_WORK + (it & 1)) * 8);
}

// One thread loads what a work needs, as room comes free: the first queries, then keys and values, then the others.
DEV void load(const Params& p, const volatile Work& w, u32 base, int it, int loaded, const TensorMap& map_q,
              const TensorMap& map_do, const TensorMap& map_k, const TensorMap& map_v, const TensorMap& map_pe) {
    const u32 bars = base + AT_BARS, bar_k = bars + BAR_K * 8, bar_v = bars + BAR_V * 8;
    const int kv = w.head * (NOPE + VDIM), key = w.key, steps = w.steps;
#pragma unroll 1
    for (int n = 0; n < max(steps, 1); n++) {
        if (n < steps) {
            const int stage = (loaded + n) & 1, parity = (loaded + n) >> 1 & 1;
            const u32 bar_q = bars + (BAR_Q + stage) * 8, bar_do = bars + (BAR_DO + stage) * 8;
            const int at = place(w, n), query = w.query + at * QUERIES;
            mbar_wait(bars + (BAR_EMPTY + stage) * 8, parity ^ 1);
            mbar_expect(bar_q, Q_STAGE + STATS);
#pragma unroll 1
            for (int i = 0; i < 3; i++)
                tma_load(base + AT_Q + stage * Q_STAGE + i * Q_BOX, &map_q, bar_q, w.head * QK + i * 64, query);
            mbar_wait(bars + (BAR_STATS_EMPTY + stage) * 8, parity ^ 1);
            const float* stats = p.stats + (i64(w.head) * p.query_tiles + w.query_tile + at) * (2 * QUERIES);
            bulk_load(base + AT_STATS + stage * STATS, stats, STATS, bar_q);
            mbar_expect(bar_do, DO_STAGE);
#pragma unroll 1
            for (int i = 0; i < 2; i++)
                tma_load(base + AT_DO + stage * DO_STAGE + i * Q_BOX, &map_do, bar_do, w.head * VDIM + i * 64, query);
        }
        if (n == 0) {
            mbar_wait(bars + BAR_V_EMPTY * 8, (it & 1) ^ 1);
            mbar_expect(bar_v, 2 * V_BOX);
#pragma unroll 1
            for (int i = 0; i < 2; i++) tma_load(base + AT_V + i * V_BOX, &map_v, bar_v, kv + NOPE + i * 64, key);
            mbar_wait(bars + BAR_K_EMPTY * 8, (it & 1) ^ 1);
            mbar_expect(bar_k, 6 * K_BOX);
#pragma unroll 1
            for (int i = 0; i < 4; i++) tma_load(base + AT_K + i * K_BOX, &map_k, bar_k, kv + i * 32, key);
#pragma unroll 1
            for (int i = 0; i < 2; i++) tma_load(base + AT_K + (4 + i) * K_BOX, &map_pe, bar_k, i * 32, key);
        }
    }
}

// One thread waits for this block's turns, at most two ahead of those who take them.
DEV void await_turn(const Params& p, const volatile Work& w, int n, u32 bars, int& turns) {
    const Turn turn = turn_of(p, w, n);
    if (turn.alone) return;
    await(turn.counter, turn.target);
    if (turns >= 2) mbar_wait(bars + (BAR_SEEN + (turns & 1)) * 8, (turns - 2) >> 1 & 1);
    mbar_arrive(bars + (BAR_TURN + (turns & 1)) * 8);
    turns++;
}

// One thread per half of the columns (that of warp 1 and that of warp 2) passes the turn on when its warpgroup has added;
// for the last to add it fetches two thirds of the sums. With few registers, it works out anew what it can.
DEV void serve_sums(const Params& p, const volatile Work& w, u32 base, int& turns, int& written) {
#define HALF (own_thread() / WARP - 1)
#define BAR_OF(kind, which) (base + AT_BARS + ((kind) + HALF * 2 + (which)) * 8)
#pragma unroll 1
    for (int n = 0; n <= w.steps; n++) {
        if (turn_of(p, w, n).alone) continue;
        if (n < w.steps && adds_last(w, seen_at(w, n))) {
            mbar_wait(base + AT_BARS + (BAR_TURN + (turns & 1)) * 8, turns >> 1 & 1);
            fence_async_global();
            const float* sums = p.sums + (i64(w.query_tile + place(w, n)) * p.slots + w.slot) * (QUERIES * QK) +
                                HALF * (QUERIES * QK / 2);
#pragma unroll 1
            for (int part = 0; part < 2; part++) {
                mbar_wait(BAR_OF(BAR_DONE, part), written & 1 ^ 1);
                mbar_expect(BAR_OF(BAR_READY, part), SUMS_PART);
                bulk_load(base + AT_SUMS + (HALF * 2 + part) * SUMS_PART, sums, SUMS_PART, BAR_OF(BAR_READY, part));
                sums += SUMS_PART / 4;
            }
            written++;
        }
        mbar_wait(BAR_OF(BAR_ADDED, turns & 1), turns >> 1 & 1);
        release_add(turn_of(p, w, n).counter);
        mbar_arrive(base + AT_BARS + (BAR_SEEN + (turns & 1)) * 8);
        turns++;
    }
#undef HALF
#undef BAR_OF
}

extern "C" __global__ void __launch_bounds__(384, 1)
mla_backward(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_do,
             const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
             const __grid_constant__ TensorMap map_pe, const float* stats, float* sums, float* pe_sums, u32* counters,
             bf16* dq, bf16* dkv_up, bf16* dk_pe, const int* cu_q, const int* cu_k, i64 dk_pe_stride, int sequences,
             int heads, int group, int slots, int query_tiles, int key_tiles, float scale) {
    extern __shared__ __align__(1024) u8 raw[];
    const u32 base = (smem(raw) + 1023) & ~1023u, bars = base + AT_BARS;
    volatile Work* works = reinterpret_cast<volatile Work*>(raw + (base - smem(raw)) + AT_WORK);
    const Params p = {stats, sums, pe_sums, counters, dq, dkv_up, dk_pe, cu_q, cu_k, dk_pe_stride,
                      sequences, heads, group, slots, query_tiles, key_tiles, scale};
    if (threadIdx.x == 0) {
        for (int i = 0; i < BAR_STATS_EMPTY + 2; i++) {
            // By warps: a warpgroup's four, both's eight, and these with the four threads that serve them; by threads where
            // loads from shared memory must be over.
            int count = i >= BAR_ADDED ? 4 : i == BAR_WORK_EMPTY || i == BAR_WORK_EMPTY + 1 ? 12 : i >= BAR_SEEN ? 2 : 1;
            if ((i >= BAR_EMPTY && i < BAR_READY) || i == BAR_K_EMPTY || i == BAR_V_EMPTY) count = 8;
            if (i >= BAR_DONE && i < BAR_V) count = 128;
            if (i >= BAR_STATS_EMPTY) count = 256;
            mbar_init(bars + i * 8, count);
        }
        mbar_init_fence();
    }
    __syncthreads();
    const int wg = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (wg == 0) {
        regs_down<24>();
        const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0);
        if (threadIdx.x % WARP != 0) return;
        if (warp == 0) {
            int loaded = 0;
            for (int it = 0;; it++) {
                const volatile Work& w = works[it & 1];
                mbar_wait(bars + (BAR_WORK + (it & 1)) * 8, it >> 1 & 1);
                if (w.steps < 0) break;
                load(p, w, base, it, loaded, map_q, map_do, map_k, map_v, map_pe);
                loaded += w.steps;
                mbar_arrive(bars + (BAR_WORK_EMPTY + (it & 1)) * 8);
            }
        } else if (warp <= 2) {
            int turns = 0, written = 0;
            for (int it = 0;; it++) {
                const volatile Work& w = works[it & 1];
                mbar_wait(bars + (BAR_WORK + (it & 1)) * 8, it >> 1 & 1);
                if (w.steps < 0) break;
                serve_sums(p, w, base, turns, written);
                mbar_arrive(bars + (BAR_WORK_EMPTY + (it & 1)) * 8);
            }
        } else {
            int turns = 0;
#pragma unroll 1
            for (int it = -1; it < 0 || works[it & 1].steps >= 0; it++) {
#pragma unroll 1
                for (int n = 0; n <= (it < 0 ? 0 : works[it & 1].steps); n++) {
                    // The next work is looked for three tiles before this one ends: its loads begin meanwhile. Earlier, and
                    // others would wait for what this block has not begun.
                    if (n == (it < 0 ? 0 : max(works[it & 1].steps - 3, 0))) take(p, works, bars, it + 1);
                    if (it >= 0) await_turn(p, works[it & 1], n, bars, turns);
                }
                if (it >= 0) mbar_arrive(bars + (BAR_WORK_EMPTY + (it & 1)) * 8);
            }
        }
    } else {
        regs_up<240>();
        int before = 0;
        Done done = {0, 0};
#pragma unroll 1
        for (int it = 0;; it++) {
            const volatile Work& w = works[it & 1];
            mbar_wait(bars + (BAR_WORK + (it & 1)) * 8, it >> 1 & 1);
            const int steps = w.steps;
            if (steps < 0) break;
            consume(p, w, base, wg - 1, it & 1, before, done);
            before += steps;
            __syncwarp();
            if (own_thread() % WARP == 0) mbar_arrive(bars + (BAR_WORK_EMPTY + (it & 1)) * 8);
        }
    }
}
