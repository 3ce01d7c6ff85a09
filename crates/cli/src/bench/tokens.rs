//! Token ids to train on: of the built-in corpus, or of a file that a run or a bench has written.

use anyhow::{Context, bail, ensure};
use hadal_data::Tokenizer;
use hadal_data::corpus::builtin;
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// Windows `[steps, batch, seq + 1]`.
pub struct Tokens {
    pub steps: usize,
    pub batch: usize,
    pub seq: usize,
    ids: Vec<u32>,
}

/// Bytes of text that a tokenizer is trained on at most, and at least.
const TEXT: (usize, usize) = (100_000, builtin::DEFAULT_BYTES);
/// Bytes of text generated for a token, at first.
const BYTES_A_TOKEN: usize = 6;

impl Tokens {
    /// The first documents of the built-in corpus under `seed`, cut into windows that lie one after the other.
    pub fn built_in(seed: u64, vocab_size: usize, steps: usize, batch: usize, seq: usize) -> anyhow::Result<Self> {
        let needed = steps.checked_mul(batch).and_then(|n| n.checked_mul(seq + 1));
        let needed = needed.context("--steps, --batch, --seq: expected fewer tokens together")?;
        let sample = (needed.saturating_mul(BYTES_A_TOKEN)).clamp(TEXT.0, TEXT.1);
        let tokenizer = Tokenizer::train(&builtin::documents(seed, sample), vocab_size)?;
        let mut bytes = needed.saturating_mul(BYTES_A_TOKEN);
        loop {
            let mut ids = Vec::new();
            for document in builtin::documents(seed, bytes) {
                ids.extend(tokenizer.encode(&document));
                ids.extend(tokenizer.eos());
            }
            if ids.len() >= needed {
                ids.truncate(needed);
                return Ok(Self { steps, batch, seq, ids });
            }
            bytes = bytes.saturating_mul(2);
        }
    }

    /// As [`hadal_train::Recorder`] writes them.
    pub fn read(path: &Path, vocab_size: usize) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
        Self::parse(&bytes, vocab_size).with_context(|| path.display().to_string())
    }

    fn parse(bytes: &[u8], vocab_size: usize) -> anyhow::Result<Self> {
        let tensor = SafeTensors::deserialize(bytes)?
            .tensor("tokens")
            .map_err(|_| anyhow::anyhow!("expected a tensor \"tokens\", found none"))?;
        let (&[steps, batch, window], Dtype::I32) = (tensor.shape(), tensor.dtype()) else {
            bail!("tokens: expected I32 [steps, batch, seq + 1], found {:?} {:?}", tensor.dtype(), tensor.shape());
        };
        ensure!(
            steps > 0 && batch > 0 && window > 1,
            "tokens: expected [steps, batch, seq + 1], found {:?}",
            tensor.shape()
        );
        let id = |bytes: &[u8]| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let ids: Vec<i32> = tensor.data().chunks_exact(4).map(id).collect();
        if let Some(found) = ids.iter().find(|id| !(0..vocab_size as i64).contains(&i64::from(**id))) {
            bail!("tokens: expected ids below vocab_size = {vocab_size}, found {found}");
        }
        Ok(Self { steps, batch, seq: window - 1, ids: ids.into_iter().map(|id| id as u32).collect() })
    }

    /// The windows of a step.
    pub fn windows(&self, step: usize) -> Vec<Vec<u32>> {
        let window = self.seq + 1;
        let of_step = &self.ids[step * self.batch * window..(step + 1) * self.batch * window];
        of_step.chunks(window).map(<[u32]>::to_vec).collect()
    }
}
