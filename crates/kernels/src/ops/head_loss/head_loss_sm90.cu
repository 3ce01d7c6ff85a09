// Hopper: the product hidden W^T and what is wanted of it in one kernel, so that logits leave the registers only as
// sums over 256 ids or as gradients. Operands are bf16 [rows, D], D a multiple of 8.
//
// A block computes tiles of 128 tokens x 256 ids, one after the other: a warpgroup brings 64 columns of both operands
// at a time into a ring of STAGES, two others multiply 64 tokens each. An element is one chain of products in order of
// the columns: it depends on nothing else.

#define TOKENS 128
#define IDS 256
#define COLS 64
#define BYTES_X (TOKENS * COLS * 2)
#define BYTES_W (IDS * COLS * 2)
#define STAGE (BYTES_X + BYTES_W)
// Rows of tiles that are gone through together: what the blocks read at a time stays in L2.
#define GROUP 16

DEV float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// e^x, off by about |x| 2^-23 of itself.
DEV float fast_exp(float x) { return fast_exp2(x * 1.44269504f); }

// What all blocks together have to do.
struct Work {
    int rows, cols, tiles;
    DEV Work(int tokens, int ids) {
        rows = (tokens + TOKENS - 1) / TOKENS;
        cols = (ids + IDS - 1) / IDS;
        tiles = rows * cols;
    }
};

// First token of tile `t` and which 256 ids.
struct Tile {
    int token, col;
    DEV Tile(int t, const Work& work) {
        int per_group = GROUP * work.cols, group = t / per_group, in = t - group * per_group;
        int first = group * GROUP, high = min(GROUP, work.rows - first);
        token = (first + in % high) * TOKENS;
        col = in / high;
    }
};

