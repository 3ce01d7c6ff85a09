// The experts' weight gradients on Hopper: dW_e[m, n] (+)= dy_e^T x_e, BF16 in, f32 sums. dy is [rows, m], x is
// [rows, n]; expert e has the rows offsets[e] .. offsets[e + 1], read on the device.
//
// Blocks stay, alone or as clusters, and take items one after another from a counter in device memory. An item is a
// tile for each block of a cluster, one below the other, of one expert over a chunk of its rows; the cluster shares the
// loads of x. In a block two warps load by TMA into a ring of STAGES; two warpgroups take the block's items in turns and
// hold a whole tile's sums each, so that one stores its results beneath the other's products.
//
// Items come in an order of falling size, experts with the most rows first, so that all blocks end together. Experts
// with a large share of all rows are cut into chunks of rows: the last chunk's warpgroup adds what the others left in
// `parts`. What is cut where follows from the offsets, the shape and the number of clusters, and so do the results'
// bits; who takes which item does not matter. An item waits only for items that were taken before it.
//
// Compile-time: ADD (dW += product; the old dW comes through the ring, after the operands; experts without rows are
// left alone, else they get zeros), tile BM x BN, STAGES, CLUSTER, BAND (items of m walked together, for reuse in L2),
// SPLIT (no item is more than one in so many of a cluster's even share of all work), PARTS (tiles that `parts` may have
// for each block of a cluster), BUFFERS (pieces of dW that a warpgroup may have under way to memory), EVICT (dW is
// not to stay in L2), MIN_CHUNK (steps that a chunk has at least).
//
// The maps of dy and x are three-dimensional windows: coordinate (col, cap - size + row, offset + size), base moved
// down by cap rows, strides of both outer dimensions one row. A row past the expert's end has second coordinate >= cap:
// outside the map, so that loads give zeros there. Boxes wholly outside are never asked for.

static const int BK = 64;  // rows of a step: one box
static const int WM = BM / 64;
static const int THREADS = 384;
static const int BOX_BYTES = 8192;  // 64 x 64 of bf16, or a piece of dW: 64 x 32 of f32
static const int A_BOXES = WM, B_BOXES = BN / 64, STAGE_BYTES = (A_BOXES + B_BOXES) * BOX_BYTES;
static const int DEEP = BN == 128 ? 8 : 4;  // reads under way at once, as registers allow
static const int PIECE = 32, PIECES = WM * BN / PIECE;
static const int OLD_PIECES = A_BOXES + B_BOXES;  // of dW in a stage
static const int OLD_STAGES = ADD ? (PIECES + OLD_PIECES - 1) / OLD_PIECES : 0;
static const int TILE = BM * BN;
// The last columns of tiles may be narrower, so that none hangs over where 64 divides the columns.
static const int NARROW = BN == 192 ? 128 : BN;
// Items whose numbers are known in a block at once. The loading warps are never further ahead of a warpgroup than the
// stages and two items more.
static const int KNOWN = 16;

struct Shared {
    u8 ring[STAGES][STAGE_BYTES];
    u8 out[2][BUFFERS][BOX_BYTES];
    u64 full[STAGES], empty[STAGES], known[KNOWN];
    u32 item[KNOWN];
    int tables[1];  // offsets [experts + 1]; first item [experts + 1] and number of the expert with the most rows, ...
};

struct Item {
    int expert, row, col, width, offset, size;  // row: of the cluster's first tile
    int begin, end;                             // steps of the expert's rows
    int part, parts, tiles;  // its place in `parts`; so many chunks come before, each `tiles` places below the next
    bool last;

    DEV int steps() const { return max(end - begin, 1); }
};

// x / d, rounded down, of what no table is too long for: 0 <= x, quotients below 2^22.
DEV int divide(int x, int d) {
    int q = int(__fdividef(float(x), float(d))), rest = x - q * d;
    return q + (rest >= d) - (rest < 0);
}

DEV int chunks_of(int steps, int chunk) { return steps > chunk ? divide(steps + chunk - 1, chunk) : 1; }

struct Schedule {
    const int *offsets, *first, *order;
    int mt, nt, narrow, chunk, place;

