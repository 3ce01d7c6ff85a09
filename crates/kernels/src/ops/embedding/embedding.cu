// Token embedding. Forward moves rows, rounding them where the table is wider. Backward sorts the positions by id,
// keeping their order, by a radix sort of DIGITS digits a pass; then each id's rows are summed one after the other, in
// registers, and added to the table's row once. Nothing depends on which block comes first.
//
// Defines: TABLE (forward: the table's type), ELEM (y's or dy's type), PACK (elements a thread moves at once, which
// divide a row and begin at a multiple of their size in every array).

template <int BYTES> struct Bytes;
template <> struct Bytes<2> { typedef u16 Type; };
template <> struct Bytes<4> { typedef u32 Type; };
template <> struct Bytes<8> { typedef uint2 Type; };
template <> struct Bytes<16> { typedef uint4 Type; };

// PACK elements that are loaded and stored at once.
template <typename E> struct Pack {
    typedef typename Bytes<PACK * sizeof(E)>::Type Raw;
    union {
        Raw raw;
        E elements[PACK];
    };
    DEV void load(const E* p) { raw = *reinterpret_cast<const Raw*>(p); }
    DEV void store(E* p) const { *reinterpret_cast<Raw*>(p) = raw; }
};

#define THREADS 256

#ifdef TABLE
// Packs of a thread in flight.
#define STEP 4

// y[n] = table[ids[n]]. An id that is no row of the table gives a row of NaN.
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_forward(const int* ids, const TABLE* table, ELEM* y, int n, u32 d, int vocabulary) {
    const u32 packs = d / PACK;
    // The first pack of the block, by a division of 64 bits; the others from there, in 32.
    const i64 first = i64(blockIdx.x) * (THREADS * STEP), first_row = first / packs;
    const u32 first_pack = u32(first - first_row * packs);
    Pack<TABLE> held[STEP];
    int id[STEP];
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const i64 row = first_row + (first_pack + s * THREADS + threadIdx.x) / packs;
        id[s] = row < n ? ids[row] : -1;
    }
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (u32(id[s]) < u32(vocabulary))
            held[s].load(table + i64(id[s]) * d + (first_pack + s * THREADS + threadIdx.x) % packs * PACK);
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = first_pack + s * THREADS + threadIdx.x;
        if (first_row + at / packs < n) {
            const bool known = u32(id[s]) < u32(vocabulary);
            Pack<ELEM> out;
#pragma unroll
            for (int i = 0; i < PACK; i++)
                out.elements[i] = narrow<ELEM>(known ? widen(held[s].elements[i]) : __int_as_float(0x7fffffff));
            out.store(y + (first_row * packs + at) * PACK);
        }
    }
}
#else

// Positions that one block of the sort takes, one a thread.
#define TILE 1024
#define BITS 9
#define DIGITS (1 << BITS)
#define TILE_WARPS (TILE / WARP)

// counts[tile][digit]: how many ids of the tile have the digit that begins at bit `shift`.
extern "C" __global__ void __launch_bounds__(TILE) embedding_count(const int* ids, int* counts, int n, int shift) {
    __shared__ int found[DIGITS];
    if (threadIdx.x < DIGITS) found[threadIdx.x] = 0;
    __syncthreads();
    const int i = blockIdx.x * TILE + threadIdx.x;
    if (i < n) atomicAdd(&found[u32(ids[i]) >> shift & DIGITS - 1], 1);
    __syncthreads();
    if (threadIdx.x < DIGITS) counts[blockIdx.x * DIGITS + threadIdx.x] = found[threadIdx.x];
}

