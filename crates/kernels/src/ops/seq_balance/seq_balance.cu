// The balance loss in three launches: counts and shares over blocks of tokens, counted from each sequence's start; each
// sequence's blocks in a fixed order, which gives f and the loss; the gradient.
//
// Sequence s has its blocks at cu[s] / TOKENS + s and after: no two sequences meet there, so that no launch has to know
// how many blocks the others have.
// Compiled with EXPERTS, TOP_K.

#define WARPS 8
#define TOKENS 64
#define PER_LANE ((EXPERTS + WARP - 1) / WARP)
// Threads of the second launch, and the parts into which it cuts a sequence's blocks.
#define WIDE_THREADS 1024
#define PARTS (EXPERTS < WIDE_THREADS ? WIDE_THREADS / EXPERTS : 1)

DEV int slot_of(const int* cu, int s) { return cu[s] / TOKENS + s; }

DEV void load_row(const float* scores, i64 t, float (&x)[PER_LANE]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        x[j] = e < EXPERTS ? scores[t * EXPERTS + e] : 0.0f;
    }
}

// 1 / the sum of a token's scores; 0 where all are zero.
DEV double inverse_sum(const float (&x)[PER_LANE]) {
    double z = 0.0;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) z += double(x[j]);
    z = warp_sum(z);
    return z == 0.0 ? 0.0 : 1.0 / z;
}

// Counts the largest, with the router's ties: the lowest index first, a NaN last.
DEV void count_largest(const float (&x)[PER_LANE], int (&counts)[PER_LANE]) {
    int lane = threadIdx.x % WARP;
    u32 key[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        u32 bits = __float_as_uint(__fadd_rn(x[j], 0.0f));
        u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        key[j] = j * WARP + lane >= EXPERTS ? 0 : x[j] == x[j] ? ordered : 1;
    }
#pragma unroll
    for (int k = 0; k < TOP_K; k++) {
        u32 best = 0;
        int at = 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            if (key[j] > best) best = key[j], at = j;
        }
        u32 largest = __reduce_max_sync(ALL_LANES, best);
        int e = __reduce_min_sync(ALL_LANES, best == largest ? u32(at * WARP + lane) : ~0u);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            if (e == j * WARP + lane) key[j] = 0, counts[j]++;
        }
    }
}

// counts[block, e], shares[block, e].
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    seq_tally(const float* __restrict__ scores, const int* __restrict__ cu, int sequences, int* __restrict__ counts,
              double* __restrict__ shares) {
    __shared__ int count_sum[EXPERTS];
    __shared__ double share_sum[EXPERTS];
    int low = 0, high = sequences, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (slot_of(cu, middle) <= blockIdx.x) low = middle;
        else high = middle;
    }
    i64 first = cu[low] + i64(blockIdx.x - slot_of(cu, low)) * TOKENS;
    i64 end = min(first + TOKENS, i64(cu[low + 1]));
    if (first >= end) return;
    int count[PER_LANE];
    double share[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) count[j] = 0, share[j] = 0.0;
    for (i64 t = first + warp; t < end; t += WARPS) {
        float x[PER_LANE];
        load_row(scores, t, x);
        count_largest(x, count);
        double inverse = inverse_sum(x);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) share[j] += double(x[j]) * inverse;
    }
    for (int e = threadIdx.x; e < EXPERTS; e += WARPS * WARP) count_sum[e] = 0, share_sum[e] = 0.0;
    for (int w = 0; w < WARPS; w++) {
        __syncthreads();
        if (w != warp) continue;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            int e = j * WARP + lane;
            if (e < EXPERTS) count_sum[e] += count[j], share_sum[e] += share[j];
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += WARPS * WARP) {
        counts[i64(blockIdx.x) * EXPERTS + e] = count_sum[e];
        shares[i64(blockIdx.x) * EXPERTS + e] = share_sum[e];
    }
}

// One block a sequence: its f and its loss. Each part takes neighbouring blocks; the parts are added in order.
extern "C" __global__ void __launch_bounds__(WIDE_THREADS)
    seq_loss(const int* __restrict__ cu, const int* __restrict__ counts, const double* __restrict__ shares,
             double* __restrict__ f, float* __restrict__ loss) {
    __shared__ double share_of[PARTS][EXPERTS];
    __shared__ int count_of[PARTS][EXPERTS];
    __shared__ double scratch[WIDE_THREADS / WARP];
    int s = blockIdx.x, tokens = cu[s + 1] - cu[s], blocks = (tokens + TOKENS - 1) / TOKENS;
    i64 base = slot_of(cu, s);
    int each = (blocks + PARTS - 1) / PARTS;
    for (int i = threadIdx.x; i < PARTS * EXPERTS; i += WIDE_THREADS) {
        int part = i / EXPERTS, e = i % EXPERTS, count = 0;
        double share = 0.0;
#pragma unroll 4
        for (int b = part * each; b < min(blocks, (part + 1) * each); b++) {
            count += counts[(base + b) * EXPERTS + e];
            share += shares[(base + b) * EXPERTS + e];
        }
        count_of[part][e] = count;
        share_of[part][e] = share;
    }
    __syncthreads();
    double sum = 0.0, at_least_one = max(tokens, 1);
    for (int e = threadIdx.x; e < EXPERTS; e += WIDE_THREADS) {
        i64 count = 0;
        double share = 0.0;
        for (int part = 0; part < PARTS; part++) count += count_of[part][e], share += share_of[part][e];
        double load = double(EXPERTS) / (TOP_K * at_least_one) * double(count);
        f[i64(s) * EXPERTS + e] = load;
        sum += load * share;
    }
    sum = block_sum<WIDE_THREADS>(sum, scratch);
    if (threadIdx.x == 0) loss[s] = float(sum / at_least_one);
}

// One warp a token: d_scores = seq_weight / T (f_j / Z - sum_i f_i s_i / Z^2).
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    seq_gradient(const float* __restrict__ scores, const int* __restrict__ cu, const double* __restrict__ f,
                 const float* __restrict__ seq_weights, float* __restrict__ d_scores, int n, int sequences) {
    int lane = threadIdx.x % WARP;
    i64 t = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (t >= n) return;
    float x[PER_LANE];
    load_row(scores, t, x);
    int low = 0, high = sequences;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (cu[middle] <= t) low = middle;
        else high = middle;
    }
    double inverse = inverse_sum(x), load[PER_LANE], mean = 0.0;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        load[j] = e < EXPERTS ? f[i64(low) * EXPERTS + e] : 0.0;
        mean += load[j] * double(x[j]);
    }
    mean = warp_sum(mean) * inverse;
    double factor = double(seq_weights[low]) / double(cu[low + 1] - cu[low]) * inverse;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        if (e < EXPERTS) d_scores[t * EXPERTS + e] = float(factor * (load[j] - mean));
    }
}
