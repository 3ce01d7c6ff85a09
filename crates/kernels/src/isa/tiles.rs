//! AMX: eight tile registers of 16 rows of 64 bytes, and one instruction that multiplies two of them. Stable Rust has no
//! intrinsics for them, so that each instruction is a line of assembly here; all above is written against [`Tiles`],
//! which ordinary code plays in tests (on CPUs with AVX-512 BF16, which the level includes).

#[cfg(target_arch = "x86_64")]
use std::marker::PhantomData;

/// Rows of a tile: of sums, of the left operand, and of cells (pairs of k) of the right one.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a tile of sums or of the right operand, and cells (pairs of k) in a row of the left one.
pub(crate) const TILE_COLUMNS: usize = 16;

/// The tile registers, numbered 0 to 7, all of 16 rows of 16 words.
///
/// # Safety
/// Registers hold what the last call left there, on this thread, between `configure` and `release`. `load` and `store`
/// reach 16 rows of 64 bytes, `stride` bytes apart, aligned or not.
pub(crate) unsafe trait Tiles {
    /// Gives the registers their shape.
    unsafe fn configure();
    /// Gives them back, which spares the kernel their saving. Does nothing where they have no shape.
    unsafe fn release();
    /// Whether they have their shape.
    #[cfg(test)]
    unsafe fn is_configured() -> bool;
    /// All zeros.
    unsafe fn zero<const T: u8>();
    /// Reads a tile.
    unsafe fn load<const T: u8>(from: *const u8, stride: usize);
    /// Reads a tile that is not read again soon: it need not stay in the first-level cache.
    unsafe fn load_once<const T: u8>(from: *const u8, stride: usize);
    /// Writes a tile.
    unsafe fn store<const T: u8>(to: *mut u8, stride: usize);
    /// `C[r][c]` += sum over the cells i of `A[r][i]` . `B[i][c]`; a cell is a pair of bf16, C is f32. The order within
    /// the sixteen cells is the hardware's own (and need not be that of the emulation), the same for every r and c.
    unsafe fn dot<const C: u8, const A: u8, const B: u8>();
}

/// Work on tiles, beside which AVX-512 with BF16 may be used. What uses it must carry the target features, or be
/// `#[inline(always)]` all the way down from `run`.
pub(crate) trait TileJob {
    /// Does it.
    fn run<T: Tiles>(self);
}

