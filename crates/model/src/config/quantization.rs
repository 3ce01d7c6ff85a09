//! `quantization_config` of a `config.json`: how weights are stored. It says nothing of the model's function, so
//! [`ModelConfig`](super::ModelConfig) does not carry it; a checkpoint does.

use super::hf::MAX_BYTES;
use super::keys::{Keys, as_usize, show};
use super::{ConfigError, error};
use hadal_numerics::block::{BLOCK, ScaleFormat};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Weights in E4M3 with a scale for each block: the one quantisation that is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// What scales may be. On reading, the tensors' own dtype decides how they are stored.
    pub scales: ScaleFormat,
}

impl Quantization {
    /// That of the published weights: blocks of 128 by 128.
    pub fn published(scales: ScaleFormat) -> Self {
        Self { block: BLOCK, scales }
    }

    /// Reads it from a `config.json`; None where weights are not quantised or there is no such file.
    pub fn from_hf(path: &Path) -> Result<Option<Self>, ConfigError> {
        if !path.exists() {
            return Ok(None);
        }
        let map = read_object(path)?;
        let mut keys = Keys::new("", &map);
        read(&mut keys, &mut Vec::new()).map_err(|e| e.at(&path.display().to_string()))
    }

    /// As `config.json` has it.
    pub(crate) fn to_hf_json(self) -> Value {
        let mut out = json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": self.block,
        });
        if self.scales == ScaleFormat::Ue8m0 {
            out["scale_fmt"] = json!("ue8m0");
        }
        out
    }
}

/// Storage in words: "FP8 (E4M3) in blocks of 128 x 128".
impl std::fmt::Display for Quantization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FP8 (E4M3) in blocks of {} x {}", self.block[0], self.block[1])?;
        if self.scales == ScaleFormat::Ue8m0 { write!(f, ", scales are powers of two") } else { Ok(()) }
    }
}

/// A file that is one JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let place = path.display().to_string();
    let read = |why| ConfigError::Read { path: place.clone(), why };
    let size = std::fs::metadata(path).map_err(read)?.len();
    if size > MAX_BYTES {
        return Err(ConfigError::value("size", format!("at most {MAX_BYTES} bytes"), size).at(&place));
    }
    parse_object(&std::fs::read(path).map_err(read)?, &place)
}

/// The JSON object that is the whole of the file called `place` in messages.
pub(super) fn parse_object(bytes: &[u8], place: &str) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_slice(bytes).map_err(|e| ConfigError::Json {
        path: place.to_string(),
        line: e.line(),
        column: e.column(),
        why: error::without_position(&e),
    })
}

/// The key of a whole `config.json`; keys inside that nothing reads are warnings.
pub(super) fn read(keys: &mut Keys<'_>, warnings: &mut Vec<String>) -> Result<Option<Quantization>, ConfigError> {
    let Some(map) = keys.object("quantization_config")? else { return Ok(None) };
    let mut keys = Keys::new("quantization_config.", map);
    let one_of = |keys: &mut Keys<'_>, key, allowed: &[&str]| match keys.raw(key) {
        None | Some(Value::Null) => Ok(()),
        Some(v) if v.as_str().is_some_and(|s| allowed.contains(&s)) => Ok(()),
        Some(v) => Err(ConfigError::value(&keys.name(key), format!("\"{}\"", allowed.join("\" or \"")), show(v))),
    };
    if keys.raw("quant_method").is_none_or(Value::is_null) {
        return Err(ConfigError::missing(&keys.name("quant_method"), "\"fp8\""));
    }
    one_of(&mut keys, "quant_method", &["fp8"])?;
    one_of(&mut keys, "fmt", &["e4m3"])?;
    // Activations are not quantised here; stored factors for them would be tensors that nothing reads.
    one_of(&mut keys, "activation_scheme", &["dynamic"])?;
    one_of(&mut keys, "scale_fmt", &["ue8m0", "float"])?;
    one_of(&mut keys, "expert_dtype", &["fp8"])?;
    // Which tensors are quantised is seen by the tensors.
    for key in ["modules_to_not_convert", "ignored_layers", "modules_to_convert"] {
        match keys.raw(key) {
            None | Some(Value::Null) => {}
            Some(Value::Array(names)) if names.iter().all(Value::is_string) => {}
            Some(v) => return Err(ConfigError::value(&keys.name(key), "a list of strings or null", show(v))),
        }
    }
    // How transformers is to load the file.
    let _ = keys.raw("dequantize");
    let scales = match keys.str("scale_fmt") {
        Ok(Some("ue8m0")) => ScaleFormat::Ue8m0,
        _ => ScaleFormat::F32,
    };
    let block = block(&mut keys)?;
    warnings.extend(keys.unknown().map(|k| format!("unknown key {}: ignored", keys.name(k))));
    Ok(Some(Quantization { block, scales }))
}

fn block(keys: &mut Keys<'_>) -> Result<[usize; 2], ConfigError> {
    let Some(v) = keys.raw("weight_block_size") else { return Ok(BLOCK) };
    let sizes: Option<Vec<usize>> = v.as_array().and_then(|a| a.iter().map(as_usize).collect());
    match sizes.as_deref() {
        Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok([rows, cols]),
        _ => Err(ConfigError::value(
            &keys.name("weight_block_size"),
            "two integers of at least 1 (rows and columns of a block)",
            show(v),
        )),
    }
}
