// What the kernels of sm90_backward.cu stand on: the layout of shared memory, copies and counters, who works on what.

#define KEYS 128
#define QUERIES 64
#define QK 192
#define NOPE 128
#define ROPE 64
#define VDIM 128

// Shared memory, from a 1024-byte boundary on.
#define AT_K 0                       // 6 boxes of 32 columns (64-byte swizzle), 128 keys
#define K_BOX (KEYS * 64)
#define AT_V (AT_K + 6 * K_BOX)      // 2 boxes of 64 columns, 128 keys
#define V_BOX (KEYS * 128)
#define AT_Q (AT_V + 2 * V_BOX)      // per stage 3 boxes of 64 columns, 64 queries
#define Q_BOX (QUERIES * 128)
#define Q_STAGE (3 * Q_BOX)
#define AT_DO (AT_Q + 2 * Q_STAGE)   // per stage 2 boxes of 64 columns, 64 queries
#define DO_STAGE (2 * Q_BOX)
#define AT_DS (AT_DO + 2 * DO_STAGE) // per stage 128 keys of 64 queries
#define DS_STAGE (KEYS * QUERIES * 2)
#define AT_SUMS (AT_DS + 2 * DS_STAGE) // per warpgroup two thirds of its 64 x 96 sums, as the others left them
#define SUMS_PART 8192
#define AT_STATS (AT_SUMS + 4 * SUMS_PART)
#define STATS 512                    // lse and D of 64 queries
#define AT_BARS (AT_STATS + 2 * STATS)
#define AT_WORK (AT_BARS + 320)      // what the block does now and next

// mbarriers; of those with a stage or a half, two or four follow each other. What each says:
#define BAR_K 0            // K is there; Q with lse and D; dO
#define BAR_Q 1
#define BAR_DO 3
#define BAR_EMPTY 5        // Q and dO of a stage are read
#define BAR_DS 7           // dS is there, of both warpgroups; read by both
#define BAR_DS_EMPTY 9
#define BAR_READY 11       // a third of the others' sums is there; read
#define BAR_DONE 15
#define BAR_V 19           // V is there; K is read; V is read
#define BAR_K_EMPTY 20
#define BAR_V_EMPTY 21
#define BAR_WORK 22        // a work is there; done with by all
#define BAR_WORK_EMPTY 24
#define BAR_TURN 26        // it is this block's turn; both halves have had it; a half has added
#define BAR_SEEN 28
#define BAR_ADDED 30
#define BAR_STATS_EMPTY 34 // lse and D of a stage are read

#define LOG2E 1.4426950408889634f

// What the kernels share; sequence s owns the tiles of 64 queries from query_base(s) on, and of 128 keys from key_base(s).
DEV int query_base(const int* cu_q, int s) { return cu_q[s] / QUERIES + s; }
DEV int key_base(const int* cu_k, int s) { return cu_k[s] / KEYS + s; }

// The last sequence whose tiles begin at or before `tile`.
template <int SIZE> DEV int sequence_of(const int* cu, int sequences, int tile) {
    int lo = 0, hi = sequences;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (cu[mid] / SIZE + mid <= tile) lo = mid;
        else hi = mid;
    }
    return lo;
}

