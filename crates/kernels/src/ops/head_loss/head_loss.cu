// What the head does with the logits of some tokens over one slice of the vocabulary: f32 [tokens, cols], rows `ld`
// apart, ids first..first + cols. A block of BLOCK threads has a row, and what it leaves depends on that row alone.
// A slice has at most SLICE ids (a multiple of 4 BLOCK); `ld` is a multiple of 4. DZ is the type of gradients of
// logits.

#define VECS (SLICE / (4 * BLOCK))
// A target past the vocabulary, which the host cannot see, gets this log-probability.
#define NAN __int_as_float(0x7fc00000)

// e^x, off by about |x| 2^-23 of itself.
DEV float fast_exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}

// What a row has gathered from the slices so far, relative to its largest logit.
struct Row {
    double sum;    // of e^(z - max)
    double dot;    // of e^(z - max) (z - max)
    float max;
    float target;  // z of the target
};

// Element e of the thread's vector i.
DEV int column(int i, int e) { return (i * BLOCK + int(threadIdx.x)) * 4 + e; }

DEV void load_row(const float* z, int cols, float (&x)[VECS][4]) {
#pragma unroll
    for (int i = 0; i < VECS; i++) {
        int j = column(i, 0);
        if (j + 4 <= cols) {
            float4 v = *reinterpret_cast<const float4*>(z + j);
            x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) x[i][e] = j + e < cols ? z[j + e] : -INF;
        }
    }
}

DEV float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int w = 1; w < BLOCK / WARP; w++) x = fmaxf(x, scratch[w]);
    return x;
}

// Takes the slice into every row's sums, and z of the target and of `g` given ids from it.
extern "C" __global__ void __launch_bounds__(BLOCK)
head_statistics(const float* logits, i64 ld, int cols, int first, float scale, const int* targets, Row* rows,
                const int* given, int g, float* picked) {
    __shared__ float maxima[BLOCK / WARP], sums[BLOCK / WARP], dots[BLOCK / WARP];
    i64 r = blockIdx.x;
    const float* z = logits + r * ld;
    float x[VECS][4];
    load_row(z, cols, x);
    Row row;
    if (threadIdx.x == 0) {
        if (first > 0) row = rows[r];
        int at = targets[r] - first;
        if (first == 0) row.target = NAN;
        if (at >= 0 && at < cols) row.target = z[at] * scale;
    }
    for (int i = threadIdx.x; i < g; i += BLOCK) {
        int at = given[r * g + i] - first;
        if (at >= 0 && at < cols) picked[r * g + i] = z[at] * scale;
    }
    float max = -INF;
#pragma unroll
    for (int i = 0; i < VECS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) max = fmaxf(max, x[i][e]);
    }
    max = block_max(max, maxima) * scale;
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (column(i, e) < cols) {
                float t = x[i][e] * scale - max, p = fast_exp(t);
                sum += p;
                dot += p * t;
            }
        }
    }
    sum = warp_sum(sum);
    dot = warp_sum(dot);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum, dots[threadIdx.x / WARP] = dot;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double s = 0.0, d = 0.0;
#pragma unroll
    for (int w = 0; w < BLOCK / WARP; w++) s += sums[w], d += dots[w];
    if (first > 0) {
        // Both sums relative to the larger of the two maxima.
        float top = fmaxf(row.max, max), a = row.max - top, b = max - top;
        double ea = expf(a), eb = expf(b);
        d = (row.dot + row.sum * a) * ea + (d + s * b) * eb;
        s = row.sum * ea + s * eb;
        max = top;
    }
    row.sum = s, row.dot = d, row.max = max;
    rows[r] = row;
}

