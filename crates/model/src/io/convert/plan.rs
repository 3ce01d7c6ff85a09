//! What a conversion writes: which tensors, in which dtype, into which file.

use super::unit::{Tensor, Unit, Way};
use super::{ConvertOptions, Target};
use crate::io::checkpoint::{Checkpoint, check_shape, derived, mtp_copies};
use crate::io::error::printable;
use crate::io::source::Source;
use crate::{IoError, Layout, ModelConfig, Scope};
use hadal_numerics::block::{BLOCK, ScaleFormat};
use safetensors::Dtype;

/// Everything to be written.
pub(super) struct Plan<'a> {
    /// Units of each file.
    pub(super) shards: Vec<Vec<Unit<'a>>>,
}

impl<'a> Plan<'a> {
    /// Checks that all is there, and decides. Beside the plan: warnings, one line each.
    pub(super) fn new(
        from: &'a Checkpoint,
        config: &ModelConfig,
        options: ConvertOptions,
    ) -> Result<(Self, Vec<String>), IoError> {
        let layout = Layout::new(config, Scope::whole(config));
        let mut units = Vec::new();
        for ((_, p), source) in layout.published().zip(from.sources(config, &layout)?) {
            units.push(unit(p.name.clone(), p.shape.clone(), source, options.target)?);
        }
        for (name, _) in mtp_copies(config, config.num_nextn_predict_layers) {
            if let Some((shard, stored)) = from.stored(&name) {
                let shape = vec![config.vocab_size, config.hidden_size];
                check_shape(shard, &name, &shape, stored)?;
                let source = Source::new(from, shard, &name, stored, 0)?;
                units.push(unit(name, shape, source, options.target)?);
            }
        }
        let mut warnings = Vec::new();
        for name in from.unused(config, &layout) {
            units.extend(other(from, name, &mut warnings)?);
        }
        warnings.extend(
            from.unlisted()
                .map(|(file, name)| format!("{}: {}: not in the index: left out", file.display(), printable(&name))),
        );
        Ok((Self { shards: cut(units, options.shard_bytes) }, warnings))
    }

    /// All tensors with the number of their file.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (usize, Tensor)> {
        let shards = self.shards.iter().enumerate();
        shards.flat_map(|(i, units)| units.iter().flat_map(Unit::tensors).map(move |t| (i, t)))
    }

    /// Bytes of all tensors.
    pub(super) fn bytes(&self) -> usize {
        self.tensors().map(|(_, t)| t.bytes()).sum()
    }

    /// Numbers in all tensors but scales.
    pub(super) fn parameters(&self) -> usize {
        self.shards.iter().flatten().map(Unit::len).sum()
    }
}

fn unit(name: String, shape: Vec<usize>, source: Source<'_>, target: Target) -> Result<Unit<'_>, IoError> {
    let bias = name.ends_with(".e_score_correction_bias");
    let way = match target {
        Target::F32 => Way::Cast(Dtype::F32),
        Target::Bf16 | Target::Fp8(_) if bias => Way::Cast(source.stored.dtype),
        Target::Fp8(format) if is_quantised(&name) => {
            if keeps_codes(&source, &shape, format)? {
                Way::Recode(format)
            } else {
                Way::Quantise(format)
            }
        }
        Target::Bf16 | Target::Fp8(_) => Way::Cast(Dtype::BF16),
    };
    // A bias in F16 or FP8 is nothing that anyone writes; it becomes what it is computed in.
    let way = match way {
        Way::Cast(Dtype::F32 | Dtype::BF16) | Way::Quantise(_) | Way::Recode(_) | Way::Copy => way,
        Way::Cast(_) => Way::Cast(Dtype::F32),
    };
    Ok(Unit { name, shape, source, way })
}

/// A tensor that the configuration has no place for: copied as it is, if it can be understood without it.
fn other<'a>(from: &'a Checkpoint, name: &str, warnings: &mut Vec<String>) -> Result<Option<Unit<'a>>, IoError> {
    let Some((shard, stored)) = from.stored(name) else { return Ok(None) };
    let file = shard.path.display();
    if name.ends_with("_scale_inv") {
        let what = "scales of no FP8 tensor that the configuration has: left out";
        warnings.push(format!("{file}: {}: {what}", printable(name)));
        return Ok(None);
    }
    if stored.dtype.bitsize() % 8 != 0 || stored.dtype == Dtype::F8_E4M3 {
        let expected = "only tensors that the configuration has in this dtype";
        return Err(IoError::tensor(&shard.path, name, expected, format!("{:?}", stored.dtype)));
    }
    if !derived(name) {
        warnings.push(format!("{file}: {}: the configuration has no such tensor: copied as it is", printable(name)));
    }
    let source = Source { shard, name: name.to_string(), stored, first: 0, scales: None };
    Ok(Some(Unit { name: name.to_string(), shape: stored.shape.clone(), source, way: Way::Copy }))
}

