// The parts of absorbed attention by m16n8k16 products of bf16; see mla_decode.cu, whose division of keys this has and
// whose `mla_decode_merge` puts the parts together.
// Defines: LATENT, ROPE, multiples of 8 whose sum is at most 576.
// A block of 4 warps takes one part of a query's keys for 16 heads. Of the scores of a cache block, 16 heads x 64 keys,
// each warp computes 16 keys; of the sums, 16 heads x C, a quarter of the columns.

static const int C = LATENT;
static const int WIDTH = LATENT + ROPE;
static const int WP = (WIDTH + 15) / 16 * 16;
// Rows of shared memory end in 16 bytes of padding: eight rows then start in eight different groups of banks.
static const int LD = WP + 8;
static const int BLOCK = 64;
static const int LP = BLOCK + 8;
static const int HEADS = 16;
static const int WARPS = 4;
static const int THREADS = WARPS * WARP;
static const int PARTS = 32;
static const int LEAST = 2;
// Tiles of 16 columns, and those of a warp.
static const int TILES = (C + 15) / 16;
static const int OWN = (TILES + WARPS - 1) / WARPS;

struct Shared {
    bf16 q[HEADS * LD];
    bf16 keys[BLOCK * LD];
    bf16 weights[HEADS * LP];
    float high[WARPS][HEADS];
    float sum[WARPS][HEADS];
};

// n of ROWS rows, zeros in what is left of [ROWS][WP].
template <int ROWS> DEV void load_rows(bf16* to, const bf16* from, int n) {
    for (int r = threadIdx.x / WARP; r < ROWS; r += WARPS)
#pragma unroll
        for (int c = threadIdx.x % WARP * 8; c < WP; c += WARP * 8)
            copy16(to + r * LD + c, from + r * WIDTH + c, r < n && c < WIDTH);
}

// As `mla_decode_parts`.
extern "C" __global__ void __launch_bounds__(THREADS) mla_decode_parts_mma(
    const bf16* q, const bf16* cache, const int* table, const int* cu_q, const int* lengths, float* sums, float* stats,
    int first, int seqs, int heads, int max_blocks, int parts, float scale) {
    extern __shared__ __align__(16) u8 dynamic[];
    Shared& s = *reinterpret_cast<Shared*>(dynamic);
    int part = blockIdx.x % parts, head0 = blockIdx.x / parts * HEADS, n_q = first + blockIdx.y;
    int low = 0, high_seq = seqs;
    while (high_seq - low > 1) {
        int m = (low + high_seq) / 2;
        if (cu_q[m] <= n_q) low = m;
        else high_seq = m;
    }
    int keys = max(0, lengths[low] - (cu_q[low + 1] - 1 - n_q));
    int per = BLOCK * max(LEAST, ((keys + BLOCK - 1) / BLOCK + PARTS - 1) / PARTS);
    int begin = part * per, end = min(keys, begin + per);
    if (begin >= end) return;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = lane / 4;
    load_rows<HEADS>(s.q, q + (i64(n_q) * heads + head0) * WIDTH, min(HEADS, heads - head0));
    float o[2 * OWN][4];
#pragma unroll
    for (int j = 0; j < 2 * OWN; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
    // Of heads `row` and `row` + 8; every warp follows the maximum, and sums the weights of its own keys.
    float top[2] = {-INF, -INF}, sum[2] = {0.0f, 0.0f};
    const float scale2 = scale * LOG2E;
    for (int base = begin; base < end; base += BLOCK) {
        int n = min(BLOCK, end - base);
        __syncthreads();
        load_rows<BLOCK>(s.keys, cache + i64(table[i64(low) * max_blocks + base / BLOCK]) * BLOCK * WIDTH, n);
        commit();
        wait_for_all_but<0>();
        __syncthreads();
        float x[2][4] = {};
#pragma unroll 4
        for (int k = 0; k < WP; k += 16) {
            u32 a[4], b[4];
            load_left(a, s.q + k, LD);
            load_right(b, s.keys + warp * 16 * LD + k, LD);
            multiply(x[0], a, b[0], b[1]);
            multiply(x[1], a, b[2], b[3]);
        }
        float high[2] = {-INF, -INF};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = warp * 16 + j * 8 + lane % 4 * 2 + e % 2;
                x[j][e] = key < n ? x[j][e] * scale2 : -INF;
                high[e / 2] = fmaxf(high[e / 2], x[j][e]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            high[h] = quad_max(high[h]);
            if (lane % 4 == 0) s.high[warp][row + 8 * h] = high[h];
        }
        __syncthreads();
        float alpha[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = top[h];
#pragma unroll
            for (int w = 0; w < WARPS; w++) most = fmaxf(most, s.high[w][row + 8 * h]);
            alpha[h] = exp2_fast(top[h] - most);
            top[h] = most;
            sum[h] *= alpha[h];
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float a = exp2_fast(x[j][2 * h] - top[h]), b = exp2_fast(x[j][2 * h + 1] - top[h]);
                sum[h] += a + b;
                int key = warp * 16 + j * 8 + lane % 4 * 2;
                *reinterpret_cast<u32*>(s.weights + (row + 8 * h) * LP + key) = narrow2(a, b);
            }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2 * OWN; j++) {
            o[j][0] *= alpha[0], o[j][1] *= alpha[0];
            o[j][2] *= alpha[1], o[j][3] *= alpha[1];
        }
#pragma unroll
        for (int k = 0; k < BLOCK; k += 16) {
            u32 a[4];
            load_left(a, s.weights + k, LP);
#pragma unroll
            for (int j = 0; j < OWN; j++) {
                int tile = warp * OWN + j;
                if (TILES % WARPS != 0 && tile >= TILES) break;
                u32 b[4];
                load_right_turned(b, s.keys + k * LD + tile * 16, LD);
                multiply(o[2 * j], a, b[0], b[1]);
                multiply(o[2 * j + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float own = quad_sum(sum[h]);
        if (lane % 4 == 0) s.sum[warp][row + 8 * h] = own;
        int head = head0 + row + 8 * h;
        if (head >= heads) continue;
        float* to = sums + ((i64(blockIdx.y) * heads + head) * parts + part) * C;
#pragma unroll
        for (int j = 0; j < 2 * OWN; j++) {
            int c = (warp * OWN * 2 + j) * 8 + lane % 4 * 2;
            if (c < C) *reinterpret_cast<float2*>(to + c) = make_float2(o[j][2 * h], o[j][2 * h + 1]);
        }
    }
    __syncthreads();
    if (warp == 0 && lane % 4 == 0) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = row + 8 * h;
            if (head0 + r >= heads) continue;
            float all = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) all += s.sum[w][r];
            float* to = stats + 2 * ((i64(blockIdx.y) * heads + head0 + r) * parts + part);
            to[0] = top[h] * 0.6931471805599453f;
            to[1] = all;
        }
    }
}