/// Runs a job on the hardware, or `emulated`.
pub(super) fn run(emulated: bool, job: impl TileJob) {
    #[cfg(all(test, target_arch = "x86_64"))]
    if emulated {
        // SAFETY: as below.
        return unsafe { with_vectors::<emulated::Emulated>(job) };
    }
    let _ = emulated;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the level is AMX, which includes AVX-512 BF16.
    unsafe {
        with_vectors::<hardware::Amx>(job);
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = job;
        unreachable!("AMX is x86-64's");
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn with_vectors<T: Tiles>(job: impl TileJob) {
    let _unwinding = Unwinding::<T>(PhantomData);
    job.run::<T>();
}

/// Releases tiles if a panic unwinds past the release of the job that configured them: the thread may be a worker, which
/// goes on.
#[cfg(target_arch = "x86_64")]
struct Unwinding<T: Tiles>(PhantomData<T>);

#[cfg(target_arch = "x86_64")]
impl<T: Tiles> Drop for Unwinding<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // SAFETY: the job is over.
            unsafe { T::release() }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use hardware::{Permission, permission};

#[cfg(target_arch = "x86_64")]
mod hardware {
    use super::Tiles;
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    /// Whether this process may use AMX.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Permission {
        /// The CPU lacks it.
        NoAmx,
        /// The CPU has it, the kernel says no.
        Refused,
        /// It may.
        Granted,
    }

    /// Asks the kernel for the tile registers, which it gives to a process only on demand (their state is 8 KiB a
    /// thread). What is granted holds for all threads started later.
    pub fn permission() -> Permission {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let has =
            __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE;
        match has {
            false => Permission::NoAmx,
            true if request() == 0 => Permission::Granted,
            true => Permission::Refused,
        }
    }

    /// arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): 0, or the negative error number.
    #[cfg(target_os = "linux")]
    fn request() -> i64 {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XFEATURE_XTILEDATA: u64 = 18;
        let result: i64;
        // SAFETY: a system call that reads and writes no memory of ours; the instruction leaves rcx and r11 changed.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack)
            );
        }
        result
    }

    /// Elsewhere there is no such request, and we do not know what would take its place.
    #[cfg(not(target_os = "linux"))]
    fn request() -> i64 {
        -1
    }

    /// The hardware's registers.
    pub struct Amx;

    /// What ldtilecfg reads: palette 1, and 64 bytes by 16 rows for each of the eight registers.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    // SAFETY: reached only where the level is AMX, which the CPU has and the kernel has granted. The compiler never
    // uses tile registers, so that they keep what these lines put there.
    unsafe impl Tiles for Amx {
        #[inline(always)]
        unsafe fn configure() {
            // SAFETY: reads the 64 bytes of a static.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags)) }
        }
        #[inline(always)]
        unsafe fn release() {
            // SAFETY: touches tile registers alone.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
        }
        #[cfg(test)]
        unsafe fn is_configured() -> bool {
            let mut config = Config { palette: 0xff, ..CONFIG };
            // SAFETY: writes 64 bytes, zeros where there is no shape.
            unsafe { asm!("sttilecfg [{}]", in(reg) &raw mut config, options(nostack, preserves_flags)) }
            config.palette != 0
        }
        #[inline(always)]
        unsafe fn zero<const T: u8>() {
            // SAFETY: as above.
            unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem, preserves_flags)) }
        }
        #[inline(always)]
        unsafe fn load<const T: u8>(from: *const u8, stride: usize) {
            // SAFETY: the caller vouches for 16 rows of 64 bytes.
            unsafe {
                asm!("tileloadd tmm{t}, [{p} + {s}]", t = const T, p = in(reg) from, s = in(reg) stride,
                    options(nostack, readonly, preserves_flags));
            }
        }
        #[inline(always)]
        unsafe fn load_once<const T: u8>(from: *const u8, stride: usize) {
            // SAFETY: the caller vouches for 16 rows of 64 bytes.
            unsafe {
                asm!("tileloaddt1 tmm{t}, [{p} + {s}]", t = const T, p = in(reg) from, s = in(reg) stride,
                    options(nostack, readonly, preserves_flags));
            }
        }
        #[inline(always)]
        unsafe fn store<const T: u8>(to: *mut u8, stride: usize) {
            // SAFETY: the caller vouches for 16 rows of 64 bytes.
            unsafe {
                asm!("tilestored [{p} + {s}], tmm{t}", t = const T, p = in(reg) to, s = in(reg) stride,
                    options(nostack, preserves_flags));
            }
        }
        #[inline(always)]
        unsafe fn dot<const C: u8, const A: u8, const B: u8>() {
            // SAFETY: touches tile registers alone.
            unsafe {
                asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                    options(nostack, nomem, preserves_flags));
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod emulated {
    use super::{TILE_COLUMNS, TILE_ROWS, Tiles};
    use std::cell::RefCell;

    type Tile = [u32; TILE_ROWS * TILE_COLUMNS];

    thread_local!(static REGISTERS: RefCell<Option<[Tile; 8]>> = const { RefCell::new(None) });

    /// Ordinary code in the place of the instructions. Using a register outside `configure` and `release` panics.
    pub struct Emulated;

    fn with<R>(f: impl FnOnce(&mut [Tile; 8]) -> R) -> R {
        REGISTERS.with_borrow_mut(|r| f(r.as_mut().expect("tiles are configured")))
    }

    fn halves(pair: u32) -> [f32; 2] {
        [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
    }

    // SAFETY: keeps the trait's promises in a thread's own memory.
    unsafe impl Tiles for Emulated {
        unsafe fn configure() {
            REGISTERS.set(Some([[0; TILE_ROWS * TILE_COLUMNS]; 8]));
        }
        unsafe fn release() {
            // Whoever releases what it never configured is wrong about what it does, but for who cleans up.
            assert!(REGISTERS.take().is_some() || std::thread::panicking(), "tiles are released twice");
        }
        unsafe fn is_configured() -> bool {
            REGISTERS.with_borrow(Option::is_some)
        }
        unsafe fn zero<const T: u8>() {
            with(|r| r[usize::from(T)].fill(0));
        }
        unsafe fn load<const T: u8>(from: *const u8, stride: usize) {
            with(|r| {
                for (i, row) in r[usize::from(T)].chunks_exact_mut(TILE_COLUMNS).enumerate() {
                    let row: &mut [u8] = bytemuck::cast_slice_mut(row);
                    // SAFETY: the caller vouches for 16 rows of 64 bytes.
                    row.copy_from_slice(unsafe { std::slice::from_raw_parts(from.add(i * stride), row.len()) });
                }
            });
        }
        unsafe fn load_once<const T: u8>(from: *const u8, stride: usize) {
            // SAFETY: passed on from the caller.
            unsafe { Self::load::<T>(from, stride) }
        }
        unsafe fn store<const T: u8>(to: *mut u8, stride: usize) {
            with(|r| {
                for (i, row) in r[usize::from(T)].chunks_exact(TILE_COLUMNS).enumerate() {
                    let row: &[u8] = bytemuck::cast_slice(row);
                    // SAFETY: as above, and nobody else has these bytes.
                    unsafe { std::slice::from_raw_parts_mut(to.add(i * stride), row.len()) }.copy_from_slice(row);
                }
            });
        }
        unsafe fn dot<const C: u8, const A: u8, const B: u8>() {
            with(|regs| {
                let (a, b) = (regs[usize::from(A)], regs[usize::from(B)]);
                for (at, c) in regs[usize::from(C)].iter_mut().enumerate() {
                    let (row, column) = (at / TILE_COLUMNS, at % TILE_COLUMNS);
                    let mut sum = f32::from_bits(*c);
                    for i in 0..TILE_COLUMNS {
                        let (x, y) = (halves(a[row * TILE_COLUMNS + i]), halves(b[i * TILE_COLUMNS + column]));
                        sum = x[0].mul_add(y[0], sum);
                        sum = x[1].mul_add(y[1], sum);
                    }
                    *c = sum.to_bits();
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ctx_of, isas};
    use crate::{Isa, Level};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Configures tiles, if at all, and fails.
    struct Fails(bool);
    impl TileJob for Fails {
        fn run<T: Tiles>(self) {
            // SAFETY: nothing else uses tiles on this thread meanwhile.
            unsafe {
                if self.0 {
                    T::configure();
                }
                assert_eq!(T::is_configured(), self.0);
            }
            panic!("a job failed");
        }
    }

    /// Says whether it finds tiles configured.
    struct Look<'a>(&'a mut Option<bool>);
    impl TileJob for Look<'_> {
        fn run<T: Tiles>(self) {
            // SAFETY: reads what there is.
            *self.0 = Some(unsafe { T::is_configured() });
        }
    }

    fn look(isa: Isa) {
        let mut found = None;
        isa.run_tiles(Look(&mut found));
        assert_eq!(found, Some(false));
    }

    /// A worker is left without tiles by a task that failed, and what failed is what the caller is told.
    #[test]
    fn a_panic_releases_tiles() {
        for isa in isas().into_iter().filter(|isa| isa.level() == Level::Amx) {
            for configured in [true, false] {
                let ctx = ctx_of(2, isa);
                let tasks = || ctx.host().for_each(4, |_| isa.run_tiles(Fails(configured)));
                let failed = catch_unwind(AssertUnwindSafe(tasks)).expect_err("all tasks fail");
                assert_eq!(failed.downcast_ref::<&str>(), Some(&"a job failed"));
                ctx.host().for_each(8, |_| look(isa));
                // On this thread too.
                catch_unwind(AssertUnwindSafe(|| isa.run_tiles(Fails(configured)))).expect_err("it fails");
                look(isa);
            }
        }
    }
}
