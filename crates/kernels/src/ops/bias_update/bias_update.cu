// The gate's biases after a step: one block.

#define THREADS_OF 256

extern "C" __global__ void __launch_bounds__(THREADS_OF)
    bias_update(const int* __restrict__ load, float* __restrict__ bias, int experts, float gamma) {
    __shared__ i64 scratch[THREADS_OF / WARP];
    i64 total = 0;
    for (int e = threadIdx.x; e < experts; e += THREADS_OF) total += load[e];
    total = block_sum<THREADS_OF>(total, scratch);
    for (int e = threadIdx.x; e < experts; e += THREADS_OF) {
        // Integers: the load against the mean without rounding.
        i64 above = i64(load[e]) * experts - total;
        float sign = above > 0 ? 1.0f : above < 0 ? -1.0f : 0.0f;
        bias[e] = __fsub_rn(bias[e], __fmul_rn(gamma, sign));
    }
}
