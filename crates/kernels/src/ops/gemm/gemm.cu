// C[m, n] (+)= op(A)[m, k] op(B)[k, n] with sums in f32: one product, one per expert over its rows, or one per expert
// summed over its rows. Two kernels for the GPUs that have no faster one: `gemm_mma` multiplies bf16 by mma.sync fed by
// cp.async, `gemm_simt` multiplies any mix of f32 and bf16 by plain fused multiply-adds, never by TF32.
//
// Every element is one chain over k in ascending order, whatever the tile: a tile's size, the number of rows and the
// way in which operands are loaded change no bit. A chain's end is padded with zeros, which change none either.
//
// Defined by the launch code: A_TYPE, B_TYPE, C_TYPE; A_K, B_K: whether k is the operand's inner dimension; WIDE:
// whether all pointers and strides are multiples of 16 bytes; TILE_M, TILE_N, TILE_K; MODE: 0 one product,
// 1 grouped (offsets count rows of A and C), 2 grouped over k (offsets count rows of A and B); EXPERTS; and for the
// kernel at hand MMA with WARP_M, WARP_N, STAGES, A_PLANES, B_PLANES, or SIMT with CELL_M, CELL_N; and BLOCKS that fit a
// multiprocessor. With SUM: what adds up the pieces of a long sum, which needs C_TYPE only. With SPLIT: what cuts f32
// into planes.
//
// Planes: an f32 number is the sum of three bf16 numbers, exactly (its 24 bits are three times eight), so that a matrix
// in f32 is three in bf16, and mma.sync computes f32 x bf16 by three products, each exact before it is summed. For
// f32 x f32 with a result in bf16 two planes each and the three largest of their products do: what is left out is about
// 2^-16 of the product, a hundredth of the result's rounding.

#ifdef SUM

// C[m, n] (+)= the sum over the pieces' products [pieces, m, n], in order.
extern "C" __global__ void __launch_bounds__(256)
gemm_sum(const float* pieces, C_TYPE* c, int count, i64 size, int n, i64 ldc, int add) {
    i64 i = blockIdx.x * i64(256) + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
    for (int s = 0; s < count; s++) sum += pieces[s * size + i];
    C_TYPE* at = c + i / n * ldc + i % n;
    *at = narrow<C_TYPE>(add ? widen(*at) + sum : sum);
}

#elif defined(SPLIT)

// Cuts x[rows, cols] into PLANES planes [rows, pitch], the largest part first. A thread has eight columns.
extern "C" __global__ void __launch_bounds__(256)
gemm_split(const float* x, bf16* planes, int rows, int cols, i64 ld, int pitch) {
    i64 id = blockIdx.x * i64(256) + threadIdx.x;
    int row = id / (pitch / 8), col = id % (pitch / 8) * 8;
    if (row >= rows) return;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float* at = x + row * ld + col + i;
        if (WIDE && col + i + 4 <= cols) {
            float4 raw = *reinterpret_cast<const float4*>(at);
            v[i] = raw.x, v[i + 1] = raw.y, v[i + 2] = raw.z, v[i + 3] = raw.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) v[i + j] = col + i + j < cols ? at[j] : 0.0f;
        }
    }
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        Vec<bf16> part;
        part.from(v);
        part.store(planes + (i64(p) * rows + row) * pitch + col);
        float rounded[8];
        part.to(rounded);
        // What has no finite rounding is all in the first plane.
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = fabsf(rounded[i]) < INF ? v[i] - rounded[i] : 0.0f;
    }
}

#else

#define DENSE 0
#define BY_ROWS 1
#define BY_DEPTH 2

// What a block computes: the tile at (row, col) of a product of its own.
struct Part {
    i64 a, b, c;    // where the operands begin, in elements
    int m, n, k;    // size of the product
    int row, col;   // first element of the tile
};

// The tile of number `id` among tiles_m x tiles_n. Eight rows of tiles go through all columns before the next eight, so
// that blocks that run at the same time share both operands in the second-level cache.
DEV void order_tiles(int id, int tiles_m, int tiles_n, Part& p) {
    const int rows = 8;
    int first = id / (rows * tiles_n) * rows;
    int count = min(rows, tiles_m - first);
    int at = id % (rows * tiles_n);
    p.row = (first + at % count) * TILE_M;
    p.col = at / count * TILE_N;
}

