// SwiGLU, element by element in f32: y = silu(gate) * up, and its gradient in place.
//
// Defines: ELEM (the elements' type), WIDE (rows of `width` elements begin at 16 bytes and are a multiple of 16 bytes
// long), TEAM (backward: threads that share a row, a warp or a whole block), STEP (packs of a thread in flight).

typedef ELEM T;
#if WIDE
typedef Vec<T> Pack;
#else
typedef Single<T> Pack;
#endif
static constexpr int N = Pack::N;

#define THREADS 256

// 1 / (1 + e^-x); where e^-x is infinite, 0. The reciprocal is off by one unit of the last place at most.
DEV float sigmoid(float x) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(1.0f + expf(-x)));
    return r;
}

// `rows`: the rows to compute, a number in device memory; null for all n. Packs are numbered through all rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_forward(const T* gate_up, T* y, const int* rows, i64 n, u32 width) {
    const i64 live = rows ? min(i64(rows[0]), n) : n;
    const u32 packs = width / N;
    // The first pack of the block, by a division of 64 bits; the others from there, in 32.
    const i64 first = i64(blockIdx.x) * (THREADS * STEP), first_row = first / packs;
    const u32 first_pack = u32(first - first_row * packs);
    Pack gate[STEP], up[STEP];
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = first_pack + s * THREADS + threadIdx.x;
        const i64 row = first_row + at / packs;
        if (row < live) {
            const T* p = gate_up + row * 2 * width + at % packs * N;
            gate[s].load(p);
            up[s].load(p + width);
        }
    }
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = first_pack + s * THREADS + threadIdx.x;
        if (first_row + at / packs < live) {
            float g[N], u[N];
            gate[s].to(g);
            up[s].to(u);
#pragma unroll
            for (int i = 0; i < N; i++) g[i] = g[i] * sigmoid(g[i]) * u[i];
            gate[s].from(g);
            gate[s].store(y + (first_row * packs + at) * N);
        }
    }
}

// Returns dy . y.
DEV float backward_pack(Pack& d, Pack& gate, Pack& up, float weight) {
    float g[N], u[N], dy[N], y[N], dot = 0.0f;
    gate.to(g);
    up.to(u);
    d.to(dy);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float s = sigmoid(g[i]), weighted = dy[i] * weight, silu = g[i] * s;
        // As the forward rounded it.
        y[i] = widen(narrow<T>(silu * u[i]));
        dot += dy[i] * y[i];
        y[i] *= weight;
        g[i] = weighted * u[i] * (s * (1.0f + g[i] * (1.0f - s)));
        u[i] = weighted * silu;
    }
    gate.from(g);
    up.from(u);
    d.from(y);
    return dot;
}

// dy becomes weights * y, gate_up its gradient, and d_weights dy . y, of the first `rows` rows. weights and d_weights
// may both be null: then all weights are 1.
extern "C" __global__ void __launch_bounds__(TEAM == WARP ? THREADS : TEAM)
    swiglu_backward(T* dy, T* gate_up, const int* rows, const float* weights, float* d_weights, i64 n, u32 width) {
    const i64 live = rows ? min(i64(rows[0]), n) : n;
    const i64 row = TEAM == WARP ? i64(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP : i64(blockIdx.x);
    if (row >= live) return;
    const u32 packs = width / N;
    const float weight = weights ? weights[row] : 1.0f;
    dy += row * width, gate_up += row * 2 * width;
    float dot = 0.0f;
    for (u32 first = threadIdx.x % TEAM; first < packs; first += STEP * TEAM) {
        Pack d[STEP], gate[STEP], up[STEP];
#pragma unroll
        for (int s = 0; s < STEP; s++)
            if (first + s * TEAM < packs) {
                const u32 at = (first + s * TEAM) * N;
                gate[s].load(gate_up + at);
                up[s].load(gate_up + width + at);
                d[s].load(dy + at);
            }
#pragma unroll
        for (int s = 0; s < STEP; s++)
            if (first + s * TEAM < packs) {
                const u32 at = (first + s * TEAM) * N;
                dot += backward_pack(d[s], gate[s], up[s], weight);
                gate[s].store(gate_up + at);
                up[s].store(gate_up + width + at);
                d[s].store(dy + at);
            }
    }
    if (!weights) return;
    __shared__ float scratch[TEAM / WARP];
    dot = block_sum<TEAM>(dot, scratch);
    if (threadIdx.x % TEAM == 0) d_weights[row] = dot;
}
