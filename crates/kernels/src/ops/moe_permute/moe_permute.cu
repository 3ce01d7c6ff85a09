// Tokens to expert order and back.
//
// The plan is a stable counting sort in three launches: slots of each expert in each tile; the tiles of an expert
// summed; places. Only integers are added, so that the order of the atomics does not show.
// Compiled with EXPERTS (plan), with UNIT_BYTES, UNITS and TOP_K (permute), or with ELEM, DIM, WIDE and TOP_K (sums).

#define THREADS_OF 256
#define WARPS (THREADS_OF / WARP)
#define ROUNDS 4
// Slots of one block: each warp has ROUNDS * 32 neighbours.
#define TILE (THREADS_OF * ROUNDS)

#ifdef EXPERTS
// Sum of x over the threads before this one, and over all of them.
DEV int scan(int x, int& total, int* scratch) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = x;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        int below = __shfl_up_sync(ALL_LANES, sum, d);
        if (lane >= d) sum += below;
    }
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) before = total;
        total += scratch[w];
    }
    __syncthreads();
    return before + sum - x;
}

// counts[e, tile]: slots of the tile that chose e.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    moe_count(const int* __restrict__ indices, int* __restrict__ counts, int slots, int tiles) {
    __shared__ int held[EXPERTS];
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS_OF) held[e] = 0;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        i64 slot = i64(blockIdx.x) * TILE + r * THREADS_OF + threadIdx.x;
        if (slot < slots) {
            int e = indices[slot];
            // A choice that is no expert's would be written outside of every buffer.
            if (u32(e) >= EXPERTS) __trap();
            atomicAdd(&held[e], 1);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS_OF) counts[i64(e) * tiles + blockIdx.x] = held[e];
}

