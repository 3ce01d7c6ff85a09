//! What lies beside the weights: `config.json` with another dtype, and all other small files.

use super::Target;
use crate::Quantization;
use crate::config::{ConfigError, read_object};
use crate::io::IoError;
use hadal_files::Disk;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// Largest file that is copied: above every tokenizer, below weights in another format.
const MAX_COPY: u64 = 64 << 20;

/// The text of `config.json` with the dtype and quantisation of `target`; nothing else changes, nor its order.
pub(super) fn converted(path: &Path, target: Target) -> Result<String, ConfigError> {
    let mut map = read_object(path)?;
    // Files have the old key, the new one, or none.
    let dtype = json!(if target == Target::F32 { "float32" } else { "bfloat16" });
    match map.get_mut("dtype") {
        Some(value) => *value = dtype.clone(),
        None => drop(map.entry("torch_dtype").or_insert(Value::Null)),
    }
    if let Some(value) = map.get_mut("torch_dtype") {
        *value = dtype;
    }
    match target {
        Target::Fp8(scales) => {
            map.insert("quantization_config".into(), Quantization::published(scales).to_hf_json());
        }
        Target::Bf16 | Target::F32 => drop(map.shift_remove("quantization_config")),
    }
    Ok(format!("{:#}\n", Value::Object(map)))
}

/// Copies the files of `from` that are neither weights nor `config.json`, nor hidden. Larger ones are named in warnings,
/// one line each; directories (a run's state) are left out.
pub(super) fn copy_others(disk: &Disk, from: &Path, to: &Path) -> Result<Vec<String>, IoError> {
    let listing = || std::fs::read_dir(from)?.map(|e| e.map(|e| e.file_name())).collect::<std::io::Result<Vec<_>>>();
    let mut names = listing().map_err(IoError::system(from, "listing"))?;
    names.sort();
    let mut warnings = Vec::new();
    for name in names {
        let path = from.join(&name);
        let text = name.to_string_lossy();
        let ours = text == "config.json" || text.ends_with(".safetensors") || text.ends_with(".safetensors.index.json");
        if ours || text.starts_with('.') {
            continue;
        }
        let data = std::fs::metadata(&path).map_err(IoError::system(&path, "reading its size"))?;
        if !data.is_file() {
            continue;
        }
        if data.len() > MAX_COPY {
            warnings.push(format!("{}: a file of more than 64 MiB: not copied", path.display()));
            continue;
        }
        let bytes = std::fs::read(&path).map_err(IoError::system(&path, "reading"))?;
        disk.write_new(&to.join(&name), |out| out.write_all(&bytes))?;
    }
    Ok(warnings)
}
