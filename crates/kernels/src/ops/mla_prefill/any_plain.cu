// Attention in f32 arithmetic, without matrix units: for f32, and for head dims that the other kernels have no room
// for. Beside it what every backward on this device needs: rowsum(dout * out), and the sum of dk_pe over heads.
// Defines: ELEM, the type of all but lse; NOPE, ROPE, VDIM.
// A block of 16 x 16 threads owns 64 rows (queries, or keys in `backward_keys`) and walks over tiles of 64 of the other
// kind in order; a thread holds 4 x 4 of each 64 x 64 product. Operands go through shared memory 16 of k at a time, so
// no head dim is too large for it.

typedef ELEM T;
static const int P = NOPE;
static const int R = ROPE;
static const int W = VDIM;
static const int D = P + R;
static const int UP = P + W;
static const int TILE = 64;
static const int STEP = 16;
static const int THREADS = 256;
// Rows of shared memory: 16 bytes apart from a multiple of the banks.
static const int LD = TILE + 4;
static const int GROUPS_D = (D + TILE - 1) / TILE;
static const int GROUPS_W = (W + TILE - 1) / TILE;

// One block's rows of one sequence. Tiles of sequence s take the slots from cu[s] / TILE + s on: their number is never
// less than the tiles that its rows fill, so the grid needs no host to know the lengths.
struct Rows {
    int seq, at, n;
};
DEV bool find_rows(const int* cu, int seqs, int slot, Rows& t) {
    int low = 0, high = seqs;
    while (high - low > 1) {
        int s = (low + high) / 2;
        if (cu[s] / TILE + s <= slot) low = s;
        else high = s;
    }
    int len = cu[low + 1] - cu[low];
    t.seq = low;
    t.at = (slot - cu[low] / TILE - low) * TILE;
    t.n = min(TILE, len - t.at);
    return t.n > 0;
}

// c += left x right over one step of k; both lie in shared memory as [k][64].
DEV void multiply_step(float (&c)[4][4], const float* left, const float* right) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int k = 0; k < STEP; k++) {
        float4 a = *reinterpret_cast<const float4*>(left + k * LD + ty * 4);
        float4 b = *reinterpret_cast<const float4*>(right + k * LD + tx * 4);
        float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) c[i][j] = fmaf(x[i], y[j], c[i][j]);
    }
}

struct Scratch {
    float left[STEP * LD];
    float right[STEP * LD];
    float tile[TILE * LD];
};

// c[i][j] += sum over k < K of left(i, k) * right(j, k): both from device memory.
template <int K, typename A, typename B> DEV void multiply_rows(float (&c)[4][4], Scratch& s, A left, B right) {
    for (int k0 = 0; k0 < K; k0 += STEP) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE * STEP / THREADS; i++) {
            int r = threadIdx.x / STEP + i * (THREADS / STEP), k = threadIdx.x % STEP;
            bool there = k0 + k < K;
            s.left[k * LD + r] = there ? left(r, k0 + k) : 0.0f;
            s.right[k * LD + r] = there ? right(r, k0 + k) : 0.0f;
        }
        __syncthreads();
        multiply_step(c, s.left, s.right);
    }
}

// c[g][i][j] += sum over the tile's k of tile[k][i] * right(k, 64 g + j), for columns below N.
template <int N, int G, typename B> DEV void multiply_tile(float (&c)[G][4][4], Scratch& s, B right) {
#pragma unroll
    for (int g = 0; g < G; g++)
        for (int k0 = 0; k0 < TILE; k0 += STEP) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < TILE * STEP / THREADS; i++) {
                int k = threadIdx.x / TILE + i * (THREADS / TILE), j = threadIdx.x % TILE;
                s.right[k * LD + j] = g * TILE + j < N ? right(k0 + k, g * TILE + j) : 0.0f;
            }
            __syncthreads();
            multiply_step(c[g], s.tile + k0 * LD, s.right);
        }
}

