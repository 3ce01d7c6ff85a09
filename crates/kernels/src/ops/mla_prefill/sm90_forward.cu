// Attention forward on Hopper. Defines: NOPE, ROPE, VDIM (P, R, W of the contract), WGS warpgroups that compute, of 64
// queries each, BN keys a block, STAGES blocks of keys and of values in flight.
//
// A block of threads stays on its multiprocessor and takes items of work (64 * WGS queries of one sequence, one head)
// until none is left. One warp loads: Q once an item, and through rings of shared memory K blocks (k_nope of the head
// and the k_pe that all heads share, side by side) and V blocks. Each computing warpgroup owns 64 queries: scores by
// wgmma, softmax in registers, and the probabilities, still in registers, are the next product's A. The softmax of one
// block runs beside the product of the last block's probabilities with its values, and beside the other warpgroup's
// products.
//
// Keys go from the last block that an item sees to the first, so that masks end after the first blocks. Blocks are
// counted from the sequence's first key, and one that a query does not see leaves that query's state as it is, to the
// bit. So what a query gets depends on its own sequence alone, and not on how that was cut into tiles of queries.

#define BM (64 * WGS)
#define LOG2E 1.4426950408889634f

// Elements of a swizzled line: 128, 64 or 32 bytes.
constexpr int line(int d) { return d % 64 == 0 ? 64 : d % 32 == 0 ? 32 : 16; }

// The descriptor of a matrix that TMA wrote as boxes of lines of L elements, with the swizzle of that width, `offset`
// bytes into the tile at `tile` * 16. `block` is the distance in bytes of boxes side by side, for operands whose lines
// are along m or n. Built so that one addition is all that remains of it between products.
template <int L> DEV u64 desc(u32 tile, u32 offset, u32 block) {
    const u32 swizzle = L == 64 ? 1 : L == 32 ? 2 : 3, high = L * 16 >> 4 | swizzle << 30;
    u64 d;
    asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(tile + ((offset >> 4) + (block >> 4 << 16))), "r"(high));
    return d;
}

DEV float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Bytes of the parts of shared memory.
#define Q_NOPE (64 * NOPE * 2)
#define Q_BYTES (Q_NOPE + 64 * ROPE * 2)
#define K_NOPE (BN * NOPE * 2)
#define K_BYTES (K_NOPE + BN * ROPE * 2)
#define V_BYTES (BN * VDIM * 2)
#define ITEMS 2
// Steps of 16 along the head whose Q is kept in registers: the product reads a third less of shared memory there.
#define HELD (NOPE / 16 < 8 ? NOPE / 16 : 8)

struct Shared {
    u8 q[WGS][Q_BYTES];
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    int item[ITEMS][8];
    u64 q_full[WGS], q_empty[WGS];
    u64 k_full[STAGES], k_empty[STAGES];
    u64 v_full[STAGES], v_empty[STAGES];
    u64 v_landed;  // of a V block that the loading warp still has to clear in part
    u64 item_full[ITEMS], item_empty[ITEMS];
};

// A place in a ring of N, and the parity of its barriers there.
template <int N> struct Ring {
    int at = 0;
    u32 parity = 0;
    DEV void next() {
        if (++at == N) at = 0, parity ^= 1;
    }
};

// What the plan says of a tile of queries, and the head.
struct Item {
    int q;      // first query, in the batch; -1: no more work
    int rows;   // queries, up to BM
    int k;      // first key of the sequence, in the batch
    int keys;   // keys of the sequence
    int first;  // keys that the first query sees; not positive when it sees none
    int head;
    // Blocks that the last of the first n queries needs.
    DEV int blocks(int n) const { return n <= 0 ? 0 : (max(min(first + n - 1, keys), 0) + BN - 1) / BN; }
};

// ---- plan ----

#define BUCKETS 1024
#define PLAN_HEADER 8
#define PLAN_ENTRY 8

