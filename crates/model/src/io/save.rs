//! From masters into files. A checkpoint appears whole or not at all: it is written into a sibling directory whose name
//! begins with a dot, flushed to the disk, and renamed.

use super::IoError;
use super::checkpoint::mtp_copies;
use super::shard::inside;
use crate::{Kind, Layout, ModelConfig, Params, Scope};
use hadal_kernels::{DType, Elem, bf16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// F32 or Bf16, of all tensors but the correction bias, which is always F32.
    pub dtype: DType,
    /// Bytes of tensors in one file; more makes shards with an index. A single larger tensor gets a file of its own.
    pub shard_bytes: usize,
}

impl SaveOptions {
    /// Files of at most 5 GB.
    pub fn new(dtype: DType) -> Self {
        Self { dtype, shard_bytes: 5_000_000_000 }
    }
}

/// Elements converted at once: the buffer stays within a core's cache.
const PIECE: usize = 1 << 16;

/// Writes `config.json`, the weights under their published names (MTP's copies of embedding and head included) and
/// the `extra` files (name, bytes) as the new directory `dir`, which must not exist or be empty. One writer at a time.
/// Panics unless `params` holds the whole model (a contract breach).
pub fn save_checkpoint(
    dir: &Path,
    config: &ModelConfig,
    params: &Params,
    options: SaveOptions,
    extra: &[(&str, &[u8])],
) -> Result<(), IoError> {
    let layout = &params.layout;
    assert_eq!(layout.scope, Scope::whole(config), "only a whole model makes a checkpoint");
    assert!(params.has_masters(), "weights for inference are no checkpoint");
    config.validate()?;
    vacant(dir)?;
    let partial = Partial::create(dir)?;
    let text = format!("{:#}\n", config.to_hf_json(options.dtype));
    write_file(&partial.path.join("config.json"), |out| out.write_all(text.as_bytes()))?;
    let shards = plan(config, layout, options);
    write_shards(&partial.path, &shards, params)?;
    for (name, bytes) in extra {
        let path = inside(&partial.path, name).filter(|p| !p.exists()).ok_or_else(|| {
            IoError::format(dir, "extra files with plain names of their own", super::error::printable(name))
        })?;
        write_file(&path, |out| out.write_all(bytes))?;
    }
    partial.commit(dir)
}

/// Writes one file beside its place, flushes it to the disk and renames it: it is whole or not there. An existing file
/// is replaced.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), IoError> {
    let Some(name) = path.file_name() else {
        return Err(IoError::format(path, "the path of a file", "a path without a last name"));
    };
    let partial = path.with_file_name(format!(".{}.partial", name.to_string_lossy()));
    let _ = std::fs::remove_file(&partial); // Left by an interrupted writer, or not there.
    let written = write_file(&partial, |out| out.write_all(bytes))
        .and_then(|()| std::fs::rename(&partial, path).map_err(IoError::system(path, "renaming the finished file")));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial); // The first error is the one to report.
    }
    written?;
    sync_dir(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

pub(super) fn vacant(dir: &Path) -> Result<(), IoError> {
    let exists = |found| Err(IoError::Exists { path: dir.to_path_buf(), found });
    match std::fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => exists("a directory that is not empty"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory && dir.is_file() => exists("a file"),
        Err(e) => Err(IoError::system(dir, "looking whether it exists")(e)),
    }
}

/// The directory being written; removed unless committed.
pub(super) struct Partial {
    pub(super) path: PathBuf,
    done: bool,
}

impl Partial {
    pub(super) fn create(dir: &Path) -> Result<Self, IoError> {
        let Some(name) = dir.file_name() else {
            return Err(IoError::format(dir, "the path of a new directory", "a path without a last name"));
        };
        let path = dir.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        // What an interrupted writer left behind.
        match std::fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(IoError::system(&path, "removing what an interrupted run left")(e));
            }
            _ => {}
        }
        std::fs::create_dir_all(&path).map_err(IoError::system(&path, "creating"))?;
        Ok(Self { path, done: false })
    }

    pub(super) fn commit(mut self, dir: &Path) -> Result<(), IoError> {
        sync_dir(&self.path)?;
        std::fs::rename(&self.path, dir).map_err(IoError::system(dir, "renaming the finished directory"))?;
        self.done = true;
        sync_dir(dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done {
            // The error that led here is the one to report; the next writer removes what stays.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Makes the names in a directory durable. Windows has no such call and needs none.
fn sync_dir(dir: &Path) -> Result<(), IoError> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).map_err(IoError::system(dir, "flushing"))?;
    }
    Ok(())
}

