// Rows into the latent cache, a copy without rounding.
// Defines: BYTES of the unit in which all is counted: 16 where pointers and widths allow it, else an element's size.

template <int N> struct UnitOf;
template <> struct UnitOf<2> { typedef u16 Type; };
template <> struct UnitOf<4> { typedef u32 Type; };
template <> struct UnitOf<16> { typedef uint4 Type; };
typedef UnitOf<BYTES>::Type Unit;
static const int THREADS = 128;

extern "C" __device__ void __assertfail(
    const char* message, const char* file, u32 line, const char* function, size_t size);

// Grid: tokens. latent, rope and stride in units; `held` is the number of slots.
extern "C" __global__ void __launch_bounds__(THREADS) kv_store(
    const Unit* c_kv, const Unit* k_pe, const int* slots, Unit* cache, i64 held, int latent, int rope, i64 stride) {
    i64 n = blockIdx.x;
    int slot = slots[n];
    if (slot == -1) return;
    if (slot < 0 || slot >= held) {
        if (threadIdx.x == 0) __assertfail("a token's slot lies in the cache", "kv_store.cu", __LINE__, "kv_store", 1);
        return;
    }
    Unit* row = cache + i64(slot) * (latent + rope);
    for (int c = threadIdx.x; c < latent + rope; c += THREADS)
        row[c] = c < latent ? c_kv[n * latent + c] : k_pe[n * stride + (c - latent)];
}
