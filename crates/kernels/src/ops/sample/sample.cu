// The next token of each row, a block of threads a row. Weights e^((logit - max) / temperature) are computed as on a
// CPU, to the bit, whenever they are needed, and summed as integers of 2^-44, in which every order gives the same sum:
// what is kept and drawn depends on the row alone. The largest weight is 1, so the sum of a row of 2^17 is exact to
// 2^-28 at worst, and of what weighs less than 2^-45 nothing is drawn.
//
// The rank of an id is its key, the bits of |scaled logit|, which grow as the rank falls, then the id. Truncation finds
// the last kept (key, id) digit by digit, by a histogram for each digit of the key and a walk over ids among equals.

static const int THREADS = 1024;
static const int WARPS = THREADS / WARP;
// 2^44: one.
static const float ONE = 17592186044416.0f;
// A row has at most 2^19 ids, whose weights add up to less than 2^64.
static const int CHUNKS = 512;
static const int CHUNK = 1024;
static const int BINS = 2048;
static const int LIMBS = 4;
static const u32 LIMB = 12;

extern "C" __device__ void __assertfail(
    const char* message, const char* file, u32 line, const char* function, size_t size);

// As the CPU's: see math.rs. No operation may be fused.
DEV float exp_as_cpu(float x) {
    const float ROUND = 12582912.0f;
    float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), ROUND);
    float n = __fsub_rn(shifted, ROUND);
    float r = __fadd_rn(__fmul_rn(n, 2.1219444e-4f), __fadd_rn(__fmul_rn(n, -355.0f / 512.0f), x));
    float p = 1.3934035e-3f;
    p = __fadd_rn(__fmul_rn(p, r), 8.369464e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1666475e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666513e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    y = __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
    return x < -87.33654f ? 0.0f : y;
}

// The last that is kept: what ranks after it is not.
struct Last {
    u32 key, id;
};
struct Row {
    const float* logits;
    int v;
    float max, temperature;
    Last last;
    DEV float scaled(int j) const { return __fdiv_rn(__fsub_rn(logits[j], max), temperature); }
    // The bits of what is never above 0.
    DEV u32 key(int j) const { return __float_as_uint(scaled(j)) & 0x7fffffffu; }
    DEV bool keeps(u32 key, u32 j) const { return key < last.key || (key == last.key && j <= last.id); }
    DEV u64 weight(u32 key) const { return __float2ull_rn(exp_as_cpu(-__uint_as_float(key)) * ONE); }
    // The weight of an id that is kept, 0 of another.
    DEV u64 kept(int j) const {
        u32 k = key(j);
        return keeps(k, j) ? weight(k) : 0;
    }
};

struct Shared {
    u32 count[BINS];
    // Weights in pieces of 12 bits, of which 2^19 add up to less than 2^32: adding 32 bits is one instruction.
    u32 limbs[LIMBS][BINS];
    u64 chunks[CHUNKS];
    u64 warps[WARPS];
    float best[WARPS];
    int at[WARPS];
    u64 sum;
    u32 found;
};

// ---- Sums over ids in their order

// The sum of value(j) over a row; leaves those of its chunks.
template <typename F> DEV u64 sum_chunks(Shared& s, int v, F value) {
    int lane = threadIdx.x % WARP, n = (v + CHUNK - 1) / CHUNK;
    __syncthreads();
    for (int c = threadIdx.x / WARP; c < n; c += WARPS) {
        u64 sum = 0;
        for (int j = c * CHUNK + lane; j < min(v, (c + 1) * CHUNK); j += WARP) sum += value(j);
        sum = warp_sum(sum);
        if (lane == 0) s.chunks[c] = sum;
    }
    __syncthreads();
    u64 all = 0;
    for (int c = threadIdx.x; c < n; c += THREADS) all += s.chunks[c];
    return block_sum<THREADS>(all, s.warps);
}

// The inclusive sum over the lanes up to this one.
DEV u64 sum_up_to(u64 x) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int d = 1; d < WARP; d <<= 1) {
        u64 other = __shfl_up_sync(ALL_LANES, x, d);
        if (lane >= d) x += other;
    }
    return x;
}

// After `sum_chunks` of the same values: the first id at which their sum is at least `need`, which is at most all.
template <typename F> DEV u32 walk(Shared& s, int v, u64 need, F value) {
    if (threadIdx.x == 0) {
        u64 sum = 0;
        int c = 0;
        while (sum + s.chunks[c] < need) sum += s.chunks[c++];
        s.found = c, s.sum = sum;
    }
    __syncthreads();
    int j = s.found * CHUNK + threadIdx.x, warp = threadIdx.x / WARP;
    u64 x = j < v ? value(j) : 0, up_to = sum_up_to(x);
    if (threadIdx.x % WARP == WARP - 1) s.warps[warp] = up_to;
    u64 before = s.sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) before += s.warps[w];
    up_to += before;
    if (up_to >= need && up_to - x < need) s.found = j;
    __syncthreads();
    u32 found = s.found;
    __syncthreads();
    return found;
}

// ---- Truncation

DEV u64 in_bin(const Shared& s, int i, bool weighs) {
    u64 sum = weighs ? 0 : s.count[i];
    if (weighs)
        for (int l = 0; l < LIMBS; l++) sum += u64(s.limbs[l][i]) << (l * LIMB);
    return sum;
}

