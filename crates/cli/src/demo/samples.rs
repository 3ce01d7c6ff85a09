//! Beginnings that training has not seen, continued and shown as they are written.

use super::Trained;
use crate::generate::{Generated, Sampling, Writer};
use crate::output::Output;
use hadal_kernels::Ctx;
use serde::Serialize;

/// Tokens written of each.
const TOKENS: usize = 64;
const TEMPERATURE: f32 = 0.7;

/// One beginning and what the model made of it.
#[derive(Serialize)]
pub struct Sample {
    kind: &'static str,
    #[serde(flatten)]
    generated: Generated,
}

/// Continues (kind, beginning) one after the other.
pub fn samples(
    ctx: &Ctx,
    trained: &Trained,
    beginnings: &[(&'static str, String)],
    out: &Output,
) -> anyhow::Result<Vec<Sample>> {
    let (model, params) = (trained.model.clone(), trained.params.clone());
    let mut writer = Writer::new(ctx, model, params, trained.tokenizer.clone(), trained.room);
    out.text(&format!(
        "\nSamples: beginnings that it has not seen, continued at temperature {TEMPERATURE} from ▸ on\n"
    ));
    let mut written = Vec::new();
    for (i, (kind, beginning)) in (0..).zip(beginnings) {
        let (prompt, ids) = trained.fitting(beginning);
        let free = trained.room.saturating_sub(ids.len());
        if ids.is_empty() || free == 0 {
            continue;
        }
        let max_tokens = free.min(TOKENS);
        // Each draws for itself.
        let seed = trained.seed.wrapping_add(i);
        let sampling = Sampling { max_tokens, temperature: TEMPERATURE, top_p: 0.95, top_k: 0, seed };
        out.text(&format!("\n--- {kind}\n"));
        // The beginning comes first.
        let mut mark = "▸";
        let generated = writer.write(ctx, &prompt, ids, sampling, |text| {
            out.text(text);
            out.text(std::mem::take(&mut mark));
        })?;
        out.text("\n");
        written.push(Sample { kind, generated });
    }
    Ok(written)
}