// Tile slot i: sequence s has the slots from cu_q[s] / BM + s on, of which it fills as many as it has tiles. So the
// slots are known without a sum over the sequences. Returns whether the slot is filled.
DEV bool tile_of(int slot, const int* cu_q, const int* cu_k, int sequences, Item& tile) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        int mid = (low + high) / 2;
        if (cu_q[mid] / BM + mid <= slot) low = mid;
        else high = mid;
    }
    int q0 = cu_q[low], q_len = cu_q[low + 1] - q0, i = (slot - (q0 / BM + low)) * BM;
    tile.q = q0 + i;
    tile.rows = min(q_len - i, BM);
    tile.k = cu_k[low];
    tile.keys = cu_k[low + 1] - tile.k;
    tile.first = tile.keys - q_len + i + 1;
    return i < q_len;
}

// Lists the tiles of queries, those with the most keys first, and resets the counter that hands them out. One block of
// BUCKETS threads. Tiles of the same length come in any order: no result depends on it.
extern "C" __global__ void __launch_bounds__(BUCKETS)
    mla_prefill_plan(const int* cu_q, const int* cu_k, int sequences, int slots, int* plan) {
    __shared__ int begin[BUCKETS], sums[WARP];
    int t = threadIdx.x;
    begin[t] = 0;
    __syncthreads();
    Item tile;
    for (int i = t; i < slots; i += BUCKETS)
        if (tile_of(i, cu_q, cu_k, sequences, tile))
            atomicAdd(&begin[BUCKETS - 1 - min(tile.blocks(tile.rows), BUCKETS - 1)], 1);
    __syncthreads();
    // From the number of each bucket's tiles to where it begins: sums within a warp, then of the warps before.
    int lane = t % WARP, count = begin[t], upto = count;
    for (int d = 1; d < WARP; d *= 2) {
        int before = __shfl_up_sync(ALL_LANES, upto, d);
        if (lane >= d) upto += before;
    }
    if (lane == WARP - 1) sums[t / WARP] = upto;
    __syncthreads();
    upto += warp_sum(lane < t / WARP ? sums[lane] : 0);
    begin[t] = upto - count;
    if (t == BUCKETS - 1) plan[0] = upto, plan[1] = 0;
    __syncthreads();
    for (int i = t; i < slots; i += BUCKETS)
        if (tile_of(i, cu_q, cu_k, sequences, tile)) {
            int at = atomicAdd(&begin[BUCKETS - 1 - min(tile.blocks(tile.rows), BUCKETS - 1)], 1);
            int4* entry = reinterpret_cast<int4*>(plan + PLAN_HEADER + i64(at) * PLAN_ENTRY);
            entry[0] = make_int4(tile.q, tile.rows, tile.k, tile.keys);
            entry[1] = make_int4(tile.first, 0, 0, 0);
        }
}

// ---- loads ----

struct Maps {
    const TensorMap *q_nope, *q_rope, *k_nope, *k_pe, *v;
};

struct Loader {
    Shared& sh;
    Maps maps;
    int lane;
    Ring<STAGES> k, v;
    u32 v_landed_parity = 0;

    DEV Loader(Shared& sh, Maps maps) : sh(sh), maps(maps), lane(threadIdx.x % WARP) {}

    DEV void load_q(const Item& it, u32 parity) {
        if (lane == 0)
            for (int w = 0; w < WGS; w++) {
                u32 full = smem(&sh.q_full[w]), to = smem(sh.q[w]);
                mbar_wait(smem(&sh.q_empty[w]), parity ^ 1);
                mbar_expect(full, Q_BYTES);
                tma_load(to, maps.q_nope, full, 0, it.q + 64 * w, 0, it.head);
                tma_load(to + Q_NOPE, maps.q_rope, full, 0, it.q + 64 * w, 0, it.head);
            }
        __syncwarp();
    }
    DEV void load_k(const Item& it, int n) {
        if (lane == 0) {
            u32 full = smem(&sh.k_full[k.at]), to = smem(sh.k[k.at]);
            mbar_wait(smem(&sh.k_empty[k.at]), k.parity ^ 1);
            mbar_expect(full, K_BYTES);
            tma_load(to, maps.k_nope, full, 0, it.k + n * BN, 0, it.head);
            tma_load(to + K_NOPE, maps.k_pe, full, 0, it.k + n * BN, 0, 0);
        }
        __syncwarp();
        k.next();
    }
    // Probabilities of keys past the sequence's end are zero, but what lies there in memory may be NaN: it is cleared.
    DEV void load_v(const Item& it, int n) {
        u32 full = smem(&sh.v_full[v.at]), to = smem(sh.v[v.at]), landed = smem(&sh.v_landed);
        bool partial = (n + 1) * BN > it.keys;
        u32 bar = partial ? landed : full;
        if (lane == 0) {
            mbar_wait(smem(&sh.v_empty[v.at]), v.parity ^ 1);
            mbar_expect(bar, V_BYTES);
            tma_load(to, maps.v, bar, 0, it.k + n * BN, 0, it.head);
        }
        __syncwarp();
        if (partial) {
            constexpr int L = line(VDIM), CHUNKS = L / 8;
            mbar_wait(landed, v_landed_parity);
            v_landed_parity ^= 1;
            int from = it.keys - n * BN, chunks = (BN - from) * CHUNKS;
#pragma unroll 1
            for (int box = 0; box < VDIM / L; box++)
#pragma unroll 1
                for (int i = lane; i < chunks; i += WARP)
                    reinterpret_cast<uint4*>(sh.v[v.at])[(box * BN + from) * CHUNKS + i] = make_uint4(0, 0, 0, 0);
            fence_async();
            __syncwarp();
            if (lane == 0) mbar_arrive(full);
        }
        v.next();
    }
};