/// True for the tensors that are FP8 in the published V3: the matrices of attention, dense layers, shared and routed
/// experts, of MTP layers too; not embedding, head, gates, norms and eh_proj.
fn is_quantised(name: &str) -> bool {
    let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return false;
    };
    let Some(part) = part.strip_suffix("_proj.weight").or_else(|| part.strip_suffix("_proj_with_mqa.weight")) else {
        return false;
    };
    let swiglu = |part: &str| matches!(part, "gate" | "up" | "down");
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    number(layer)
        && match part.split_once('.') {
            Some(("self_attn", part)) => matches!(part, "q" | "q_a" | "q_b" | "kv_a" | "kv_b" | "o"),
            Some(("mlp", part)) => match part.split_once('.') {
                None => swiglu(part),
                Some(("shared_experts", part)) => swiglu(part),
                Some(("experts", part)) => part.split_once('.').is_some_and(|(e, part)| number(e) && swiglu(part)),
                Some(_) => false,
            },
            _ => false,
        }
}

/// True if FP8 weights can stay as they are, so that converting changes no number: their blocks lie as those of the
/// output, and their scales fit its format.
fn keeps_codes(source: &Source<'_>, shape: &[usize], format: ScaleFormat) -> Result<bool, IoError> {
    let Some(scales) = &source.scales else { return Ok(false) };
    if scales.block != BLOCK || !scales.begins_blocks(source.first) {
        return Ok(false);
    }
    let count = shape[0].div_ceil(BLOCK[0]) * scales.across();
    scales.fit(scales.first_of(source.first), count, format)
}

/// Which units go into which file: in their order, a new file where the limit would be passed.
fn cut(units: Vec<Unit<'_>>, limit: usize) -> Vec<Vec<Unit<'_>>> {
    let mut shards: Vec<Vec<Unit<'_>>> = vec![Vec::new()];
    let mut held = 0;
    for unit in units {
        let bytes: usize = unit.tensors().map(|t| t.bytes()).sum();
        if held > 0 && held + bytes > limit {
            shards.push(Vec::new());
            held = 0;
        }
        held += bytes;
        shards.last_mut().expect("there is always a last shard").push(unit);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the published V3: which of its tensors have scales.
    #[test]
    fn quantised_tensors_are_those_of_the_published_weights() {
        let c = ModelConfig::preset("v3").unwrap();
        let layout = Layout::new(&c, Scope { experts: hadal_comm::ExpertRange::all(2), ..Scope::whole(&c) });
        let (mut codes, mut rest) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        for (_, p) in layout.published() {
            let part = p.name.splitn(4, '.').last().unwrap().replace(|c: char| c.is_ascii_digit(), "");
            if is_quantised(&p.name) {
                codes.insert(part)
            } else {
                rest.insert(part)
            };
        }
        let mlp = |p: &str| ["down", "gate", "up"].map(|x| format!("{p}.{x}_proj.weight"));
        let mut expected: Vec<String> =
            [mlp("mlp"), mlp("mlp.experts."), mlp("mlp.shared_experts")].into_iter().flatten().collect();
        let attention = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"];
        expected.extend(attention.map(|x| format!("self_attn.{x}.weight")));
        expected.sort();
        assert_eq!(codes.into_iter().collect::<Vec<_>>(), expected);
        for part in ["eh_proj.weight", "mlp.gate.weight", "input_layernorm.weight", "mlp.gate.e_score_correction_bias"]
        {
            assert!(rest.contains(part), "{part} of {rest:?}");
        }
        for name in ["lm_head.weight", "model.embed_tokens.weight", "model.layers.x.mlp.up_proj.weight"] {
            assert!(!is_quantised(name), "{name}");
        }
        assert!(is_quantised("model.layers.0.self_attn.q_proj.weight"));
    }
}
