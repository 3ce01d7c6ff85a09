// What every kernel source begins with: number types, conversions, wide loads, reductions. No toolkit header: who runs
// this may have nothing of CUDA but the driver and the NVRTC library.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEV __device__ __forceinline__
#define WARP 32
#define ALL_LANES 0xffffffffu
#define INF __int_as_float(0x7f800000)

// bfloat16 as bits. Arithmetic is in f32: widen, compute, round once on store.
struct bf16 {
    u16 bits;
};

DEV float widen(float x) { return x; }
DEV float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// Rounds to nearest even; a NaN stays a NaN.
template <typename T> DEV T narrow(float x);
template <> DEV float narrow<float>(float x) { return x; }
template <> DEV bf16 narrow<bf16>(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
// Two at once, `lo` in the lower half.
DEV u32 narrow2(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
DEV float lower(u32 pair) { return __uint_as_float(pair << 16); }
DEV float upper(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Sixteen bytes of elements: 4 f32 or 8 bf16.
template <typename T> struct Vec;
template <> struct Vec<float> {
    static const int N = 4;
    float4 raw;
    DEV void load(const float* p) { raw = *reinterpret_cast<const float4*>(p); }
    DEV void store(float* p) const { *reinterpret_cast<float4*>(p) = raw; }
    DEV void to(float (&x)[4]) const { x[0] = raw.x, x[1] = raw.y, x[2] = raw.z, x[3] = raw.w; }
    DEV void from(const float (&x)[4]) { raw = make_float4(x[0], x[1], x[2], x[3]); }
};
template <> struct Vec<bf16> {
    static const int N = 8;
    uint4 raw;
    DEV void load(const bf16* p) { raw = *reinterpret_cast<const uint4*>(p); }
    DEV void store(bf16* p) const { *reinterpret_cast<uint4*>(p) = raw; }
    DEV void to(float (&x)[8]) const {
        x[0] = lower(raw.x), x[1] = upper(raw.x), x[2] = lower(raw.y), x[3] = upper(raw.y);
        x[4] = lower(raw.z), x[5] = upper(raw.z), x[6] = lower(raw.w), x[7] = upper(raw.w);
    }
    DEV void from(const float (&x)[8]) {
        raw = make_uint4(narrow2(x[0], x[1]), narrow2(x[2], x[3]), narrow2(x[4], x[5]), narrow2(x[6], x[7]));
    }
};

// One element, where no more may be taken at once.
template <typename T> struct Single {
    static const int N = 1;
    T raw;
    DEV void load(const T* p) { raw = *p; }
    DEV void store(T* p) const { *p = raw; }
    DEV void to(float (&x)[1]) const { x[0] = widen(raw); }
    DEV void from(const float (&x)[1]) { raw = narrow<T>(x[0]); }
};

// Every lane gets the result; the order of the sum is fixed.
template <typename F> DEV F warp_sum(F x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}
DEV float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}
// Every thread of a block of THREADS (a multiple of 32) gets the sum. `scratch` holds THREADS / 32 elements and may be
// used again after the call.
template <int THREADS, typename F> DEV F block_sum(F x, F* scratch) {
    x = warp_sum(x);
    if (THREADS == WARP) return x;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    F total = scratch[0];
#pragma unroll
    for (int w = 1; w < THREADS / WARP; w++) total += scratch[w];
    __syncthreads();
    return total;
}
