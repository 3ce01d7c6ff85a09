//! What this machine's memory can never hold is refused: the system would end it without a word, or with a long one.

use crate::inspect::scaled;
use crate::open::cache_bytes;
use hadal_engine::plan::{self, Work};
use hadal_kernels::Ctx;
use hadal_model::{Layout, ModelConfig, Params, Precision, Scope};
use hadal_train::plan::{BESIDE, most};

/// An error if `what` needs more than there is where the context computes.
pub fn fits_on(ctx: &Ctx, what: &str, needed: usize) -> anyhow::Result<()> {
    match ctx.device.as_cuda() {
        Some(cuda) => within(what, needed, Some(cuda.available_memory())),
        None => fits(what, needed),
    }
}

/// An error if `what` needs more than this machine has.
pub fn fits(what: &str, needed: usize) -> anyhow::Result<()> {
    within(what, needed, machine_memory())
}

/// An error, which says what would fit, if a model's weights without MTP layers and `work` with them need more than there
/// is where the context computes; else, on a GPU, their memory is taken in one piece.
pub fn inference(ctx: &Ctx, config: &ModelConfig, precision: Precision, work: Work) -> anyhow::Result<()> {
    let Some(cuda) = ctx.device.as_cuda() else {
        return inference_within(precision, work, machine_memory(), |p, w| host_bytes(config, p, w));
    };
    let needed = |precision, work| plan::gpu_memory(Some(cuda), ctx.host(), config, precision, work);
    let all = needed(precision, work);
    // Compiled kernels come beside it.
    let found = cuda.free_memory().saturating_sub(BESIDE);
    inference_within(
        precision,
        work,
        Some(found),
        |p, w| if (p, w) == (precision, work) { all } else { needed(p, w) },
    )?;
    cuda.reserve(all);
    Ok(())
}

fn inference_within(
    precision: Precision,
    work: Work,
    there_is: Option<usize>,
    needed: impl Fn(Precision, Work) -> usize,
) -> anyhow::Result<()> {
    let Err(e) = within(WHAT, needed(precision, work), there_is) else { return Ok(()) };
    let fits = |precision, work| there_is.is_some_and(|found| needed(precision, work) <= found);
    anyhow::bail!("{e}; {}", what_fits(precision, work, fits))
}

/// What is loaded and computed.
pub const WHAT: &str = "the model with what it computes";

/// What could be asked for instead.
fn what_fits(precision: Precision, work: Work, fits: impl Fn(Precision, Work) -> bool) -> String {
    let tokens = |precision| most(work.tokens(), |n| fits(precision, work.of(n)));
    let narrow = if precision == Precision::Fp32 { tokens(Precision::Bf16) } else { 0 };
    let said = |n: usize| match work {
        Work::Write { .. } => format!("{n} tokens, those of the prompt and --max-tokens together"),
        Work::Logits { .. } | Work::Uncached { .. } => format!("--tokens of {n} ids"),
    };
    match tokens(precision) {
        0 if narrow == 0 => "nothing of this model fits: a smaller one does, or a device with more memory".into(),
        n if n < narrow => format!("what fits: --dtype bf16 with {}", said(narrow)),
        n => format!("what fits: {}", said(n)),
    }
}

/// Bytes that weights, cache and logits take in host memory; logits as numbers, as bytes, and as the file's bytes.
fn host_bytes(config: &ModelConfig, precision: Precision, work: Work) -> usize {
    let logits = if matches!(work, Work::Write { .. }) { 0 } else { work.tokens() };
    let logits = logits.saturating_mul(config.vocab_size * 3 * size_of::<f32>());
    let cache = cache_bytes(config, precision, work.cached());
    let layout = Layout::new(config, Scope { mtp: 0, ..Scope::whole(config) });
    Params::inference_bytes(&layout, precision).saturating_add(cache).saturating_add(logits)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 bytes of weights in BF16 and twice as many in FP32, and a byte a token.
    fn refusal(precision: Precision, work: Work, found: usize) -> Option<String> {
        let weights = |p| if p == Precision::Fp32 { 200 } else { 100 };
        let refused = inference_within(precision, work, Some(found), |p, w| weights(p) + w.tokens());
        refused.err().map(|e| e.to_string())
    }

    #[test]
    fn what_would_fit_is_said() {
        let (write, logits) = (Work::Write { prompt: 30, tokens: 50 }, Work::Logits { tokens: 50, chunk: 16 });
        let uncached = Work::Uncached { tokens: 50 };
        let begins = |found: usize, needed: usize| {
            format!("{WHAT} does not fit: expected at most {found} B of memory, found that it needs {needed} B; ")
        };
        for work in [write, logits, uncached] {
            assert_eq!(refusal(Precision::Bf16, work, 150), None);
            let nothing = "nothing of this model fits: a smaller one does, or a device with more memory";
            assert_eq!(refusal(Precision::Bf16, work, 100), Some(begins(100, 150) + nothing));
            assert_eq!(refusal(Precision::Fp32, work, 100), Some(begins(100, 250) + nothing));
        }
        let expected = "what fits: 49 tokens, those of the prompt and --max-tokens together";
        assert_eq!(refusal(Precision::Bf16, write, 149), Some(begins(149, 150) + expected));
        let expected = "what fits: 1 tokens, those of the prompt and --max-tokens together";
        assert_eq!(refusal(Precision::Bf16, write, 101), Some(begins(101, 150) + expected));
        for work in [logits, uncached] {
            let expected = "what fits: --tokens of 20 ids";
            assert_eq!(refusal(Precision::Bf16, work, 120), Some(begins(120, 150) + expected));
            let expected = "what fits: --dtype bf16 with --tokens of 50 ids";
            assert_eq!(refusal(Precision::Fp32, work, 240), Some(begins(240, 250) + expected));
        }
    }

    #[test]
    fn where_the_system_does_not_tell_all_fits() {
        let work = Work::Uncached { tokens: 1 };
        assert!(inference_within(Precision::Bf16, work, None, |_, _| usize::MAX).is_ok());
    }
}
