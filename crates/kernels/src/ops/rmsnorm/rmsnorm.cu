// RMSNorm. A team of TEAM threads holds a row in registers between the sum over it and what is made of it, so that
// every element is read once. A team is a warp, of which a block has ROWS, or a block of several warps (ROWS is 1).
//
// Defines: ELEM (the elements' type), WIDE (rows begin at 16 bytes and their length is a multiple of 16 bytes), TEAM,
// ROWS, and PER_THREAD, the packs of a row that one thread holds at most: TEAM * PER_THREAD packs are at least a row's.

typedef ELEM T;
#if WIDE
typedef Vec<T> Pack;
#else
typedef Single<T> Pack;
#endif
static constexpr int N = Pack::N;

// The weights of a pack.
DEV void load_weights(const float* w, float (&x)[N]) {
#if WIDE
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 v = *reinterpret_cast<const float4*>(w + i);
        x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
#else
    x[0] = *w;
#endif
}

// Every thread of the team gets the sum, whose order depends on TEAM alone. Once a kernel.
DEV float team_sum(float x) {
    x = warp_sum(x);
    if (TEAM == WARP) return x;
    __shared__ float parts[TEAM / WARP];
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = parts[0];
#pragma unroll
    for (int i = 1; i < TEAM / WARP; i++) total += parts[i];
    return total;
}

extern "C" __global__ void __launch_bounds__(TEAM* ROWS)
    rmsnorm_forward(const T* x, i64 x_stride, const float* w, T* y, float* rstd, int n, int d, float eps) {
    const int row = blockIdx.x * ROWS + threadIdx.x / TEAM, thread = threadIdx.x % TEAM, packs = d / N;
    if (row >= n) return;
    x += row * x_stride, y += i64(row) * d;
    Pack held[PER_THREAD];
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (thread + j * TEAM < packs) held[j].load(x + (thread + j * TEAM) * N);
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (thread + j * TEAM < packs) {
            float v[N];
            held[j].to(v);
#pragma unroll
            for (int i = 0; i < N; i++) square += v[i] * v[i];
        }
    const float r = 1.0f / sqrtf(team_sum(square) / d + eps);
    if (thread == 0) rstd[row] = r;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (thread + j * TEAM < packs) {
            const int at = (thread + j * TEAM) * N;
            float v[N], weight[N];
            held[j].to(v);
            load_weights(w + at, weight);
#pragma unroll
            for (int i = 0; i < N; i++) v[i] = v[i] * r * weight[i];
            held[j].from(v);
            held[j].store(y + at);
        }
}

// With g = dy * w: dx = rstd * (g - x * rstd^2 * mean(g * x)).
extern "C" __global__ void __launch_bounds__(TEAM* ROWS)
    rmsnorm_backward_input(const T* dy, const T* x, i64 x_stride, const float* w, const float* rstd, T* dx,
                           i64 dx_stride, int n, int d, int accumulate) {
    const int row = blockIdx.x * ROWS + threadIdx.x / TEAM, thread = threadIdx.x % TEAM, packs = d / N;
    if (row >= n) return;
    x += row * x_stride, dy += i64(row) * d, dx += row * dx_stride;
    const float r = rstd[row];
    Pack held_x[PER_THREAD], held_dy[PER_THREAD], old[PER_THREAD];
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (thread + j * TEAM < packs) {
            const int at = (thread + j * TEAM) * N;
            held_x[j].load(x + at);
            held_dy[j].load(dy + at);
            if (accumulate) old[j].load(dx + at);
        }
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (thread + j * TEAM < packs) {
            float v[N], g[N], weight[N];
            held_x[j].to(v);
            held_dy[j].to(g);
            load_weights(w + (thread + j * TEAM) * N, weight);
#pragma unroll
            for (int i = 0; i < N; i++) dot += g[i] * weight[i] * v[i];
        }
    const float share = r * r * (team_sum(dot) / d);
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++)
        if (thread + j * TEAM < packs) {
            const int at = (thread + j * TEAM) * N;
            float v[N], g[N], weight[N];
            held_x[j].to(v);
            held_dy[j].to(g);
            load_weights(w + at, weight);
#pragma unroll
            for (int i = 0; i < N; i++) g[i] = r * (g[i] * weight[i] - v[i] * share);
            if (accumulate) {
                old[j].to(v);
#pragma unroll
                for (int i = 0; i < N; i++) g[i] += v[i];
            }
            held_x[j].from(g);
            held_x[j].store(dx + at);
        }
}

// The weight's gradient: a lane owns a pack of columns, a warp every WARPS-th row of the block's `block_rows`, STEP of
// them in flight. What the warps found is added in their order, then what the blocks found in theirs.
#define WARPS 8
#define STEP 4

// Of one block of rows: added to dw if it is the only one, else to `partial[blocks][d]`.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    rmsnorm_backward_weight(const T* dy, const T* x, i64 x_stride, const float* rstd, float* partial, float* dw, int n,
                            int d, int block_rows) {
    __shared__ float sums[WARPS][WARP * N];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int at = (blockIdx.x * WARP + lane) * N;
    const int begin = blockIdx.y * block_rows, end = min(begin + block_rows, n);
    float sum[N] = {};
    if (at < d) {
        int row = begin + warp;
        for (; row + (STEP - 1) * WARPS < end; row += STEP * WARPS) {
            Pack g[STEP], v[STEP];
            float r[STEP];
#pragma unroll
            for (int s = 0; s < STEP; s++) {
                const i64 k = row + s * WARPS;
                g[s].load(dy + k * d + at);
                v[s].load(x + k * x_stride + at);
                r[s] = rstd[k];
            }
#pragma unroll
            for (int s = 0; s < STEP; s++) {
                float a[N], b[N];
                g[s].to(a);
                v[s].to(b);
#pragma unroll
                for (int i = 0; i < N; i++) sum[i] += a[i] * (b[i] * r[s]);
            }
        }
        for (; row < end; row += WARPS) {
            Pack g, v;
            float a[N], b[N];
            g.load(dy + i64(row) * d + at);
            v.load(x + row * x_stride + at);
            g.to(a);
            v.to(b);
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] += a[i] * (b[i] * rstd[row]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) sums[warp][lane * N + i] = sum[i];
    __syncthreads();
    const int column = blockIdx.x * WARP * N + threadIdx.x;
    if (threadIdx.x >= WARP * N || column >= d) return;
    float total = sums[0][threadIdx.x];
#pragma unroll
    for (int i = 1; i < WARPS; i++) total += sums[i][threadIdx.x];
    if (gridDim.y == 1)
        dw[column] += total;
    else
        partial[i64(blockIdx.y) * d + column] = total;
}

// dw += the blocks' sums: a warp adds every WARPS-th of them, in order, then the warps' sums are added in theirs.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    rmsnorm_backward_weight_sum(const float* partial, float* dw, int blocks, int d) {
    __shared__ float sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < d) {
#pragma unroll 8
        for (int b = warp; b < blocks; b += WARPS) sum += partial[i64(b) * d + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= d) return;
    float total = sums[0][lane];
#pragma unroll
    for (int i = 1; i < WARPS; i++) total += sums[i][lane];
    dw[column] += total;
}
