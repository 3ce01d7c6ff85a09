// The norm over tensors: sums of squares in f64 over blocks counted from each tensor's start, a tensor's blocks in a
// fixed order, then the tensors one after the other.

#define THREADS_OF 256
#define BLOCK 32768
// The second launch is one block.
#define WARPS 32

struct Tensor {
    // Blocks of the tensors before.
    u32 first;
    u32 blocks;
    u32 start_low, start_high, end_low, end_high;
};

DEV Tensor find(const Tensor* tensors, int count) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (tensors[middle].first <= blockIdx.x) low = middle;
        else high = middle;
    }
    return tensors[low];
}

// Which thread takes an element depends on its distance from the tensor's start alone; the start's alignment decides
// only how it is read.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    grad_squares(const float* __restrict__ grad, const Tensor* __restrict__ tensors, int count,
                 double* __restrict__ partial) {
    __shared__ double scratch[THREADS_OF / WARP];
    Tensor t = find(tensors, count);
    u64 start = u64(t.start_high) << 32 | t.start_low, end = u64(t.end_high) << 32 | t.end_low;
    u64 block = start + u64(blockIdx.x - t.first) * BLOCK;
    int length = int(min(end - block, u64(BLOCK)));
    const float* x = grad + block;
    bool aligned = u64(x) % 16 == 0;
    double sum[4] = {0.0, 0.0, 0.0, 0.0};
#pragma unroll 4
    for (int first = 0; first < BLOCK; first += THREADS_OF * 4) {
        int i = first + threadIdx.x * 4;
        float own[4];
        if (aligned && i + 4 <= length) {
            Vec<float> wide;
            wide.load(x + i);
            wide.to(own);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) own[j] = i + j < length ? x[i + j] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] = fma(double(own[j]), double(own[j]), sum[j]);
    }
    double total = block_sum<THREADS_OF>((sum[0] + sum[1]) + (sum[2] + sum[3]), scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// out = the root of the sum. `sums` holds `count` numbers.
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    grad_norm(const Tensor* __restrict__ tensors, int count, const double* __restrict__ partial, double* sums,
              float* __restrict__ out) {
    int lane = threadIdx.x % WARP;
    for (int t = threadIdx.x / WARP; t < count; t += WARPS) {
        const double* own = partial + tensors[t].first;
        int blocks = tensors[t].blocks;
        double sum = 0.0;
#pragma unroll 8
        for (int b = lane; b < blocks; b += WARP) sum += own[b];
        sum = warp_sum(sum);
        if (lane == 0) sums[t] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    double total = 0.0;
    for (int first = 0; first < count; first += WARP) {
        double own = first + lane < count ? sums[first + lane] : 0.0;
#pragma unroll
        for (int i = 0; i < WARP; i++) total += __shfl_sync(ALL_LANES, own, i);
    }
    if (lane == 0) out[0] = float(sqrt(total));
}
