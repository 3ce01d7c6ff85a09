// Hopper matrix product, BF16 in, f32 sums: C (+)= op(A) op(B), over one product or one per expert. One block per SM
// stays and walks the tiles of all experts; what each expert has is read from `offsets` in device memory. A warpgroup
// loads (one thread of it issues TMA into a ring of STAGES), two multiply (wgmma) and write the results through shared
// memory, again by TMA.
//
// Each element of C is one chain of additions over k, 16 at a time in ascending order, whatever the tile: its bits do
// not depend on the tile shape, on the other rows or on the schedule.
//
// Compile-time: TA, TB (A stored [k, m], B stored [k, n]), OUT (float or bf16), ADD (C += product), GROUPED, tile BM x BN,
// STAGES, CLUSTER (blocks that share the loads of B), BAND (tiles of m walked together, for reuse in L2).
//
// Operands with rows per expert ("segments": A, C and, if TA, B) come as three-dimensional maps of a window: coordinate
// (col, cap - size + row, offset + size), base moved down by cap rows, strides of both outer dimensions one row. A row
// past the segment's end has second coordinate >= cap: outside the map, so that loads give zeros and stores skip it,
// without a descriptor per expert. Stacked weights are (col, row, expert).

static const int BK = 64;                                     // one 128-byte swizzled line of bf16
static const int WM = BM == 256 ? 2 : 1;                      // m64 blocks per consumer warpgroup
static const int WN = BM == 64 ? BN / 2 : BN;                 // its columns: 64-row tiles are split by columns
static const int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
static const int OUT_BYTES = 8192;                            // a 64-row, 128-byte-wide piece of C
static const int B_PIECE = TB ? 64 : BN / 2, A_PIECE = TA ? 64 : BM == 256 ? 128 : BM;
static const int OUT_COLS = 128 / sizeof(OUT);

struct Shared {
    u8 ring[STAGES][STAGE_BYTES];
    u8 out[2][2][OUT_BYTES];
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

DEV void store_pair(u32 at, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(CLUSTER, 1, 1)
sm90_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
          const __grid_constant__ TensorMap map_c, const int* segments, int experts, int m, int n, int k, int cap, OUT* out,
          i64 ld) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    int* offsets = s.tables;
    int* first = s.tables + experts + 1;
    u32 ring = smem(s.ring), full = smem(s.full), empty = smem(s.empty);
    int thread = threadIdx.x, group = thread / 128;
    u32 rank = CLUSTER > 1 ? cluster_rank() : 0;

