// Attention by m16n8k16 products of bf16, for any GPU that has them and head dims up to DP + WP = 320.
// Defines: NOPE, ROPE, VDIM; WIDE = 1 where every row of inputs and outputs begins at a multiple of 16 bytes and all
// three are multiples of 8.
// A block of 4 warps owns 64 rows (queries, or keys in `backward_keys`), 16 a warp, and walks over tiles of the other
// kind in order. Scores stay in registers: the accumulators of one product are the left operand of the next.

static const int P = NOPE;
static const int R = ROPE;
static const int W = VDIM;
static const int D = P + R;
static const int DP = (D + 15) / 16 * 16;
static const int WP = (W + 15) / 16 * 16;
// Rows of shared memory end in 16 bytes of padding: eight rows then start in eight different groups of banks.
static const int LD = DP + 8;
static const int LW = WP + 8;
static const int UP = P + W;
static const int OWN = 64;
static const int KEYS = 64;
// Rows per step of a backward kernel; two steps are in flight.
static const int STEP = 32;
static const int THREADS = 128;
#define LN2 0.6931471805599453f

// ---- Tiles of a packed batch

// One block's rows of one sequence. Tiles of sequence s take the slots from cu[s] / OWN + s on: their number is never
// less than the tiles that its rows fill, so the grid needs no host to know the lengths.
struct Tile {
    int seq, at, n;
};
DEV bool find_tile(const int* cu, int seqs, int slot, Tile& t) {
    int low = 0, high = seqs;
    while (high - low > 1) {
        int s = (low + high) / 2;
        if (cu[s] / OWN + s <= slot) low = s;
        else high = s;
    }
    int len = cu[low + 1] - cu[low];
    t.seq = low;
    t.at = (slot - cu[low] / OWN - low) * OWN;
    t.n = min(OWN, len - t.at);
    return t.n > 0;
}

// ---- Copies into shared memory

// A thread copies the same columns of every so many rows: what it computes for a copy is little beside the products.
// Loops over rows stay rolled: unrolled, their addresses take the registers that the sums need.
template <int ROWS, int PADDED, typename F> DEV void for_pieces(F piece) {
    const int CHUNKS = PADDED / 8, LANES = CHUNKS >= 8 ? 8 : CHUNKS >= 4 ? 4 : 2;
    int c = threadIdx.x % LANES * 8;
#pragma unroll 1
    for (int r = threadIdx.x / LANES; r < ROWS; r += THREADS / LANES)
#pragma unroll
        for (int j = 0; j < CHUNKS; j += LANES)
            if (CHUNKS % LANES == 0 || j * 8 + c < PADDED) piece(r, j * 8, c);
}
template <int ROWS, int PADDED, typename F> DEV void for_elements(F element) {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * PADDED; i += THREADS) element(i / PADDED, i % PADDED);
}

// The block copies n of ROWS rows of WIDTH elements, and writes zeros to what is left of [ROWS][PADDED].
template <int ROWS, int WIDTH, int PADDED> DEV void load_rows(bf16* to, const bf16* from, i64 stride, int n) {
    if (WIDE) {
        for_pieces<ROWS, PADDED>([&](int r, int j, int c) {
            bool there = r < n && (WIDTH == PADDED || j + c < WIDTH);
            copy16(to + r * (PADDED + 8) + c + j, from + r * stride + c + j, there);
        });
    } else {
        for_elements<ROWS, PADDED>([&](int r, int c) {
            bf16 x = {0};
            if (r < n && c < WIDTH) x = from[r * stride + c];
            to[r * (PADDED + 8) + c] = x;
        });
    }
}

