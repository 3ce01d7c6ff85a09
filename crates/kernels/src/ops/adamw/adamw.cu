// AdamW over the arena in one launch, in the CPU's operations without a fused one: the same bits. A block updates BLOCK
// elements at most, counted from the arena's start, of one segment.
//
// Compiled with WIDE (every pointer is aligned to a vector).

#define THREADS_OF 256
// One wide access a thread: with two to eight the step takes 1 to 3 % longer.
#define BLOCK (THREADS_OF * 4)

struct Segment {
    // Blocks of the segments before.
    u32 first;
    u32 decay;
    u32 start_low, start_high, end_low, end_high;
};

struct Constants {
    float clip, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps, keep;
};

DEV float update(const Constants& c, float w, float g, float& m, float& v) {
    g = __fmul_rn(g, c.clip);
    m = __fadd_rn(m, __fmul_rn(c.one_minus_beta1, __fsub_rn(g, m)));
    v = __fadd_rn(__fmul_rn(v, c.beta2), __fmul_rn(__fmul_rn(c.one_minus_beta2, g), g));
    float root = __fadd_rn(__fmul_rn(__fsqrt_rn(v), c.root_correction), c.eps);
    return __fsub_rn(__fmul_rn(w, c.keep), __fdiv_rn(__fmul_rn(c.step_size, m), root));
}

// The last segment that begins at or before this block.
DEV Segment find(const Segment* segments, int count) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (segments[middle].first <= blockIdx.x) low = middle;
        else high = middle;
    }
    return segments[low];
}

// False for a NaN, which then stays.
DEV float clip_factor(float clip, float norm) {
    if (clip == INF) return 1.0f;
    float factor = __fdiv_rn(clip, __fadd_rn(norm, 1e-6f));
    return factor > 1.0f ? 1.0f : factor;
}

// `schedule` is lr / (1 - b1^t), 1 / sqrt(1 - b2^t), 1 - lr wd.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    adamw_step(float* __restrict__ master, const float* __restrict__ grad, float* __restrict__ m,
               float* __restrict__ v, bf16* __restrict__ compute, const Segment* __restrict__ segments, int count,
               const float* __restrict__ norm, const float* __restrict__ schedule, float clip, float one_minus_beta1,
               float beta2, float one_minus_beta2, float eps) {
    Segment s = find(segments, count);
    Constants c = {clip_factor(clip, norm[0]), one_minus_beta1, beta2, one_minus_beta2, schedule[0], schedule[1], eps,
                   s.decay ? schedule[2] : 1.0f};
    u64 start = u64(s.start_high) << 32 | s.start_low, end = u64(s.end_high) << 32 | s.end_low;
    u64 block = (start / BLOCK + (blockIdx.x - s.first)) * BLOCK;
    if (WIDE && block >= start && block + BLOCK <= end) {
        u64 i = block + threadIdx.x * 4;
        Vec<float> vw, vg, vm, vv;
        vw.load(master + i), vg.load(grad + i), vm.load(m + i), vv.load(v + i);
        float xw[4], xg[4], xm[4], xv[4];
        vw.to(xw), vg.to(xg), vm.to(xm), vv.to(xv);
#pragma unroll
        for (int j = 0; j < 4; j++) xw[j] = update(c, xw[j], xg[j], xm[j], xv[j]);
        vw.from(xw), vm.from(xm), vv.from(xv);
        vw.store(master + i), vm.store(m + i), vv.store(v + i);
        if (compute) {
            *reinterpret_cast<uint2*>(compute + i) = make_uint2(narrow2(xw[0], xw[1]), narrow2(xw[2], xw[3]));
        }
        return;
    }
    for (u64 i = max(start, block) + threadIdx.x; i < min(end, block + BLOCK); i += THREADS_OF) {
        float w = update(c, master[i], grad[i], m[i], v[i]);
        master[i] = w;
        if (compute) compute[i] = narrow<bf16>(w);
    }
}
