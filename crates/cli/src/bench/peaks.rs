//! What a case's speed is a share of, measured in the same minute: hosts are shared, and clocks change.

use super::case::Against;
use super::measure::{Budget, Work, median};
use hadal_kernels::{Ctx, DType, peak};
use std::time::{Duration, Instant};

/// After this long a peak is measured again.
const STALE: Duration = Duration::from_secs(30);
/// Bytes that a copy moves, half of them read: several times any cache.
pub const COPIED: usize = 512 << 20;
/// Bytes of one task of a copy.
const PIECE: usize = 1 << 20;

/// What has been measured, and when.
#[derive(Default)]
pub struct Peaks {
    registers: Option<(Instant, f64, f64)>,
    copy: Option<(Instant, f64)>,
}

impl Peaks {
    /// GFLOP/s or GB/s that nothing exceeds.
    pub fn of(&mut self, ctx: &Ctx, against: Against, budget: Budget) -> Option<f64> {
        let fresh = |at: &Instant| at.elapsed() < STALE;
        match against {
            Against::Nothing | Against::Rival => None,
            Against::Copy => {
                if !self.copy.as_ref().is_some_and(|(at, _)| fresh(at)) {
                    let times = budget.interleaved(&mut [copy(ctx, COPIED)]);
                    self.copy = Some((Instant::now(), COPIED as f64 / median(&times[0]) / 1e9));
                }
                self.copy.map(|(_, peak)| peak)
            }
            Against::Bf16 | Against::F32 => {
                if !self.registers.as_ref().is_some_and(|(at, ..)| fresh(at)) {
                    let (bf16, f32) = registers(ctx, budget);
                    self.registers = Some((Instant::now(), bf16, f32));
                }
                self.registers.map(|(_, bf16, f32)| if against == Against::F32 { f32 } else { bf16 })
            }
        }
    }
}

/// GFLOP/s of the fastest loops on the device's level: of BF16, which may be widened, and of FP32.
fn registers(ctx: &Ctx, budget: Budget) -> (f64, f64) {
    let cpu = ctx.host();
    let kernels = peak::kernels(cpu.isa());
    let mut works: Vec<Work> = kernels.iter().map(|&k| work(ctx, k)).collect();
    let times = budget.interleaved(&mut works);
    let rate = |k: &peak::Kernel, t: &Vec<f64>| flops(ctx, k) / median(t) / 1e9;
    let rates: Vec<(DType, f64)> = kernels.iter().zip(&times).map(|(k, t)| (k.dtype(), rate(k, t))).collect();
    let best = |dtype: Option<DType>| {
        let wanted = rates.iter().filter(|(d, _)| dtype.is_none_or(|dtype| dtype == *d));
        wanted.map(|(_, rate)| *rate).fold(0.0, f64::max)
    };
    (best(None), best(Some(DType::F32)))
}

/// Rounds of a loop: some milliseconds.
const ROUNDS: u64 = 1 << 19;

/// A loop over registers on all workers.
pub fn work(ctx: &Ctx, kernel: peak::Kernel) -> Work {
    let device = ctx.device.clone();
    Box::new(move || {
        let cpu = device.host();
        kernel.run(cpu, ROUNDS);
    })
}

/// Operations of [`work`].
pub fn flops(ctx: &Ctx, kernel: &peak::Kernel) -> f64 {
    let cpu = ctx.host();
    kernel.flops(ROUNDS) * cpu.threads() as f64
}

/// A plain copy over all workers that moves `bytes`, read and written ones together; of much, over the same memory
/// again.
pub fn copy(ctx: &Ctx, bytes: usize) -> Work {
    let elements = |bytes: usize| (bytes / 2 / DType::F32.size()).max(1);
    let (all, held) = (elements(bytes), elements(bytes.min(COPIED)));
    let (from, mut to) = (super::inputs::floats(ctx, DType::F32, held, 0), ctx.zeros(DType::F32, held));
    let device = ctx.device.clone();
    Box::new(move || {
        let cpu = device.host();
        let (from, piece) = (from.view().f32(), PIECE / DType::F32.size());
        let mut left = all;
        while left > 0 {
            let pass = left.min(held);
            cpu.chunks_mut(&mut to.view_mut().f32()[..pass], piece, |i, to| {
                to.copy_from_slice(&from[i * piece..i * piece + to.len()]);
            });
            left -= pass;
        }
    })
}