// Finds the expert that tile row `id` belongs to; experts' tiles follow one another. False beyond the last.
DEV bool find_expert(const int* offsets, int id, int& expert, int& begin, int& end, int& tile) {
    const int rounds = (EXPERTS + WARP - 1) / WARP;
    int lane = threadIdx.x % WARP, from[rounds], to[rounds];
#pragma unroll
    for (int r = 0; r < rounds; r++) {
        int e = min(r * WARP + lane, EXPERTS);
        from[r] = offsets[e];
        to[r] = offsets[min(e + 1, EXPERTS)];
    }
    int before = 0;
    bool found = false;
#pragma unroll
    for (int r = 0; r < rounds; r++) {
        int tiles = (to[r] - from[r] + TILE_M - 1) / TILE_M, sum = tiles;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            int left = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d) sum += left;
        }
        u32 hit = __ballot_sync(ALL_LANES, !found && id < before + sum);
        if (hit) {
            int l = __ffs(hit) - 1;
            expert = r * WARP + l;
            begin = __shfl_sync(ALL_LANES, from[r], l);
            end = __shfl_sync(ALL_LANES, to[r], l);
            tile = id - before - __shfl_sync(ALL_LANES, sum - tiles, l);
            found = true;
        }
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    return found;
}

// Where this block works; false if it has nothing to do. `k` is cut into gridDim.y pieces of `piece` (DENSE only), whose
// products lie one after another in C.
DEV bool locate(int m, int n, int k, int piece, i64 lda, i64 ldb, i64 ldc, const int* offsets, bool add, Part& p) {
    int tiles_n = (n + TILE_N - 1) / TILE_N;
    p.a = p.b = p.c = 0;
    p.m = m, p.n = n, p.k = k;
    if (MODE == DENSE) {
        order_tiles(blockIdx.x, (m + TILE_M - 1) / TILE_M, tiles_n, p);
        int first = blockIdx.y * piece;
        p.a = A_K ? i64(first) : first * lda;
        p.b = B_K ? i64(first) : first * ldb;
        p.c = blockIdx.y * (m * ldc);
        p.k = max(0, min(piece, k - first));
    } else if (MODE == BY_ROWS) {
        int expert, begin, end, tile;
        if (!find_expert(offsets, blockIdx.x / tiles_n, expert, begin, end, tile)) return false;
        p.a = begin * lda;
        p.b = expert * ldb * (B_K ? n : k);
        p.c = begin * ldc;
        p.m = end - begin;
        p.row = tile * TILE_M;
        p.col = blockIdx.x % tiles_n * TILE_N;
    } else {
        int tiles_m = (m + TILE_M - 1) / TILE_M;
        int expert = blockIdx.x / (tiles_m * tiles_n);
        order_tiles(blockIdx.x % (tiles_m * tiles_n), tiles_m, tiles_n, p);
        int begin = offsets[expert];
        p.a = begin * lda;
        p.b = begin * ldb;
        p.c = expert * (m * ldc);
        p.k = offsets[expert + 1] - begin;
    }
    // Adding an empty sum would turn -0 into 0.
    return p.k > 0 || !add;
}