// Item `index` of all. Heads are taken in so many sections, as equal as they can be: keys and values of one section
// should stay in the L2 cache. Within a section items are in the plan's order, the longest first.
DEV Item item_at(const int* plan, int tiles, int index, int heads, int sections) {
    Item it;
    it.q = -1;
    if (index < tiles * heads) {
        int section = ((index / tiles + 1) * sections - 1) / heads, begin = section * heads / sections;
        int width = (section + 1) * heads / sections - begin, rest = index - begin * tiles;
        const int4* entry = reinterpret_cast<const int4*>(plan + PLAN_HEADER + i64(rest / width) * PLAN_ENTRY);
        int4 e = entry[0];
        it.q = e.x, it.rows = e.y, it.k = e.z, it.keys = e.w, it.first = entry[1].x;
        it.head = begin + rest % width;
    }
    return it;
}

// What comes first of an item is loaded before the next item is asked for.
DEV void produce(Shared& sh, Maps maps, int* plan, int heads, int sections) {
    Loader load(sh, maps);
    int lane = threadIdx.x % WARP, tiles = plan[0];
    Ring<ITEMS> items;
    u32 q_parity = 0;
    Item it = item_at(plan, tiles, blockIdx.x, heads, sections);
    while (true) {
        if (lane == 0) {
            mbar_wait(smem(&sh.item_empty[items.at]), items.parity ^ 1);
            int4* to = reinterpret_cast<int4*>(sh.item[items.at]);
            to[0] = make_int4(it.q, it.rows, it.k, it.keys);
            to[1] = make_int4(it.first, it.head, 0, 0);
            mbar_arrive(smem(&sh.item_full[items.at]));
        }
        __syncwarp();
        items.next();
        if (it.q < 0) return;
        int n = it.blocks(it.rows) - 1;
        if (n >= 0) {
            load.load_k(it, n);
            load.load_q(it, q_parity);
            q_parity ^= 1;
            if (n > 0) load.load_k(it, n - 1);
            load.load_v(it, n);
        }
        int index = 0;
        if (lane == 0) index = gridDim.x + atomicAdd(&plan[1], 1);
        Item next = item_at(plan, tiles, __shfl_sync(ALL_LANES, index, 0), heads, sections);
        for (n--; n >= 0; n--) {
            if (n > 0) load.load_k(it, n - 1);
            load.load_v(it, n);
        }
        it = next;
    }
}

// ---- products ----