pub(super) fn write_file(path: &Path, f: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), IoError> {
    let write = || {
        let mut file = File::create_new(path)?;
        f(&mut file)?;
        file.sync_all()
    };
    write().map_err(IoError::system(path, "writing"))
}

/// A tensor to write: a stretch of the arena under a name.
struct Item {
    name: String,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
    dtype: DType,
}

impl Item {
    fn bytes(&self) -> usize {
        self.range.len() * self.dtype.size()
    }
}

/// Which tensors go into which file: in arena order, a new file where the limit would be passed.
fn plan(config: &ModelConfig, layout: &Layout, options: SaveOptions) -> Vec<Vec<Item>> {
    let mut shards: Vec<Vec<Item>> = vec![Vec::new()];
    let mut held = 0;
    for item in items(config, layout, options.dtype) {
        if held > 0 && held + item.bytes() > options.shard_bytes {
            shards.push(Vec::new());
            held = 0;
        }
        held += item.bytes();
        shards.last_mut().expect("there is always a last shard").push(item);
    }
    // F32 before BF16 within a file, so that every tensor is aligned to its elements.
    shards.iter_mut().for_each(|s| s.sort_by_key(|i| std::cmp::Reverse(i.dtype.size())));
    shards
}

fn items(config: &ModelConfig, layout: &Layout, dtype: DType) -> Vec<Item> {
    let mut main = HashMap::new();
    let mut out = Vec::new();
    for (t, p) in layout.published() {
        let dtype = if t.kind == Kind::Buffer { DType::F32 } else { dtype };
        if matches!(t.kind, Kind::Embedding | Kind::Head) {
            main.insert(p.name.as_str(), p.range());
        }
        out.push(Item { name: p.name.clone(), shape: p.shape.clone(), range: p.range(), dtype });
    }
    let shape = vec![config.vocab_size, config.hidden_size];
    for (name, of) in mtp_copies(config, config.num_nextn_predict_layers) {
        out.push(Item { name, shape: shape.clone(), range: main[of].clone(), dtype });
    }
    out
}

/// Name of file `i` of `n`.
pub(super) fn shard_name(i: usize, n: usize) -> String {
    if n == 1 { "model.safetensors".to_string() } else { format!("model-{:05}-of-{n:05}.safetensors", i + 1) }
}

fn write_shards(dir: &Path, shards: &[Vec<Item>], params: &Params) -> Result<(), IoError> {
    let master = params.master.view().f32();
    let n = shards.len();
    let file = |i: usize| shard_name(i, n);
    for (i, items) in shards.iter().enumerate() {
        write_file(&dir.join(file(i)), |out| write_shard(out, items, master))?;
    }
    if n == 1 {
        return Ok(());
    }
    let all = || shards.iter().enumerate().flat_map(|(i, items)| items.iter().map(move |item| (i, item)));
    let map: serde_json::Map<_, _> = all().map(|(i, item)| (item.name.clone(), json!(file(i)))).collect();
    let total: usize = all().map(|(_, item)| item.bytes()).sum();
    let index = format!("{:#}\n", json!({ "metadata": { "total_size": total }, "weight_map": map }));
    write_file(&dir.join("model.safetensors.index.json"), |out| out.write_all(index.as_bytes()))
}

/// What precedes the data of a file with these tensors, in the order of the data.
pub(super) fn header(entries: Vec<(String, TensorInfo)>) -> std::io::Result<Vec<u8>> {
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(format), entries).map_err(std::io::Error::other)?;
    let mut text = serde_json::to_vec(&metadata)?;
    // The data begins at a multiple of 8 bytes, as readers that map the file want it.
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

fn write_shard(out: &mut File, items: &[Item], master: &[f32]) -> std::io::Result<()> {
    let mut at = 0;
    let entry = |item: &Item| {
        let begin = at;
        at += item.bytes();
        let dtype = if item.dtype == DType::F32 { Dtype::F32 } else { Dtype::BF16 };
        (item.name.clone(), TensorInfo { dtype, shape: item.shape.clone(), data_offsets: (begin, at) })
    };
    out.write_all(&header(items.iter().map(entry).collect())?)?;
    let mut bytes = Vec::new();
    for item in items {
        for piece in master[item.range.clone()].chunks(PIECE) {
            bytes.clear();
            match item.dtype {
                DType::F32 => bytes.extend(piece.iter().flat_map(|x| x.to_le_bytes())),
                _ => bytes.extend(piece.iter().flat_map(|&x| <bf16 as Elem>::round(x).to_bits().to_le_bytes())),
            }
            out.write_all(&bytes)?;
        }
    }
    Ok(())
}
