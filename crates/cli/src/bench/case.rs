//! One case of a bench: its name, its sizes, how much work it is, and how to make it ready.

use super::measure::{Budget, Work, median, spread};
use super::peaks::Peaks;
use super::row::Row;
use hadal_kernels::{Ctx, Isa};
use serde_json::{Value, json};

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Floating-point operations, a multiply-add being two.
    Gflops,
    /// Bytes that must be read and written at least.
    Gbytes,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Gflops => "GFLOP/s",
            Self::Gbytes => "GB/s",
        }
    }
}

/// What a case's speed is a share of.
#[derive(Clone, Copy, PartialEq)]
pub enum Against {
    /// Nothing.
    Nothing,
    /// The fastest loop over registers that multiplies BF16, widened or not; on a GPU a large product of BF16.
    Bf16,
    /// The fastest loop over registers that multiplies FP32; on a GPU a large product of FP32.
    F32,
    /// A plain copy of memory.
    Copy,
    /// The rival, which is a plain copy.
    Rival,
    /// The rival or a plain copy of so many bytes, whichever is slower.
    RivalOrBytes(f64),
}

/// The name of a case, with the instruction set if the device has not the widest that there is.
pub fn restricted(ctx: &Ctx, name: &str) -> String {
    if ctx.device.as_cuda().is_some() {
        return name.into();
    }
    let cpu = ctx.host();
    let level = cpu.isa().level();
    if level != Isa::best().level() { format!("{name} ({})", level.name()) } else { name.into() }
}

/// A case made ready.
pub struct Ready {
    /// What is measured.
    pub ours: Work,
    /// What it is measured beside, in turns.
    pub rival: Option<(&'static str, Work)>,
}

/// A case.
pub struct Case {
    /// Its name, sizes included.
    pub name: String,
    /// Its sizes, for rivals that do the same.
    pub sizes: Value,
    /// What is counted.
    pub unit: Unit,
    /// How many of them.
    pub work: f64,
    /// What its speed is a share of.
    pub against: Against,
    /// Allocates and fills what it needs.
    pub setup: Box<dyn Fn(&Ctx) -> Ready>,
}

impl Case {
    /// Its line in a list.
    pub fn listed(&self, bench: &str) -> Value {
        let mut line = json!({ "bench": bench, "case": self.name, "unit": self.unit.name(), "work": self.work });
        if let (Value::Object(line), Value::Object(sizes)) = (&mut line, &self.sizes) {
            line.extend(sizes.clone());
        }
        line
    }

    /// Runs it.
    pub fn measure(&self, bench: &'static str, ctx: &Ctx, budget: &Budget, peaks: &mut Peaks) -> Row {
        let (beside, of_loop) = peaks.beside(ctx, self.against, budget).unzip();
        let before = if of_loop.is_none() { peaks.of(ctx, self.against, budget) } else { None };
        let Ready { ours, rival } = (self.setup)(ctx);
        let (rival_name, rival) = rival.unzip();
        let has_rival = rival.is_some();
        let mut works: Vec<Work> = [Some(ours), rival, beside].into_iter().flatten().collect();
        let times = budget.interleaved(&mut works);
        let rate = |seconds: f64| self.work / seconds / 1e9;
        let (ours, rival) = (rate(median(&times[0])), has_rival.then(|| rate(median(&times[1]))));
        let [fastest, slowest] = spread(&times[0]);
        let ratio = rival.map(|r| ours / r);
        drop(works);
        // Clocks change: what a GPU can do is what it could before and after, on average.
        let peak = before.map(|a| (a + peaks.of(ctx, self.against, budget).unwrap_or(a)) / 2.0);
        let share_of_peak = match self.against {
            Against::Bf16 | Against::F32 if of_loop.is_some() => of_loop.map(|operations| {
                let of_run = |(ours, of_loop): (&f64, &f64)| (self.work / ours) / (operations / of_loop);
                median(&times[0].iter().zip(&times[times.len() - 1]).map(of_run).collect::<Vec<_>>())
            }),
            Against::Rival => ratio,
            Against::RivalOrBytes(bytes) => {
                let of_bytes = peak.map(|copy| self.work / bytes * copy);
                rival.zip(of_bytes).map(|(rival, bytes)| ours / rival.min(bytes))
            }
            _ => peak.map(|p| ours / p),
        };
        // A loop over registers has its instruction set in its name.
        let name = if self.against == Against::Nothing { self.name.clone() } else { restricted(ctx, &self.name) };
        Row {
            rival_name: rival_name.map(String::from),
            rival,
            ratio,
            share_of_peak,
            spread: [rate(slowest), rate(fastest)],
            ..Row::new(&ctx.device, bench, name, self.unit.name(), ours)
        }
    }
}
