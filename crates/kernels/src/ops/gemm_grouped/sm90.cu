// Hopper matrix product, BF16 in, f32 sums: C (+)= op(A) op(B), over one product or one per expert. One block per SM
// stays and walks the tiles of all experts; what each expert has is read from `offsets` in device memory. A warpgroup
// loads (one warp of it issues TMA into a ring of STAGES, and says with which slot which tile begins), the others
// multiply (wgmma) and write the results through shared memory: those that are only rounded by plain stores, which a
// warp makes on its own, else by TMA.
//
// Each element of C is one chain of additions over k, 16 at a time in ascending order, whatever the tile: its bits do
// not depend on the tile shape, on the other rows or on the schedule.
//
// Compile-time: TA, TB (A stored [k, m], B stored [k, n]), OUT (float or bf16), ADD (C += product; the old C comes
// through the ring, after the operands), GROUPED, tile BM x BN, STAGES, BUFFERS (pieces of C that a warpgroup has under
// way), CLUSTER (blocks that share the loads of B), BAND (tiles of m walked together, for reuse in L2). Rows of all
// operands are multiples of 16 bytes.
//
// Blocks of a cluster take their tiles in turns. Single blocks take the next tile when they are free, by `counter`, a
// word in device memory that is 0 before and after: with few rows for each expert tiles take unequal times.
//
// Operands with rows per expert ("segments": A and C; where TA is, which is for one matrix, B) come as three-dimensional
// maps of a window: coordinate (col, cap - size + row, offset + size), base moved down by cap rows, strides of both outer
// dimensions one row. A row past the segment's end has second coordinate >= cap: outside the map, so that loads give
// zeros and stores skip it, without a descriptor per expert. Stacked weights are (col, row, expert). For a box wholly
// outside, the engine may look at the map's base, where a window has no memory: such boxes are never asked for.

static const int BK = 64;  // one 128-byte swizzled line of bf16
static const int GROUPS = BM * BN <= 4096 ? 1 : 2;                 // warpgroups that multiply
static const int THREADS = 128 * (1 + GROUPS);
static const int WN = BM == 64 ? BN / GROUPS : BN;                 // columns of one: 64-row tiles are split by columns
static const int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
// Rows (or m, n) of a TMA box; single blocks leave out the second half of A where an expert has no more rows.
static_assert(!(GROUPED && TA), "experts' weight gradients are sm90_weight.cu's");
static const int A_BOX = TA || CLUSTER == 1 ? 64 : BM, B_BOX = TB ? 64 : BN / 2;
static const int A_BOXES = BM / A_BOX, B_BOXES = BN / B_BOX;
static const int PIECE_BYTES = 8192;                               // 64 rows, 128 bytes wide, of C
static const int PIECE = 128 / sizeof(OUT), PIECES = WN / PIECE;   // its columns; how many a warpgroup has
static const int OLD_PIECES = STAGE_BYTES / PIECE_BYTES;           // of C in a stage
static const int OLD_STAGES = ADD ? (GROUPS * PIECES + OLD_PIECES - 1) / OLD_PIECES : 0;
static const bool PLAIN = !TA && !ADD && sizeof(OUT) == 2;         // plain stores
static const int KNOWN = 4;                                        // offsets that a lane asks for at the start
static const int LATE = 2;                                         // steps before a tile's end when the next is taken
static const int EARLY_BYTES = 32768;                              // of B that a block brings into L2 before all else

struct Tile {
    int expert, row, col, offset, size, rows;  // `rows` of it exist, the tile's last ones may not
    bool live;

    // What the first lane has, in all lanes, as the compiler can tell.
    DEV Tile told() const {
        auto x = [](int y) { return __shfl_sync(ALL_LANES, y, 0); };
        return {x(expert), x(row), x(col), x(offset), x(size), x(rows), x(live) != 0};
    }
};

struct Shared {
    u8 ring[STAGES][STAGE_BYTES];
    u8 out[GROUPS][BUFFERS][PIECE_BYTES];
    u64 full[STAGES], empty[STAGES];
    Tile tiles[STAGES];  // the one that begins with a slot; of size 0 behind the last
    int tables[2];       // offsets[experts + 1], then starts[experts] and order[experts] of the schedule
};