// Stores N finished sums of a row, `left` of them within the matrix.
template <int N> DEV void put(C_TYPE* c, const float (&sums)[N], int left, bool add) {
    const int W = Vec<C_TYPE>::N;
    if (WIDE && N % W == 0 && left >= N) {
#pragma unroll
        for (int i = 0; i < N; i += W) {
            Vec<C_TYPE> v;
            float x[W];
            if (add) {
                v.load(c + i);
                v.to(x);
#pragma unroll
                for (int j = 0; j < W; j++) x[j] += sums[i + j];
            } else {
#pragma unroll
                for (int j = 0; j < W; j++) x[j] = sums[i + j];
            }
            v.from(x);
            v.store(c + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < left) c[i] = narrow<C_TYPE>(add ? widen(c[i]) + sums[i] : sums[i]);
    }
}

#ifdef MMA

#define WARPS_N (TILE_N / WARP_N)
#define BLOCK ((TILE_M / WARP_M) * WARPS_N * WARP)

// An operand's tile of TILE_K by OUTER (rows of A or columns of B) in shared memory: rows of 16-byte chunks in the order
// of global memory, a row's chunks exchanged by a function of the row so that eight rows' same chunk lie in eight
// different groups of banks, and ldmatrix as well as the copy take the fewest cycles there are.
template <int OUTER, bool INNER_K> struct Tile {
    static const int CHUNKS = (INNER_K ? TILE_K : OUTER) / 8;
    static const int ROWS = INNER_K ? OUTER : TILE_K;
    static const int BYTES = TILE_K * OUTER * 2;
    static const int STEP = BLOCK / CHUNKS;      // rows between two chunks of a thread
    static const int COUNT = ROWS / STEP;
    static const int MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
    static const int SHARED_BY = 8 / (MASK + 1); // rows in 128 bytes
    static_assert(TILE_K % 32 == 0, "fragments alternate between two buffers");
    static_assert(BLOCK % CHUNKS == 0 && ROWS % STEP == 0, "threads copy whole rows");

    const bf16* first;  // the thread's first chunk, of k = 0
    const bf16* base;
    i64 ld;
    int row, chunk, outer, end;
    bool inside;        // no row or column of the tile lies outside the matrix

    DEV static int place(int row, int chunk) { return row * (CHUNKS * 16) + ((chunk ^ (row / SHARED_BY & MASK)) << 4); }

    DEV void begin(const bf16* p, i64 stride, int outer0, int outer_end) {
        row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        base = p, ld = stride, end = outer_end, inside = outer0 + OUTER <= outer_end;
        outer = outer0 + (INNER_K ? row : chunk * 8);
        first = p + (INNER_K ? outer * ld + chunk * 8 : row * ld + outer);
    }

    DEV static void copy_async(u32 to, const bf16* from) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    }
    DEV static void copy_async(u32 to, const bf16* from, int bytes) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    }

    // Copies the tile of k from k0 on of the plane that begins `plane` elements later; what lies outside the matrix
    // becomes zero.
    DEV void copy(u32 shared, int k0, int k, i64 plane) const {
        const bf16* p = first + plane + (INNER_K ? i64(k0) : k0 * ld);
        if (WIDE && inside && k0 + TILE_K <= k) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) copy_async(shared + place(row + i * STEP, chunk), p + i * (STEP * ld));
            return;
        }
        // Edges, and what no wide copy fits: rare enough to save registers on.
#pragma unroll 1
        for (int i = 0; i < COUNT; i++) {
            int valid;  // elements
            if (INNER_K) valid = outer + i * STEP < end ? min(8, max(0, k - k0 - chunk * 8)) : 0;
            else valid = k0 + row + i * STEP < k ? min(8, max(0, end - outer)) : 0;
            u32 to = shared + place(row + i * STEP, chunk);
            const bf16* from = p + i * (STEP * ld);
            if (WIDE) {
                copy_async(to, valid ? from : base, valid * 2);
            } else {
                u32 x[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 lo = 2 * j < valid ? from[2 * j].bits : 0, hi = 2 * j + 1 < valid ? from[2 * j + 1].bits : 0;
                    x[j] = lo | hi << 16;
                }
                asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
            }
        }
    }

    // Four 8 x 8 matrices: 16 of the outer dimension from `o` by 16 of k from `kk`. Matrix i is the half `i % 2` of the
    // outer dimension and the half `i / 2` of k if OUTER_FIRST (an A fragment), else the other way round (two of B).
    template <bool OUTER_FIRST> DEV static void fragment(u32 (&x)[4], u32 shared, int o, int kk) {
        int lane = threadIdx.x % WARP, i = lane / 8;
        int half_o = OUTER_FIRST ? i % 2 : i / 2, half_k = OUTER_FIRST ? i / 2 : i % 2;
        if (INNER_K) {
            u32 at = shared + place(o + half_o * 8 + lane % 8, kk / 8 + half_k);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
        } else {
            u32 at = shared + place(kk + half_k * 8 + lane % 8, o / 8 + half_o);
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
        }
    }
};

