//! What a case's speed is a share of: hosts are shared, and clocks change. Loops over registers run in turns with the case,
//! a copy in the same minute. On a GPU, whose clock falls within seconds as it grows hot, a peak is measured each time it
//! is asked for.

use super::case::Against;
use super::gemm::{Form, Product};
use super::measure::{Budget, Work, median};
use hadal_kernels::{Ctx, DType, peak};
use std::time::{Duration, Instant};

/// After this long a peak is measured again.
const STALE: Duration = Duration::from_secs(30);
/// Bytes that a copy moves, half of them read: several times any cache; on a GPU so many that its start does not count.
pub const COPIED: usize = 512 << 20;
pub const COPIED_ON_GPU: usize = 4 << 30;
/// Bytes of one task of a copy.
const PIECE: usize = 1 << 20;

/// What has been measured, and when.
#[derive(Default)]
pub struct Peaks {
    registers: Option<(Instant, [(peak::Kernel, f64); 2])>,
    copy: Option<(Instant, f64)>,
}

impl Peaks {
    /// GFLOP/s or GB/s that nothing exceeds.
    pub fn of(&mut self, ctx: &Ctx, against: Against, budget: &Budget) -> Option<f64> {
        let fresh = |at: &Instant| at.elapsed() < STALE;
        let on_gpu = ctx.device.as_cuda().is_some();
        let rate = |work: f64, ours: Work| work / median(&budget.short().interleaved(&mut [ours])[0]) / 1e9;
        match against {
            Against::Nothing | Against::Rival => None,
            Against::Copy | Against::RivalOrBytes(_) if on_gpu => {
                Some(rate(COPIED_ON_GPU as f64, copy(ctx, COPIED_ON_GPU)))
            }
            Against::Bf16 | Against::F32 if on_gpu => {
                let p = product(if against == Against::Bf16 { DType::Bf16 } else { DType::F32 });
                Some(rate(p.flops(), p.work(ctx, 1)))
            }
            Against::Copy | Against::RivalOrBytes(_) => {
                if !self.copy.as_ref().is_some_and(|(at, _)| fresh(at)) {
                    let times = budget.interleaved(&mut [copy(ctx, COPIED)]);
                    self.copy = Some((Instant::now(), COPIED as f64 / median(&times[0]) / 1e9));
                }
                self.copy.map(|(_, peak)| peak)
            }
            Against::Bf16 | Against::F32 => {
                if !self.registers.as_ref().is_some_and(|(at, _)| fresh(at)) {
                    self.registers = Some((Instant::now(), registers(ctx, budget)));
                }
                self.registers.map(|(_, [bf16, f32])| if against == Against::F32 { f32.1 } else { bf16.1 })
            }
        }
    }

    /// The loop over registers that a case on the host's cores is a share of, to run in turns with it, and the loop's
    /// operations. On a host that others use too, a peak of half a minute ago can be that of another machine.
    pub fn beside(&mut self, ctx: &Ctx, against: Against, budget: &Budget) -> Option<(Work, f64)> {
        if ctx.device.as_cuda().is_some() || !matches!(against, Against::Bf16 | Against::F32) {
            return None;
        }
        // Which loop is the fastest does not change.
        let (_, [bf16, f32]) = *self.registers.get_or_insert_with(|| (Instant::now(), registers(ctx, budget)));
        let (kernel, _) = if against == Against::F32 { f32 } else { bf16 };
        Some((work(ctx, kernel), flops(ctx, &kernel)))
    }
}

/// The product that says what a GPU can multiply.
pub fn product(dtype: DType) -> Product {
    let n = if dtype == DType::Bf16 { 8192 } else { 4096 };
    Product { m: n, n, k: n, form: Form::Nt, dtypes: [dtype; 3], accumulate: false }
}

/// The fastest loops on the device's level and their GFLOP/s: of BF16, which may be widened, and of FP32.
fn registers(ctx: &Ctx, budget: &Budget) -> [(peak::Kernel, f64); 2] {
    let cpu = ctx.host();
    let kernels = peak::kernels(cpu.isa());
    let mut works: Vec<Work> = kernels.iter().map(|&k| work(ctx, k)).collect();
    let times = budget.interleaved(&mut works);
    let rate = |k: &peak::Kernel, t: &Vec<f64>| flops(ctx, k) / median(t) / 1e9;
    let best = |dtype: Option<DType>| {
        let wanted = kernels.iter().zip(&times).filter(|(k, _)| dtype.is_none_or(|dtype| dtype == k.dtype()));
        let rates = wanted.map(|(k, t)| (*k, rate(k, t)));
        rates.max_by(|a, b| a.1.total_cmp(&b.1)).expect("every level multiplies FP32")
    };
    [best(None), best(Some(DType::F32))]
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
/// again. On a GPU the driver's.
pub fn copy(ctx: &Ctx, bytes: usize) -> Work {
    let elements = |bytes: usize| (bytes / 2 / DType::F32.size()).max(1);
    if let Some(cuda) = ctx.device.as_cuda() {
        let (from, mut to) =
            (super::inputs::floats(ctx, DType::F32, elements(bytes), 0), ctx.zeros(DType::F32, elements(bytes)));
        let cuda = cuda.clone();
        return Box::new(move || cuda.copy(from.view(), to.view_mut()));
    }
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
