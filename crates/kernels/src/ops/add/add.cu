// Elementwise sums, blends and conversion in f32, rounded once. A thread takes STEP packs of PACK elements, all loaded
// before the first is stored; the last elements, fewer than a pack, are taken one by one.
//
// Defines: FROM and OTHER (what is read), ELEM (what is written), PACK. A pack is 16 bytes of the widest of them, so
// that the accesses of a warp are dense in each array, and every array begins at a multiple of its pack's size; or it
// is one element, wherever they begin.

#define STEP 4

template <int BYTES> struct Bytes;
template <> struct Bytes<2> { typedef u16 Type; };
template <> struct Bytes<4> { typedef u32 Type; };
template <> struct Bytes<8> { typedef uint2 Type; };
template <> struct Bytes<16> { typedef uint4 Type; };

// COUNT elements that are loaded and stored at once.
template <typename E, int COUNT> struct Pack {
    union {
        typename Bytes<COUNT * sizeof(E)>::Type raw;
        E elements[COUNT];
    };
    DEV void load(const E* p) { raw = *reinterpret_cast<const typename Bytes<COUNT * sizeof(E)>::Type*>(p); }
    DEV void store(E* p) const { *reinterpret_cast<typename Bytes<COUNT * sizeof(E)>::Type*>(p) = raw; }
    DEV float at(int i) const { return widen(elements[i]); }
    DEV void set(int i, float x) { elements[i] = narrow<E>(x); }
};

struct Sum {
    DEV static float of(float a, float b, float) { return a + b; }
};
struct Same {
    DEV static float of(float a, float, float) { return a; }
};
// From b, what is there, towards a.
struct Blend {
    DEV static float of(float a, float b, float weight) { return b + weight * (a - b); }
};

// out = Op(a, b) for the packs i, i + stride, ... below `end`, STEP of them; b may be out itself, and is read if TWO.
template <typename Op, bool TWO, int COUNT>
DEV void packs(const FROM* a, const OTHER* b, ELEM* out, i64 i, i64 end, int stride, float weight) {
    Pack<FROM, COUNT> x[STEP];
    Pack<OTHER, COUNT> y[STEP];
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (i + s * stride < end) {
            x[s].load(a + (i + s * stride) * COUNT);
            if (TWO) y[s].load(b + (i + s * stride) * COUNT);
        }
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (i + s * stride < end) {
            Pack<ELEM, COUNT> z;
#pragma unroll
            for (int e = 0; e < COUNT; e++) z.set(e, Op::of(x[s].at(e), TWO ? y[s].at(e) : 0.0f, weight));
            z.store(out + (i + s * stride) * COUNT);
        }
}

// The grid covers all packs.
template <typename Op, bool TWO>
DEV void elementwise(const FROM* a, const OTHER* b, ELEM* out, i64 len, float weight) {
    const i64 whole = len / PACK, first = i64(blockIdx.x) * blockDim.x * STEP + threadIdx.x;
    packs<Op, TWO, PACK>(a, b, out, first, whole, blockDim.x, weight);
    if (PACK > 1 && blockIdx.x == 0) {
        const i64 i = whole * PACK + threadIdx.x;
        packs<Op, TWO, 1>(a, b, out, i, min(len, i + 1), 1, weight);
    }
}

extern "C" __global__ void add(const FROM* a, const OTHER* b, ELEM* out, i64 len) {
    elementwise<Sum, true>(a, b, out, len, 0.0f);
}

extern "C" __global__ void convert(const FROM* a, ELEM* out, i64 len) {
    elementwise<Same, false>(a, nullptr, out, len, 0.0f);
}

// OTHER is ELEM.
extern "C" __global__ void blend(const FROM* a, const OTHER* b, ELEM* out, i64 len, float weight) {
    elementwise<Blend, true>(a, b, out, len, weight);
}
