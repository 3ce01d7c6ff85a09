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

// Every thread of the team gets the sum, whose order depends on TEAM alone.
DEV float team_sum(float x) {
    __shared__ float parts[TEAM / WARP];
    return block_sum<TEAM>(x, parts);
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

#ifdef INPUT
// The gradient of the input and of the weight, or one of them, from one reading of dy and x. With g = dy * w:
// dx = rstd * (g - x * rstd^2 * mean(g * x)), and the weight's gradient is the sum of dy * x * rstd over all rows. A team
// takes every ROWS-th row of the block's `block_rows`, the next one on its way meanwhile if registers allow it, and holds
// what it has of the sum; teams are added in their order, then blocks in theirs. The sum's bits are the same whether dx
// is asked for or not.
//
// Defines: INPUT, WEIGHT (what is asked for).
static const bool AHEAD = PER_THREAD * N <= 16;

struct Row {
    Pack x[PER_THREAD], dy[PER_THREAD], old[PER_THREAD];
    float r;
};

extern "C" __global__ void __launch_bounds__(TEAM* ROWS)
    rmsnorm_backward(const T* dy, const T* x, i64 x_stride, const float* w, const float* rstd, T* dx, i64 dx_stride,
                     float* partial, int n, int d, int block_rows, int accumulate) {
    const int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM, packs = d / N;
    const int begin = blockIdx.x * block_rows, end = min(begin + block_rows, n);
    auto load = [&](Row& to, i64 row) {
        to.r = rstd[row];
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++)
            if (thread + j * TEAM < packs) {
                const int at = (thread + j * TEAM) * N;
                to.x[j].load(x + row * x_stride + at);
                to.dy[j].load(dy + row * d + at);
                if (INPUT && accumulate) to.old[j].load(dx + row * dx_stride + at);
            }
    };
    float sum[WEIGHT ? PER_THREAD : 1][N];
#pragma unroll
    for (int j = 0; j < (WEIGHT ? PER_THREAD : 1); j++)
#pragma unroll
        for (int i = 0; i < N; i++) sum[j][i] = 0.0f;
    Row row, next;
    if (AHEAD && begin + team < end) load(next, begin + team);
    // Teams of several warps are alone in their block, and so make the same number of steps.
    for (int at_row = begin + team; at_row < end; at_row += ROWS) {
        if (AHEAD) {
            row = next;
            if (at_row + ROWS < end) load(next, at_row + ROWS);
        } else {
            load(row, at_row);
        }
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++)
            if (thread + j * TEAM < packs) {
                float v[N], g[N], weight[N];
                row.x[j].to(v);
                row.dy[j].to(g);
                if (INPUT) load_weights(w + (thread + j * TEAM) * N, weight);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    if (WEIGHT) sum[WEIGHT ? j : 0][i] += g[i] * (v[i] * row.r);
                    if (INPUT) dot += g[i] * weight[i] * v[i];
                }
            }
        if constexpr (INPUT) {
            const float share = row.r * row.r * (team_sum(dot) / d);
            T* to = dx + at_row * dx_stride;
#pragma unroll
            for (int j = 0; j < PER_THREAD; j++)
                if (thread + j * TEAM < packs) {
                    const int at = (thread + j * TEAM) * N;
                    float v[N], g[N], weight[N];
                    row.x[j].to(v);
                    row.dy[j].to(g);
                    load_weights(w + at, weight);
#pragma unroll
                    for (int i = 0; i < N; i++) g[i] = row.r * (g[i] * weight[i] - v[i] * share);
                    if (accumulate) {
                        row.old[j].to(v);
#pragma unroll
                        for (int i = 0; i < N; i++) g[i] += v[i];
                    }
                    Pack out;
                    out.from(g);
                    out.store(to + at);
                }
        }
    }
    if (!WEIGHT) return;
    partial += i64(blockIdx.x) * d;
    if constexpr (ROWS == 1) {
#pragma unroll
        for (int j = 0; j < (WEIGHT ? PER_THREAD : 1); j++)
            if (thread + j * TEAM < packs) {
#pragma unroll
                for (int i = 0; i < N; i++) partial[(thread + j * TEAM) * N + i] = sum[j][i];
            }
    } else {
        __shared__ float sums[ROWS][TEAM * PER_THREAD * N];
#pragma unroll
        for (int j = 0; j < (WEIGHT ? PER_THREAD : 1); j++)
#pragma unroll
            for (int i = 0; i < N; i++) sums[team][(thread + j * TEAM) * N + i] = sum[j][i];
        __syncthreads();
        for (int column = threadIdx.x; column < d; column += TEAM * ROWS) {
            float total = sums[0][column];
#pragma unroll
            for (int t = 1; t < ROWS; t++) total += sums[t][column];
            partial[column] = total;
        }
    }
}

// dw (+)= the blocks' sums: a warp adds every WARPS-th of them, in order, then the warps' sums are added in theirs.
#define WARPS 32
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    rmsnorm_backward_sum(const float* partial, float* dw, int blocks, int d, int accumulate) {
    __shared__ float sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < d) {
#pragma unroll 16
        for (int b = warp; b < blocks; b += WARPS) sum += partial[i64(b) * d + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= d) return;
    float total = sums[0][lane];
#pragma unroll
    for (int i = 1; i < WARPS; i++) total += sums[i][lane];
    dw[column] = accumulate ? dw[column] + total : total;
}
#endif
