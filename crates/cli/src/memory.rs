//! What this machine's memory can never hold is refused: the system would end it without a word, or with a long one.

use crate::inspect::scaled;
use hadal_kernels::Ctx;

/// An error if `what` needs more than there is where the context computes.
pub fn fits_on(ctx: &Ctx, what: &str, needed: usize) -> anyhow::Result<()> {
    match ctx.device.as_cuda() {
        Some(cuda) => within(what, needed, Some(cuda.free_memory())),
        None => fits(what, needed),
    }
}

/// An error if `what` needs more than this machine has.
pub fn fits(what: &str, needed: usize) -> anyhow::Result<()> {
    within(what, needed, machine_memory())
}

fn within(what: &str, needed: usize, there_is: Option<usize>) -> anyhow::Result<()> {
    match there_is {
        Some(found) if needed > found => anyhow::bail!(
            "{what} does not fit: expected at most {} of memory, found that it needs {}",
            scaled(found as f64, "B"),
            scaled(needed as f64, "B")
        ),
        _ => Ok(()),
    }
}

/// Bytes of memory and swap, where the system says so in a file (Linux).
fn machine_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<usize>().ok()
    };
    Some((kib("MemTotal:")? + kib("SwapTotal:")?) << 10)
}
