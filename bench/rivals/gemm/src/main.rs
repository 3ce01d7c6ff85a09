//! FP32 products beside the crate `gemm`, in turns in one process: one JSON object a case and number of threads, with the
//! keys of `hadal bench --json`.
//!
//! ```text
//! hadal-rival-gemm [--case SUBSTRING] [--seconds S] [--threads N] [--clock wall|cpu]
//! ```
//!
//! `bench/rivals/run.sh PYTHON gemm-f32` starts it several times and records medians. Without `--threads` each case runs on one thread and on all cores. `--clock cpu` counts the time that this process had
//! the cores, over all its threads: for a machine that others use as well.

use anyhow::{Context, bail, ensure};
use gemm::Parallelism;
use hadal_kernels::ops::gemm::{Gemm, Mat, MatMut};
use hadal_kernels::{Buf, Ctx, DType, Device, Isa};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use std::process::ExitCode;

/// Rows, columns, length of the sums, and which operand is stored transposed: `nn`, `nt` or `tn`.
type Case = (&'static str, [usize; 3], &'static str);

/// Squares, and the products of the preset `mini` at 4,096 tokens: forward, gradients of the input and of the weight.
const CASES: [Case; 15] = [
    ("square", [2048; 3], "nn"),
    ("square", [2048; 3], "nt"),
    ("square", [2048; 3], "tn"),
    ("mini/router", [4096, 32, 512], "nt"),
    ("mini/router", [4096, 512, 32], "nn"),
    ("mini/router", [32, 512, 4096], "tn"),
    ("mini/kv_a_proj", [4096, 160, 512], "nt"),
    ("mini/kv_a_proj", [4096, 512, 160], "nn"),
    ("mini/kv_a_proj", [160, 512, 4096], "tn"),
    ("mini/o_proj", [4096, 512, 512], "nt"),
    ("mini/o_proj", [4096, 512, 512], "nn"),
    ("mini/o_proj", [512, 512, 4096], "tn"),
    ("mini/gate_up_proj", [4096, 2816, 512], "nt"),
    ("mini/gate_up_proj", [4096, 512, 2816], "nn"),
    ("mini/gate_up_proj", [2816, 512, 4096], "tn"),
];
/// Fewest runs of each side.
const REPEATS: usize = 5;
/// What results may differ by, of the root mean square of ours: both sum in FP32, in other orders.
const CLOSE: f64 = 1e-3;

struct Options {
    case: Option<String>,
    seconds: f64,
    threads: Option<usize>,
    clock: ClockId,
}

impl Options {
    fn parse() -> anyhow::Result<Self> {
        let mut o = Self { case: None, seconds: 0.5, threads: None, clock: ClockId::Monotonic };
        let mut args = std::env::args().skip(1);
        while let Some(name) = args.next() {
            let value = args.next().with_context(|| format!("{name}: expected a value"))?;
            match (name.as_str(), value.as_str()) {
                ("--case", _) => o.case = Some(value),
                ("--seconds", _) => o.seconds = value.parse().context("--seconds")?,
                ("--threads", _) => o.threads = Some(value.parse().context("--threads")?),
                ("--clock", "wall") => o.clock = ClockId::Monotonic,
                ("--clock", "cpu") => o.clock = ClockId::ProcessCPUTime,
                _ => bail!("{name} {value}: expected --case, --seconds, --threads or --clock wall|cpu"),
            }
        }
        ensure!((0.0..=3600.0).contains(&o.seconds), "--seconds {}: expected a number from 0 to 3600", o.seconds);
        Ok(o)
    }

    fn now(&self) -> f64 {
        let t = clock_gettime(self.clock);
        t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
    }
}

/// Numbers between -1 and 1 without a pattern.
fn numbers(ctx: &Ctx, len: usize, seed: u64) -> Buf {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    ctx.from_f32(&(0..len).map(|_| next()).collect::<Vec<_>>())
}

/// Both sides of a case on one context.
struct Pair {
    m: usize,
    n: usize,
    k: usize,
    ta: bool,
    tb: bool,
    a: Buf,
    b: Buf,
    /// Results of ours and of the rival.
    c: [Buf; 2],
    ctx: Ctx,
    threads: usize,
}

impl Pair {
    fn new(ctx: &Ctx, threads: usize, ([m, n, k], layout): ([usize; 3], &str)) -> Self {
        let (a, b) = (numbers(ctx, m * k, 1), numbers(ctx, k * n, 2));
        let c = [(); 2].map(|()| ctx.zeros(DType::F32, m * n));
        let (ta, tb) = (layout == "tn", layout == "nt");
        Self { m, n, k, ta, tb, a, b, c, ctx: ctx.clone(), threads }
    }

    /// Elements from one row to the next as A and B are stored.
    fn ld(&self) -> [usize; 2] {
        [if self.ta { self.m } else { self.k }, if self.tb { self.k } else { self.n }]
    }

