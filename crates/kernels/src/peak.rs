//! How fast this CPU multiplies when nothing is in the way: loops over registers that load and store nothing. What a
//! product of matrices reaches is judged by them (`hadal bench peak`); no operation uses them.

use crate::isa::{Job, Lanes, TILE_COLUMNS, TILE_ROWS, TileJob, Tiles};
use crate::{Cpu, DType, Isa, Level};
use std::hint::black_box;

/// Independent chains of multiply-adds: over the latency times the units of any CPU that we know, and with both
/// factors within the 16 registers of AVX2.
const CHAINS: usize = 12;

/// Levels that each brought wider multiply-adds of f32.
const MULTIPLIES_F32: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

/// A loop over registers.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    isa: Isa,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// f32 multiply-add.
    Fma,
    /// vdpbf16ps: products of pairs of bf16, summed in f32.
    Bf16Dot,
    /// tdpbf16ps: the same on tiles.
    Tiles,
}

/// All loops that a device of the level `isa` may use, the narrowest first.
pub fn kernels(isa: Isa) -> Vec<Kernel> {
    let levels = MULTIPLIES_F32.into_iter().filter(|&l| l <= isa.level()).filter_map(Isa::new);
    let fma = levels.map(|isa| Kernel { isa, kind: Kind::Fma });
    let kernel = |level, kind| (isa.level() >= level).then_some(Kernel { isa, kind });
    fma.chain(kernel(Level::Avx512Bf16, Kind::Bf16Dot)).chain(kernel(Level::Amx, Kind::Tiles)).collect()
}

impl Kernel {
    /// Level and instruction.
    pub fn name(&self) -> String {
        let instruction = match self.kind {
            Kind::Fma => "fma",
            Kind::Bf16Dot => return "vdpbf16ps".into(),
            Kind::Tiles => return "tdpbf16ps".into(),
        };
        format!("{} {instruction}", self.isa.level().name())
    }

    /// What it multiplies; sums are f32.
    pub fn dtype(&self) -> DType {
        match self.kind {
            Kind::Fma => DType::F32,
            Kind::Bf16Dot | Kind::Tiles => DType::Bf16,
        }
    }

    /// Operations of one worker's `rounds`; a multiply-add is two.
    pub fn flops(&self, rounds: u64) -> f64 {
        let lanes = match (self.kind, self.isa.level()) {
            (Kind::Tiles, _) => return rounds as f64 * (4 * TILE_ROWS * TILE_COLUMNS * 2 * TILE_COLUMNS * 2) as f64,
            (Kind::Bf16Dot, _) => 32,
            (Kind::Fma, Level::Portable) => 4,
            (Kind::Fma, Level::Avx2) => 8,
            (Kind::Fma, _) => 16,
        };
        rounds as f64 * (CHAINS * lanes * 2) as f64
    }

    /// `rounds` rounds on every worker at once.
    pub fn run(&self, cpu: &Cpu, rounds: u64) {
        cpu.install(|| rayon::broadcast(|_| self.alone(rounds)));
    }

    fn alone(&self, rounds: u64) {
        match self.kind {
            Kind::Fma => self.isa.run(Fma { rounds }),
            Kind::Bf16Dot => self.isa.run(Bf16Dot { rounds }),
            Kind::Tiles => self.isa.run_tiles(OnTiles { rounds }),
        }
    }
}

/// Each chain is x = x * a + b with |a| < 1: it depends on itself, so that nothing leaves the loop, and stays finite.
struct Fma {
    rounds: u64,
}

impl Job for Fma {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // SAFETY: `Isa::run` compiles a job for the level of its lanes.
        let (mut x, a, b) = unsafe {
            (
                std::array::from_fn::<V, CHAINS, _>(|_| V::splat(black_box(1.0))),
                V::splat(black_box(0.5)),
                V::splat(black_box(0.25)),
            )
        };
        for _ in 0..self.rounds {
            for x in &mut x {
                // SAFETY: as above.
                *x = unsafe { x.mul_add(a, b) };
            }
        }
        let mut out = [0f32; 16];
        for x in x {
            // SAFETY: as above, and no level has more than 16 lanes.
            unsafe { x.store(out.as_mut_ptr()) };
            black_box(&out);
        }
    }
}

/// The chains are sums, which grow until adding changes nothing: the instruction takes the same time for any numbers.
struct Bf16Dot {
    rounds: u64,
}

impl Job for Bf16Dot {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        if !V::PAIRS {
            return;
        }
        // SAFETY: `Isa::run` compiles a job for the level of its lanes. All bits of a pair of ones are those of a float.
        let (mut x, a) = unsafe {
            (
                std::array::from_fn::<V, CHAINS, _>(|_| V::splat(black_box(1.0))),
                V::splat(f32::from_bits(black_box(0x3f80_3f80))),
            )
        };
        for _ in 0..self.rounds {
            for x in &mut x {
                // SAFETY: as above.
                *x = unsafe { a.dot(a, *x) };
            }
        }
        let mut out = [0f32; 16];
        for x in x {
            // SAFETY: as above, and no level has more than 16 lanes.
            unsafe { x.store(out.as_mut_ptr()) };
            black_box(&out);
        }
    }
}

/// Four tiles of sums, each from one of two pairs of factors: what a block of a product does, without its loads. Factors
/// are numbers that differ, as a product's do: a CPU short of current multiplies tiles of zeros faster than those, by a
/// fifth or by more than half.
struct OnTiles {
    rounds: u64,
}

impl TileJob for OnTiles {
    #[inline(always)]
    fn run<T: Tiles>(self) {
        // Low bits of a square look random. Halves between 1 and 2, of either sign: sums are finite whatever the rounds.
        let number = |i: u32| i.wrapping_mul(i.wrapping_mul(0x9e37_79b9) >> 3) & 0x807f_807f | 0x3f80_3f80;
        let factors: [u32; 4 * TILE_ROWS * TILE_COLUMNS] = std::array::from_fn(|i| number(i as u32 + 1));
        let factor = |i: usize| factors[i * TILE_ROWS * TILE_COLUMNS..].as_ptr().cast::<u8>();
        // SAFETY: configured before all else, released after; four tiles of factors are there, and nothing is stored.
        unsafe {
            T::configure();
            T::zero::<0>();
            T::zero::<1>();
            T::zero::<2>();
            T::zero::<3>();
            T::load::<4>(factor(0), 4 * TILE_COLUMNS);
            T::load::<5>(factor(1), 4 * TILE_COLUMNS);
            T::load::<6>(factor(2), 4 * TILE_COLUMNS);
            T::load::<7>(factor(3), 4 * TILE_COLUMNS);
            for _ in 0..self.rounds {
                T::dot::<0, 4, 6>();
                T::dot::<1, 4, 7>();
                T::dot::<2, 5, 6>();
                T::dot::<3, 5, 7>();
            }
            T::release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::testing::isas;

    /// Every loop runs on every level, and a device of a level has none that is wider.
    #[test]
    fn every_kernel_runs() {
        for isa in isas() {
            let device = Device::cpu_with(Some(2), isa).unwrap();
            let cpu = device.host();
            let all = kernels(isa);
            let expected = MULTIPLIES_F32.iter().filter(|l| **l <= isa.level()).count();
            assert_eq!(all.iter().filter(|k| k.kind == Kind::Fma).count(), expected);
            for k in all {
                assert!(k.isa.level() <= isa.level() && k.flops(3) == 3.0 * k.flops(1), "{}", k.name());
                k.run(cpu, 3);
            }
        }
    }
}
