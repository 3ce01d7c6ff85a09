// Tokens that chose each expert, added up.

extern "C" __global__ void expert_load(const int* __restrict__ offsets, int* __restrict__ counts, int experts) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e < experts) counts[e] += offsets[e + 1] - offsets[e];
}