    fn ours(&mut self) {
        let [lda, ldb] = self.ld();
        let g = Gemm {
            m: self.m,
            n: self.n,
            k: self.k,
            a: Mat { data: self.a.view(), ld: lda },
            ta: self.ta,
            b: Mat { data: self.b.view(), ld: ldb },
            tb: self.tb,
            c: MatMut { data: self.c[0].view_mut(), ld: self.n },
            accumulate: false,
        };
        hadal_kernels::ops::gemm::gemm(&self.ctx, g);
    }

    fn rival(&mut self) {
        let [lda, ldb] = self.ld().map(|ld| ld as isize);
        let strides = |transposed, ld| if transposed { (ld, 1) } else { (1, ld) };
        let ((a_column, a_row), (b_column, b_row)) = (strides(self.ta, lda), strides(self.tb, ldb));
        let how = if self.threads == 1 { Parallelism::None } else { Parallelism::Rayon(self.threads) };
        let (m, n, k) = (self.m, self.n, self.k);
        let (a, b) = (self.a.view().f32(), self.b.view().f32());
        let c = self.c[1].view_mut().f32();
        let mut multiply = || {
            // SAFETY: all three have as many elements as their sizes and strides say (they were made so), and C is ours.
            unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    c.as_mut_ptr(),
                    1,
                    n as isize,
                    false,
                    a.as_ptr(),
                    a_column,
                    a_row,
                    b.as_ptr(),
                    b_column,
                    b_row,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    how,
                );
            }
        };
        match &self.ctx.device {
            Device::Cpu(cpu) if self.threads > 1 => cpu.install(&mut multiply),
            _ => multiply(),
        }
    }

    /// That both computed the same.
    fn check(&self) -> anyhow::Result<()> {
        let [ours, theirs] = [&self.c[0], &self.c[1]].map(|c| c.view().to_f32());
        let square: f64 = ours.iter().map(|x| f64::from(*x).powi(2)).sum();
        let rms = (square / ours.len() as f64).sqrt();
        let far = ours.iter().zip(&theirs).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        ensure!(far <= CLOSE * rms, "results are {far:e} apart, of {rms:e}");
        Ok(())
    }
}

fn median(xs: &mut [f64]) -> f64 {
    xs.sort_by(f64::total_cmp);
    xs[xs.len() / 2]
}

fn main() -> ExitCode {
    run().map_or_else(
        |e| {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn run() -> anyhow::Result<()> {
    let o = Options::parse()?;
    let cores = std::thread::available_parallelism()?.get();
    if let Some(found) = o.threads.filter(|n| !(1..=cores).contains(n)) {
        bail!("--threads {found}: expected at least 1, at most the {cores} cores of this machine");
    }
    let (mut any, clock) = (false, if o.clock == ClockId::ProcessCPUTime { ", CPU time" } else { "" });
    let threads = o.threads.map_or(if cores > 1 { vec![1, cores] } else { vec![1] }, |n| vec![n]);
    for ((name, sizes, layout), &threads) in CASES.iter().flat_map(|case| threads.iter().map(move |n| (case, n))) {
        let [m, n, k] = sizes;
        let case = format!("{name}/{layout} {m}x{n}x{k} f32, threads {threads}{clock}");
        if o.case.as_ref().is_some_and(|wanted| wanted.is_empty() || !case.contains(wanted)) {
            continue;
        }
        any = true;
        let ctx = Device::cpu(Some(threads))?.ctx();
        // As in the names of `hadal bench`: what a result was held to is part of it.
        let level = ctx.host().isa().level();
        let case = if level == Isa::best().level() { case } else { format!("{case} ({})", level.name()) };
        let mut pair = Pair::new(&ctx, threads, (*sizes, layout));
        pair.ours();
        pair.rival();
        pair.check().context(case.clone())?;
        let (mut ours, mut theirs, begin) = (Vec::new(), Vec::new(), o.now());
        let timed = |work: &mut dyn FnMut()| {
            let begin = o.now();
            work();
            o.now() - begin
        };
        while ours.len() < REPEATS || o.now() - begin < o.seconds {
            ours.push(timed(&mut || pair.ours()));
            theirs.push(timed(&mut || pair.rival()));
        }
        let rate = |seconds: &mut [f64]| 2e-9 * (m * n * k) as f64 / median(seconds);
        let (ours, theirs) = (rate(&mut ours), rate(&mut theirs));
        let row = json!({
            "bench": "gemm", "case": case, "unit": "GFLOP/s", "ours": ours, "rival_name": "crate gemm 0.19",
            "rival": theirs, "ratio": ours / theirs, "share_of_peak": null,
        });
        println!("{row}");
    }
    ensure!(any, "--case {}: expected part of the name of a case, found none with it", o.case.unwrap_or_default());
    Ok(())
}