typedef Tile<TILE_M, A_K> TileA;
typedef Tile<TILE_N, B_K> TileB;
#define STAGE_BYTES (A_PLANES * TileA::BYTES + B_PLANES * TileB::BYTES)

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
gemm_mma(const bf16* a, const bf16* b, C_TYPE* c, int m, int n, int k, int piece, i64 lda, i64 ldb, i64 ldc, const int* offsets, int add, i64 plane_a, i64 plane_b) {
    extern __shared__ __align__(128) char memory[];
    Part p;
    if (!locate(m, n, k, piece, lda, ldb, ldc, offsets, add, p)) return;
    u32 shared = u32(__cvta_generic_to_shared(memory));
    TileA tile_a;
    TileB tile_b;
    tile_a.begin(a + p.a, lda, p.row, p.m);
    tile_b.begin(b + p.b, ldb, p.col, p.n);
    const int MI = WARP_M / 16, NJ = WARP_N / 16, STEPS = TILE_K / 16;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int wm = warp / WARPS_N * WARP_M, wn = warp % WARPS_N * WARP_N;
    // The matrix unit cuts off what it adds instead of rounding, an error that grows with a chain's length: fine for
    // operands in bf16, but what stands for f32 is summed by it over 32 of k only, and from there in f32.
    const bool SHORT = A_PLANES + B_PLANES > 2;
    float sums[MI][NJ * 2][4] = {}, part[MI][NJ * 2][4];
    int count = (p.k + TILE_K - 1) / TILE_K;

    auto fetch = [&](int t) {
        if (t < count) {
            u32 at = shared + t % STAGES * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < A_PLANES; i++) tile_a.copy(at + i * TileA::BYTES, t * TILE_K, p.k, i * plane_a);
            at += A_PLANES * TileA::BYTES;
#pragma unroll
            for (int i = 0; i < B_PLANES; i++) tile_b.copy(at + i * TileB::BYTES, t * TILE_K, p.k, i * plane_b);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    // Tile t has arrived, and all warps have left the stage of tile t - 1.
    auto arrived = [&]() {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
    };
    u32 fa[2][A_PLANES][MI][4], fb[2][B_PLANES][NJ][4];
    auto load = [&](int buffer, int t, int step) {
        u32 at = shared + t % STAGES * STAGE_BYTES;
#pragma unroll
        for (int q = 0; q < A_PLANES; q++)
#pragma unroll
            for (int i = 0; i < MI; i++)
                TileA::fragment<true>(fa[buffer][q][i], at + q * TileA::BYTES, wm + i * 16, step * 16);
        at += A_PLANES * TileA::BYTES;
#pragma unroll
        for (int q = 0; q < B_PLANES; q++)
#pragma unroll
            for (int j = 0; j < NJ; j++)
                TileB::fragment<false>(fb[buffer][q][j], at + q * TileB::BYTES, wn + j * 16, step * 16);
    };
#pragma unroll
    for (int t = 0; t < STAGES - 1; t++) fetch(t);
    if (count > 0) {
        arrived();
        load(0, 0, 0);
    }
    for (int t = 0; t < count; t++) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            // A step's fragments are loaded during the step before, a tile's first during the last of the tile before.
            if (s + 1 < STEPS) {
                load((s + 1) % 2, t, s + 1);
            } else if (t + 1 < count) {
                arrived();
                load((s + 1) % 2, t + 1, 0);
            }
            if (s == 0) fetch(t + STAGES - 1);
            auto& to = SHORT ? part : sums;
            if (SHORT && s % 2 == 0) {
#pragma unroll
                for (int i = 0; i < MI * NJ * 8; i++) (&part[0][0][0])[i] = 0.0f;
            }
            // Small planes first.
#pragma unroll
            for (int pa = A_PLANES - 1; pa >= 0; pa--)
#pragma unroll
                for (int pb = B_PLANES - 1; pb >= 0; pb--)
                    if (pa + pb < (A_PLANES > B_PLANES ? A_PLANES : B_PLANES)) {
#pragma unroll
                        for (int i = 0; i < MI; i++)
#pragma unroll
                            for (int j = 0; j < NJ * 2; j++) {
                                const u32(&y)[4] = fb[s % 2][pb][j / 2];
                                multiply(to[i][j], fa[s % 2][pa][i], y[j % 2 * 2], y[j % 2 * 2 + 1]);
                            }
                    }
            if (SHORT && s % 2 == 1) {
#pragma unroll
                for (int i = 0; i < MI * NJ * 8; i++) (&sums[0][0][0])[i] += (&part[0][0][0])[i];
            }
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();

    // Through shared memory, sixteen rows of a warp at a time, so that C is read and written in whole lines.
    const int PITCH = WARP_N + 8, E = Vec<C_TYPE>::N, LANES = WARP_N / E;
    float* stage = reinterpret_cast<float*>(memory) + warp * (16 * PITCH);
    C_TYPE* out = c + p.c;
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
        for (int j = 0; j < NJ * 2; j++) {
            float* at = stage + lane / 4 * PITCH + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(at) = make_float2(sums[i][j][0], sums[i][j][1]);
            *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
        __syncwarp();
#pragma unroll
        for (int r = lane / LANES; r < 16; r += WARP / LANES) {
            int row = p.row + wm + i * 16 + r, col = p.col + wn + lane % LANES * E;
            float x[E];
#pragma unroll
            for (int e = 0; e < E; e += 4) {
                float4 v = *reinterpret_cast<const float4*>(stage + r * PITCH + lane % LANES * E + e);
                x[e] = v.x, x[e + 1] = v.y, x[e + 2] = v.z, x[e + 3] = v.w;
            }
            if (row < p.m && col < p.n) put(out + row * ldc + col, x, p.n - col, add);
        }
        __syncwarp();
    }
}

#endif

#ifdef SIMT

#define BLOCK ((TILE_M / CELL_M) * (TILE_N / CELL_N))

// An operand's tile in shared memory as f32, k by OUTER, and the path to it through registers.
template <typename T, int OUTER, bool INNER_K> struct Tile {
    static const int PITCH = OUTER + 4;
    static const int CHUNKS = (INNER_K ? TILE_K : OUTER) / 4;
    static const int TOTAL = TILE_K * OUTER / 4;
    static const int COUNT = (TOTAL + BLOCK - 1) / BLOCK;
    const T* base;
    i64 ld;
    int outer0, end;
    float x[COUNT][4];

    DEV void begin(const T* p, i64 stride, int outer, int outer_end) { base = p, ld = stride, outer0 = outer, end = outer_end; }

    DEV static void load(const float* p, float (&x)[4]) {
        float4 v = *reinterpret_cast<const float4*>(p);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    DEV static void load(const bf16* p, float (&x)[4]) {
        uint2 v = *reinterpret_cast<const uint2*>(p);
        x[0] = lower(v.x), x[1] = upper(v.x), x[2] = lower(v.y), x[3] = upper(v.y);
    }

    // Four elements along the inner dimension into registers; zeros outside the matrix.
    DEV void fetch(int k0, int k) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int id = threadIdx.x + i * BLOCK, row = id / CHUNKS, col = id % CHUNKS * 4;
            int outer = outer0 + (INNER_K ? row : col), kk = k0 + (INNER_K ? col : row);
            int valid = INNER_K ? (outer < end ? k - kk : 0) : (kk < k ? end - outer : 0);
            if (TOTAL % BLOCK != 0 && id >= TOTAL) valid = 0;
            const T* p = base + (INNER_K ? outer * ld + kk : kk * ld + outer);
            if (WIDE && valid >= 4) {
                load(p, x[i]);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) x[i][j] = j < valid ? widen(p[j]) : 0.0f;
            }
        }
    }

    DEV void store(float* shared) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int id = threadIdx.x + i * BLOCK, row = id / CHUNKS, col = id % CHUNKS * 4;
            if (TOTAL % BLOCK != 0 && id >= TOTAL) break;
            if (INNER_K) {
#pragma unroll
                for (int j = 0; j < 4; j++) shared[(col + j) * PITCH + row] = x[i][j];
            } else {
                *reinterpret_cast<float4*>(shared + row * PITCH + col) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
            }
        }
    }
};

