//! From arenas into files, in directories that appear whole or not at all.

use super::IoError;
use super::checkpoint::mtp_copies;
use super::shard::inside;
use crate::{Kind, Layout, ModelConfig, Params, Published, Scope};
use hadal_files::{Disk, Output, Staged, Written};
use hadal_kernels::{DType, Elem, bf16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

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

/// Files of a checkpoint with what was written, by name within its directory.
pub type Manifest = BTreeMap<String, Written>;

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
    assert!(params.has_masters(), "weights for inference are no checkpoint");
    config.validate()?;
    vacant(dir)?;
    let disk = Disk::new();
    let staged = Staged::begin(&disk, dir)?;
    let master = params.master.host();
    write_model(&disk, staged.path(), config, &params.layout, master.view().f32(), options)?;
    write_extra(&disk, staged.path(), extra)?;
    Ok(staged.commit()?)
}

/// Writes `config.json` and the weights `master`, the f32 arena of `layout`, into a directory that is being made.
/// Panics unless the layout is of the whole model (a contract breach).
pub fn write_model(
    disk: &Disk,
    dir: &Path,
    config: &ModelConfig,
    layout: &Layout,
    master: &[f32],
    options: SaveOptions,
) -> Result<Manifest, IoError> {
    assert_eq!(layout.scope, Scope::whole(config), "only a whole model makes a checkpoint");
    let text = format!("{:#}\n", config.to_hf_json(options.dtype));
    let written = disk.write_new(&dir.join("config.json"), |out| out.write_all(text.as_bytes()))?;
    let shards = plan(items(config, layout, options.dtype), options);
    let mut manifest = write_shards(disk, dir, "model", &shards, master)?;
    manifest.insert("config.json".into(), written);
    Ok(manifest)
}

/// Writes any f32 arena of `layout` (masters, a moment, an average) as `<stem>.safetensors`, or shards with an index,
/// under the published names and global shapes, all F32.
pub fn write_arena(
    disk: &Disk,
    dir: &Path,
    stem: &str,
    layout: &Layout,
    arena: &[f32],
    shard_bytes: usize,
) -> Result<Manifest, IoError> {
    let item =
        |p: &Published| Item { name: p.name.clone(), shape: p.shape.clone(), range: p.range(), dtype: DType::F32 };
    let items = layout.published().map(|(_, p)| item(p)).collect();
    let shards = plan(items, SaveOptions { dtype: DType::F32, shard_bytes });
    write_shards(disk, dir, stem, &shards, arena)
}

/// Writes files with plain names of their own into a directory that is being made.
pub fn write_extra(disk: &Disk, dir: &Path, extra: &[(&str, &[u8])]) -> Result<Manifest, IoError> {
    let mut manifest = Manifest::new();
    for (name, bytes) in extra {
        let path = inside(dir, name).filter(|p| !p.exists()).ok_or_else(|| {
            IoError::format(dir, "extra files with plain names of their own", super::error::printable(name))
        })?;
        manifest.insert((*name).into(), disk.write_new(&path, |out| out.write_all(bytes))?);
    }
    Ok(manifest)
}

/// An error unless nothing, or an empty directory, lies at `dir`.
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
fn plan(items: Vec<Item>, options: SaveOptions) -> Vec<Vec<Item>> {
    let mut shards: Vec<Vec<Item>> = vec![Vec::new()];
    let mut held = 0;
    for item in items {
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
pub(super) fn shard_name(stem: &str, i: usize, n: usize) -> String {
    match n {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{n:05}.safetensors", i + 1),
    }
}

/// Writes `<stem>.safetensors`, or `<stem>-i-of-n.safetensors` and their index.
fn write_shards(disk: &Disk, dir: &Path, stem: &str, shards: &[Vec<Item>], arena: &[f32]) -> Result<Manifest, IoError> {
    let n = shards.len();
    let file = |i: usize| shard_name(stem, i, n);
    let mut manifest = Manifest::new();
    for (i, items) in shards.iter().enumerate() {
        let written = disk.write_new(&dir.join(file(i)), |out| write_shard(out, items, arena))?;
        manifest.insert(file(i), written);
    }
    if n == 1 {
        return Ok(manifest);
    }
    let all = || shards.iter().enumerate().flat_map(|(i, items)| items.iter().map(move |item| (i, item)));
    let map: serde_json::Map<_, _> = all().map(|(i, item)| (item.name.clone(), json!(file(i)))).collect();
    let total: usize = all().map(|(_, item)| item.bytes()).sum();
    let elements: usize = all().map(|(_, item)| item.range.len()).sum();
    let metadata = json!({ "total_size": total, "total_parameters": elements });
    let index = format!("{:#}\n", json!({ "metadata": metadata, "weight_map": map }));
    let name = format!("{stem}.safetensors.index.json");
    let written = disk.write_new(&dir.join(&name), |out| out.write_all(index.as_bytes()))?;
    manifest.insert(name, written);
    Ok(manifest)
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

fn write_shard(out: &mut Output, items: &[Item], master: &[f32]) -> std::io::Result<()> {
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