// tile[column][row] = x: what is read next as k is written as columns. The barrier keeps it from those that still read.
DEV void store_tile(Scratch& s, const float (&x)[4][4]) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++)
        *reinterpret_cast<float4*>(s.tile + (tx * 4 + j) * LD + ty * 4) =
            make_float4(x[0][j], x[1][j], x[2][j], x[3][j]);
}

template <int G> DEV void clear(float (&c)[G][4][4]) {
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
        for (int i = 0; i < 16; i++) c[g][i / 4][i % 4] = 0.0f;
}

// Over the 16 threads that hold a row.
DEV float row_max(float x) {
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}
DEV float row_sum(float x) {
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}

// A head's queries, keys and values from some row of the batch on.
struct Head {
    const T *q, *up, *pe;
    i64 q_stride, up_stride, pe_stride;
    DEV float query(int r, int c) const { return widen(q[r * q_stride + c]); }
    DEV float key(int r, int c) const {
        return widen(c < P ? up[r * up_stride + c] : pe[r * pe_stride + (c - P)]);
    }
    DEV float value(int r, int c) const { return widen(up[r * up_stride + P + c]); }
};
DEV Head head_at(const T* q, const T* kv_up, const T* k_pe, i64 q0, i64 k0, int head, int heads, i64 pe_stride) {
    Head x;
    x.q = q + (q0 * heads + head) * D;
    x.up = kv_up + (k0 * heads + head) * UP;
    x.pe = k_pe + k0 * pe_stride;
    x.q_stride = i64(heads) * D, x.up_stride = i64(heads) * UP, x.pe_stride = pe_stride;
    return x;
}

// out and lse. Grid: heads x slots; those with the most keys first.
extern "C" __global__ void __launch_bounds__(THREADS) mla_plain_forward(
    const T* q, const T* kv_up, const T* k_pe, const int* cu_q, const int* cu_k, T* out, float* lse, int seqs,
    int heads, int slots, i64 pe_stride, float scale) {
    __shared__ __align__(16) Scratch scratch;
    int head = blockIdx.x % heads;
    Rows t;
    if (!find_rows(cu_q, seqs, slots - 1 - blockIdx.x / heads, t)) return;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int q0 = cu_q[t.seq] + t.at, k0 = cu_k[t.seq];
    // Query i of the tile sees the keys below ahead + i.
    int ahead = (cu_k[t.seq + 1] - k0) - (cu_q[t.seq + 1] - cu_q[t.seq]) + t.at + 1;
    int keys = max(0, ahead + t.n - 1);
    Head x = head_at(q, kv_up, k_pe, q0, k0, head, heads, pe_stride);
    float o[GROUPS_W][4][4], top[4], sum[4];
    clear(o);
#pragma unroll
    for (int i = 0; i < 4; i++) top[i] = -INF, sum[i] = 0.0f;
    for (int base = 0; base < keys; base += TILE) {
        float s[1][4][4];
        clear(s);
        multiply_rows<D>(s[0], scratch, [&](int r, int c) { return r < t.n ? x.query(r, c) : 0.0f; },
                         [&](int r, int c) { return base + r < keys ? x.key(base + r, c) : 0.0f; });
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int visible = ahead + ty * 4 + i - base;
            float high = -INF;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[0][i][j] = tx * 4 + j < visible ? s[0][i][j] * scale : -INF;
                high = fmaxf(high, s[0][i][j]);
            }
            high = fmaxf(top[i], row_max(high));
            // As long as a query has seen no key its probabilities are exp(-inf), whatever is taken off.
            float off = high == -INF ? 0.0f : high, alpha = expf(top[i] - off);
            top[i] = high;
            sum[i] *= alpha;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[0][i][j] = expf(s[0][i][j] - off);
                sum[i] += s[0][i][j];
            }
#pragma unroll
            for (int g = 0; g < GROUPS_W; g++)
#pragma unroll
                for (int j = 0; j < 4; j++) o[g][i][j] *= alpha;
        }
        store_tile(scratch, s[0]);
        multiply_tile<W>(o, scratch, [&](int k, int c) { return base + k < keys ? x.value(base + k, c) : 0.0f; });
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = ty * 4 + i;
        float total = row_sum(sum[i]);
        if (r >= t.n) continue;
        i64 at = i64(q0 + r) * heads + head;