// A thread's cell of a tile: groups of up to four neighbours, the groups spread over the tile.
template <int CELL, int OUTER> struct Cell {
    static const int GROUP = CELL < 4 ? CELL : 4;
    static const int GROUPS = CELL / GROUP;
    DEV static int at(int thread, int i) { return i / GROUP * (OUTER / GROUPS) + thread * GROUP + i % GROUP; }
    DEV static void load(const float* row, int thread, float (&x)[CELL]) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const float* p = row + at(thread, g * GROUP);
            if (GROUP == 4) {
                float4 v = *reinterpret_cast<const float4*>(p);
                x[g * GROUP] = v.x, x[g * GROUP + 1] = v.y, x[g * GROUP + 2] = v.z, x[g * GROUP + 3] = v.w;
            } else {
#pragma unroll
                for (int i = 0; i < GROUP; i++) x[g * GROUP + i] = p[i];
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
gemm_simt(const A_TYPE* a, const B_TYPE* b, C_TYPE* c, int m, int n, int k, int piece, i64 lda, i64 ldb, i64 ldc, const int* offsets, int add) {
    typedef Tile<A_TYPE, TILE_M, A_K> TileA;
    typedef Tile<B_TYPE, TILE_N, B_K> TileB;
    typedef Cell<CELL_M, TILE_M> CellM;
    typedef Cell<CELL_N, TILE_N> CellN;
    __shared__ __align__(16) float as[2][TILE_K * TileA::PITCH];
    __shared__ __align__(16) float bs[2][TILE_K * TileB::PITCH];
    Part p;
    if (!locate(m, n, k, piece, lda, ldb, ldc, offsets, add, p)) return;
    TileA tile_a;
    TileB tile_b;
    tile_a.begin(a + p.a, lda, p.row, p.m);
    tile_b.begin(b + p.b, ldb, p.col, p.n);
    // A warp covers four by eight cells, so that it reads few different words of both operands.
    const int ACROSS = TILE_N / CELL_N, LANES_N = ACROSS < 8 ? ACROSS : 8, LANES_M = WARP / LANES_N, WARPS_N = ACROSS / LANES_N;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int tm = warp / WARPS_N * LANES_M + lane / LANES_N, tn = warp % WARPS_N * LANES_N + lane % LANES_N;
    float sums[CELL_M][CELL_N] = {};
    int count = (p.k + TILE_K - 1) / TILE_K;
    if (count > 0) {
        tile_a.fetch(0, p.k), tile_b.fetch(0, p.k);
        tile_a.store(as[0]), tile_b.store(bs[0]);
    }
    __syncthreads();
    for (int t = 0; t < count; t++) {
        bool more = t + 1 < count;
        if (more) tile_a.fetch((t + 1) * TILE_K, p.k), tile_b.fetch((t + 1) * TILE_K, p.k);
        const float *sa = as[t % 2], *sb = bs[t % 2];
#pragma unroll 16
        for (int l = 0; l < TILE_K; l++) {
            float x[CELL_M], y[CELL_N];
            CellM::load(sa + l * TileA::PITCH, tm, x);
            CellN::load(sb + l * TileB::PITCH, tn, y);
#pragma unroll
            for (int i = 0; i < CELL_M; i++)
#pragma unroll
                for (int j = 0; j < CELL_N; j++) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
        }
        if (more) tile_a.store(as[(t + 1) % 2]), tile_b.store(bs[(t + 1) % 2]);
        __syncthreads();
    }
    C_TYPE* out = c + p.c;
#pragma unroll
    for (int i = 0; i < CELL_M; i++) {
        int row = p.row + CellM::at(tm, i);
        if (row >= p.m) continue;
#pragma unroll
        for (int g = 0; g < CELL_N; g += CellN::GROUP) {
            int col = p.col + CellN::at(tn, g);
float x[CellN::GROUP];
#pragma unroll
            for (int j = 0; j < CellN::GROUP; j++) x[j] = sums[i][g + j];
            if (col < p.n) put(out + row * ldc + col, x, p.n - col, add);
        }
    }
}

#endif

#endif
