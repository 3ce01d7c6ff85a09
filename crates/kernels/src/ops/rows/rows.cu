// Rows moved in units of UNIT bytes, whatever they hold, and rows added. Units are numbered through all rows, so that
// short rows and long ones fill the warps alike; a thread loads STEP units before it stores the first.
//
// Defines: UNIT (2, 4, 8 or 16 bytes, which divide every row and every distance of rows, and at which both sides
// begin). scatter_add: ELEM as well.

#define STEP 4

#if UNIT == 16
typedef uint4 Unit;
#elif UNIT == 8
typedef uint2 Unit;
#elif UNIT == 4
typedef u32 Unit;
#else
typedef u16 Unit;
#endif

// The row and the unit in it of the first unit of a block, whose further units need no division of 64 bits.
struct Place {
    i64 row;
    u32 unit;
    DEV Place(u32 units) {
        const i64 first = i64(blockIdx.x) * blockDim.x * STEP;
        row = first / units;
        unit = u32(first - row * units);
    }
};

// out[n] = x[index[n]]. An index that is not one of x's rows reads nothing, and its row of out stays as it is.
extern "C" __global__ void gather(const Unit* x, const int* index, Unit* out, int n, u32 units, int x_rows) {
    const Place begin(units);
    Unit held[STEP];
    int from[STEP];
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = begin.unit + s * blockDim.x + threadIdx.x;
        const i64 row = begin.row + at / units;
        from[s] = row < n ? index[row] : -1;
    }
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (u32(from[s]) < u32(x_rows)) {
            const u32 at = begin.unit + s * blockDim.x + threadIdx.x;
            held[s] = x[i64(from[s]) * units + at % units];
        }
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (u32(from[s]) < u32(x_rows)) {
            const u32 at = begin.unit + s * blockDim.x + threadIdx.x;
            out[begin.row * units + at] = held[s];
        }
}

// to[r * to_stride] = from[r * from_stride], rows of `units`; strides in units.
extern "C" __global__ void copy_strided(const Unit* from, i64 from_stride, Unit* to, i64 to_stride, i64 n, u32 units) {
    const Place begin(units);
    Unit held[STEP];
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = begin.unit + s * blockDim.x + threadIdx.x;
        const i64 row = begin.row + at / units;
        if (row < n) held[s] = from[row * from_stride + at % units];
    }
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = begin.unit + s * blockDim.x + threadIdx.x;
        const i64 row = begin.row + at / units;
        if (row < n) to[row * to_stride + at % units] = held[s];
    }
}

#ifdef ELEM
#define COUNT (UNIT / sizeof(ELEM))

union Sum {
    Unit raw;
    ELEM elements[COUNT];
};

// x[index[n]] += d[n], in f32, rounded once. No index occurs twice; one that is not one of x's rows adds nothing.
extern "C" __global__ void scatter_add(const Unit* d, const int* index, Unit* x, int n, u32 units, int x_rows) {
    const Place begin(units);
    Sum added[STEP], held[STEP];
    i64 to[STEP];
#pragma unroll
    for (int s = 0; s < STEP; s++) {
        const u32 at = begin.unit + s * blockDim.x + threadIdx.x;
        const i64 row = begin.row + at / units;
        const int r = row < n ? index[row] : -1;
        to[s] = u32(r) < u32(x_rows) ? i64(r) * units + at % units : -1;
        if (to[s] >= 0) added[s].raw = d[begin.row * units + at];
    }
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (to[s] >= 0) held[s].raw = x[to[s]];
#pragma unroll
    for (int s = 0; s < STEP; s++)
        if (to[s] >= 0) {
#pragma unroll
            for (int e = 0; e < COUNT; e++)
                held[s].elements[e] = narrow<ELEM>(widen(held[s].elements[e]) + widen(added[s].elements[e]));
            x[to[s]] = held[s].raw;
        }
}
#endif