// Turns `n` rows' sums into their outputs, and logits picked on the way (g + k a row) into log-probabilities.
extern "C" __global__ void __launch_bounds__(BLOCK)
head_finish(int n, const Row* rows, const int* targets, float* lse, float* logp, float* entropy, int g, float* picked,
            int k, float* top) {
    i64 r = i64(blockIdx.x) * BLOCK + threadIdx.x;
    if (r >= n) return;
    Row row = rows[r];
    double log_sum = log(row.sum), all = row.max + log_sum;
    lse[r] = float(all);
    logp[r] = targets[r] < 0 ? 0.0f : float(row.target - all);
    entropy[r] = float(log_sum - row.dot / row.sum);
    for (int i = 0; i < g; i++) picked[r * g + i] = float(picked[r * g + i] - all);
    for (int i = 0; i < k; i++) top[r * k + i] = float(top[r * k + i] - all);
}

// Floats as integers that sort alike, a NaN as the lowest, both zeros as one; `id` in the lower half so that among
// equals the lowest comes first in descending order. Never 0.
DEV float ranked(float z) { return z == 0.0f ? 0.0f : fmaxf(z, -INF); }
DEV u64 key_of(float z, int id) {
    u32 bits = __float_as_uint(z);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return u64(bits) << 32 | u32(~id);
}
DEV float value_of(u64 key) {
    u32 bits = u32(key >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// Merges the slice into each row's k largest so far (values z and ids, in descending order), PART ids at a time: those
// above the least of the k are collected, sorted and merged in.
extern "C" __global__ void __launch_bounds__(BLOCK)
head_top(const float* logits, i64 ld, int cols, int first, float scale, int k, int* top_ids, float* top_values) {
    __shared__ u64 keys[PART];
    __shared__ int places[PART];
    __shared__ int count;
    const float* z = logits + i64(blockIdx.x) * ld;
    int* ids = top_ids + i64(blockIdx.x) * k;
    float* values = top_values + i64(blockIdx.x) * k;
    int tid = threadIdx.x;
    for (int part = 0; part < cols; part += PART) {
        int seen = first + part, width = min(PART, cols - part), filled = min(seen, k);
        float least = filled == k ? values[k - 1] : -INF;
        if (tid == 0) count = 0;
        __syncthreads();
        for (int j = tid; j < width; j += BLOCK) {
            float v = ranked(z[part + j] * scale);
            // The order in which they are collected is any; the sort's is total.
            if (filled < k || v > least) keys[atomicAdd(&count, 1)] = key_of(v, seen + j);
        }
        __syncthreads();
        int found = count, size = 1;
        while (size < found) size *= 2;
        for (int j = found + tid; j < size; j += BLOCK) keys[j] = 0;
        for (int run = 2; run <= size; run *= 2) {
            for (int step = run / 2; step > 0; step /= 2) {
                __syncthreads();
                for (int i = tid; i < size / 2; i += BLOCK) {
                    int a = 2 * i - (i & (step - 1)), b = a + step;
                    u64 x = keys[a], y = keys[b];
                    if ((x < y) == ((a & run) == 0)) keys[a] = y, keys[b] = x;
                }
            }
        }
        __syncthreads();
        int fresh = min(found, k);
        // A new one goes behind those of the old that are at least as large: their ids are lower.
        for (int j = tid; j < fresh; j += BLOCK) {
            float v = value_of(keys[j]);
            int lo = 0, hi = filled;
            while (lo < hi) {
                int mid = (lo + hi) / 2;
                if (values[mid] < v) hi = mid;
                else lo = mid + 1;
            }
            places[j] = lo + j;
        }
        // The old ones make room, from the back: none moves to a place that is still to be read.
        for (int base = fresh > 0 && filled > 0 ? (filled - 1) / BLOCK * BLOCK : -1; base >= 0; base -= BLOCK) {
            int i = base + tid, id = 0, lo = 0, hi = fresh;
            float v = 0.0f;
            if (i < filled) v = values[i], id = ids[i];
            while (lo < hi) {
                int mid = (lo + hi) / 2;
                if (value_of(keys[mid]) > v) lo = mid + 1;
                else hi = mid;
            }
            __syncthreads();
            if (i < filled && i + lo < k) values[i + lo] = v, ids[i + lo] = id;
        }
        __syncthreads();
        for (int j = tid; j < fresh; j += BLOCK) {
            if (places[j] < k) values[places[j]] = value_of(keys[j]), ids[places[j]] = int(~u32(keys[j]));
        }
        __syncthreads();
    }
}

// Logits in, their gradients out, in the same memory: row r of DZ begins where row r of f32 did.
// dz = e^(z - lse) (all + spread (z - lse + entropy)), plus the gradients at single ids; the division by the
// temperature is in the factors. d_entropy is read if SPREAD, given ids and their gradients (g a row) if GIVEN.
extern "C" __global__ void __launch_bounds__(BLOCK)
head_gradient(float* logits, i64 ld, int cols, int first, float scale, const int* targets, const float* lse,
              const float* entropy, const float* d_logp, const float* d_entropy, const int* given,
              const float* d_given, int g) {
    i64 r = blockIdx.x;
    float* z = logits + r * ld;
    int target = targets[r];
    float d_target = target < 0 ? 0.0f : d_logp[r], row_lse = lse[r];
    float spread = SPREAD ? -d_entropy[r] * scale : 0.0f, h = SPREAD ? entropy[r] : 0.0f;
    double total = d_target;
#if GIVEN
    __shared__ double scratch[BLOCK / WARP];
    __shared__ float single[SLICE];
    double part = 0.0;
    for (int i = threadIdx.x; i < g; i += BLOCK) part += d_given[r * g + i];
    total += block_sum<BLOCK>(part, scratch);
    for (int j = threadIdx.x; j < SLICE; j += BLOCK) single[j] = 0.0f;
    __syncthreads();
    for (int i = threadIdx.x; i < g; i += BLOCK) {
        int id = given[r * g + i], at = id - first;
        if (at < 0 || at >= cols) continue;
        // An id may be given more than once; who finds it first adds for all.
        bool mine = true;
        for (int o = 0; o < i; o++) mine = mine && given[r * g + o] != id;
        float sum = 0.0f;
        for (int o = i; mine && o < g; o++) sum += given[r * g + o] == id ? d_given[r * g + o] * scale : 0.0f;
        if (mine) single[at] = sum;
    }
    __syncthreads();
#endif
    float all = float(-total * scale);
    // What the logits of a row without a gradient are does not matter.
    bool dense = all != 0.0f || spread != 0.0f;
    float x[VECS][4];
    if (dense) load_row(z, cols, x);
#pragma unroll
    for (int i = 0; i < VECS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float dz = 0.0f;
            if (dense) {
                float t = x[i][e] * scale - row_lse;
                dz = fast_exp(t) * (SPREAD ? all + spread * (t + h) : all);
            }
            if (column(i, e) == target - first) dz += d_target * scale;
#if GIVEN
            dz += single[column(i, e)];
#endif
            x[i][e] = dz;
        }
    }
    // All of the row has been read before any of it is overwritten.
    __syncthreads();
    DZ* out = reinterpret_cast<DZ*>(z);
#pragma unroll
    for (int i = 0; i < VECS; i++) {
        int j = column(i, 0);
        if (j + 4 <= cols) {
            if constexpr (sizeof(DZ) == 2) {
                uint2 v = make_uint2(narrow2(x[i][0], x[i][1]), narrow2(x[i][2], x[i][3]));
                *reinterpret_cast<uint2*>(out + j) = v;
            } else {
                *reinterpret_cast<float4*>(out + j) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
            }
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (j + e < cols) out[j + e] = narrow<DZ>(x[i][e]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
head_target_weights(int n, const int* targets, float weight, float* out) {
    i64 r = i64(blockIdx.x) * BLOCK + threadIdx.x;
    if (r < n) out[r] = targets[r] < 0 ? 0.0f : weight;
}