// x / d, rounded down, for quotients below 2^22 of numbers that are not negative.
DEV int divide(int x, int d) {
    int q = int(__fdividef(float(x), float(d))), rest = x - q * d;
    return q + (rest >= d) - (rest < 0);
}

// The experts that have rows, in two lists, one behind the other: first those with several tiles of rows ("long"), with
// the number of tiles before each; then those with one, the ones with at most half its rows last. Multiplying bounds
// the former, whose weights serve several tiles; the latter are bound by memory. So tiles of both lists are walked side
// by side, in proportion, and the shortest last. Units are what a cluster takes at once, CLUSTER tiles.
struct Schedule {
    int *offsets, *starts;
    u16* order;
    int m, n, experts, longs, shorts;  // experts of either list
    int heads, tails, total, last;     // units of either list, of both, of the shortest ones that come last
    u32 share;                         // of the tails, in 2^-32

    DEV int kind(int e) const {
        int size = e < experts ? offsets[e + 1] - offsets[e] : 0;
        return size == 0 ? 3 : TA || size > BM ? 0 : size > BM / 2 ? 1 : 2;
    }

    // By one warp, which has written the offsets. With TA the tiles of an expert fill whole clusters, whose blocks must
    // make steps of equal number.
    DEV void count(int units) {
        int lane = threadIdx.x, nt = (n + BN - 1) / BN, before = 0, count[3] = {0, 0, 0};
        for (int e = lane; e - lane < experts; e += WARP) {
            int of = kind(e);
#pragma unroll
            for (int i = 0; i < 3; i++) count[i] += __popc(__ballot_sync(ALL_LANES, of == i));
        }
        int place[3] = {0, count[0], count[0] + count[1]};
        for (int e = lane; e - lane < experts; e += WARP) {
            int of = kind(e), at = 0;
#pragma unroll
            for (int i = 0; i < 3; i++) {
                u32 mask = __ballot_sync(ALL_LANES, of == i);
                if (of == i) at = place[i] + __popc(mask & (1u << lane) - 1);
                place[i] += __popc(mask);
            }
            if (of < 3) order[at] = e;
            if (!__any_sync(ALL_LANES, of == 0)) continue;
            int tiles = of == 0 ? ((TA ? m : offsets[e + 1] - offsets[e]) + BM - 1) / BM * nt : 0;
            if (TA) tiles = (tiles + CLUSTER - 1) / CLUSTER * CLUSTER;
            int sum = tiles;
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                int left = __shfl_up_sync(ALL_LANES, sum, d);
                if (lane >= d) sum += left;
            }
            if (of == 0) starts[at] = before + sum - tiles;
            before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
        longs = count[0], shorts = count[1] + count[2];
        heads = (before + CLUSTER - 1) / CLUSTER, tails = (shorts * nt + CLUSTER - 1) / CLUSTER, total = heads + tails;
        last = min(units, count[2] * nt / CLUSTER);
        share = u32(float(tails - last) / float(max(total - last, 1)) * 4294967040.f);
        __syncwarp();
    }

    // Tails among the first `unit` units, but for the last ones.
    DEV int tails_before(int unit) const { return min(max(int(__umulhi(unit, share)), unit - heads), tails - last); }

    // Which tile of which list unit `unit` begins with.
    DEV int first(int unit, bool& tail) const {
        int before = tails_before(unit), behind = total - unit;
        tail = behind <= last || tails_before(unit + 1) > before;
        return (behind <= last ? tails - behind : tail ? before : unit - before) * CLUSTER;
    }

    DEV Tile at(bool tail, int t) const {
        int nt = (n + BN - 1) / BN, mt = 1, low = 0, local;
        if (tail) {
            low = min(t / nt, shorts - 1), local = t - low * nt, low += longs;
        } else {
            int high = longs;
            while (high - low > 1) {
                int mid = (low + high) / 2;
                if (starts[mid] <= t) low = mid;
                else high = mid;
            }
            local = t - starts[low];
        }
        int expert = order[low], offset = offsets[expert], size = offsets[expert + 1] - offset;
        if (!tail) mt = ((TA ? m : size) + BM - 1) / BM;
        // A tile past the last only keeps its partner company: it repeats the tile before.
        bool live = local < mt * nt;
        if (!live) local--;
        int band = local / (BAND * nt), inside = local - band * BAND * nt, height = min(BAND, mt - band * BAND);
        int col = inside / height;
        int row = (band * BAND + inside - col * height) * BM;
        return {expert, row, col * BN, offset, size, min((TA ? m : size) - row, BM), live};
    }
};