// The same of keys: P elements of kv_up, then R of k_pe.
template <int ROWS>
DEV void load_keys(bf16* to, const bf16* up, i64 up_stride, const bf16* pe, i64 pe_stride, int n) {
    if (WIDE) {
        for_pieces<ROWS, DP>([&](int r, int j, int c) {
            // With P a multiple of all lanes' pieces, the choice is the compiler's.
            bool is_up = P % 64 == 0 ? j < P : j + c < P;
            const bf16* from = is_up ? up + r * up_stride + c + j : pe + r * pe_stride + c + (j - P);
            copy16(to + r * LD + c + j, from, r < n && (D == DP || j + c < D));
        });
    } else {
        for_elements<ROWS, DP>([&](int r, int c) {
            bf16 x = {0};
            if (r < n && c < D) x = c < P ? up[r * up_stride + c] : pe[r * pe_stride + (c - P)];
            to[r * LD + c] = x;
        });
    }
}

// ---- Products

// c [16][8 N] += left [16][16 K] x right^T, both in shared memory as [row][k].
template <int N, int K> DEV void multiply_rows(float (&c)[N][4], const bf16* left, const bf16* right, int ld) {
#pragma unroll
    for (int k = 0; k < K; k++) {
        u32 a[4];
        load_left(a, left + k * 16, ld);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            u32 b[4];
            load_right(b, right + n * 16 * ld + k * 16, ld);
            multiply(c[2 * n], a, b[0], b[1]);
            multiply(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}
// c [16][8 N] += left [16][8 K] x right, the left one another product's result, right in shared memory as [k][n].
template <int N, int K>
DEV void multiply_result(float (&c)[N][4], const float (&left)[K][4], const bf16* right, int ld) {
#pragma unroll
    for (int k = 0; k < K / 2; k++) {
        const float(&l)[4] = left[2 * k];
        const float(&r)[4] = left[2 * k + 1];
        u32 a[4] = {narrow2(l[0], l[1]), narrow2(l[2], l[3]), narrow2(r[0], r[1]), narrow2(r[2], r[3])};
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            u32 b[4];
            load_right_turned(b, right + k * 16 * ld + n * 16, ld);
            multiply(c[2 * n], a, b[0], b[1]);
            multiply(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}
template <int N> DEV void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}
// Two neighbouring columns of a row of `width` elements at `to`.
DEV void store2(bf16* to, int column, int width, float x, float y) {
    if (WIDE) {
        if (column < width) *reinterpret_cast<u32*>(to + column) = narrow2(x, y);
    } else {
        if (column < width) to[column] = narrow<bf16>(x);
        if (column + 1 < width) to[column + 1] = narrow<bf16>(y);
    }
}

// ---- Kernels

// out and lse; scale is above 0, so that the largest product has the largest score. Grid: heads x slots; those with the most
// keys first.
extern "C" __global__ void __launch_bounds__(THREADS) mla_any_forward(
    const bf16* q, const bf16* kv_up, const bf16* k_pe, const int* cu_q, const int* cu_k, bf16* out, float* lse,
    int seqs, int heads, int slots, i64 pe_stride, float scale) {
    extern __shared__ __align__(16) u8 shared[];
    bf16* sq = reinterpret_cast<bf16*>(shared);
    bf16* sk = sq + OWN * LD;
    bf16* sv = sk + KEYS * LD;
    int head = blockIdx.x % heads;
    Tile t;
    if (!find_tile(cu_q, seqs, slots - 1 - blockIdx.x / heads, t)) return;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = warp * 16 + lane / 4;
    int q0 = cu_q[t.seq] + t.at, k0 = cu_k[t.seq], k_len = cu_k[t.seq + 1] - k0;
    // Query i of the tile sees the keys below ahead + i.
    int ahead = k_len - (cu_q[t.seq + 1] - cu_q[t.seq]) + t.at + 1;
    int keys = max(0, ahead + t.n - 1);
    const bf16* up = kv_up + (i64(k0) * heads + head) * UP;
    const bf16* pe = k_pe + k0 * pe_stride;
    const i64 up_stride = i64(heads) * UP;

    load_rows<OWN, D, DP>(sq, q + (i64(q0) * heads + head) * D, i64(heads) * D, t.n);
    if (keys > 0) load_keys<KEYS>(sk, up, up_stride, pe, pe_stride, min(keys, KEYS));
    commit();
    float o[WP / 8][4];
    clear(o);
    float top[2] = {-INF, -INF}, sum[2] = {0.0f, 0.0f};
    const float scale2 = scale * LOG2E;
    for (int base = 0; base < keys; base += KEYS) {
        int n = min(keys - base, KEYS);
        wait_for_all_but<0>();
        __syncthreads();
        load_rows<KEYS, W, WP>(sv, up + base * up_stride + P, up_stride, n);
        commit();
        float s[KEYS / 8][4];
        clear(s);
        multiply_rows<KEYS / 8, DP / 16>(s, sq + warp * 16 * LD, sk, LD);
        __syncthreads();
        int next = base + KEYS;
        if (next < keys) {
            const bf16 *next_up = up + next * up_stride, *next_pe = pe + next * pe_stride;
            load_keys<KEYS>(sk, next_up, up_stride, next_pe, pe_stride, min(keys - next, KEYS));
        }
        commit();
        if (base + KEYS > ahead + warp * 16) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int key = base + j * 8 + lane % 4 * 2 + e % 2;
                    if (key >= ahead + row + e / 2 * 8) s[j][e] = -INF;
                }
        }
        float alpha[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float high = top[h];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) high = fmaxf(high, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
            high = quad_max(high);
            // As long as a query has seen no key its probabilities are exp(-inf), whatever is taken off.
            float off = high == -INF ? 0.0f : __fmul_rn(high, scale2);
            // Rounded before the difference: where the maximum stays, the factor is 1.
            alpha[h] = exp2_fast(__fmul_rn(top[h], scale2) - off);
            top[h] = high;
            sum[h] *= alpha[h];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float p = exp2_fast(s[j][2 * h + e] * scale2 - off);
                    s[j][2 * h + e] = p;
                    sum[h] += p;
                }
        }
        // Most tiles raise no maximum: a product with 1 is left out.
        if (__any_sync(ALL_LANES, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < WP / 8; j++) {
                o[j][0] *= alpha[0], o[j][1] *= alpha[0];
                o[j][2] *= alpha[1], o[j][3] *= alpha[1];
            }
        }
        wait_for_all_but<1>();
        __syncthreads();
        multiply_result<WP / 8, KEYS / 8>(o, s, sv, LW);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = quad_sum(sum[h]);
        int r = row + 8 * h;
        if (r >= t.n) continue;
        i64 at = i64(q0 + r) * heads + head;
        float factor = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int j = 0; j < WP / 8; j++)
            store2(out + at * W, j * 8 + lane % 4 * 2, W, o[j][2 * h] * factor, o[j][2 * h + 1] * factor);
        if (lane % 4 == 0) lse[at] = total > 0.0f ? (__fmul_rn(top[h], scale2) + log2f(total)) * LN2 : -INF;
    }
}

