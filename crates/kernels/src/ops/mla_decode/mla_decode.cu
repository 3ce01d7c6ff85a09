// Absorbed attention over the paged cache: plain f32 arithmetic, all SMs in use.
// Defines: ELEM, the type of q, cache and out; LATENT, ROPE.
// A query's keys are cut into parts of whole blocks of the cache, in number and size a function of how many keys it
// sees; a block of threads takes one part for 16 heads, which share every key. What the parts found is put together in
// their order, so that a token's bits depend on its own sequence alone.

typedef ELEM T;
static const int C = LATENT;
static const int WIDTH = LATENT + ROPE;
static const int BLOCK = 64;
static const int HEADS = 16;
static const int THREADS = 256;
// Columns of a row that are in shared memory at a time, and the distance of keys there, which is odd: a warp reads one
// column of 32 keys.
static const int STEP = 64;
static const int KEY_LD = STEP + 1;
static const int SCORE_LD = HEADS + 4;
static const int COLUMNS = (C + THREADS - 1) / THREADS;
// Most parts of a query, and least blocks of one.
static const int PARTS = 32;
static const int LEAST = 2;

struct Query {
    int seq, keys, blocks_per_part;
    DEV int parts() const { return (keys + BLOCK * blocks_per_part - 1) / (BLOCK * blocks_per_part); }
};
// The sequence of query n, and how many keys it sees: aligned at the end.
DEV Query query_of(const int* cu_q, const int* lengths, int seqs, int n) {
    int low = 0, high = seqs;
    while (high - low > 1) {
        int s = (low + high) / 2;
        if (cu_q[s] <= n) low = s;
        else high = s;
    }
    Query x;
    x.seq = low;
    x.keys = max(0, lengths[low] - (cu_q[low + 1] - 1 - n));
    x.blocks_per_part = max(LEAST, ((x.keys + BLOCK - 1) / BLOCK + PARTS - 1) / PARTS);
    return x;
}

struct Shared {
    // Queries as [column][head].
    float q[WIDTH * HEADS];
    float keys[BLOCK * KEY_LD];
    // Scores, then weights, as [key][head].
    float scores[BLOCK * SCORE_LD];
    float alpha[HEADS];
};