// The warpgroup that brings operands; one thread of it.
DEV void bring(const TensorMap* x, const TensorMap* w, const Work& work, int blocks, u32 ring, u32 full, u32 empty) {
    int stage = 0, phase = 1;
    for (int t = blockIdx.x; t < work.tiles; t += gridDim.x) {
        Tile tile(t, work);
        for (int k = 0; k < blocks; k++) {
            u32 to = ring + stage * STAGE, bar = full + stage * 8;
            mbar_wait(empty + stage * 8, phase);
            mbar_expect(bar, STAGE);
            tma_load(to, x, bar, k * COLS, tile.token);
            tma_load(to + BYTES_X, w, bar, k * COLS, tile.col * IDS);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

// One warpgroup's 64 x 256 of a tile.
DEV void multiply(float (&z)[IDS / 2], int group, int blocks, u32 ring, u32 full, u32 empty, int& stage, int& phase) {
    int before = 0;
    for (int k = 0; k < blocks; k++) {
        mbar_wait(full + stage * 8, phase);
        u32 at = ring + stage * STAGE;
        u64 a = desc_k(at + group * 64 * COLS * 2), b = desc_k(at + BYTES_X);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < COLS / 16; i++) wgmma<IDS>(z, desc_add(a, i * 32), desc_add(b, i * 32), k > 0 || i > 0);
        wgmma_commit();
        // The products of the stage before are done: its memory is free.
        wgmma_wait<1>();
        if (k > 0 && threadIdx.x % 128 == 0) mbar_arrive(empty + before * 8);
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    wgmma_pin(z);
    if (threadIdx.x % 128 == 0) mbar_arrive(empty + before * 8);
}

// Column of z[i] in the tile.
DEV int column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + (i & 1); }

// Of both rows that a thread has a part of (the second's elements are two behind the first's), over the ids of the tile
// that there are: the largest z, the sums of e^(z - largest) and of e^(z - largest) (z - largest).
template <bool WHOLE> DEV void summarise(const float (&z)[IDS / 2], int ids, float scale, float4 (&rows)[2]) {
    float max[2][2] = {{-INF, -INF}, {-INF, -INF}}, sum[2] = {0.0f, 0.0f}, dot[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < IDS / 2; i++) {
        if (WHOLE || column(i) < ids) max[i / 2 % 2][i % 2] = fmaxf(max[i / 2 % 2][i % 2], z[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        max[h][0] = fmaxf(max[h][0], max[h][1]);
        max[h][0] = fmaxf(max[h][0], __shfl_xor_sync(ALL_LANES, max[h][0], 1));
        max[h][0] = fmaxf(max[h][0], __shfl_xor_sync(ALL_LANES, max[h][0], 2));
    }
    // e^x = 2^(x log2 e). The largest is subtracted first, so that of one id alone nothing is left of the rounding.
    float factor = scale * 1.44269504f;
#pragma unroll
    for (int i = 0; i < IDS / 2; i++) {
        int h = i / 2 % 2;
        if (WHOLE || column(i) < ids) {
            float t = (z[i] - max[h][0]) * factor, p = fast_exp2(t);
            sum[h] += p;
            dot[h] = fmaf(p, t, dot[h]);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int lane = 1; lane < 4; lane *= 2) {
            sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], lane);
            dot[h] += __shfl_xor_sync(ALL_LANES, dot[h], lane);
        }
        rows[h] = make_float4(max[h][0] * scale, sum[h], dot[h] * 0.693147181f, 0.0f);
    }
}

#define BARRIERS                                                                                                      \
    extern __shared__ __align__(1024) u8 memory[];                                                                     \
    __shared__ u64 bars[2 * STAGES];                                                                                   \
    u32 ring = smem(memory), full = smem(bars), empty = full + STAGES * 8;                                             \
    if (threadIdx.x == 0) {                                                                                            \
        for (int s = 0; s < STAGES; s++) mbar_init(full + s * 8, 1), mbar_init(empty + s * 8, 2);                      \
        mbar_init_fence();                                                                                             \
    }                                                                                                                  \
    __syncthreads();

// parts[tokens, tiles]: the summary of every tile of 256 ids; and z of the target.
extern "C" __global__ void __launch_bounds__(384, 1)
head_summaries(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, int tokens, int ids, int d,
               float scale, const int* targets, float* target_z, float4* parts) {
    BARRIERS
    Work work(tokens, ids);
    int blocks = (d + COLS - 1) / COLS;
    if (threadIdx.x < 128) {
        regs_down<24>();
        if (threadIdx.x == 0) bring(&x, &w, work, blocks, ring, full, empty);
    } else {
        regs_up<240>();
        int group = threadIdx.x / 128 - 1, stage = 0, phase = 0;
        float z[IDS / 2];
        for (int t = blockIdx.x; t < work.tiles; t += gridDim.x) {
            Tile tile(t, work);
            int first = tile.token + group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
            int left = ids - tile.col * IDS, wanted[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = first + half * 8;
                wanted[half] = r < tokens ? targets[r] - tile.col * IDS : -1;
            }
            multiply(z, group, blocks, ring, full, empty, stage, phase);
            float4 rows[2];
            if (left >= IDS) summarise<true>(z, left, scale, rows);
            else summarise<false>(z, left, scale, rows);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = first + half * 8, at = wanted[half];
                if (r < tokens && threadIdx.x % 4 == 0) parts[i64(r) * work.cols + tile.col] = rows[half];
                if (at >= 0 && at < IDS) {
#pragma unroll
                    for (int i = 0; i < IDS / 2; i++) {
                        if (i / 2 % 2 == half && column(i) == at) target_z[r] = z[i] * scale;
                    }
                }
            }
        }
    }
}

// A warp merges the summaries of one token, lane by lane and then across lanes.
extern "C" __global__ void __launch_bounds__(256)
head_merge(int tokens, int tiles, const float4* parts, int ids, const int* targets, const float* target_z, float* lse,
           float* logp, float* entropy) {
    i64 r = i64(blockIdx.x) * 8 + threadIdx.x / WARP;
    if (r >= tokens) return;
    const float4* row = parts + r * tiles;
    float max = -INF;
    for (int i = threadIdx.x % WARP; i < tiles; i += WARP) max = fmaxf(max, row[i].x);
    max = warp_max(max);
    double sum = 0.0, dot = 0.0;
    for (int i = threadIdx.x % WARP; i < tiles; i += WARP) {
        float4 part = row[i];
        float below = part.x - max;
        double e = expf(below);
        sum += part.y * e;
        dot += (part.z + double(part.y) * below) * e;
    }
    sum = warp_sum(sum);
    dot = warp_sum(dot);
    if (threadIdx.x % WARP != 0) return;
    double log_sum = log(sum), all = max + log_sum;
    lse[r] = float(all);
    // A target past the vocabulary, which the host cannot see, has no z.
    logp[r] = targets[r] < 0 ? 0.0f : targets[r] < ids ? float(target_z[r] - all) : __int_as_float(0x7fc00000);
    entropy[r] = float(log_sum - dot / sum);
}

// dz[tokens, ids] in bf16, ids `first` and on of the vocabulary.
extern "C" __global__ void __launch_bounds__(384, 1)
head_gradients(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
               const __grid_constant__ TensorMap dz, int tokens, int ids, int d, int first_id, float scale,
               const int* targets, const float* lse, const float* entropy, const float* d_logp,
               const float* d_entropy) {
    BARRIERS
    Work work(tokens, ids);
    int blocks = (d + COLS - 1) / COLS;
    if (threadIdx.x < 128) {
        regs_down<24>();
        if (threadIdx.x == 0) bring(&x, &w, work, blocks, ring, full, empty);
    } else {
        regs_up<240>();
        int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, stage = 0, phase = 0;
        // Two boxes of 64 tokens x 64 ids.
        u32 out = ring + STAGES * STAGE + group * 2 * 64 * 128;
        float z[IDS / 2];
        for (int t = blockIdx.x; t < work.tiles; t += gridDim.x) {
            Tile tile(t, work);
            int token = tile.token + group * 64;
            // What the rows need, on its way while they are multiplied: of each half one row.
            int wanted[2];
            float d_target[2], spread[2], row_lse[2], all[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = token + warp * 16 + lane / 4 + half * 8;
                bool there = r < tokens;
                wanted[half] = there ? targets[r] : -1;
                d_target[half] = wanted[half] < 0 ? 0.0f : d_logp[r] * scale;
                row_lse[half] = there ? lse[r] : 0.0f;
                spread[half] = SPREAD && there ? -d_entropy[r] * scale : 0.0f;
                all[half] = SPREAD && there ? spread[half] * entropy[r] - d_target[half] : -d_target[half];
            }
            multiply(z, group, blocks, ring, full, empty, stage, phase);
            // What the logits of a row without a gradient are does not matter.
            bool dense[2] = {d_target[0] != 0.0f || spread[0] != 0.0f, d_target[1] != 0.0f || spread[1] != 0.0f};
#pragma unroll
            for (int i = 0; i < IDS / 2; i++) {
                int h = i / 2 % 2;
                float t = fmaf(z[i], scale, -row_lse[h]);
                float dz = fast_exp(t) * (SPREAD ? fmaf(spread[h], t, all[h]) : all[h]);
                z[i] = dense[h] ? dz : 0.0f;
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = wanted[half] - first_id - tile.col * IDS;
                if (wanted[half] >= 0 && at >= 0 && at < IDS) {
#pragma unroll
                    for (int i = 0; i < IDS / 2; i++) {
                        if (i / 2 % 2 == half && column(i) == at) z[i] += d_target[half];
                    }
                }
            }
#pragma unroll
            for (int pair = 0; pair < IDS / 128; pair++) {
                // The copy engine has read what was here before.
                if (threadIdx.x % 128 == 0) tma_wait_read<0>();
                bar_sync(1 + group, 128);
                int line = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
                for (int c = 0; c < 16; c += 2) {
                    int chunk = c + lane / 16, i = (pair * 16 + c) * 4;
                    u32 at = out + chunk / 8 * 8192 + line * 128 + ((chunk % 8 ^ line % 8) << 4);
                    stmatrix4(at, narrow2(z[i], z[i + 1]), narrow2(z[i + 2], z[i + 3]), narrow2(z[i + 4], z[i + 5]),
                              narrow2(z[i + 6], z[i + 7]));
                }
                fence_async();
                bar_sync(1 + group, 128);
                if (threadIdx.x % 128 == 0) {
#pragma unroll
                    for (int box = 0; box < 2; box++) {
                        int id = tile.col * IDS + (pair * 2 + box) * 64;
                        if (token < tokens && id < ids) tma_store(&dz, out + box * 8192, id, token);
                    }
                    tma_commit();
                }
            }
        }
        if (threadIdx.x % 128 == 0) tma_wait<0>();
    }
}