// The first bin at which the sum, `before` included, is at least `need`; `before` grows by the bins in front of it.
DEV u32 reach(Shared& s, bool weighs, u64 need, u64& before) {
    __syncthreads();
    if (threadIdx.x < WARP) {
        for (int base = 0; base < BINS; base += WARP) {
            u64 x = in_bin(s, base + threadIdx.x, weighs), up_to = sum_up_to(x);
            u32 hit = __ballot_sync(ALL_LANES, before + up_to >= need);
            if (hit != 0) {
                int lane = __ffs(hit) - 1;
                before += __shfl_sync(ALL_LANES, up_to - x, lane);
                if (threadIdx.x == 0) s.found = base + lane, s.sum = before;
                break;
            }
            before += __shfl_sync(ALL_LANES, up_to, WARP - 1);
        }
    }
    __syncthreads();
    before = s.sum;
    return s.found;
}

// The last of the smallest set of the most likely, among the kept, whose weights, or whose number, add up to `need`,
// which is at least 1 and at most the sum of all kept.
DEV Last rank(Shared& s, const Row& row, bool weighs, u64 need) {
    u64 before = 0;
    u32 key = 0;
    // Digits of 11, 10 and 10 bits.
    for (int shift = 20; shift >= 0; shift -= 10) {
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS) {
            s.count[i] = 0;
            for (int l = 0; l < LIMBS; l++) s.limbs[l][i] = 0;
        }
        __syncthreads();
        u32 width = shift == 20 ? 11 : 10;
        for (int j = threadIdx.x; j < row.v; j += THREADS) {
            u32 k = row.key(j);
            if (!row.keeps(k, j) || k >> shift >> width != key) continue;
            u32 bin = k >> shift & ((1u << width) - 1);
            atomicAdd(&s.count[bin], 1u);
            if (!weighs) continue;
            u64 w = row.weight(k);
            for (int l = 0; l < LIMBS; l++) {
                u32 x = u32(w >> (l * LIMB)) & ((1u << LIMB) - 1);
                if (x != 0) atomicAdd(&s.limbs[l][bin], x);
            }
        }
        key = key << width | reach(s, weighs, need, before);
    }
    // Before the key's ids lies what ranks above them; they are equals, of which the lowest come first.
    auto equal = [&](int j) -> u64 {
        if (row.key(j) != key || !row.keeps(key, j)) return 0;
        return weighs ? row.weight(key) : 1;
    };
    Last last = {key, key == row.last.key ? row.last.id : 0xffffffffu};
    if (s.count[key & 1023] > 1) {
        sum_chunks(s, row.v, equal);
        last.id = walk(s, row.v, need - before, equal);
    }
    return last;
}

// ---- Rows

// Ends the kernel, and with it the process.
DEV void refuse(const char* message, u32 line) { __assertfail(message, "sample.cu", line, "sample", 1); }

// The largest logit and the first id that has it.
DEV int most_likely(Shared& s, const float* logits, int v, float& max) {
    float best = -INF;
    int at = v;
    bool finite = true;
    for (int j = threadIdx.x; j < v; j += THREADS) {
        float l = logits[j];
        finite &= l < INF;
        if (l > best) best = l, at = j;
    }
    if (!finite) refuse("a logit is infinite or no number: the model's output is not finite", __LINE__);
    auto take = [&](float other, int other_at) {
        if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    };
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) take(__shfl_xor_sync(ALL_LANES, best, d), __shfl_xor_sync(ALL_LANES, at, d));
    if (threadIdx.x % WARP == 0) s.best[threadIdx.x / WARP] = best, s.at[threadIdx.x / WARP] = at;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) take(s.best[w], s.at[w]);
    if (at == v) refuse("all logits of a row are -inf", __LINE__);
    max = best;
    return min(at, v - 1);
}

// How a row is sampled; `random` is uniform in [0, 1).
struct Params {
    float temperature, top_p;
    u32 top_k, greedy;
    double random;
};

// Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS) sample(
    const float* logits, const Params* params, int* tokens, float* logp, int v) {
    __shared__ Shared s;
    Params p = params[blockIdx.x];
    Row row;
    row.logits = logits + i64(blockIdx.x) * v, row.v = v, row.temperature = p.temperature;
    row.last = Last{0xffffffffu, 0xffffffffu};
    int id = most_likely(s, row.logits, v, row.max);
    auto kept = [&](int j) { return row.kept(j); };
    u64 all = sum_chunks(s, v, kept);
    if (!p.greedy) {
        u64 mass = all;
        if (p.top_k > 0 && p.top_k < v) {
            row.last = rank(s, row, false, p.top_k);
            mass = sum_chunks(s, v, kept);
        }
        if (p.top_p < 1.0f) {
            u64 need = __double2ull_ru(double(p.top_p) * double(mass));
            row.last = rank(s, row, true, min(max(need, 1ull), mass));
            mass = sum_chunks(s, v, kept);
        }
        // The first id at which the sum exceeds it.
        u64 drawn = __double2ull_rd(p.random * double(mass));
        id = walk(s, v, min(drawn + 1, mass), kept);
    }
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = id;
        logp[blockIdx.x] = float(double(row.scaled(id)) - log(double(all) / double(ONE)));
    }
}

// Whether a row is finite as a whole. Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS) sample_finite(const float* x, int* out, int v) {
    const float* row = x + i64(blockIdx.x) * v;
    bool finite = true;
    for (int j = threadIdx.x; j < v; j += THREADS) finite &= fabsf(row[j]) < INF;
    int all = __syncthreads_and(finite);
    if (threadIdx.x == 0) out[blockIdx.x] = all != 0;
}