// Sums f32 [queries, H, parts, C] and stats f32 [queries, H, parts, 2] (largest score, sum of weights) of the queries
// from `first` on. Grid: groups of heads x parts, queries.
extern "C" __global__ void __launch_bounds__(THREADS) mla_decode_parts(
    const T* q, const T* cache, const int* table, const int* cu_q, const int* lengths, float* sums, float* stats,
    int first, int seqs, int heads, int max_blocks, int parts, float scale) {
    extern __shared__ __align__(16) u8 dynamic[];
    Shared& s = *reinterpret_cast<Shared*>(dynamic);
    int part = blockIdx.x % parts, head0 = blockIdx.x / parts * HEADS;
    Query x = query_of(cu_q, lengths, seqs, first + blockIdx.y);
    int begin = part * x.blocks_per_part * BLOCK, end = min(x.keys, begin + x.blocks_per_part * BLOCK);
    if (begin >= end) return;
    int tid = threadIdx.x, lane = tid % WARP, warp = tid / WARP;
    const T* from = q + (i64(first + blockIdx.y) * heads + head0) * WIDTH;
    for (int i = tid; i < WIDTH * HEADS; i += THREADS) {
        int h = i / WIDTH, c = i % WIDTH;
        s.q[c * HEADS + h] = head0 + h < heads ? widen(from[h * WIDTH + c]) : 0.0f;
    }
    float acc[COLUMNS][HEADS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) acc[j][h] = 0.0f;
    // Warp w follows the softmax of heads 2 w and 2 w + 1.
    float top[2] = {-INF, -INF}, sum[2] = {0.0f, 0.0f};
    for (int base = begin; base < end; base += BLOCK) {
        int n = min(BLOCK, end - base);
        const T* rows = cache + i64(table[i64(x.seq) * max_blocks + base / BLOCK]) * BLOCK * WIDTH;
        // Scores: a thread has one key and four heads. What lies beyond the last key belongs to no one: it is not read.
        int key = tid % BLOCK, four = tid / BLOCK * 4;
        float score[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int c0 = 0; c0 < WIDTH; c0 += STEP) {
            __syncthreads();
#pragma unroll 4
            for (int i = tid; i < BLOCK * STEP; i += THREADS) {
                int k = i / STEP, c = i % STEP;
                s.keys[k * KEY_LD + c] = k < n && c0 + c < WIDTH ? widen(rows[k * WIDTH + c0 + c]) : 0.0f;
            }
            __syncthreads();
            int width = min(STEP, WIDTH - c0);
#pragma unroll 8
            for (int c = 0; c < width; c++) {
                float k = s.keys[key * KEY_LD + c];
                float4 f = *reinterpret_cast<const float4*>(s.q + (c0 + c) * HEADS + four);
                score[0] = fmaf(f.x, k, score[0]), score[1] = fmaf(f.y, k, score[1]);
                score[2] = fmaf(f.z, k, score[2]), score[3] = fmaf(f.w, k, score[3]);
            }
        }
        *reinterpret_cast<float4*>(s.scores + key * SCORE_LD + four) =
            make_float4(score[0] * scale, score[1] * scale, score[2] * scale, score[3] * scale);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int h = warp * 2 + i;
            float a = lane < n ? s.scores[lane * SCORE_LD + h] : -INF;
            float b = lane + WARP < n ? s.scores[(lane + WARP) * SCORE_LD + h] : -INF;
            float high = fmaxf(top[i], warp_max(fmaxf(a, b)));
            float alpha = expf(top[i] - high);
            a = expf(a - high), b = expf(b - high);
            top[i] = high;
            sum[i] = sum[i] * alpha + warp_sum(a + b);
            s.scores[lane * SCORE_LD + h] = a;
            s.scores[(lane + WARP) * SCORE_LD + h] = b;
            if (lane == 0) s.alpha[h] = alpha;
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) acc[j][h] *= s.alpha[h];
#pragma unroll 4
        for (int k = 0; k < n; k++) {
            float v[COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                int c = j * THREADS + tid;
                v[j] = c < C ? widen(rows[k * WIDTH + c]) : 0.0f;
            }
#pragma unroll
            for (int h = 0; h < HEADS; h += 4) {
                float4 p = *reinterpret_cast<const float4*>(s.scores + k * SCORE_LD + h);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    acc[j][h] = fmaf(p.x, v[j], acc[j][h]), acc[j][h + 1] = fmaf(p.y, v[j], acc[j][h + 1]);
                    acc[j][h + 2] = fmaf(p.z, v[j], acc[j][h + 2]), acc[j][h + 3] = fmaf(p.w, v[j], acc[j][h + 3]);
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (head0 + h >= heads) break;
        i64 row = (i64(blockIdx.y) * heads + head0 + h) * parts + part;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            if (j * THREADS + tid < C) sums[row * C + j * THREADS + tid] = acc[j][h];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int h = head0 + warp * 2 + i;
        if (lane == 0 && h < heads) {
            i64 row = (i64(blockIdx.y) * heads + h) * parts + part;
            stats[2 * row] = top[i];
            stats[2 * row + 1] = sum[i];
        }
    }
}

// out and lse of the queries from `first` on. Grid: heads, queries.
extern "C" __global__ void __launch_bounds__(THREADS) mla_decode_merge(
    const float* sums, const float* stats, const int* cu_q, const int* lengths, T* out, float* lse, int first, int seqs,
    int heads, int parts) {
    Query x = query_of(cu_q, lengths, seqs, first + blockIdx.y);
    int used = x.parts();
    i64 row = (i64(blockIdx.y) * heads + blockIdx.x) * parts, to = i64(first + blockIdx.y) * heads + blockIdx.x;
    float high = -INF, total = 0.0f;
    for (int p = 0; p < used; p++) high = fmaxf(high, stats[2 * (row + p)]);
    for (int p = 0; p < used; p++) total = fmaf(stats[2 * (row + p) + 1], expf(stats[2 * (row + p)] - high), total);
    for (int c = threadIdx.x; c < C; c += THREADS) {
        float sum = 0.0f;
        for (int p = 0; p < used; p++) sum = fmaf(sums[(row + p) * C + c], expf(stats[2 * (row + p)] - high), sum);
        out[to * C + c] = narrow<T>(used > 0 ? sum / total : 0.0f);
    }
    if (threadIdx.x == 0) lse[to] = used > 0 ? high + logf(total) : -INF;
}