// Where no block has more than one tile: this block's, without tables. By one warp, a lane of which knows the offset of
// an expert (`known[0]`; the first lane also that behind the last expert of 32). Tiles have 64 rows if there are blocks
// enough for that. Returns the number of all tiles; 0 where there are none, or more than blocks.
DEV int one_each(const int (&known)[KNOWN], int experts, int n, Tile& tile) {
    if (!GROUPED || CLUSTER > 1 || experts > WARP) return 0;
    int lane = threadIdx.x, nt = (n + BN - 1) / BN, room = divide(gridDim.x, nt), height = BM;
    int right = __shfl_down_sync(ALL_LANES, known[0], 1), last = __shfl_sync(ALL_LANES, known[1], 0);
    int size = lane < experts ? (lane == WARP - 1 ? last : right) - known[0] : 0;
    int tiles = (size + BM - 1) / BM, halves = (size + 63) / 64;
    bool half = BM > 64 && __reduce_add_sync(ALL_LANES, halves) <= room;
    if (half) height = 64, tiles = halves;
    int sum = tiles;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        int left = __shfl_up_sync(ALL_LANES, sum, d);
        if (lane >= d) sum += left;
    }
    int all = __shfl_sync(ALL_LANES, sum, WARP - 1);
    if (all > room) return 0;
    int block = blockIdx.x, expert = __popc(__ballot_sync(ALL_LANES, sum * nt <= block)) % WARP;
    auto of = [&](int x) { return __shfl_sync(ALL_LANES, x, expert); };
    // An expert's tiles row by row if they are low, else column by column, which is what was faster.
    int local = max(block - of(sum - tiles) * nt, 0), mt = max(of(tiles), 1);
    int major = divide(local, half ? nt : mt), minor = local - major * (half ? nt : mt);
    int row = (half ? major : minor) * height, col = (half ? minor : major) * BN, rows = of(size);
    tile = {expert, row, col, of(known[0]), rows, min(rows - row, height), true};
    return all * nt;
}

typedef RingSlot<STAGES, STAGE_BYTES> Slot;

// A piece of C in shared memory, of which a thread has x (`wgmma`'s layout); `lines` are its warp's 16 rows.
struct Piece : FloatPiece {
    DEV void put(const float* x, float) const { FloatPiece::put(x); }
    DEV void add_to(float* x, float) const { FloatPiece::add_to(x); }
    DEV void put(const float* x, bf16) const {
        int line = lane % 16;
#pragma unroll
        for (int j = 0; j < 4; j++)
            stmatrix4(lines + line * 128 + ((2 * j + lane / 16 ^ line & 7) << 4), narrow2(x[8 * j], x[8 * j + 1]),
                      narrow2(x[8 * j + 2], x[8 * j + 3]), narrow2(x[8 * j + 4], x[8 * j + 5]),
                      narrow2(x[8 * j + 6], x[8 * j + 7]));
    }
    DEV void add_to(float* x, bf16) const {
        int line = lane / 4;
#pragma unroll
        for (int q = 0; q < 16; q++) {
            u32 pair, at = lines + line * 128 + q % 2 * 1024 + (q / 2 << 4 ^ line << 4) + lane % 4 * 4;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));
            x[2 * q] += lower(pair), x[2 * q + 1] += upper(pair);
        }
    }
};

