// Zeros for the weight gradients of experts without rows, whose products have no tile that could write them.

extern "C" __global__ void zero_empty(const int* offsets, float* dw, i64 each) {
    int e = blockIdx.y;
    if (offsets[e + 1] > offsets[e]) return;
    i64 step = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < each; i += step) dw[e * each + i] = 0;
}