    // Item `t`; calls come with ascending t.
    DEV Item at(int t) {
        while (t >= first[place + 1]) place++;
        Item i;
        i.expert = order[place], i.offset = offsets[i.expert], i.size = offsets[i.expert + 1] - i.offset;
        int steps = (i.size + BK - 1) / BK, chunks = chunks_of(steps, chunk), tiles = mt * nt;
        int local = t - first[place], q = 0, tile = local;
        i.begin = 0, i.end = steps;
        if (chunks > 1) {
            q = divide(local, tiles), tile = local - q * tiles;
            i.begin = divide(steps * q, chunks), i.end = divide(steps * (q + 1), chunks);
        }
        // All experts before have rows: each has one place fewer than items for every tile.
        i.part = t - place * tiles, i.parts = q, i.tiles = tiles, i.last = q == chunks - 1;
        int band = mt > BAND ? divide(tile, BAND * nt) : 0, inside = tile - band * BAND * nt;
        int height = min(BAND, mt - band * BAND);
        int col = divide(inside, height), wide = nt - narrow;
        i.row = (band * BAND + inside - col * height) * CLUSTER * BM;
        i.col = min(col, wide) * BN + max(col - wide, 0) * NARROW, i.width = col < wide ? BN : NARROW;
        return i;
    }
};

// The experts' steps, by each warp for itself; steps of a chunk follow from them.
DEV int chunk_steps(const int* segments, int experts, int tiles) {
    int sum = 0;
#pragma unroll 4
    for (int e = threadIdx.x % WARP; e < experts; e += WARP) sum += (segments[e + 1] - segments[e] + BK - 1) / BK;
    sum = __reduce_add_sync(ALL_LANES, sum);
    // Rounded up by more than the division's error.
    return max(int(float(sum) * tiles / (gridDim.x / CLUSTER * SPLIT)) + 1, MIN_CHUNK);
}

// Fills the tables: who has the most rows, first items. By all threads, one for an expert.
DEV void plan(int begin, int size, int chunk, int* offsets, int* first, int* order, int experts, int tiles) {
    int e = threadIdx.x, steps = (size + BK - 1) / BK, rank = 0, before = 0;
    int items = steps > 0 || !ADD ? chunks_of(steps, chunk) * tiles : 0;
    if (e < experts) offsets[e] = begin, first[e] = items;
    if (e == experts - 1) offsets[experts] = begin + size;
    __syncthreads();
    if (e < experts) {
        int left = offsets[0];
#pragma unroll 8
        for (int f = 0; f < experts; f++) {
            int right = offsets[f + 1], other = right - left;
            bool ahead = other > size || other == size && f < e;
            rank += ahead, before += ahead ? first[f] : 0;
            left = right;
        }
    }
    __syncthreads();
    if (e < experts) order[rank] = e, first[rank] = before;
    if (e < experts && rank == experts - 1) first[experts] = before + items;
    __syncthreads();
}

typedef RingSlot<STAGES, STAGE_BYTES> Slot;

// All threads of the cluster meet. It orders nothing but their barriers' initialisation.
DEV void meet_arrive() {
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEV void meet_wait() {
    if (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Tells all blocks of the cluster item `value`, each by its own barrier. With several it is the bytes that complete a
// phase, which a block has to expect.
DEV void send(u32 at, u32 value, u32 bar) {
    if (CLUSTER == 1) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
        mbar_arrive(bar);
    }
    for (u32 rank = 0; CLUSTER > 1 && rank < CLUSTER; rank++)
        asm volatile(
            "{\n.reg .b32 to, done;\nmapa.shared::cluster.u32 to, %0, %3;\nmapa.shared::cluster.u32 done, %2, %3;\n"
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %1, [done];\n}" ::"r"(at), "r"(value),
            "r"(bar), "r"(rank) : "memory");
}
DEV void expect_item(u32 bar) {
    if (CLUSTER > 1) mbar_expect(bar, 4);
}

DEV u32 read_acquired(const u32* p) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
DEV void write_released(u32* p, u32 x) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// What another block wrote. In this order: the compiler would gather all loads of a tile first, for which there are no
// registers.
DEV float4 read(const float4* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
DEV u32 take(u32* taken) {
    u32 x;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(x) : "l"(taken) : "memory");
    return x;
}

DEV void store_piece(const TensorMap* map, u32 from, int c0, int c1, int c2) {
    if (!EVICT) return tma_store(map, from, c0, c1, c2);
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%1, {%2, %3, %4}], [%0], %5;" ::
            "r"(from), "l"(map), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
        : "memory");
}