// 64-byte swizzle: K-major, rows of 32 k; MN-major, boxes of 32 n, `block` bytes apart.
DEV u64 desc64_k(u32 at) { return u64((at & 0x3ffff) >> 4) | u64(1) << 16 | u64(512 >> 4) << 32 | u64(2) << 62; }
DEV u64 desc64_mn(u32 at, u32 block) {
    return u64((at & 0x3ffff) >> 4) | u64(block >> 4) << 16 | u64(512 >> 4) << 32 | u64(2) << 62;
}
DEV void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar) : "memory");
}
DEV u32 acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Orders everything this thread has seen (other threads' stores included) before the addition.
DEV void release_add(u32* p) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
DEV void await(const u32* p, u32 v) {
    while (acquire(p) < v) __nanosleep(32);
}
// Orders the copy engine's accesses to device memory and this thread's.
DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEV float4 load_shared(u32 at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}
DEV void add4(float* p, float a, float b, float c, float d) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEV void put4(float* p, float a, float b, float c, float d) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// Not from the first-level cache: other processors have written there.
DEV float4 get4(const float* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
DEV float load2(u32 at, float& next) {
    float v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v), "=f"(next) : "r"(at));
    return v;
}
DEV void store16(bf16* p, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What a block does until it takes the next.
struct Work {
    int head, tile;        // tile: of 128 keys, counted over all sequences
    int slot, round;       // where the head's sums lie; how many heads had that place before
    int j;                 // within its sequence
    int key, keys;         // its first row, and how many rows are the sequence's
    int query, queries;    // the sequence's first row, its length
    int offset;            // query i sees keys 0 ..= offset + i
    int first, steps;      // tiles of queries
    int query_tile;        // counted over all sequences, of the sequence's first
};

// How many tiles of keys the tile `i` of queries sees.
DEV int tiles_seen(int i, int queries, int offset) {
    return (min(i * QUERIES + QUERIES, queries) - 1 + offset) / KEYS + 1;
}

DEV bool find_work(volatile Work& w, u32 ticket, int tiles, int heads, int group, int slots, const int* cu_q,
                   const int* cu_k, int sequences) {
    const u32 g = ticket / u32(group * tiles), r = ticket - g * u32(group * tiles);
    const u32 in_group = min(group, heads - int(g) * group);
    w.tile = r / in_group;
    w.head = g * group + r - w.tile * in_group;
    int s = sequence_of<KEYS>(cu_k, sequences, w.tile);
    int k0 = cu_k[s], keys = cu_k[s + 1] - k0, base = key_base(cu_k, s);
    int count = (keys + KEYS - 1) / KEYS;
    // Later keys first.
    w.j = count - 1 - (w.tile - base);
    if (w.j < 0 || w.j >= count) return false;
    w.tile = base + w.j;
    w.key = k0 + w.j * KEYS, w.keys = min(keys - w.j * KEYS, KEYS);
    w.query = cu_q[s], w.queries = cu_q[s + 1] - w.query;
    w.offset = keys - w.queries;
    w.first = max(w.j * KEYS - w.offset, 0) / QUERIES;
    w.steps = max((w.queries + QUERIES - 1) / QUERIES - w.first, 0);
    w.query_tile = query_base(cu_q, s);
    w.round = u32(w.head) / u32(slots), w.slot = w.head - w.round * slots;
    return true;
}

// The tile of queries of step n, within its sequence.
DEV int place(const volatile Work& w, int n) { return w.first + n; }
DEV int seen_at(const volatile Work& w, int n) { return tiles_seen(place(w, n), w.queries, w.offset); }
// Of the `seen` tiles of keys that a tile of queries sees, the last adds first and the first last.
DEV bool adds_first(const volatile Work& w, int seen) { return w.j == seen - 1; }
DEV bool adds_last(const volatile Work& w, int seen) { return w.j == 0; }

// sums: f32 [tiles of queries][slots][2][12][128][4], the fragments of dQ; pe_sums: f32 [tiles of keys][2][8][128][4].
// counters: the ticket, then slots per tile of queries, then one per tile of keys.
struct Params {
    const float* stats;
    float* sums;
    float* pe_sums;
    u32* counters;
    bf16* dq;
    bf16* dkv_up;
    bf16* dk_pe;
    const int* cu_q;
    const int* cu_k;
    i64 dk_pe_stride;
    int sequences, heads, group, slots, query_tiles, key_tiles;
    float scale;
};

struct Turn {
    u32* counter;
    u32 target;
    bool alone;
};
// Which value the counter of step n's tile of queries must have for this block to add, and where it is; after the last step,
// that of dk_pe. Each half of a tile counts one.
DEV Turn turn_of(const Params& p, const volatile Work& w, int n) {
    Turn t;
    if (n == w.steps) {
        t.counter = p.counters + 1 + i64(p.query_tiles) * p.slots + w.tile, t.target = 2 * w.head, t.alone = false;
        return t;
    }
    int seen = seen_at(w, n);
    t.counter = p.counters + 1 + i64(w.query_tile + place(w, n)) * p.slots + w.slot;
    t.target = 2 * (u32(w.round) * seen + (seen - 1 - w.j));
    t.alone = seen == 1;
    return t;
}

// Among each four lanes: lane i gets all their x[i].
DEV void transpose4(u32 (&x)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    u32 a = __shfl_xor_sync(ALL_LANES, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(ALL_LANES, odd ? x[2] : x[3], 1);
    if (odd) x[0] = a, x[2] = b;
    else x[1] = a, x[3] = b;
    a = __shfl_xor_sync(ALL_LANES, high ? x[0] : x[2], 2), b = __shfl_xor_sync(ALL_LANES, high ? x[1] : x[3], 2);
    if (high) x[0] = a, x[1] = b;
    else x[2] = a, x[3] = b;
}

// The thread within its warpgroup, read anew where registers are short.
DEV int own_thread() {
    u32 t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t & 127;
}