// The log-sum-exp in powers of two; a query that sees nothing, or is none, has +inf, so that its probabilities are 0.
DEV float lse2_of(const float* lse, i64 at, bool there) {
    float x = there ? lse[at] : -INF;
    return x == -INF ? INF : x * LOG2E;
}

// dq. Grid as in forward. delta [Nq, H] is rowsum(dout * out).
extern "C" __global__ void __launch_bounds__(THREADS) mla_any_backward_queries(
    const bf16* q, const bf16* kv_up, const bf16* k_pe, const int* cu_q, const int* cu_k, const bf16* dout,
    const float* lse, const float* delta, bf16* dq, int seqs, int heads, int slots, i64 pe_stride, float scale) {
    extern __shared__ __align__(16) u8 shared[];
    bf16* sq = reinterpret_cast<bf16*>(shared);
    bf16* sd = sq + OWN * LD;
    bf16* sk = sd + OWN * LW;
    bf16* sv = sk + 2 * STEP * LD;
    int head = blockIdx.x % heads;
    Tile t;
    if (!find_tile(cu_q, seqs, slots - 1 - blockIdx.x / heads, t)) return;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = warp * 16 + lane / 4;
    int q0 = cu_q[t.seq] + t.at, k0 = cu_k[t.seq], k_len = cu_k[t.seq + 1] - k0;
    int ahead = k_len - (cu_q[t.seq + 1] - cu_q[t.seq]) + t.at + 1;
    int keys = max(0, ahead + t.n - 1);
    const bf16* up = kv_up + (i64(k0) * heads + head) * UP;
    const bf16* pe = k_pe + k0 * pe_stride;
    const i64 up_stride = i64(heads) * UP, at = i64(q0) * heads + head;

    load_rows<OWN, D, DP>(sq, q + at * D, i64(heads) * D, t.n);
    load_rows<OWN, W, WP>(sd, dout + at * W, i64(heads) * W, t.n);
    if (keys > 0) {
        load_keys<STEP>(sk, up, up_stride, pe, pe_stride, min(keys, STEP));
        load_rows<STEP, W, WP>(sv, up + P, up_stride, min(keys, STEP));
    }
    commit();
    float lse2[2], mean[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = row + 8 * h;
        lse2[h] = lse2_of(lse, at + i64(r) * heads, r < t.n);
        mean[h] = r < t.n ? delta[at + i64(r) * heads] : 0.0f;
    }
    float acc[DP / 8][4];
    clear(acc);
    const float scale2 = scale * LOG2E;
    for (int base = 0, stage = 0; base < keys; base += STEP, stage ^= 1) {
        int next = base + STEP;
        if (next < keys) {
            int n = min(keys - next, STEP);
            const bf16 *next_up = up + next * up_stride, *next_pe = pe + next * pe_stride;
            load_keys<STEP>(sk + (stage ^ 1) * STEP * LD, next_up, up_stride, next_pe, pe_stride, n);
            load_rows<STEP, W, WP>(sv + (stage ^ 1) * STEP * LW, next_up + P, up_stride, n);
        }
        commit();
        wait_for_all_but<1>();
        __syncthreads();
        float s[STEP / 8][4], dp[STEP / 8][4];
        clear(s);
        clear(dp);
        multiply_rows<STEP / 8, DP / 16>(s, sq + warp * 16 * LD, sk + stage * STEP * LD, LD);
        multiply_rows<STEP / 8, WP / 16>(dp, sd + warp * 16 * LW, sv + stage * STEP * LW, LW);
        bool edge = base + STEP > ahead + warp * 16;
#pragma unroll
        for (int j = 0; j < STEP / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int h = e / 2, key = base + j * 8 + lane % 4 * 2 + e % 2;
                float p = exp2_fast(s[j][e] * scale2 - lse2[h]);
                if (edge && key >= ahead + row + 8 * h) p = 0.0f;
                s[j][e] = p * (dp[j][e] - mean[h]);
            }
        multiply_result<DP / 8, STEP / 8>(acc, s, sk + stage * STEP * LD, LD);
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = row + 8 * h;
        if (r >= t.n) continue;
        bf16* to = dq + (at + i64(r) * heads) * D;
#pragma unroll
        for (int j = 0; j < DP / 8; j++)
            store2(to, j * 8 + lane % 4 * 2, D, acc[j][2 * h] * scale, acc[j][2 * h + 1] * scale);
    }
}