// Where step d of 16 along the head begins in a tile of ROWS rows: the nope part's boxes, then the rope part's.
template <int ROWS> DEV u32 step_at(int d) {
    constexpr int LN = line(NOPE), LR = line(ROPE);
    int r = d - NOPE;
    return d < NOPE ? d / LN * (ROWS * LN * 2) + d % LN * 2 : ROWS * NOPE * 2 + r / LR * (ROWS * LR * 2) + r % LR * 2;
}
template <int ROWS> DEV u64 step_desc(u32 tile, int d) {
    return d < NOPE ? desc<line(NOPE)>(tile, step_at<ROWS>(d), 16) : desc<line(ROPE)>(tile, step_at<ROWS>(d), 16);
}
// The A operands of the first HELD steps, from Q as TMA swizzled it.
DEV void hold(u32 (&held)[HELD][4], u32 q) {
    constexpr int L = line(NOPE);
    int t = threadIdx.x % 128;
#pragma unroll
    for (int j = 0; j < HELD; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int d = j * 16 + (i & 2) * 4, row = t / 32 * 16 + t % 32 / 4 + (i & 1) * 8, chunk = d % L / 8;
            u32 to = row * (L * 2) + ((chunk ^ (row * L / 64 & (L / 8 - 1))) << 4) + t % 4 * 4;
            u32 at = q + step_at<64>(d / L * L) + to;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(held[j][i]) : "r"(at) : "memory");
        }
}
// s = Q K^T.
DEV void scores(float (&s)[BN / 2], const u32 (&held)[HELD][4], u32 q, u32 k) {
    q >>= 4, k >>= 4;
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < NOPE + ROPE; d += 16) {
        u64 b = step_desc<BN>(k, d);
        if (d / 16 < HELD) wgmma<BN>(s, held[d / 16], b, d > 0);
        else wgmma<BN>(s, step_desc<64>(q, d), b, d > 0);
    }
    wgmma_commit();
}
// o += P V.
DEV void values(float (&o)[VDIM / 2], const u32 (&p)[BN / 16][4], u32 v) {
    constexpr int L = line(VDIM);
    v >>= 4;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < BN / 16; j++) wgmma<VDIM, 1>(o, p[j], desc<L>(v, j * 16 * L * 2, BN * L * 2), 1);
    wgmma_commit();
}

// ---- softmax ----

// Of this thread's two rows (8 apart): the maximum that exponents are taken against, this thread's part of the sum, and
// what turns sums against the last maximum into sums against this one. Roundings are spelled out: they have to be the
// same with and without masks.
struct Softmax {
    float max[2] = {-INF, -INF}, sum[2] = {0, 0}, factor[2];