    if (thread == 0) {
        tma_prefetch(&map_a), tma_prefetch(&map_b), tma_prefetch(&map_c);
        for (int i = 0; i < STAGES; i++) mbar_init(full + 8 * i, 1), mbar_init(empty + 8 * i, 8 * CLUSTER);
        mbar_init_fence();
    }
    for (int e = thread; e <= experts; e += 384) offsets[e] = GROUPED ? segments[e] : e * cap;
    __syncthreads();
    if (thread < WARP) {
        int before = 0, nt = (n + BN - 1) / BN;
        for (int e = thread; e - thread < experts; e += WARP) {
            int tiles = 0;
            if (e < experts) {
                int size = offsets[e + 1] - offsets[e];
                if (TA) tiles = size > 0 ? ((m + BM - 1) / BM * nt + CLUSTER - 1) / CLUSTER * CLUSTER : 0;
                else tiles = (size + BM - 1) / BM * nt;
            }
            int sum = tiles;
            for (int d = 1; d < WARP; d *= 2) {
                int left = __shfl_up_sync(ALL_LANES, sum, d);
                if (thread >= d) sum += left;
            }
            if (e < experts) first[e + 1] = before + sum;
            before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
        if (thread == 0) first[0] = 0;
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    Schedule schedule = {offsets, first, experts, m, n, 0};
    int total = first[experts], begin = blockIdx.x - rank;
    int slot = 0;
    u32 phase = 0;

    if (group == 0) {
        regs_down<40>();
        if (thread == 0) {
            for (int t = begin; t < total; t += gridDim.x) {
                Tile tile = schedule.at(t), own = tile;
                bool together = false;
                if (CLUSTER > 1) {
                    Tile next = schedule.at(t + 1);
                    together = next.live && next.expert == tile.expert && next.col == tile.col;
                    if (rank) own = next;
                }
                int depth = TA ? own.size : k, window = cap - own.size, end = own.offset + own.size;
                for (int at = 0; at < depth; at += BK) {
                    u32 bar = full + 8 * slot, to = ring + slot * STAGE_BYTES;
                    if (CLUSTER > 1) mbar_wait_cluster(empty + 8 * slot, phase ^ 1);
                    else mbar_wait(empty + 8 * slot, phase ^ 1);
                    mbar_expect(bar, STAGE_BYTES);
#pragma unroll
                    for (int i = 0; i < BM / A_PIECE; i++) {
                        u32 a = to + i * A_PIECE * 128;
                        int row = own.row + i * A_PIECE;
                        if (TA) tma_load(a, &map_a, bar, row, window + at, end);
                        else tma_load(a, &map_a, bar, at, window + row, end);
                    }
                    to += A_BYTES;
#pragma unroll
                    for (int i = 0; i < BN / B_PIECE; i++) {
                        u32 b = to + i * B_PIECE * 128;
                        int col = own.col + i * B_PIECE;
                        int x = TB ? col : at, y = !TB ? col : TA ? window + at : at, z = TB && TA ? end : own.expert;
                        if (!together) tma_load(b, &map_b, bar, x, y, z);
                        else if (i % 2 == rank) tma_load_to(3, b, &map_b, bar, x, y, z);
                    }
                    if (++slot == STAGES) slot = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        regs_up<232>();
        int w = group - 1, lane = thread % WARP, warp = thread / WARP % 4;
        u32 staging = smem(s.out[w]);
        int row_of = BM == 64 ? 0 : w * WM * 64, col_of = BM == 64 ? w * WN : 0;
        u32 at_a = ring + row_of * 128, at_b = ring + A_BYTES + col_of * 128;
        u64 a0 = TA ? desc_mn(at_a, 8192) : desc_k(at_a), b0 = TB ? desc_mn(at_b, 8192) : desc_k(at_b);
        float acc[WM][WN / 2];
        int buffer = 0;
        for (int t = begin; t < total; t += gridDim.x) {
            Tile tile = schedule.at(t + rank);
            int depth = TA ? tile.size : k;
            u32 release = 0;
            for (int at = 0; at < depth; at += BK) {
                mbar_wait(full + 8 * slot, phase);
                u64 a = desc_add(a0, slot * STAGE_BYTES), b = desc_add(b0, slot * STAGE_BYTES);
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
                    if (CLUSTER == 1 && lane == 0) mbar_arrive(release);
                    if (CLUSTER > 1 && lane < CLUSTER) mbar_arrive_at(release, lane);
                }
                release = empty + 8 * slot;
                if (++slot == STAGES) slot = 0, phase ^= 1;
            }
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < WM; i++) wgmma_pin(acc[i]);
            if (CLUSTER == 1 && lane == 0) mbar_arrive(release);
            if (CLUSTER > 1 && lane < CLUSTER) mbar_arrive_at(release, lane);
            if (!tile.live) continue;

#pragma unroll
            for (int i = 0; i < WM; i++) {
#pragma unroll
                for (int piece = 0; piece < WN / OUT_COLS; piece++) {
                    float* x = acc[i] + piece * OUT_COLS / 2;
                    int row = tile.row + row_of + i * 64, col = tile.col + col_of + piece * OUT_COLS;
                    u32 to = staging + buffer * OUT_BYTES, lines = to + warp * 2048;
                    if (thread % 128 == 0) tma_wait_read<1>();
                    bar_sync(1 + w, 128);
                    if (sizeof(OUT) == 2) {
                        if (ADD) {
#pragma unroll
                            for (int q = 0; q < OUT_COLS / 2; q++) {
                                int r = row + warp * 16 + lane / 4 + (q & 2) * 4;
                                int c = col + q / 4 * 8 + lane % 4 * 2 + (q & 1);
                                if (r < (TA ? m : tile.size) && c < n)
                                    x[q] += widen(out[(TA ? i64(tile.expert) * m : i64(tile.offset)) * ld + r * ld + c]);
                            }
                        }
                        int line = lane % 16;
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            stmatrix4(lines + line * 128 + ((2 * j + lane / 16 ^ line & 7) << 4),
                                      narrow2(x[8 * j], x[8 * j + 1]), narrow2(x[8 * j + 2], x[8 * j + 3]),
                                      narrow2(x[8 * j + 4], x[8 * j + 5]), narrow2(x[8 * j + 6], x[8 * j + 7]));
                    } else {
                        int line = lane / 4;
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            u32 p = lines + line * 128 + ((2 * c + lane % 4 / 2 ^ line) << 4) + lane % 2 * 8;
                            store_pair(p, x[4 * c], x[4 * c + 1]);
                            store_pair(p + 1024, x[4 * c + 2], x[4 * c + 3]);
                        }
                    }
                    fence_async();
                    bar_sync(1 + w, 128);
                    if (thread % 128 == 0) {
                        int y = TA ? row : cap - tile.size + row, z = TA ? tile.expert : tile.offset + tile.size;
                        if (ADD && sizeof(OUT) == 4) tma_add(&map_c, to, col, y, z);
                        else tma_store(&map_c, to, col, y, z);
                        tma_commit();
                    }
                    buffer ^= 1;
                }
            }
        }
        if (thread % 128 == 0) tma_wait_read<0>();
        __syncwarp();
    }
    // No block leaves while another may still signal its barriers.
    if (CLUSTER > 1) cluster_sync();
}
