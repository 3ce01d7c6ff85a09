//! A fault as a GPU reports it: a kernel writes where there is no memory. The process's context is lost with it, so that
//! the kernel is launched by a process of its own: this test's binary, which is asked for this test alone.

use super::is_failure;
use super::tests::{device, scale_at};
use crate::ops::rmsnorm;
use crate::sizes::sizes;
use crate::{Buf, Ctx, DType, ViewMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

/// Set for the process that is to fail.
const FAILS: &str = "HADAL_TEST_FAULT";
/// What it prints before each message.
const SAID: &str = "said: ";

/// Whatever shows the fault, its message names what was launched before with the sizes of the arguments; with a wait
/// behind each launch, the one that failed alone.
#[test]
fn a_fault_is_told_with_its_op_and_sizes() {
    let Some((ctx, _)) = device() else { return };
    if std::env::var_os(FAILS).is_some() {
        return fails(&ctx);
    }
    let several = said("0");
    assert!(several[0].contains("waiting for the device: "), "{several:?}");
    for message in &several {
        assert!(message.contains("rmsnorm forward (x bf16[512], x_stride 64, "), "{message}");
        assert!(
            message.ends_with(" (HADAL_CUDA_SYNC=1 waits after each, which tells the one that failed)"),
            "{message}"
        );
    }
    let one = said("1");
    assert!(one[0].contains("waiting for the device: ") && !one[0].contains("rmsnorm"), "{}", one[0]);
    for message in several.iter().chain(&one) {
        assert!(message.starts_with("GPU 0 (") && message.contains(" (CUDA_ERROR_ILLEGAL_ADDRESS)"), "{message}");
        assert!(message.contains("a wild write (x f32[100], rows 7): scale, grid [1, 1, 1]"), "{message}");
    }
}

/// What a process says that fails, with this HADAL_CUDA_SYNC.
fn said(sync: &str) -> Vec<String> {
    let test = std::thread::current().name().expect("a test's thread has its name").to_string();
    // On a single thread the harness runs tests on its own.
    let test = if test == "main" { "cuda::fault::a_fault_is_told_with_its_op_and_sizes".into() } else { test };
    let out = Command::new(std::env::current_exe().expect("this test's binary"))
        .args(["--exact", &test, "--nocapture", "--test-threads", "1"])
        .env(FAILS, "1")
        .env("HADAL_CUDA_SYNC", sync)
        .output()
        .expect("this test's binary runs");
    let text = String::from_utf8_lossy(&out.stdout);
    let said: Vec<String> = text.lines().filter_map(|l| l.split_once(SAID)).map(|(_, said)| said.to_string()).collect();
    assert!(
        out.status.success() && said.len() == 2,
        "{:?}: {text}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    said
}

/// Fails, and says what is said of it: of the first wait, and of what comes after.
fn fails(ctx: &Ctx) {
    let cuda = ctx.device.as_cuda().expect("a GPU");
    let (held, weight) = (ctx.from_f32(&[1.0; 100]), ctx.filled(64, 1.0));
    let x = held.view();
    let (rows, norm) = (7usize, ctx.zeros(DType::Bf16, 512));
    let failed = catch_unwind(AssertUnwindSafe(|| {
        normed(ctx, &norm, &weight, ctx.empty(DType::Bf16, 512).view_mut());
        {
            let _timer = ctx.timer("a wild write", sizes![x, rows]);
            // No GPU maps the first pages.
            scale_at(cuda, DType::F32, (512, 1), 1.0, &weight);
        }
        cuda.synchronize();
    }));
    say(failed.expect_err("a fault"));
    say(catch_unwind(AssertUnwindSafe(|| ctx.from_f32(&[1.0]).view().to_f32())).expect_err("nothing works any more"));
}

fn normed(ctx: &Ctx, x: &Buf, weight: &Buf, y: ViewMut<'_>) {
    let (x_stride, eps, mut rstd) = (64, 1e-6, ctx.empty(DType::F32, 8));
    let (x, weight) = (x.view(), weight.view());
    rmsnorm::forward(ctx, rmsnorm::Forward { x, x_stride, weight, eps, y, rstd: rstd.view_mut() });
}

fn say(failure: Box<dyn std::any::Any + Send>) {
    assert!(is_failure(), "it is for the user");
    let message = failure.downcast_ref::<String>().expect("a message for the user");
    println!("{SAID}{message}");
}
