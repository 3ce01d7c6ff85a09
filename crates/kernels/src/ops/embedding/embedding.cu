// Token embedding. Forward moves rows, rounding them where the table is wider. Backward sorts the positions by id,
// keeping their order, by a radix sort of DIGITS digits a pass; then each id's rows are summed one after the other, in
// registers, and added to the table's row once. Nothing depends on which block comes first.
//
// Defines: TABLE (forward: the table's type), ELEM (y's or dy's type), PACK (elements a thread moves at once, which
// divide a row and begin at a multiple of their size in every array; backward: 16 bytes of dy, or one).

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

// A warp's rows in flight, of an id that few positions hold.
#define DEPTH 4
// Warps of a block that sums.
#define SUM_WARPS 4

// The first place behind `place`, whose id is `id`, that holds another; the whole warp searches.
DEV int end_of(const int* ids, int place, int n, int id) {
    int same = place, end = n;
    while (end - same > 1) {
        const int step = (end - same + WARP - 1) / WARP;
        const i64 probe = same + i64(threadIdx.x % WARP + 1) * step;
        same += __popc(__ballot_sync(ALL_LANES, probe < end && ids[probe] == id)) * step;
        end = min(end, same + step);
    }
    return end;
}

// A lane's columns of the table's row, to which a sum is added.
template <int COUNT> struct Target {
    float* to;
    float old[COUNT];
    // Four at once where there are four: PACK is then a divisor of the row.
    DEV void load(float* row) {
        to = row;
        if (COUNT % 4 == 0) {
#pragma unroll
            for (int e = 0; e + 3 < COUNT; e += 4) {
                const float4 v = *reinterpret_cast<const float4*>(to + e);
                old[e] = v.x, old[e + 1] = v.y, old[e + 2] = v.z, old[e + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int e = 0; e < COUNT; e++) old[e] = to[e];
        }
    }
    DEV void add(const float (&sum)[COUNT]) {
        if (COUNT % 4 == 0) {
#pragma unroll
            for (int e = 0; e + 3 < COUNT; e += 4)
                *reinterpret_cast<float4*>(to + e) = make_float4(old[e] + sum[e], old[e + 1] + sum[e + 1],
                                                                 old[e + 2] + sum[e + 2], old[e + 3] + sum[e + 3]);
        } else {
#pragma unroll
            for (int e = 0; e < COUNT; e++) to[e] = old[e] + sum[e];
        }
    }
};

// Of an id that holds at most WARP places, the first of which is `place`: rows go through registers, DEPTH at a time.
DEV void sum_few(const int* ids, const int* positions, const ELEM* dy, float* to, int n, u32 d, u32 column, int place,
                 int id) {
    const int i = place + int(threadIdx.x % WARP);
    const bool mine = i < n && ids[i] == id;
    const int position = i < n ? positions[i] : 0;
    const int count = __popc(__ballot_sync(ALL_LANES, mine));
    const bool inside = column < d;
    Target<PACK> target;
    if (inside) target.load(to + column);
    float sum[PACK] = {};
    for (int k = 0; k < count; k += DEPTH) {
        Pack<ELEM> held[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            const i64 row = __shfl_sync(ALL_LANES, position, k + j);
            if (inside && k + j < count) held[j].load(dy + row * d + column);
        }
#pragma unroll
        for (int j = 0; j < DEPTH; j++)
            if (inside && k + j < count) {
#pragma unroll
                for (int e = 0; e < PACK; e++) sum[e] += widen(held[j].elements[e]);
            }
    }
    if (inside) target.add(sum);
}

// Of an id that holds the places from `place` to `end`: their order makes this one chain of additions, which is as fast
// as rows arrive. A warp takes 128 bytes of every row; STAGES groups of GROUP rows are on their way to shared memory at
// once, eight lanes fetching a row.
#define GROUP 8
#define STAGES 6
// Columns of a lane; one where rows do not begin at 16 bytes.
static constexpr int NARROW = PACK > 1 ? 4 / sizeof(ELEM) : 1;

DEV void sum_many(const int* positions, const ELEM* dy, float* to, u32 d, u32 column, int place, int end) {
    float sum[NARROW] = {};
#if PACK > 1
    __shared__ __align__(16) ELEM ring[SUM_WARPS][STAGES][GROUP][WARP * NARROW];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rows = end - place;
    // What the lane fetches of its rows: 16 bytes.
    const u32 part = lane % 8 * PACK;
    const bool inside = column - lane * NARROW + part < d;
    dy += column - lane * NARROW + part;
    // Positions of the WARP rows that are fetched now and of the next, one a lane.
    int now = 0, next = lane < rows ? positions[place + lane] : 0;
    int stage = 0;
    for (int fetched = 0; fetched < rows + STAGES * GROUP; fetched += GROUP) {
        // The group that was fetched a whole ring ago has arrived.
        const int row = fetched - STAGES * GROUP;
        if (row >= 0) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
            __syncwarp();
            float x[GROUP][NARROW];
#pragma unroll
            for (int j = 0; j < GROUP; j++)
#pragma unroll
                for (int e = 0; e < NARROW; e++) x[j][e] = widen(ring[warp][stage][j][lane * NARROW + e]);
#pragma unroll
            for (int j = 0; j < GROUP; j++)
                if (row + j < rows) {
#pragma unroll
                    for (int e = 0; e < NARROW; e++) sum[e] += x[j][e];
                }
            __syncwarp();
        }
        if (fetched % WARP == 0) {
            now = next;
            const int i = fetched + WARP + lane;
            next = i < rows ? positions[place + i] : 0;
        }
#pragma unroll
        for (int j = 0; j < GROUP; j += 4) {
            const int k = j + lane / 8;
            const i64 from = __shfl_sync(ALL_LANES, now, (fetched + k) % WARP);
            if (inside && fetched + k < rows) {
                const u32 slot = u32(__cvta_generic_to_shared(&ring[warp][stage][k][part]));
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot), "l"(dy + from * d) : "memory");
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
#else
    if (column < d) {
#pragma unroll 8
        for (int i = place; i < end; i++) sum[0] += widen(dy[i64(positions[i]) * d + column]);
    }
#endif
    if (column >= d) return;
    Target<NARROW> target;
    target.load(to + column);
    target.add(sum);
}

// dtable[id] += the sum of id's rows of dy; ids are sorted, positions beside them. The first windows * many_columns
// blocks look for ids that hold more than WARP places: each has a window of WARP places, in which only the last id that
// begins can be one. The others have one place each, many_columns and few_columns being the blocks that all columns
// take; if an id begins there that holds few, they sum its rows.
extern "C" __global__ void __launch_bounds__(SUM_WARPS* WARP)
    embedding_sum(const int* ids, const int* positions, const ELEM* dy, float* dtable, int n, u32 d, int vocabulary,
                  u32 windows, u32 many_columns, u32 few_columns) {
    const u32 thread = threadIdx.x;
    const u32 many = windows * many_columns;
    if (blockIdx.x < many) {
        const int begin = blockIdx.x / many_columns * WARP, i = begin + int(thread % WARP);
        const u32 starts = __ballot_sync(ALL_LANES, i < n && (i == 0 || ids[i - 1] != ids[i]));
        if (starts == 0) return;
        const int place = begin + 31 - __clz(starts), id = ids[place];
        if (place + WARP >= n || ids[place + WARP] != id || u32(id) >= u32(vocabulary)) return;
        const u32 column = (blockIdx.x % many_columns * SUM_WARPS * WARP + thread) * NARROW;
        sum_many(positions, dy, dtable + i64(id) * d, d, column, place, end_of(ids, place, n, id));
    } else {
        const u32 block = blockIdx.x - many;
        const int place = block / few_columns, id = ids[place];
        if (u32(id) >= u32(vocabulary) || (place > 0 && ids[place - 1] == id)) return;
        if (place + WARP < n && ids[place + WARP] == id) return;
        const u32 column = (block % few_columns * SUM_WARPS * WARP + thread) * PACK;
        sum_few(ids, positions, dy, dtable + i64(id) * d, n, d, column, place, id);
    }
}
#endif
