// Hopper matrix product, BF16 in, f32 sums: C (+)= op(A) op(B), over one product or one per expert. One block per SM
// stays and walks the tiles of all experts; what each expert has is read from `offsets` in device memory. A warpgroup
// loads (one thread of it issues TMA into a ring of STAGES), the others multiply (wgmma) and write the results through
// shared memory, again by TMA.
//
// Each element of C is one chain of additions over k, 16 at a time in ascending order, whatever the tile: its bits do
// not depend on the tile shape, on the other rows or on the schedule.
//
// Compile-time: TA, TB (A stored [k, m], B stored [k, n]), OUT (float or bf16), ADD (C += product; the old C comes
// through the ring, after the operands), GROUPED, tile BM x BN, STAGES, CLUSTER (blocks that share the loads of B), BAND
// (tiles of m walked together, for reuse in L2).
//
// Operands with rows per expert ("segments": A, C and, if TA, B) come as three-dimensional maps of a window: coordinate
// (col, cap - size + row, offset + size), base moved down by cap rows, strides of both outer dimensions one row. A row
// past the segment's end has second coordinate >= cap: outside the map, so that loads give zeros and stores skip it,
// without a descriptor per expert. Stacked weights are (col, row, expert). For a box wholly outside, the engine may look
// at the map's base, where a window has no memory: such boxes are never asked for.

static const int BK = 64;  // one 128-byte swizzled line of bf16
static const int GROUPS = BM * BN <= 4096 ? 1 : 2;                 // warpgroups that multiply
static const int THREADS = 128 * (1 + GROUPS);
static const int WM = BM == 256 ? 2 : 1;                           // m64 blocks of one of them
static const int WN = BM == 64 ? BN / GROUPS : BN;                 // its columns: 64-row tiles are split by columns
static const int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
static const int A_BOX = TA ? 64 : BM == 256 ? 128 : BM, B_BOX = TB ? 64 : BN / 2;  // rows (or m, n) a TMA box has
static const int A_BOXES = BM / A_BOX, B_BOXES = BN / B_BOX;
static const int PIECE_BYTES = 8192;                               // 64 rows, 128 bytes wide, of C
static const int PIECE = 128 / sizeof(OUT), PIECES = WM * WN / PIECE;  // its columns; how many a warpgroup has
static const int OLD_PIECES = STAGE_BYTES / PIECE_BYTES;           // of C in a stage
static const int OLD_STAGES = ADD ? (GROUPS * PIECES + OLD_PIECES - 1) / OLD_PIECES : 0;

struct Shared {
    u8 ring[STAGES][STAGE_BYTES];
    u8 out[GROUPS][2][PIECE_BYTES];
    u64 full[STAGES], empty[STAGES];
    int tables[2];  // offsets[experts + 1], then the first tile of each expert [experts + 1]
};

struct Tile {
    int expert, row, col, offset, size;
    bool live;
};

struct Schedule {
    const int *offsets, *first;
    int experts, m, n, expert;

    // Tile `t`; calls come with ascending t. A tile past the last (of the expert, where the pair must stay within one)
    // only keeps its partner company: it repeats the tile before.
    DEV Tile at(int t) {
        bool live = t < first[experts];
        if (!live) t--;
        while (t >= first[expert + 1]) expert++;
        int offset = offsets[expert], size = offsets[expert + 1] - offset;
        int local = t - first[expert], mt = ((TA ? m : size) + BM - 1) / BM, nt = (n + BN - 1) / BN;
        if (local >= mt * nt) live = false, local--;
        int band = local / (BAND * nt), inside = local - band * BAND * nt, height = min(BAND, mt - band * BAND);
        int col = inside / height;
        return {expert, (band * BAND + inside - col * height) * BM, col * BN, offset, size, live};
    }
};

// Tells the experts' first tiles from their offsets; by one warp. With TA the tiles of an expert fill whole clusters,
// whose blocks must make steps of equal number.
DEV void count_tiles(const int* offsets, int* first, int experts, int m, int n) {
    int lane = threadIdx.x, before = 0, nt = (n + BN - 1) / BN;
    for (int e = lane; e - lane < experts; e += WARP) {
        int tiles = 0;
        if (e < experts) {
            int size = offsets[e + 1] - offsets[e];
            if (TA) tiles = size > 0 ? ((m + BM - 1) / BM * nt + CLUSTER - 1) / CLUSTER * CLUSTER : 0;
            else tiles = (size + BM - 1) / BM * nt;
        }
        int sum = tiles;
        for (int d = 1; d < WARP; d *= 2) {
            int left = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d) sum += left;
        }
        if (e < experts) first[e + 1] = before + sum;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (lane == 0) first[0] = 0;
}