#pragma unroll
        for (int g = 0; g < GROUPS_W; g++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int c = g * TILE + tx * 4 + j;
                if (c < W) out[at * W + c] = narrow<T>(total > 0.0f ? o[g][i][j] / total : 0.0f);
            }
        if (tx == 0) lse[at] = total > 0.0f ? top[i] + logf(total) : -INF;
    }
}

// A query that sees nothing, or is none, has +inf, so that its probabilities are 0.
DEV float lse_of(const float* lse, i64 at, bool there) {
    float x = there ? lse[at] : -INF;
    return x == -INF ? INF : x;
}

// dq. Grid as in forward. delta [Nq, H] is rowsum(dout * out).
extern "C" __global__ void __launch_bounds__(THREADS) mla_plain_backward_queries(
    const T* q, const T* kv_up, const T* k_pe, const int* cu_q, const int* cu_k, const T* dout, const float* lse,
    const float* delta, T* dq, int seqs, int heads, int slots, i64 pe_stride, float scale) {
    __shared__ __align__(16) Scratch scratch;
    int head = blockIdx.x % heads;
    Rows t;
    if (!find_rows(cu_q, seqs, slots - 1 - blockIdx.x / heads, t)) return;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int q0 = cu_q[t.seq] + t.at, k0 = cu_k[t.seq];
    int ahead = (cu_k[t.seq + 1] - k0) - (cu_q[t.seq + 1] - cu_q[t.seq]) + t.at + 1;
    int keys = max(0, ahead + t.n - 1);
    Head x = head_at(q, kv_up, k_pe, q0, k0, head, heads, pe_stride);
    const i64 at = i64(q0) * heads + head;
    float acc[GROUPS_D][4][4], row_lse[4], mean[4];
    clear(acc);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = ty * 4 + i;
        row_lse[i] = lse_of(lse, at + i64(r) * heads, r < t.n);
        mean[i] = r < t.n ? delta[at + i64(r) * heads] : 0.0f;
    }
    for (int base = 0; base < keys; base += TILE) {
        float s[1][4][4], dp[1][4][4];
        clear(s);
        clear(dp);
        multiply_rows<D>(s[0], scratch, [&](int r, int c) { return r < t.n ? x.query(r, c) : 0.0f; },
                         [&](int r, int c) { return base + r < keys ? x.key(base + r, c) : 0.0f; });
        multiply_rows<W>(
            dp[0], scratch, [&](int r, int c) { return r < t.n ? widen(dout[(at + i64(r) * heads) * W + c]) : 0.0f; },
            [&](int r, int c) { return base + r < keys ? x.value(base + r, c) : 0.0f; });
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float p = expf(s[0][i][j] * scale - row_lse[i]);
                p = tx * 4 + j < ahead + ty * 4 + i - base ? p : 0.0f;
                s[0][i][j] = p * (dp[0][i][j] - mean[i]);
            }
        store_tile(scratch, s[0]);
        multiply_tile<D>(acc, scratch, [&](int k, int c) { return base + k < keys ? x.key(base + k, c) : 0.0f; });
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = ty * 4 + i;
        if (r >= t.n) continue;
#pragma unroll
        for (int g = 0; g < GROUPS_D; g++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int c = g * TILE + tx * 4 + j;
                if (c < D) dq[(at + i64(r) * heads) * D + c] = narrow<T>(acc[g][i][j] * scale);
            }
    }
}