// One block an expert: counts become sums over the tiles before; totals[e] is the sum over all.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    moe_scan(int* __restrict__ counts, int* __restrict__ totals, int tiles) {
    __shared__ int scratch[WARPS];
    int* row = counts + i64(blockIdx.x) * tiles;
    int before = 0;
    for (int first = 0; first < tiles; first += THREADS_OF) {
        int tile = first + threadIdx.x, total;
        int own = tile < tiles ? row[tile] : 0;
        int sum = scan(own, total, scratch);
        if (tile < tiles) row[tile] = before + sum;
        before += total;
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// Rows of a tile's slots. The first block also writes the offsets.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    moe_place(const int* __restrict__ indices, const int* __restrict__ counts, const int* __restrict__ totals,
              int* __restrict__ offsets, int* __restrict__ row_of_slot, int* __restrict__ slot_of_row, int slots,
              int tiles) {
    __shared__ int next[WARPS][EXPERTS];
    __shared__ int begin[EXPERTS];
    __shared__ int scratch[WARPS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = 0;
    for (int first = 0; first < EXPERTS; first += THREADS_OF) {
        int e = first + threadIdx.x, total;
        int sum = scan(e < EXPERTS ? totals[e] : 0, total, scratch);
        if (e < EXPERTS) begin[e] = before + sum;
        before += total;
    }
    for (int i = threadIdx.x; i < WARPS * EXPERTS; i += THREADS_OF) next[0][i] = 0;
    __syncthreads();
    if (blockIdx.x == 0) {
        for (int e = threadIdx.x; e < EXPERTS; e += THREADS_OF) offsets[e] = begin[e];
        if (threadIdx.x == 0) offsets[EXPERTS] = before;
    }
    if (slots == 0) return;
    i64 base = i64(blockIdx.x) * TILE + warp * (ROUNDS * WARP) + lane;
    int chosen[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        chosen[r] = base + r * WARP < slots ? indices[base + r * WARP] : -1;
        if (chosen[r] >= 0) atomicAdd(&next[warp][chosen[r]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS_OF) {
        int row = begin[e] + counts[i64(e) * tiles + blockIdx.x];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            int own = next[w][e];
            next[w][e] = row;
            row += own;
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        int e = chosen[r];
        u32 alike = __match_any_sync(ALL_LANES, e);
        int rank = __popc(alike & ((1u << lane) - 1));
        if (e >= 0) {
            int row = next[warp][e] + rank, slot = int(base + r * WARP);
            row_of_slot[slot] = row;
            slot_of_row[row] = slot;
        }
        __syncwarp();
        if (e >= 0 && rank == 0) next[warp][e] += __popc(alike);
        __syncwarp();
    }
}
#endif

#ifdef UNIT_BYTES
#if UNIT_BYTES == 16
typedef uint4 Unit;
#elif UNIT_BYTES == 8
typedef uint2 Unit;
#elif UNIT_BYTES == 4
typedef u32 Unit;
#else
typedef u16 Unit;
#endif

// A token's row to the places of its slots: read once, and written TOP_K times. `units` is that of all tokens.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    moe_spread(const Unit* __restrict__ x, const int* __restrict__ row_of_slot, Unit* __restrict__ rows, i64 units) {
    i64 i = i64(blockIdx.x) * THREADS_OF + threadIdx.x;
    if (i >= units) return;
    i64 t = i / UNITS;
    int at = int(i % UNITS);
    Unit v = x[i];
#pragma unroll
    for (int k = 0; k < TOP_K; k++) rows[row_of_slot[t * TOP_K + k] * i64(UNITS) + at] = v;
}
#endif

#ifdef ELEM
#if WIDE
typedef Vec<ELEM> Piece;
#define PIECE (Vec<ELEM>::N)
#else
#define PIECE 1
struct Piece {
    ELEM raw;
    DEV void load(const ELEM* p) { raw = *p; }
    DEV void store(ELEM* p) const { *p = raw; }
    DEV void to(float (&x)[1]) const { x[0] = widen(raw); }
    DEV void from(const float (&x)[1]) { raw = narrow<ELEM>(x[0]); }
};
#endif
#define PIECES (DIM / PIECE)

// No fused operation, so that the bits are the CPU's.
DEV void add(float (&sum)[PIECE], float weight, const Piece& p) {
    float x[PIECE];
    p.to(x);
#pragma unroll
    for (int i = 0; i < PIECE; i++) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, x[i]));
}
DEV void add(float (&sum)[PIECE], const ELEM* p) {
    Piece piece;
    piece.load(p);
    add(sum, 1.0f, piece);
}

// out = base + sum over a token's slots, in order, of weight * row + extra (+ out): what is null is left out. `pieces`
// is that of all tokens.
extern "C" __global__ void __launch_bounds__(THREADS_OF)
    moe_sum(const ELEM* __restrict__ rows, const int* __restrict__ row_of_slot, const float* __restrict__ weights,
            const ELEM* base, const ELEM* extra, ELEM* out, i64 pieces, int accumulate) {
    i64 i = i64(blockIdx.x) * THREADS_OF + threadIdx.x;
    if (i >= pieces) return;
    i64 t = i / PIECES, own = i * PIECE;
    int at = int(i % PIECES) * PIECE;
    float sum[PIECE];
#pragma unroll
    for (int c = 0; c < PIECE; c++) sum[c] = 0.0f;
    if (base) add(sum, base + own);
    // So many rows are on their way at once.
    const int DEEP = TOP_K < 8 ? TOP_K : 8;
#pragma unroll 1
    for (int first = 0; first < TOP_K; first += DEEP) {
        Piece piece[DEEP];
        float weight[DEEP];
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            if (first + k < TOP_K) {
                i64 slot = t * TOP_K + first + k;
                piece[k].load(rows + row_of_slot[slot] * i64(DIM) + at);
                weight[k] = weights ? weights[slot] : 1.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            if (first + k < TOP_K) add(sum, weight[k], piece[k]);
        }
    }
    if (extra) add(sum, extra + own);
    if (accumulate) add(sum, out + own);
    Piece result;
    result.from(sum);
    result.store(out + own);
}
#endif