    // Turns scores into probabilities times exp(max). Columns from `seen` (for the second row, seen + 8) on are masked;
    // `seen` is relative to this thread's first column.
    template <bool MASK> DEV void block(float (&s)[BN / 2], float scale, int seen) {
        if (MASK)
#pragma unroll
            for (int i = 0; i < BN / 2; i++)
                if (i / 4 * 8 + (i & 1) >= seen + (i & 2) * 4) s[i] = -INF;
        float top[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
        for (int i = 4; i < BN / 2; i++) top[i >> 1 & 1][i & 1] = fmaxf(top[i >> 1 & 1][i & 1], s[i]);
        float against[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float t = fmaxf(top[r][0], top[r][1]);
            t = fmaxf(t, __shfl_xor_sync(ALL_LANES, t, 1));
            t = fmaxf(t, __shfl_xor_sync(ALL_LANES, t, 2));
            t = fmaxf(t, max[r]);
            // Probabilities and sums up to 2^8 times larger lose nothing, and a maximum that stays spares rescaling.
            bool stays = (t - max[r]) * scale <= 8.0f;
            t = stays ? max[r] : t;
            // Only where keys are masked can a row have seen none so far.
            against[r] = MASK && t == -INF ? 0.0f : __fmul_rn(t, scale);
            factor[r] = stays ? 1.0f : exp2_(__fmaf_rn(max[r], scale, -against[r]));
            max[r] = t;
        }
        float part[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            int r = i >> 1 & 1;
            s[i] = exp2_(__fmaf_rn(s[i], scale, -against[r]));
            part[r][i & 1] += s[i];
        }
#pragma unroll
        for (int r = 0; r < 2; r++) sum[r] = __fmaf_rn(sum[r], factor[r], part[r][0] + part[r][1]);
    }

    DEV void rescale(float (&o)[VDIM / 2]) const {
        if (!__any_sync(ALL_LANES, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
        for (int i = 0; i < VDIM / 2; i++) o[i] *= factor[i >> 1 & 1];
    }
};

DEV void narrow_all(u32 (&p)[BN / 16][4], const float (&s)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 4; i++) p[i / 4][i % 4] = narrow2(s[2 * i], s[2 * i + 1]);
}
DEV void pin(u32 (&p)[BN / 16][4]) {
#pragma unroll
    for (int j = 0; j < BN / 16; j++) wgmma_pin(p[j]);
}

struct Consumer {
    Shared& sh;
    int wg, lane;
    float scale;  // softmax scale times log2(e)
    Ring<STAGES> k, v;

    DEV Consumer(Shared& sh, int wg, float scale) : sh(sh), wg(wg), lane(threadIdx.x % WARP), scale(scale) {}

    DEV void wait_k() const { mbar_wait(smem(&sh.k_full[k.at]), k.parity); }
    DEV void wait_v() const { mbar_wait(smem(&sh.v_full[v.at]), v.parity); }
    DEV void release_k() {
        if (lane == 0) mbar_arrive(smem(&sh.k_empty[k.at]));
        k.next();
    }
    DEV void release_v() {
        if (lane == 0) mbar_arrive(smem(&sh.v_empty[v.at]));
        v.next();
    }
    DEV void release_q() {
        if (lane == 0) mbar_arrive(smem(&sh.q_empty[wg]));
    }

    // Block n, of which K has arrived: its scores, and beside its softmax the product of block n + 1.
    template <bool MASK> DEV void step(const u32 (&held)[HELD][4], float (&s)[BN / 2], u32 (&p)[BN / 16][4],
                                       float (&o)[VDIM / 2], Softmax& softmax, int seen, bool last) {
        scores(s, held, smem(sh.q[wg]), smem(sh.k[k.at]));
        wait_v();
        values(o, p, smem(sh.v[v.at]));
        wgmma_wait<1>();
        wgmma_pin(s);
        release_k();
        if (last) release_q();
        softmax.block<MASK>(s, scale, seen);
        // No sum is negative, which the compiler does not know: it cannot move the exponentials behind this wait, and
        // so not behind the next, for the product that they are to run beside.
        if (!last) mbar_wait(smem(&sh.k_full[k.at]), k.parity ^ (fminf(softmax.sum[0], softmax.sum[1]) < 0));
        wgmma_wait<0>();
        wgmma_pin(o);
        pin(p);
        release_v();
        softmax.rescale(o);
        narrow_all(p, s);
    }

    // This warpgroup's part of an item into o and softmax.
    DEV void attend(const Item& it, int blocks, u32 q_parity, float (&o)[VDIM / 2], Softmax& softmax) {
        int first = it.first + 64 * wg, mine = it.blocks(min(it.rows, 64 * (wg + 1))) * (it.rows > 64 * wg);
        if (blocks == 0) return;
        mbar_wait(smem(&sh.q_full[wg]), q_parity);
        // Blocks that only warpgroups further down see.
        for (int n = blocks; n > mine; n--) {
            wait_k();
            release_k();
            wait_v();
            release_v();
        }
        if (mine == 0) return release_q();
        u32 held[HELD][4], p[BN / 16][4];
        float s[BN / 2];
        hold(held, smem(sh.q[wg]));
        // Keys seen by this thread's first row, from its first column on; blocks below `whole` are seen by all rows.
        int t = threadIdx.x % 128, seen = first + t / 32 * 16 + lane / 4 - lane % 4 * 2;
        int whole = max(first, 0) / BN, n = mine - 1;
        wait_k();
        scores(s, held, smem(sh.q[wg]), smem(sh.k[k.at]));
        wgmma_wait<0>();
        wgmma_pin(s);
        release_k();
        if (n == 0) release_q();
        softmax.block<true>(s, scale, seen - n * BN);
        narrow_all(p, s);
        if (n > 0) wait_k();
        for (n--; n >= whole; n--) step<true>(held, s, p, o, softmax, seen - n * BN, n == 0);
        for (; n >= 0; n--) step<false>(held, s, p, o, softmax, 0, n == 0);
        wait_v();
        pin(p);
        wgmma_pin(o);
        values(o, p, smem(sh.v[v.at]));
        wgmma_wait<0>();
        wgmma_pin(o);
        release_v();
    }

    // Four lanes share a row; they exchange pairs so that each writes 16 bytes, four lines of 8 columns at a time.
    DEV void store(const Item& it, float (&o)[VDIM / 2], Softmax& softmax, float log_scale, int heads, bf16* out,
                   float* lse) {
        int t = threadIdx.x % 128, quad = lane % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = softmax.sum[r];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            float inverse = sum > 0 ? 1.0f / sum : 0.0f;
            int row = 64 * wg + t / 32 * 16 + lane / 4 + 8 * r;
            bool valid = row < it.rows;
            i64 at = i64(it.q + row) * heads + it.head;
            if (valid && quad == 0) lse[at] = sum > 0 ? softmax.max[r] * log_scale + logf(sum) : -INF;
#pragma unroll
            for (int j = 0; j < VDIM / 8; j += 4) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    x[i] = narrow2(o[(j + i) * 4 + 2 * r] * inverse, o[(j + i) * 4 + 2 * r + 1] * inverse);
                // A 4 x 4 transpose over the quad, in two exchanges: lane q ends with the four pairs of line j + q.
#pragma unroll
                for (int d = 1; d < 4; d *= 2)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (!(i & d)) {
                            bool upper = quad & d;
                            u32 other = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i | d], d);
                            if (upper) x[i] = other;
                            else x[i | d] = other;
                        }
                if (valid)
                    *reinterpret_cast<uint4*>(out + at * VDIM + (j + quad) * 8) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
};

DEV void consume(Shared& sh, int wg, float scale, int heads, bf16* out, float* lse) {
    Consumer c(sh, wg, scale * LOG2E);
    Ring<ITEMS> items;
    u32 q_parity = 0;
    while (true) {
        mbar_wait(smem(&sh.item_full[items.at]), items.parity);
        const int4* from = reinterpret_cast<const int4*>(sh.item[items.at]);
        int4 a = from[0], b = from[1];
        __syncwarp();
        if (c.lane == 0) mbar_arrive(smem(&sh.item_empty[items.at]));
        items.next();
        Item it{a.x, a.y, a.z, a.w, b.x, b.y};
        if (it.q < 0) return;
        int blocks = it.blocks(it.rows);
        float o[VDIM / 2];
#pragma unroll
        for (int i = 0; i < VDIM / 2; i++) o[i] = 0;
        Softmax softmax;
        c.attend(it, blocks, q_parity, o, softmax);
        if (blocks > 0) q_parity ^= 1;
        c.store(it, o, softmax, scale, heads, out, lse);
    }
}

// Registers of a thread that loads and of one that computes: 65,536 in all, handed out by warpgroup.
#define REGS_LOAD 40
#define REGS_COMPUTE 232

// plan: mla_prefill_plan's. Grid: at most one block a multiprocessor.
extern "C" __global__ void __launch_bounds__(128 * (WGS + 1), 1)
    mla_prefill_forward(const __grid_constant__ TensorMap q_nope, const __grid_constant__ TensorMap q_rope,
                        const __grid_constant__ TensorMap k_nope, const __grid_constant__ TensorMap k_pe,
                        const __grid_constant__ TensorMap v, int* plan, int heads, int sections, float scale, bf16* out,
                        float* lse) {
    extern __shared__ u8 raw[];
    Shared& sh = *reinterpret_cast<Shared*>(raw + (1024 - (smem(raw) & 1023)) % 1024);
    if (threadIdx.x == 0) {
        const int warps = 4 * WGS;
        for (int i = 0; i < WGS; i++) mbar_init(smem(&sh.q_full[i]), 1), mbar_init(smem(&sh.q_empty[i]), 4);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem(&sh.k_full[i]), 1), mbar_init(smem(&sh.k_empty[i]), warps);
            mbar_init(smem(&sh.v_full[i]), 1), mbar_init(smem(&sh.v_empty[i]), warps);
        }
        for (int i = 0; i < ITEMS; i++) mbar_init(smem(&sh.item_full[i]), 1), mbar_init(smem(&sh.item_empty[i]), warps);
        mbar_init(smem(&sh.v_landed), 1);
        mbar_init_fence();
    }
    __syncthreads();
    int role = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (role == WGS) {
        regs_down<REGS_LOAD>();
        Maps maps{&q_nope, &q_rope, &k_nope, &k_pe, &v};
        if (threadIdx.x / WARP == 4 * WGS) produce(sh, maps, plan, heads, sections);
    } else {
        regs_up<REGS_COMPUTE>();
        consume(sh, role, scale, heads, out, lse);
    }
}