// dkv_up of the heads first .. first + some, and their parts of dk_pe in f32, pe_parts [Nk, some, R].
// Grid: some x slots; those with the most queries first.
extern "C" __global__ void __launch_bounds__(THREADS) mla_any_backward_keys(
    const bf16* q, const bf16* kv_up, const bf16* k_pe, const int* cu_q, const int* cu_k, const bf16* dout,
    const float* lse, const float* delta, bf16* dkv_up, float* pe_parts, int seqs, int heads, int first, int some,
    i64 pe_stride, float scale) {
    extern __shared__ __align__(16) u8 shared[];
    bf16* sk = reinterpret_cast<bf16*>(shared);
    bf16* sv = sk + OWN * LD;
    bf16* sq = sv + OWN * LW;
    bf16* sd = sq + 2 * STEP * LD;
    float* slse = reinterpret_cast<float*>(sd + 2 * STEP * LW);
    float* smean = slse + 2 * STEP;
    int head = first + blockIdx.x % some;
    Tile t;
    if (!find_tile(cu_k, seqs, blockIdx.x / some, t)) return;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = warp * 16 + lane / 4;
    int k0 = cu_k[t.seq] + t.at, q0 = cu_q[t.seq], q_len = cu_q[t.seq + 1] - q0;
    // Key i of the tile is seen by the queries from behind + i on.
    int behind = q_len - (cu_k[t.seq + 1] - cu_k[t.seq]) + t.at;
    int from = max(0, behind) / STEP * STEP;
    const bf16* up = kv_up + (i64(k0) * heads + head) * UP;
    const i64 up_stride = i64(heads) * UP, q_stride = i64(heads) * D, d_stride = i64(heads) * W;
    const i64 at = i64(q0) * heads + head;

    auto load_queries = [&](int query, int stage) {
        int n = min(q_len - query, STEP);
        load_rows<STEP, D, DP>(sq + stage * STEP * LD, q + at * D + query * q_stride, q_stride, n);
        load_rows<STEP, W, WP>(sd + stage * STEP * LW, dout + at * W + query * d_stride, d_stride, n);
        int i = threadIdx.x;
        if (i < STEP) {
            slse[stage * STEP + i] = lse2_of(lse, at + i64(query + i) * heads, i < n);
            smean[stage * STEP + i] = i < n ? delta[at + i64(query + i) * heads] : 0.0f;
        }
    };
    load_keys<OWN>(sk, up, up_stride, k_pe + k0 * pe_stride, pe_stride, t.n);
    load_rows<OWN, W, WP>(sv, up + P, up_stride, t.n);
    if (from < q_len) load_queries(from, 0);
    commit();
    float dk[DP / 8][4], dv[WP / 8][4];
    clear(dk);
    clear(dv);
    const float scale2 = scale * LOG2E;
    for (int base = from, stage = 0; base < q_len; base += STEP, stage ^= 1) {
        if (base + STEP < q_len) load_queries(base + STEP, stage ^ 1);
        commit();
        wait_for_all_but<1>();
        __syncthreads();
        // Keys are rows, queries columns.
        float s[STEP / 8][4], dp[STEP / 8][4];
        clear(s);
        clear(dp);
        multiply_rows<STEP / 8, DP / 16>(s, sk + warp * 16 * LD, sq + stage * STEP * LD, LD);
        multiply_rows<STEP / 8, WP / 16>(dp, sv + warp * 16 * LW, sd + stage * STEP * LW, LW);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int query = j * 8 + lane % 4 * 2 + e % 2;
                float p = exp2_fast(s[j][e] * scale2 - slse[stage * STEP + query]);
                if (base + query < behind + row + e / 2 * 8) p = 0.0f;
                s[j][e] = p;
                dp[j][e] = p * (dp[j][e] - smean[stage * STEP + query]);
            }
        multiply_result<WP / 8, STEP / 8>(dv, s, sd + stage * STEP * LW, LW);
        multiply_result<DP / 8, STEP / 8>(dk, dp, sq + stage * STEP * LD, LD);
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = row + 8 * h;
        if (r >= t.n) continue;
        bf16* to = dkv_up + (i64(k0 + r) * heads + head) * UP;
        float* part = pe_parts + (i64(k0 + r) * some + (head - first)) * R;
#pragma unroll
        for (int j = 0; j < DP / 8; j++) {
            int c = j * 8 + lane % 4 * 2;
            float x = dk[j][2 * h] * scale, y = dk[j][2 * h + 1] * scale;
            store2(to, c, P, x, y);
            if (c >= P && c < D) part[c - P] = x;
            if (c + 1 >= P && c + 1 < D) part[c + 1 - P] = y;
        }
#pragma unroll
        for (int j = 0; j < WP / 8; j++)
            store2(to + P, j * 8 + lane % 4 * 2, W, dv[j][2 * h], dv[j][2 * h + 1]);
    }
}
