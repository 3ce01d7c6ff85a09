//! Many prompts continued at once, each time with the likeliest token: what the report counts on.

use hadal_engine::pool::blocks_for;
use hadal_engine::{CacheOptions, Engine, Request};
use hadal_kernels::Ctx;
use hadal_model::{Model, Params, Sequence};
use std::sync::Arc;

/// A prompt and how much may follow, at least one token each.
pub struct Asked {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Most tokens to write.
    pub max_tokens: usize,
}

/// Continues all prompts in one engine with room for every one, each until an end token, its limit, or `done` with what
/// it has written. Returns what was written, in the order asked.
pub fn greedy(
    ctx: &Ctx,
    model: &Arc<Model>,
    params: &Arc<Params>,
    asked: &[Asked],
    done: impl Fn(usize, &[u32]) -> bool,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let blocks = asked.iter().map(|a| blocks_for(a.prompt.len() + a.max_tokens)).sum();
    let mut engine = Engine::new(ctx, model.clone(), params.clone(), CacheOptions::blocks(blocks));
    for (id, a) in (0..).zip(asked) {
        engine.submit(Request {
            id,
            prompt: a.prompt.clone(),
            max_new_tokens: a.max_tokens,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: model.config.eos_token_ids.clone(),
        })?;
    }
    let mut written = vec![Vec::new(); asked.len()];
    while !engine.is_idle() {
        for event in engine.step(ctx)? {
            // Ids were counted from 0 over `asked`.
            let i = event.id as usize;
            written[i].push(event.token);
            if event.finished.is_none() && done(i, &written[i]) {
                engine.cancel(event.id);
            }
        }
    }
    Ok(written)
}

/// A prompt and what was written after it, with a target wherever decoding would guess: behind each written token that
/// another one follows.
pub fn sequence(prompt: &[u32], written: &[u32]) -> Sequence {
    let tokens: Vec<i32> = prompt.iter().chain(written).map(|&t| t as i32).collect();
    let mut targets = tokens[1.min(tokens.len())..].to_vec();
    let given = prompt.len().min(targets.len());
    targets[..given].fill(-1);
    Sequence { tokens: tokens[..targets.len()].to_vec(), targets }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_follow_written_tokens() {
        let s = sequence(&[7, 8, 9], &[1, 2, 3]);
        assert_eq!((s.tokens, s.targets), (vec![7, 8, 9, 1, 2], vec![-1, -1, -1, 2, 3]));
        let s = sequence(&[7, 8], &[1]);
        assert_eq!((s.tokens, s.targets), (vec![7, 8], vec![-1, -1]));
    }
}