// The products of an item over `steps` slots; returns the last slot's barrier, to be released once they are done.
template <int width> DEV u32 products(float (&acc)[WM][BN / 2], Slot& slot, u64 a0, u64 b0, int steps) {
    u32 before = 0;
    for (int step = 0; step < steps; step++) {
        mbar_wait(slot.filled(), slot.phase);
        u64 a = desc_add(a0, slot.index * STAGE_BYTES), b = desc_add(b0, slot.index * STAGE_BYTES);
#pragma unroll
        for (int j = 0; j < WM; j++) wgmma_pin(acc[j]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BK / 16; k++)
#pragma unroll
            for (int j = 0; j < WM; j++)
                wgmma<width, 1, 1>(reinterpret_cast<float(&)[width / 2]>(acc[j]), desc_add(a, j * BOX_BYTES + k * 2048),
                                   desc_add(b, k * 2048), step > 0 || k > 0);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            ring_release<CLUSTER>(before);
        }
        before = slot.emptied();
        slot.next();
    }
    return before;
}

// Row and column in the tile of piece p.
DEV int piece_row(int p) { return p / (BN / PIECE) * 64; }
DEV int piece_col(int p) { return p % (BN / PIECE) * PIECE; }

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
sm90_weight(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
            const __grid_constant__ TensorMap map_c, const int* segments, float* parts, u32* counters,
            int experts, int m, int n, int cap) {
    // PARTS * CLUSTER flags follow; all are zero before and after every launch.
    u32 *taken = counters, *finished = counters + 1, *ready = counters + 2;
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    int *offsets = s.tables, *first = offsets + experts + 1, *order = first + experts + 1;
    Slot slot = {smem(s.ring), smem(s.full), smem(s.empty), 0, 0};
    int thread = threadIdx.x, group = thread / 128;
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0, known = smem(s.known);
    int mt = (m + CLUSTER * BM - 1) / (CLUSTER * BM), nt = (n + BN - 1) / BN;
    int narrow = BN > NARROW ? min((nt * BN - n) / 64, nt) : 0;

    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) {
            // Both loading warps arrive at every slot, also where one has nothing to load: else one might miss that a
            // slot was emptied, filled and emptied again, of which its parity tells nothing.
            mbar_init(slot.full + 8 * i, 2);
            mbar_init(slot.empty + 8 * i, 4 * CLUSTER);
        }
        for (int i = 0; i < KNOWN; i++) mbar_init(known + 8 * i, 1);
        mbar_init_fence();
        for (int i = 0; i < KNOWN; i++) expect_item(known + 8 * i);
    }
    if (thread == WARP) tma_prefetch(&map_a), tma_prefetch(&map_b), tma_prefetch(&map_c);
    wait_for_previous();
    bool leads = thread < WARP && rank == 0, one = elect_one();
    u32 next = 0;
    if (leads && one) next = take(taken);
    int begin = 0, size = 0;
    if (thread < experts) begin = segments[thread], size = segments[thread + 1] - begin;
    __syncwarp();
    meet_arrive();
    int chunk = chunk_steps(segments, experts, mt * nt);
    if (CLUSTER == 1) __syncthreads();
    meet_wait();
    if (leads && one) send(smem(s.item), next, known);
    plan(begin, size, chunk, offsets, first, order, experts, mt * nt);
    int total = first[experts];
    Schedule schedule = {offsets, first, order, mt, nt, narrow, chunk, 0};

    // The same in all lanes, as the compiler can tell: what follows from it stays in uniform registers. Loads of values
    // that might differ between lanes are issued by a loop over the lanes, which took most of a step.
    int warp = __shfl_sync(ALL_LANES, thread / WARP, 0), lane = thread % WARP;
    if (group == 0) {
        regs_down<40>();
        // One warp loads dy, one x; the first of the cluster also takes the items.
        if (warp < 2) {
            leads = warp == 0 && rank == 0;
            int source = __ffs(__ballot_sync(ALL_LANES, one)) - 1;
            for (int i = 0;; i++) {
                int entry = i % KNOWN;
                if (leads && one && i > 0) send(smem(s.item + entry), next, known + 8 * entry);
                if (warp == 0 && i >= KNOWN / 2) {
                    // The entry half a round ago was read by all; it counts the next number's bytes.
                    int old = i - KNOWN / 2;
                    mbar_wait(known + 8 * (old % KNOWN), old / KNOWN & 1);
                    if (one) expect_item(known + 8 * (old % KNOWN));
                }
                if (!leads) {
                    mbar_wait(known + 8 * entry, i / KNOWN & 1);
                    next = *(volatile u32*)(s.item + entry);
                }
                int t = __shfl_sync(ALL_LANES, next, source);
                if (t >= total) break;
                if (leads && one) next = take(taken);
                Item item = schedule.at(t);
                int row = item.row + rank * BM, window = cap - item.size, end = item.offset + item.size;
                // What the ring holds in place of boxes outside reaches only results that are not stored.
                int rows = min(m - row, BM), cols = min(n - item.col, item.width);
                bool any = item.size > 0;
                int boxes_a = any ? max(rows + 63, 0) / 64 : 0, boxes_b = any ? (cols + 63) / 64 : 0;
                u32 bytes = (boxes_a + boxes_b) * BOX_BYTES;
                int at = window + item.begin * BK;
                for (int step = 0; step < item.steps(); step++, at += BK) {
                    mbar_wait(slot.emptied(), slot.phase ^ 1);
                    u32 bar = slot.filled();
                    if (warp == 0) {
                        if (one) {
                            mbar_expect(bar, bytes);
#pragma unroll
                            for (int j = 0; j < A_BOXES; j++)
                                if (j < boxes_a)
                                    tma_load(slot.data() + j * BOX_BYTES, &map_a, bar, row + j * 64, at, end);
                        }
                    } else if (one) {
#pragma unroll
                        for (int j = 0; j < B_BOXES; j++) {
                            u32 to = slot.data() + (A_BOXES + j) * BOX_BYTES;
                            int col = item.col + j * 64;
                            if (CLUSTER == 1 && j < boxes_b) tma_load(to, &map_b, bar, col, at, end);
                            if (CLUSTER > 1 && j < boxes_b && (j + step) % CLUSTER == rank)
                                tma_load_to((1 << CLUSTER) - 1, to, &map_b, bar, col, at, end);
                        }
                        mbar_arrive(bar);
                    }
                    __syncwarp();
                    slot.next();
                }
                if (!item.last) continue;
                for (int c = 0; c < OLD_STAGES; c++) {
                    mbar_wait(slot.emptied(), slot.phase ^ 1);
                    if (warp == 0 && one) {
                        auto inside = [&](int p) { return p < PIECES && piece_row(p) < rows && piece_col(p) < cols; };
                        int count = 0;
                        for (int j = 0; j < OLD_PIECES; j++) count += inside(c * OLD_PIECES + j);
                        mbar_expect(slot.filled(), count * BOX_BYTES);
                        for (int j = 0; j < OLD_PIECES; j++) {
                            int p = c * OLD_PIECES + j;
                            if (!inside(p)) continue;
                            tma_load(slot.data() + j * BOX_BYTES, &map_c, slot.filled(), item.col + piece_col(p),
                                     row + piece_row(p), item.expert);
                        }
                    } else if (one) {
                        mbar_arrive(slot.filled());
                    }
                    __syncwarp();
                    slot.next();
                }
            }
            let_next_begin();
            // Nobody takes any more once all clusters have come here.
            if (leads && one && atomicAdd(finished, 1) == gridDim.x / CLUSTER - 1) {
                *finished = 0;
                *taken = 0;
            }
        }
        __syncwarp();
    } else {
        regs_up<232>();
        int w = warp / 4 - 1, own = thread % 128;
        warp %= 4;
        u32 staging = smem(s.out[w]);
        u64 a0 = desc_mn(slot.ring, BOX_BYTES), b0 = desc_mn(slot.ring + A_BOXES * BOX_BYTES, BOX_BYTES);
        float acc[WM][BN / 2];
        int buffer = 0;
        for (int i = 0;; i++) {
            mbar_wait(known + 8 * (i % KNOWN), i / KNOWN & 1);
            int t = __shfl_sync(ALL_LANES, *(volatile u32*)(s.item + i % KNOWN), 0);
            // The other warpgroup has seen the item before filled, to its last slot. Before that a slot might be two
            // rounds behind, which its parity does not tell from this one.
            if (i % 2 == w && i > 0) bar_sync(3 + w, 256);
            if (t >= total) break;
            Item item = schedule.at(t);
            int steps = item.steps();
            if (i % 2 != w) {
                slot.skip(steps + (item.last ? OLD_STAGES : 0));
                continue;
            }
            u32 before = BN == NARROW || item.width == BN ? products<BN>(acc, slot, a0, b0, steps)
                                                          : products<NARROW>(acc, slot, a0, b0, steps);
            if (OLD_STAGES == 0) bar_arrive(3 + (w ^ 1), 256);
            wgmma_wait<0>();
#pragma unroll
            for (int j = 0; j < WM; j++) wgmma_pin(acc[j]);
            ring_release<CLUSTER>(before);
            if (!ADD && item.size == 0) {
#pragma unroll
                for (int j = 0; j < WM * BN / 2; j++) acc[0][j] = 0;
            }

            if (OLD_STAGES > 0 && !item.last) bar_arrive(3 + (w ^ 1), 256);
            if (!item.last) {
                float4* to = reinterpret_cast<float4*>(parts + i64(item.part * CLUSTER + rank) * TILE) + own;
#pragma unroll
                for (int j = 0; j < WM * BN / 8; j++) {
                    const float* x = acc[0] + 4 * j;
                    __stcg(to + j * 128, make_float4(x[0], x[1], x[2], x[3]));
                }
                __threadfence();
                bar_sync(1 + w, 128);
                if (own == 0) write_released(ready + item.part * CLUSTER + rank, 1);
                continue;
            }
#pragma unroll
            for (int c = 0; c < OLD_STAGES; c++) {
                mbar_wait(slot.filled(), slot.phase);
                u32 lines = slot.data() + warp * 2048;
#pragma unroll
                for (int j = 0; j < OLD_PIECES; j++)
                    if (c * OLD_PIECES + j < PIECES)
                        FloatPiece{lines + j * BOX_BYTES, lane}.add_to(acc[0] + (c * OLD_PIECES + j) * 16);
                fence_async();
                __syncwarp();
                ring_release<CLUSTER>(slot.emptied());
                slot.next();
            }
            if (OLD_STAGES > 0) bar_arrive(3 + (w ^ 1), 256);
            for (int q = item.parts; q > 0; q--) {
                int part = (item.part - q * item.tiles) * CLUSTER + rank;
                if (own == 0) {
                    while (read_acquired(ready + part) == 0) {
                    }
                    ready[part] = 0;
                }
                bar_sync(1 + w, 128);
                const float4* from = reinterpret_cast<const float4*>(parts + i64(part) * TILE) + own;
#pragma unroll
                for (int j = 0; j < WM * BN / 8; j += DEEP) {
                    float4 v[DEEP];
#pragma unroll
                    for (int i = 0; i < DEEP; i++) v[i] = read(from + (j + i) * 128);
#pragma unroll
                    for (int i = 0; i < DEEP; i++) {
                        float* x = acc[0] + 4 * (j + i);
                        x[0] += v[i].x, x[1] += v[i].y, x[2] += v[i].z, x[3] += v[i].w;
                    }
                }
            }

            int row = item.row + rank * BM, rows = m - row, cols = min(n - item.col, item.width);
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                if (piece_col(p) >= NARROW && piece_col(p) >= cols) continue;
                u32 from = staging + buffer * BOX_BYTES;
                if (own == 0) tma_wait_read<BUFFERS - 1>();
                bar_sync(1 + w, 128);
                FloatPiece{from + warp * 2048, lane}.put(acc[0] + p * 16);
                fence_async();
                bar_sync(1 + w, 128);
                if (own == 0) {
                    if (piece_row(p) < rows && piece_col(p) < cols)
                        store_piece(&map_c, from, item.col + piece_col(p), row + piece_row(p), item.expert);
                    // A group for every piece, that those under way can be counted.
                    tma_commit();
                }
                if (++buffer == BUFFERS) buffer = 0;
            }
        }
        if (own == 0) tma_wait_read<0>();
        __syncwarp();
    }
    // No block leaves while another may still signal its barriers.
    meet_arrive();
    meet_wait();
}