// Eight results, 16 bytes.
DEV uint4 load_line(u32 at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
// The counter before this step up; after `top` it goes back to 0.
DEV int counter_next(u32* counter, int top) {
    u32 was;
    asm volatile("atom.global.inc.u32 %0, [%1], %2;" : "=r"(was) : "l"(counter), "r"(top) : "memory");
    return was;
}

// Row and column in the tile of piece p of warpgroup w.
DEV int piece_row(int w) { return BM == 64 ? 0 : w * 64; }
DEV int piece_col(int p, int w) { return (BM == 64 ? w * WN : 0) + p * PIECE; }

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
sm90_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
          const __grid_constant__ TensorMap map_c, const int* segments, u32* counter, bf16* out, i64 ldc, int experts,
          int m, int n, int k, int cap) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    int* starts = s.tables + experts + 1;
    Slot slot = {smem(s.ring), smem(s.full), smem(s.empty), 0, 0};
    int thread = threadIdx.x, group = thread / 128;
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

    wait_for_previous();
    // Asked for first, as all loads wait for it.
    int known[KNOWN] = {};
    if (thread < WARP) {
#pragma unroll
        for (int i = 0; i < KNOWN; i++) {
            int e = thread + i * WARP;
            if (e <= experts) known[i] = GROUPED ? segments[e] : e * cap;
        }
    }
    if (thread == THREADS - WARP) {
        tma_prefetch(&map_a), tma_prefetch(&map_b);
        if (!PLAIN) tma_prefetch(&map_c);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(slot.full + 8 * i, 1);
            mbar_init(slot.empty + 8 * i, 4 * GROUPS * CLUSTER);
        }
        mbar_init_fence();
        // Where the blocks have a tile or two each, what the experts' tiles begin with is brought into L2 meanwhile.
        int nt = (n + BN - 1) / BN, e = blockIdx.x / nt, col = (blockIdx.x - e * nt) * BN;
        if (GROUPED && CLUSTER == 1 && e < experts && experts * nt <= 2 * gridDim.x)
            for (int at = 0; at < EARLY_BYTES / (BN * 2); at += BK)
                for (int i = 0; i < BN; i += B_BOX) tma_ahead(&map_b, TB ? col + i : at, TB ? at : col + i, e);
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    if (group == 0) {
        regs_down<56>();
        Schedule schedule = {s.tables, starts, reinterpret_cast<u16*>(starts + experts), m, n, experts};
        int units = gridDim.x / CLUSTER;
        if (thread < WARP) {
            Tile only;
            int few = one_each(known, experts, n, only);
            if (!few) {
#pragma unroll
                for (int i = 0; i < KNOWN; i++)
                    if (thread + i * WARP <= experts) s.tables[thread + i * WARP] = known[i];
                for (int e = thread + KNOWN * WARP; e <= experts; e += WARP) s.tables[e] = segments[e];
                __syncwarp();
                schedule.count(units);
            }
            // The whole warp goes through the tiles and one lane issues. What the compiler knows to be the same in all
            // lanes is in uniform registers, which TMA takes its operands from; else it loops over the lanes.
            auto same = [](int x) { return __shfl_sync(ALL_LANES, x, 0); };
            bool one = elect_one();
            int next, total = same(few ? few : schedule.total);
            for (int unit = blockIdx.x / CLUSTER; unit < total; unit = next) {
                next = unit + units;
                bool tail = false;
                int t = few ? 0 : schedule.first(unit, tail);
                Tile tile = few ? only : schedule.at(tail, t), own = tile;
                // Blocks of a cluster whose tiles have the same expert and columns load a half of B each, for both.
                bool together = false;
                if (CLUSTER > 1) {
                    Tile other = schedule.at(tail, t + 1);
                    together = other.live && other.expert == tile.expert && other.col == tile.col;
                    together = same(together);
                    if (rank) own = other;
                }
                own = own.told();
                int depth = TA ? own.size : k, window = cap - own.size, end = own.offset + own.size;
                int rows = own.rows, cols = n - own.col;
                // What the ring holds in place of boxes outside reaches only results that are not stored.
                int boxes_a = (rows + A_BOX - 1) / A_BOX, boxes_b = (min(cols, BN) + B_BOX - 1) / B_BOX;
                u32 bytes = (boxes_a * A_BOX + boxes_b * B_BOX) * 128;
                bool whole = boxes_a == A_BOXES && boxes_b == B_BOXES;
                int late = max((depth + BK - 1) / BK - LATE, 0) * BK;
                auto load = [&](int at, bool whole) {
                    u32 bar = slot.filled();
#pragma unroll
                    for (int i = 0; i < A_BOXES; i++) {
                        if (!whole && i >= boxes_a) break;
                        u32 a = slot.data() + i * A_BOX * 128;
                        int row = own.row + i * A_BOX;
                        if (TA) tma_load(a, &map_a, bar, row, window + at, end);
                        else tma_load(a, &map_a, bar, at, window + row, end);
                    }
#pragma unroll
                    for (int i = 0; i < B_BOXES; i++) {
                        if (!whole && i >= boxes_b) break;
                        if (together && i % 2 != rank) continue;
                        u32 b = slot.data() + A_BYTES + i * B_BOX * 128;
                        int col = own.col + i * B_BOX;
                        int x = TB ? col : at, y = !TB ? col : TA ? window + at : at, z = TB && TA ? end : own.expert;
                        if (together) tma_load_to(3, b, &map_b, bar, x, y, z);
                        else tma_load(b, &map_b, bar, x, y, z);
                    }
                };
                mbar_wait(slot.emptied(), slot.phase ^ 1);
                if (one) s.tiles[slot.index] = own;
                for (int at = 0; at < depth; at += BK) {
                    mbar_wait(slot.emptied(), slot.phase ^ 1);
                    if (one) {
                        mbar_expect(slot.filled(), bytes);
                        if (whole) load(at, true);
                        else load(at, false);
                    }
                    __syncwarp();
                    slot.next();
                    // As late as hides the way to memory, so that who is ahead takes more. Each unit asks once, which
                    // takes the counter round to 0.
                    if (CLUSTER == 1 && total > units && at == late && thread == 0)
                        next = units + counter_next(counter, total - 1);
                }
                for (int c = 0; c < OLD_STAGES; c++) {
                    mbar_wait(slot.emptied(), slot.phase ^ 1);
                    // The warpgroups' pieces alternate.
                    auto place = [&](int j, int& row, int& col) {
                        int q = c * OLD_PIECES + j, p = q / GROUPS, w = q % GROUPS;
                        row = piece_row(w), col = piece_col(p, w);
                        return own.live && p < PIECES && row < rows && col < cols;
                    };
                    int row, col, pieces = 0;
                    for (int j = 0; j < OLD_PIECES; j++) pieces += place(j, row, col);
                    if (one) mbar_expect(slot.filled(), pieces * PIECE_BYTES);
                    for (int j = 0; j < OLD_PIECES; j++) {
                        if (!one || !place(j, row, col)) continue;
                        int y = own.row + row + (TA ? 0 : window), z = TA ? own.expert : end;
                        tma_load(slot.data() + j * PIECE_BYTES, &map_c, slot.filled(), own.col + col, y, z);
                    }
                    __syncwarp();
                    slot.next();
                }
                next = same(next);
            }
            mbar_wait(slot.emptied(), slot.phase ^ 1);
            if (one) {
                s.tiles[slot.index].size = 0;
                mbar_arrive(slot.filled());
            }
        }
        __syncwarp();
    } else {
        regs_up<224>();
        int w = group - 1, lane = thread % WARP, warp = thread / WARP % 4;
        u32 staging = smem(s.out[w]);
        u32 at_a = slot.ring + piece_row(w) * 128, at_b = slot.ring + A_BYTES + piece_col(0, w) * 128;
        u64 a0 = TA ? desc_mn(at_a, BK * 128) : desc_k(at_a), b0 = TB ? desc_mn(at_b, BK * 128) : desc_k(at_b);
        float acc[WN / 2];
        int buffer = 0;
        while (true) {
            mbar_wait(slot.filled(), slot.phase);
            // Read by the lane that releases the slot, so that no other is late.
            Tile tile = {};
            if (lane == 0) tile = s.tiles[slot.index];
            tile = tile.told();
            if (tile.size == 0) break;
            int depth = TA ? tile.size : k, rows = tile.rows;
            u32 before = 0;
            // Nothing to multiply for a warpgroup without rows.
            bool idle = piece_row(w) >= rows;
            for (int at = 0; idle && at < depth; at += BK) {
                mbar_wait(slot.filled(), slot.phase);
                ring_release<CLUSTER>(slot.emptied());
                slot.next();
            }
            for (int at = 0; !idle && at < depth; at += BK) {
                mbar_wait(slot.filled(), slot.phase);
                u64 a = desc_add(a0, slot.index * STAGE_BYTES), b = desc_add(b0, slot.index * STAGE_BYTES);
                wgmma_pin(acc);
                wgmma_fence();
#pragma unroll
                for (int j = 0; j < BK / 16; j++)
                    wgmma<WN, TA, TB>(acc, desc_add(a, j * (TA ? 2048 : 32)), desc_add(b, j * (TB ? 2048 : 32)),
                                      at > 0 || j > 0);
                wgmma_commit();
                if (at > 0) {
                    wgmma_wait<1>();
                    ring_release<CLUSTER>(before);
                }
                before = slot.emptied();
                slot.next();
            }
            wgmma_wait<0>();
            wgmma_pin(acc);
            if (!idle) ring_release<CLUSTER>(before);

#pragma unroll
            for (int c = 0; c < OLD_STAGES; c++) {
                mbar_wait(slot.filled(), slot.phase);
                u32 lines = slot.data() + warp * 2048;
#pragma unroll
                for (int p = 0; p < PIECES; p++) {
                    int place = GROUPS * p + w - c * OLD_PIECES;
                    if (place < 0 || place >= OLD_PIECES) continue;
                    Piece{lines + place * PIECE_BYTES, lane}.add_to(acc + p * PIECE / 2, OUT());
                }
                fence_async();
                __syncwarp();
                ring_release<CLUSTER>(slot.emptied());
                slot.next();
            }
            if (!tile.live || idle) continue;

            if constexpr (PLAIN) {
                // A warp's own 16 rows, as many pieces at once as there are buffers for: it waits for nobody, and all
                // loads are under way before the first store needs one.
                static_assert(PIECES % BUFFERS == 0, "pieces leave in groups");
#pragma unroll
                for (int p = 0; p < PIECES; p += BUFFERS) {
                    uint4 x[BUFFERS][4];
                    u32 lines = staging + warp * 2048;
                    __syncwarp();
#pragma unroll
                    for (int q = 0; q < BUFFERS; q++)
                        Piece{lines + q * PIECE_BYTES, lane}.put(acc + (p + q) * PIECE / 2, OUT());
                    __syncwarp();
#pragma unroll
                    for (int q = 0; q < BUFFERS; q++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int line = lane / 8 + 4 * i;
                            x[q][i] = load_line(lines + q * PIECE_BYTES + line * 128 + (lane % 8 ^ line & 7) * 16);
                        }
                    int row = piece_row(w) + warp * 16 + lane / 8;
                    bf16* to = out + (tile.offset + tile.row + row) * ldc;
#pragma unroll
                    for (int q = 0; q < BUFFERS; q++) {
                        int col = tile.col + piece_col(p + q, w) + lane % 8 * 8;
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (row + 4 * i < rows) {
                                bf16* at = to + 4 * i * ldc;
                                if (col + 8 <= n) *reinterpret_cast<uint4*>(at + col) = x[q][i];
                            }
                    }
                }
            } else {
#pragma unroll
                for (int p = 0; p < PIECES; p++) {
                    u32 from = staging + buffer * PIECE_BYTES;
                    if (thread % 128 == 0) tma_wait_read<BUFFERS - 1>();
                    bar_sync(1 + w, 128);
                    Piece{from + warp * 2048, lane}.put(acc + p * PIECE / 2, OUT());
                    fence_async();
                    bar_sync(1 + w, 128);
                    if (thread % 128 == 0) {
                        int row = piece_row(w), col = tile.col + piece_col(p, w);
                        int y = tile.row + row + (TA ? 0 : cap - tile.size);
                        int z = TA ? tile.expert : tile.offset + tile.size;
                        if (col < n) tma_store(&map_c, from, col, y, z);
                        // A group for every piece, that those under way can be counted.
                        tma_commit();
                    }
                    buffer = (buffer + 1) % BUFFERS;
                }
            }
        }
        if (thread % 128 == 0) tma_wait_read<0>();
        __syncwarp();
    }
    // No block leaves while another may still signal its barriers.
    if (CLUSTER > 1) cluster_sync();
}