// A place in the ring, with the parity of its round.
struct Slot {
    u32 ring, full, empty;
    int index;
    u32 phase;

    DEV u32 data() const { return ring + index * STAGE_BYTES; }
    DEV u32 filled() const { return full + 8 * index; }
    DEV u32 emptied() const { return empty + 8 * index; }
    DEV void next() {
        if (++index == STAGES) index = 0, phase ^= 1;
    }
};

// By one lane of each warp that multiplies (a lane for each block of the cluster): it has read the slot.
DEV void release(u32 barrier) {
    int lane = threadIdx.x % WARP;
    if (CLUSTER == 1 && lane == 0) mbar_arrive(barrier);
    if (CLUSTER > 1 && lane < CLUSTER) mbar_arrive_at(barrier, lane);
}

DEV void store_pair(u32 at, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}

// A piece of C in shared memory, of which a thread has x (`wgmma`'s layout); `lines` are its warp's 16 rows. Of f32, the
// lanes of odd rows take the blocks of 8 columns in another order than those of even rows: otherwise rows 0 and 1, which
// the swizzle leaves within the same 32 bytes, would meet in the same banks.
struct Piece {
    u32 lines;
    int lane;

    // Where columns 2 t and 2 t + 1 of block c (c ^ 2 in odd rows) are, 8 h rows down.
    DEV u32 at(int c, int h) const {
        int line = lane / 4;
        return lines + line * 128 + h * 1024 + (c * 32 + lane % 4 * 8 ^ line << 4 ^ (line & 1) << 6);
    }
    DEV void put(const float* x, float) const {
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
    DEV void add_to(float* x, float) const {
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

// Row and column in the tile of piece p of warpgroup w.
DEV int piece_row(int p, int w) { return (BM == 64 ? 0 : w * WM * 64) + p / (PIECES / WM) * 64; }
DEV int piece_col(int p, int w) { return (BM == 64 ? w * WN : 0) + p % (PIECES / WM) * PIECE; }

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
sm90_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
          const __grid_constant__ TensorMap map_c, const int* segments, int experts, int m, int n, int k, int cap) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    int* offsets = s.tables;
    int* first = s.tables + experts + 1;
    Slot slot = {smem(s.ring), smem(s.full), smem(s.empty), 0, 0};
    int thread = threadIdx.x, group = thread / 128;
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

    if (thread == 0) {
        tma_prefetch(&map_a), tma_prefetch(&map_b), tma_prefetch(&map_c);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(slot.full + 8 * i, 1);
            mbar_init(slot.empty + 8 * i, 4 * GROUPS * CLUSTER);
        }
        mbar_init_fence();
    }
    for (int e = thread; e <= experts; e += THREADS) offsets[e] = GROUPED ? segments[e] : e * cap;
    __syncthreads();
    if (thread < WARP) count_tiles(offsets, first, experts, m, n);
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    Schedule schedule = {offsets, first, experts, m, n, 0};
    int total = first[experts], begin = blockIdx.x - rank;

