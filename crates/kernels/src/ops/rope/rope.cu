// Rotary embedding in place. A block takes `tokens` tokens: it computes their cosines and sines once, into shared
// memory, and rotates all their heads with them. Memory is bound by the bytes of the rotated parts, so that the first
// loads are under way before the table is computed.
//
// Defines: ELEM (the elements' type), INTERLEAVED (pairs (2i, 2i + 1), else (i, i + width / 2)), WIDE (16 bytes at a
// time: every head begins at 16 bytes, and its parts of pairs are multiples of 16 bytes), STEP (parts of a thread in
// flight).

typedef ELEM T;
#define THREADS 256

// What a thread rotates at once: PAIRS pairs, in one pack of 16 bytes or two.
#if WIDE
typedef Vec<T> Pack;
static constexpr int PAIRS = INTERLEAVED ? Pack::N / 2 : Pack::N;
struct Part {
    Pack a, b;
    DEV void load(const T* head, u32 part, u32 half) {
        a.load(head + part * Pack::N);
        if (!INTERLEAVED) b.load(head + half + part * Pack::N);
    }
    DEV void store(T* head, u32 part, u32 half) const {
        a.store(head + part * Pack::N);
        if (!INTERLEAVED) b.store(head + half + part * Pack::N);
    }
    DEV void rotate(const float2* turns) {
        float x[Pack::N], y[Pack::N];
        a.to(x);
        if (!INTERLEAVED) b.to(y);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float& p = x[INTERLEAVED ? 2 * i : i];
            float& q = INTERLEAVED ? x[2 * i + 1] : y[i];
            const float2 t = turns[i];
            const float turned = p * t.x - q * t.y;
            q = p * t.y + q * t.x;
            p = turned;
        }
        a.from(x);
        if (!INTERLEAVED) b.from(y);
    }
};
#else
static constexpr int PAIRS = 1;
struct Part {
    T a, b;
    DEV void load(const T* head, u32 part, u32 half) {
        a = head[INTERLEAVED ? 2 * part : part];
        b = head[INTERLEAVED ? 2 * part + 1 : part + half];
    }
    DEV void store(T* head, u32 part, u32 half) const {
        head[INTERLEAVED ? 2 * part : part] = a;
        head[INTERLEAVED ? 2 * part + 1 : part + half] = b;
    }
    DEV void rotate(const float2* turns) {
        const float p = widen(a), q = widen(b);
        a = narrow<T>(p * turns->x - q * turns->y);
        b = narrow<T>(p * turns->y + q * turns->x);
    }
};
#endif

// Cosine and sine of position * frequency, times the factor. The angle is taken in f64: at position 100,000 one in f32
// is off by 4e-3. What is left of it after quarter turns is at most pi / 4, of which f32 keeps all that a result in
// f32 needs; the series go as far as r^11 / 11! < 2e-9.
DEV float2 turn(int position, float frequency, float factor) {
    const double angle = double(position) * double(frequency);
    const double quarters = rint(angle * 0.63661977236758134308);
    // pi / 2 in two parts; the product with the first is not rounded before the difference is.
    const float r = float(fma(-quarters, 6.123233995736766e-17, fma(-quarters, 1.5707963267948966, angle)));
    const float square = r * r;
    float s = 1.0f / 362880, c = -1.0f / 3628800;
    s = fmaf(s, square, -1.0f / 5040), c = fmaf(c, square, 1.0f / 40320);
    s = fmaf(s, square, 1.0f / 120), c = fmaf(c, square, -1.0f / 720);
    s = fmaf(s, square, -1.0f / 6), c = fmaf(c, square, 1.0f / 24);
    c = fmaf(c, square, -0.5f);
    s = fmaf(s * square, r, r), c = fmaf(c, square, 1.0f);
    // Quarter turns exchange them and change their signs.
    const int q = int(i64(quarters) & 3);
    float sine = q & 1 ? c : s, cosine = q & 1 ? s : c;
    if (q & 2) sine = -sine;
    if ((q + 1) & 2) cosine = -cosine;
    return make_float2(cosine * factor, sine * factor);
}

// Token n's head h begins at n * token_stride + h * head_stride of x. `sign` is -1 for the inverse. Shared memory holds
// tokens * width / 2 turns.
extern "C" __global__ void __launch_bounds__(THREADS)
    rope(T* x, i64 token_stride, u32 heads, u32 head_stride, const int* positions, const float* inv_freq, u32 half,
         float factor, float sign, int n, u32 tokens) {
    extern __shared__ float2 turns[];
    const int begin = blockIdx.x * tokens;
    tokens = min(tokens, u32(n - begin));
    const u32 parts = half / PAIRS, items = tokens * heads * parts;
    x += begin * token_stride;
    for (u32 first = 0; first < items; first += THREADS * STEP) {
        Part held[STEP];
        T* heads_at[STEP];
#pragma unroll
        for (int s = 0; s < STEP; s++) {
            const u32 item = first + s * THREADS + threadIdx.x, head = item / parts, token = head / heads;
            heads_at[s] = x + token * token_stride + (head - token * heads) * head_stride;
            if (item < items) held[s].load(heads_at[s], item % parts, half);
        }
        if (first == 0) {
            for (u32 i = threadIdx.x; i < tokens * half; i += THREADS) {
                const float2 t = turn(positions[begin + i / half], inv_freq[i % half], factor);
                turns[i] = make_float2(t.x, t.y * sign);
            }
            __syncthreads();
        }
#pragma unroll
        for (int s = 0; s < STEP; s++) {
            const u32 item = first + s * THREADS + threadIdx.x, part = item % parts;
            if (item < items) {
                held[s].rotate(turns + item / (heads * parts) * half + part * PAIRS);
                held[s].store(heads_at[s], part, half);
            }
        }
    }
}
