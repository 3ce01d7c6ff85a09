// The gate, one warp a token: expert e belongs to lane e % 32. Scores and weights are computed in the CPU's order
// without a fused operation, so that both devices hold the same bits and choose alike.
//
// Compiled with EXPERTS, TOP_K, SIGMOID (or softmax), GROUPS, TOPK_GROUP, TOP_TWO (or the best alone), NORM.

#define WARPS 8
#define PER_LANE ((EXPERTS + WARP - 1) / WARP)
#define WIDTH (EXPERTS / GROUPS)

// e^x with the CPU's bits: see `math::exp`.
DEV float exp_rounded(float x) {
    const float ROUND = 12582912.0f;
    float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), ROUND);
    float n = __fsub_rn(shifted, ROUND);
    float r = __fadd_rn(__fmul_rn(n, -0.693359375f), x);
    r = __fadd_rn(__fmul_rn(n, 2.1219444e-4f), r);
    float p = 1.3934035e-3f;
    p = __fadd_rn(__fmul_rn(p, r), 8.369464e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1666475e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666513e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    y = __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
    if (x < -87.33654f) return 0.0f;
    return x <= 88.72283f ? y : x + INF;
}

// Keys order as numbers do: -0 equals 0, a NaN is below every number, and 0 is below all (not a candidate).
#define KEY_NAN 1u
#define KEY_LOWEST 0x007fffffu
DEV u32 key_of(float x) {
    u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
    u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return x == x ? key : KEY_NAN;
}
DEV float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// The lowest of the lanes that hold the largest key.
DEV int first_with(u32 key, u32 largest) { return __ffs(__ballot_sync(ALL_LANES, key == largest)) - 1; }

// What a group is judged by; a NaN in it counts for nothing.
DEV float judge(const u32 (&key)[PER_LANE], int group, int lane) {
    u32 first = KEY_LOWEST, second = KEY_LOWEST;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        bool inside = WIDTH % WARP == 0 ? j / max(WIDTH / WARP, 1) == group : (j * WARP + lane) / WIDTH == group;
        u32 k = inside ? key[j] : 0;
        if (k > first) {
            second = first, first = k;
        } else if (k > second) {
            second = k;
        }
    }
    u32 best = __reduce_max_sync(ALL_LANES, first);
    if (!TOP_TWO) return value_of(best);
    if (lane == first_with(first, best)) first = second;
    return __fadd_rn(value_of(best), value_of(__reduce_max_sync(ALL_LANES, first)));
}

// Takes the experts of all but the best groups out of the candidates.
DEV void keep_groups(u32 (&key)[PER_LANE], int lane) {
    u32 judged = 0, kept = 0;
#pragma unroll 8
    for (int g = 0; g < GROUPS; g++) {
        float score = judge(key, g, lane);
        if (lane == g) judged = key_of(score);
    }
    for (int i = 0; i < TOPK_GROUP; i++) {
        int g = first_with(judged, __reduce_max_sync(ALL_LANES, judged));
        kept |= 1u << g;
        if (lane == g) judged = 0;
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        if (e >= EXPERTS || !(kept >> (e / WIDTH) & 1)) key[j] = 0;
    }
}

// Lane k gets the expert of the k-th largest key.
DEV int select(u32 (&key)[PER_LANE], int lane) {
    int chosen = 0;
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
        if (lane == k) chosen = e;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            if (e == j * WARP + lane) key[j] = 0;
        }
    }
    return chosen;
}

// Lanes below TOP_K get the score of their choice; one that is no expert's gives NaN.
DEV float score_of(const float (&score)[PER_LANE], int chosen) {
    float found = __int_as_float(0x7fffffff);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        float s = __shfl_sync(ALL_LANES, score[j], chosen % WARP);
        if (u32(chosen) < EXPERTS && chosen / WARP == j) found = s;
    }
    return found;
}

// What the chosen scores are divided by, summed in the order of choice.
DEV float normaliser(float picked) {
    if (!NORM) return 1.0f;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < TOP_K; k++) sum = __fadd_rn(sum, __shfl_sync(ALL_LANES, picked, k));
    return __fadd_rn(sum, 1e-20f);
}