    if (group == 0) {
        regs_down<40>();
        if (thread == 0) {
            for (int t = begin; t < total; t += gridDim.x) {
                Tile tile = schedule.at(t), own = tile;
                // Blocks of a cluster whose tiles have the same expert and columns load a half of B each, for both.
                bool together = false;
                if (CLUSTER > 1) {
                    Tile next = schedule.at(t + 1);
                    together = next.live && next.expert == tile.expert && next.col == tile.col;
                    if (rank) own = next;
                }
                int depth = TA ? own.size : k, window = cap - own.size, end = own.offset + own.size;
                int rows = (TA ? m : own.size) - own.row, cols = n - own.col;
                // What the ring holds in place of boxes outside reaches only results that are not stored.
                int boxes_a = (min(rows, BM) + A_BOX - 1) / A_BOX, boxes_b = (min(cols, BN) + B_BOX - 1) / B_BOX;
                u32 bytes = (boxes_a * A_BOX + boxes_b * B_BOX) * 128;
                bool whole = boxes_a == A_BOXES && boxes_b == B_BOXES;
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
                for (int at = 0; at < depth; at += BK) {
                    mbar_wait(slot.emptied(), slot.phase ^ 1);
                    mbar_expect(slot.filled(), bytes);
                    if (whole) load(at, true);
                    else load(at, false);
                    slot.next();
                }
                for (int c = 0; c < OLD_STAGES; c++) {
                    mbar_wait(slot.emptied(), slot.phase ^ 1);
                    // The warpgroups' pieces alternate.
                    auto place = [&](int j, int& row, int& col) {
                        int q = c * OLD_PIECES + j, p = q / GROUPS, w = q % GROUPS;
                        row = piece_row(p, w), col = piece_col(p, w);
                        return own.live && p < PIECES && row < rows && col < cols;
                    };
                    int row, col, pieces = 0;
                    for (int j = 0; j < OLD_PIECES; j++) pieces += place(j, row, col);
                    mbar_expect(slot.filled(), pieces * PIECE_BYTES);
                    for (int j = 0; j < OLD_PIECES; j++) {
                        if (!place(j, row, col)) continue;
                        int y = own.row + row + (TA ? 0 : window), z = TA ? own.expert : end;
                        tma_load(slot.data() + j * PIECE_BYTES, &map_c, slot.filled(), own.col + col, y, z);
                    }
                    slot.next();
                }
            }
        }
        __syncwarp();
    } else {
        regs_up<232>();
        int w = group - 1, lane = thread % WARP, warp = thread / WARP % 4;
        u32 staging = smem(s.out[w]);
        u32 at_a = slot.ring + piece_row(0, w) * 128, at_b = slot.ring + A_BYTES + piece_col(0, w) * 128;
        u64 a0 = TA ? desc_mn(at_a, BK * 128) : desc_k(at_a), b0 = TB ? desc_mn(at_b, BK * 128) : desc_k(at_b);
        float acc[WM][WN / 2];
        int buffer = 0;
        for (int t = begin; t < total; t += gridDim.x) {
            Tile tile = schedule.at(t + rank);
            int depth = TA ? tile.size : k, rows = (TA ? m : tile.size) - tile.row, cols = n - tile.col;
            u32 before = 0;
            for (int at = 0; at < depth; at += BK) {
                mbar_wait(slot.filled(), slot.phase);
                u64 a = desc_add(a0, slot.index * STAGE_BYTES), b = desc_add(b0, slot.index * STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < WM; i++) wgmma_pin(acc[i]);
                wgmma_fence();
#pragma unroll
                for (int j = 0; j < BK / 16; j++)
#pragma unroll
                    for (int i = 0; i < WM; i++)
                        wgmma<WN, TA, TB>(acc[i], desc_add(a, i * 8192 + j * (TA ? 2048 : 32)),
                                          desc_add(b, j * (TB ? 2048 : 32)), at > 0 || j > 0);
                wgmma_commit();
                if (at > 0) {
                    wgmma_wait<1>();
                    release(before);
                }
                before = slot.emptied();
                slot.next();
            }
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < WM; i++) wgmma_pin(acc[i]);
            release(before);

#pragma unroll
            for (int c = 0; c < OLD_STAGES; c++) {
                mbar_wait(slot.filled(), slot.phase);
                u32 lines = slot.data() + warp * 2048;
#pragma unroll
                for (int p = 0; p < PIECES; p++) {
                    int place = GROUPS * p + w - c * OLD_PIECES;
                    if (place < 0 || place >= OLD_PIECES) continue;
                    Piece{lines + place * PIECE_BYTES, lane}.add_to(acc[0] + p * PIECE / 2, OUT());
                }
                fence_async();
                __syncwarp();
                release(slot.emptied());
                slot.next();
            }
            if (!tile.live) continue;

#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                u32 from = staging + buffer * PIECE_BYTES;
                if (thread % 128 == 0) tma_wait_read<1>();
                bar_sync(1 + w, 128);
                Piece{from + warp * 2048, lane}.put(acc[0] + p * PIECE / 2, OUT());
                fence_async();
                bar_sync(1 + w, 128);
                if (thread % 128 == 0) {
                    int row = piece_row(p, w), col = piece_col(p, w);
                    int y = tile.row + row + (TA ? 0 : cap - tile.size), z = TA ? tile.expert : tile.offset + tile.size;
                    if (row < rows && col < cols) tma_store(&map_c, from, tile.col + col, y, z);
                    // A group for every piece, that those under way can be counted.
                    tma_commit();
                }
                buffer ^= 1;
            }
        }
        if (thread % 128 == 0) tma_wait_read<0>();
        __syncwarp();
    }
    // No block leaves while another may still signal its barriers.
    if (CLUSTER > 1) cluster_sync();
}