// dkv_up of the heads first .. first + some, and their parts of dk_pe in f32, pe_parts [Nk, some, R].
// Grid: some x slots; those with the most queries first.
extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_plain_backward_keys(
    const T* q, const T* kv_up, const T* k_pe, const int* cu_q, const int* cu_k, const T* dout, const float* lse,
    const float* delta, T* dkv_up, float* pe_parts, int seqs, int heads, int first, int some, i64 pe_stride,
    float scale) {
    __shared__ __align__(16) Scratch scratch;
    int head = first + blockIdx.x % some;
    Rows t;
    if (!find_rows(cu_k, seqs, blockIdx.x / some, t)) return;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int k0 = cu_k[t.seq] + t.at, q0 = cu_q[t.seq], q_len = cu_q[t.seq + 1] - q0;
    // Key i of the tile is seen by the queries from behind + i on.
    int behind = q_len - (cu_k[t.seq + 1] - cu_k[t.seq]) + t.at;
    Head x = head_at(q, kv_up, k_pe, q0, k0, head, heads, pe_stride);
    const i64 at = i64(q0) * heads + head;
    auto gradient = [&](int r, int c) { return r < q_len ? widen(dout[(at + i64(r) * heads) * W + c]) : 0.0f; };
    auto query = [&](int r, int c) { return r < q_len ? x.query(r, c) : 0.0f; };
    float dk[GROUPS_D][4][4], dv[GROUPS_W][4][4];
    clear(dk);
    clear(dv);
    for (int base = max(0, behind) / TILE * TILE; base < q_len; base += TILE) {
        // Keys are rows, queries columns.
        float s[1][4][4], dp[1][4][4];
        clear(s);
        clear(dp);
        multiply_rows<D>(s[0], scratch, [&](int r, int c) { return r < t.n ? x.key(r, c) : 0.0f; },
                         [&](int r, int c) { return query(base + r, c); });
        multiply_rows<W>(dp[0], scratch, [&](int r, int c) { return r < t.n ? x.value(r, c) : 0.0f; },
                         [&](int r, int c) { return gradient(base + r, c); });
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i_q = base + tx * 4 + j;
            float l = lse_of(lse, at + i64(i_q) * heads, i_q < q_len);
            float mean = i_q < q_len ? delta[at + i64(i_q) * heads] : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = expf(s[0][i][j] * scale - l);
                p = i_q >= behind + ty * 4 + i ? p : 0.0f;
                s[0][i][j] = p;
                dp[0][i][j] = p * (dp[0][i][j] - mean);
            }
        }
        store_tile(scratch, s[0]);
        multiply_tile<W>(dv, scratch, [&](int k, int c) { return gradient(base + k, c); });
        store_tile(scratch, dp[0]);
        multiply_tile<D>(dk, scratch, [&](int k, int c) { return query(base + k, c); });
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = ty * 4 + i;
        if (r >= t.n) continue;
        T* to = dkv_up + (i64(k0 + r) * heads + head) * UP;
        float* part = pe_parts + (i64(k0 + r) * some + (head - first)) * R;
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int g = 0; g < GROUPS_D; g++) {
                int c = g * TILE + tx * 4 + j;
                float v = dk[g][i][j] * scale;
                if (c < P) to[c] = narrow<T>(v);
                else if (c < D) part[c - P] = v;
            }
#pragma unroll
            for (int g = 0; g < GROUPS_W; g++) {
                int c = g * TILE + tx * 4 + j;
                if (c < W) to[P + c] = narrow<T>(dv[g][i][j]);
            }
        }
    }
}

// delta[row] = out[row] . dout[row], a warp a row of W.
extern "C" __global__ void __launch_bounds__(THREADS) mla_delta(const T* out, const T* dout, float* delta, i64 rows) {
    i64 row = i64(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int c = threadIdx.x % WARP; c < W; c += WARP)
        sum = fmaf(widen(out[row * W + c]), widen(dout[row * W + c]), sum);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[row] = sum;
}

// dk_pe from the parts [Nk, some, R] of the next heads in order. `sums` f32 [Nk, R] carries what earlier launches
// summed; the first does not read it, the last rounds to dk_pe.
extern "C" __global__ void __launch_bounds__(THREADS) mla_sum_heads(
    const float* parts, float* sums, T* dk_pe, i64 keys, int some, i64 stride, int is_first, int is_last) {
    i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (R == 0 || i >= keys * R) return;
    i64 key = i / max(R, 1);
    int c = int(i - key * R);
    float sum = is_first ? 0.0f : sums[i];
    for (int h = 0; h < some; h++) sum += parts[(key * some + h) * R + c];
    if (is_last) dk_pe[key * stride + c] = narrow<T>(sum);
    else sums[i] = sum;
}