// Moves ids and their positions to where the digit puts them: behind those with lower digits, and behind those with
// the same digit that came before. Without `positions`, they are 0, 1, ...
extern "C" __global__ void __launch_bounds__(TILE)
    embedding_sort(const int* ids, const int* positions, const int* counts, int* to_ids, int* to_positions, int n,
                   int shift) {
    // Of each warp, how many have the digit; then, how many of the warps before.
    __shared__ u16 before[TILE_WARPS][DIGITS];
    // Of each digit: where the tile's first goes.
    __shared__ int begin[DIGITS];
    __shared__ int sums[DIGITS / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, digit = threadIdx.x;
    for (int d = lane; d < DIGITS; d += WARP) before[warp][d] = 0;
    int total = 0, earlier = 0, scan = 0;
    if (digit < DIGITS) {
#pragma unroll 16
        for (int tile = 0; tile < gridDim.x; tile++) {
            const int c = counts[tile * DIGITS + digit];
            total += c;
            if (tile < blockIdx.x) earlier += c;
        }
        scan = total;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const int left = __shfl_up_sync(ALL_LANES, scan, d);
            if (lane >= d) scan += left;
        }
        if (lane == WARP - 1) sums[warp] = scan;
    }
    __syncthreads();
    if (digit < DIGITS) {
        for (int w = 0; w < warp; w++) scan += sums[w];
        begin[digit] = scan - total + earlier;
    }
    const int i = blockIdx.x * TILE + threadIdx.x;
    const int id = i < n ? ids[i] : 0;
    const u32 key = u32(id) >> shift & DIGITS - 1;
    // Lanes past the end match each other alone.
    const u32 same = __match_any_sync(ALL_LANES, i < n ? key : u32(DIGITS));
    const int rank = __popc(same & (1u << lane) - 1);
    if (i < n && rank == 0) before[warp][key] = __popc(same);
    __syncthreads();
    if (digit < DIGITS) {
        int sum = 0;
#pragma unroll
        for (int w = 0; w < TILE_WARPS; w++) {
            const int c = before[w][digit];
            before[w][digit] = sum;
            sum += c;
        }
    }
    __syncthreads();
    if (i < n) {
        const int to = begin[key] + before[warp][key] + rank;
        to_ids[to] = id;
        to_positions[to] = positions ? positions[i] : i;
    }
}

// Rows in flight.
#ifndef DEPTH
#define DEPTH 8
#endif
#ifndef SUM_WARPS
#define SUM_WARPS 4
#endif

// dtable[id] += the sum of id's rows of dy. ids are sorted, positions beside them. A warp has a place among them and
// WARP packs of columns; if another id ends before its place, it sums the rows of the id that begins there.
extern "C" __global__ void __launch_bounds__(SUM_WARPS* WARP)
    embedding_sum(const int* ids, const int* positions, const ELEM* dy, float* dtable, int n, u32 d, int vocabulary) {
    const int lane = threadIdx.x % WARP, place = blockIdx.x;
    const int id = ids[place];
    if (u32(id) >= u32(vocabulary) || (place > 0 && ids[place - 1] == id)) return;
    const u32 column = ((blockIdx.y * SUM_WARPS + threadIdx.x / WARP) * WARP + lane) * PACK;
    const bool inside = column < d;
    dy += column;
    float sum[PACK] = {};
    for (int from = place; from < n; from += WARP) {
        // The next ids and positions, one a lane.
        const int i = from + lane;
        const bool mine = i < n && ids[i] == id;
        const int position = mine ? positions[i] : 0;
        const int count = __popc(__ballot_sync(ALL_LANES, mine));
        for (int k = 0; k < count; k += DEPTH) {
            Pack<ELEM> held[DEPTH];
#pragma unroll
            for (int j = 0; j < DEPTH; j++) {
                const i64 row = __shfl_sync(ALL_LANES, position, k + j);
                if (inside && k + j < count) held[j].load(dy + row * d);
            }
#pragma unroll
            for (int j = 0; j < DEPTH; j++)
                if (inside && k + j < count) {
#pragma unroll
                    for (int e = 0; e < PACK; e++) sum[e] += widen(held[j].elements[e]);
                }
        }
        if (count < WARP) break;
    }
    if (!inside) return;
    float* to = dtable + i64(id) * d + column;
#if PACK >= 4
#pragma unroll
    for (int e = 0; e < PACK; e += 4) {
        float4 v = *reinterpret_cast<float4*>(to + e);
        v.x += sum[e], v.y += sum[e + 1], v.z += sum[e + 2], v.w += sum[e + 3];
        *reinterpret_cast<float4*>(to + e) = v;
    }
#else
#pragma unroll
    for (int e = 0; e < PACK; e++) to[e] += sum[e];
#endif
}
#endif