// Softmax over the warp's experts; the sum goes from the first expert to the last.
DEV void softmax(float (&x)[PER_LANE], float* row, int lane) {
    float largest = -INF;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        if (j * WARP + lane < EXPERTS) largest = fmaxf(largest, x[j]);
    }
    largest = warp_max(largest);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        x[j] = exp_rounded(__fsub_rn(x[j], largest));
        if (e < EXPERTS) row[e] = x[j];
    }
    __syncwarp();
    float sum = 0.0f;
#pragma unroll 16
    for (int e = 0; e < EXPERTS; e++) sum = __fadd_rn(sum, row[e]);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) x[j] = __fdiv_rn(x[j], sum);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    router_forward(const float* __restrict__ logits, const float* __restrict__ bias, const int* __restrict__ given,
                   float* __restrict__ scores, int* __restrict__ indices, float* __restrict__ weights, int n,
                   float scale) {
    __shared__ __align__(16) float rows[SIGMOID ? 1 : WARPS][EXPERTS + 3 & ~3];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    i64 t = i64(blockIdx.x) * WARPS + warp;
    if (t >= n) return;
    float score[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        score[j] = e < EXPERTS ? logits[t * EXPERTS + e] : 0.0f;
    }
    if (SIGMOID) {
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) score[j] = __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_rounded(-score[j])));
    } else {
        softmax(score, rows[SIGMOID ? 0 : warp], lane);
    }
    u32 key[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        if (e < EXPERTS) {
            scores[t * EXPERTS + e] = score[j];
            key[j] = key_of(bias ? __fadd_rn(score[j], bias[e]) : score[j]);
        } else {
            key[j] = 0;
        }
    }
    int chosen = 0;
    if (given) {
        if (lane < TOP_K) chosen = given[t * TOP_K + lane];
    } else {
        if (GROUPS > TOPK_GROUP) keep_groups(key, lane);
        chosen = select(key, lane);
    }
    float picked = score_of(score, chosen);
    float weight = __fmul_rn(__fdiv_rn(picked, normaliser(picked)), scale);
    if (lane < TOP_K) {
        indices[t * TOP_K + lane] = chosen;
        weights[t * TOP_K + lane] = weight;
    }
}

// With w_k = scale s_k / Z: ds_k += scale / Z (dw_k - sum_j dw_j s_j / Z); then through the score function.
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    router_backward(const float* __restrict__ scores, const int* __restrict__ indices,
                    const float* __restrict__ d_weights, const float* __restrict__ d_scores,
                    float* __restrict__ d_logits, int n, float scale) {
    int lane = threadIdx.x % WARP;
    i64 t = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (t >= n) return;
    float score[PER_LANE], d[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        score[j] = e < EXPERTS ? scores[t * EXPERTS + e] : 0.0f;
        d[j] = d_scores && e < EXPERTS ? d_scores[t * EXPERTS + e] : 0.0f;
    }
    int chosen = lane < TOP_K ? indices[t * TOP_K + lane] : 0;
    float dw = lane < TOP_K ? d_weights[t * TOP_K + lane] : 0.0f;
    float picked = score_of(score, chosen), z = normaliser(picked), through = 0.0f;
    if (NORM) {
        float part = __fmul_rn(dw, __fdiv_rn(picked, z));
#pragma unroll
        for (int k = 0; k < TOP_K; k++) through = __fadd_rn(through, __shfl_sync(ALL_LANES, part, k));
    }
    float own = __fmul_rn(__fdiv_rn(scale, z), __fsub_rn(dw, through));
#pragma unroll
    for (int k = 0; k < TOP_K; k++) {
        int e = __shfl_sync(ALL_LANES, chosen, k);
        float g = __shfl_sync(ALL_LANES, own, k);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            if (e == j * WARP + lane) d[j] = __fadd_rn(d[j], g);
        }
    }
    float mean = 0.0f;
    if (!SIGMOID) {
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) mean += d[j] * score[j];
        mean = warp_sum(mean);
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        int e = j * WARP + lane;
        float s = score[j];
        float g = SIGMOID ? __fmul_rn(d[j], __fmul_rn(s, __fsub_rn(1.0f, s))) : s * (d[j] - mean);
        if (e < EXPERTS) d_logits[t * EXPERTS + e] = g;
    }
}
