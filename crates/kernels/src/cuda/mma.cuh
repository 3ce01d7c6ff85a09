// Products of bf16 by mma.sync, which every GPU since Ampere has, and copies into shared memory that do not wait. A
// product is m16n8k16: of its 16 x 8 sums a lane holds those of rows lane / 4 and lane / 4 + 8, columns lane % 4 * 2 and
// the next.

#define LOG2E 1.4426950408889634f

// ---- Copies into shared memory

DEV u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Sixteen bytes, or zeros where `there` is false: then nothing is read.
DEV void copy16(bf16* to, const bf16* from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
DEV void commit() { asm volatile("cp.async.commit_group;"); }
// Waits until at most N of the groups of copies that this thread began are under way.
template <int N> DEV void wait_for_all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- Products

// The left operand's 16 x 16 at `p`, rows `ld` apart.
DEV void load_left(u32 (&a)[4], const bf16* p, int ld) {
    u32 lane = threadIdx.x % WARP;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(p + lane % 16 * ld + lane / 16 * 8)));
}
// The right operand's 16 (k) x 16 (n), stored as [n][k].
DEV void load_right(u32 (&b)[4], const bf16* p, int ld) {
    u32 lane = threadIdx.x % WARP;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(p + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8)));
}
// The same, stored as [k][n].
DEV void load_right_turned(u32 (&b)[4], const bf16* p, int ld) {
    u32 lane = threadIdx.x % WARP;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared_address(p + lane % 16 * ld + lane / 16 * 8)));
}
// c [16][8] += a b: a of 16 x 16, b of 16 x 8 as one half of what is loaded.
DEV void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- What softmax makes of a product

DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Over the four lanes that share a row.
DEV float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
DEV float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
