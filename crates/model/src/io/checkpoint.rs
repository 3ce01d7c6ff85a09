//! A directory of safetensors files, and where in it each tensor of a layout lies.

use super::IoError;
use super::error::printable;
use super::shard::{Shard, inside};
use super::source::{Source, scales_name};
use crate::{Kind, Layout, ModelConfig, Published, Quantization, TensorInfo};
use hadal_comm::GlobalExpert;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo as Stored;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Largest index that is read; V3's has about 9 MB.
const MAX_INDEX: u64 = 256 << 20;

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Shard of each tensor.
    tensors: HashMap<String, usize>,
    quantization: Option<Quantization>,
}

impl Checkpoint {
    /// Opens `model.safetensors` in `dir`, or else the shards that `model.safetensors.index.json` names, and reads
    /// their headers, and from `config.json`, if there is one, how weights are quantised. Data is only read by
    /// [`Checkpoint::load`].
    pub fn open(dir: &Path) -> Result<Self, IoError> {
        let quantization = Quantization::from_hf(&dir.join("config.json"))?;
        Ok(Self { quantization, ..Self::open_stem(dir, "model")? })
    }

    /// As [`Checkpoint::open`], of files that begin with `stem` instead of "model", none of them quantised.
    pub(super) fn open_stem(dir: &Path, stem: &str) -> Result<Self, IoError> {
        let single = dir.join(format!("{stem}.safetensors"));
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        if single.exists() {
            let shard = Shard::open(single)?;
            let tensors = shard.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Self { dir: dir.to_path_buf(), shards: vec![shard], tensors, quantization: None });
        }
        if index.exists() {
            return Self::open_index(dir, &index);
        }
        let found = if dir.is_dir() { "neither" } else { "no such directory" };
        let expected = format!("{stem}.safetensors or {stem}.safetensors.index.json in it");
        Err(IoError::format(dir, expected, found))
    }

    fn open_index(dir: &Path, path: &Path) -> Result<Self, IoError> {
        let size = std::fs::metadata(path).map_err(IoError::system(path, "reading its size"))?.len();
        if size > MAX_INDEX {
            return Err(IoError::format(path, format!("at most {MAX_INDEX} bytes"), format!("{size} bytes")));
        }
        let text = std::fs::read(path).map_err(IoError::system(path, "reading"))?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|e| IoError::format(path, "JSON with weight_map, tensor to file", printable(&e.to_string())))?;
        let mut files: BTreeMap<&str, usize> = BTreeMap::new();
        let mut shards = Vec::new();
        let mut tensors = HashMap::new();
        for (name, file) in &index.weight_map {
            let at = match files.get(file.as_str()) {
                Some(&at) => at,
                None => {
                    let plain = inside(dir, file).ok_or_else(|| {
                        IoError::tensor(path, name, "the name of a file beside the index", printable(file))
                    })?;
                    if !plain.exists() {
                        let expected = format!("the file {} beside it, as weight_map says", printable(file));
                        return Err(IoError::format(path, expected, "no such file"));
                    }
                    shards.push(Shard::open(plain)?);
                    files.insert(file, shards.len() - 1);
                    shards.len() - 1
                }
            };
            let shard: &Shard = &shards[at];
            if shard.info(name).is_none() {
                return Err(IoError::tensor(&shard.path, name, "a tensor, as the index says", "none of that name"));
            }
            tensors.insert(name.clone(), at);
        }
        Ok(Self { dir: dir.to_path_buf(), shards, tensors, quantization: None })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How its weights are quantised, if any are.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantization
    }

    /// Number of tensors in it.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True if it holds no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// True if a tensor of this name is stored.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// How many MTP layers the files hold, whatever `num_nextn_predict_layers` says: layers counted on from
    /// `num_hidden_layers` that have a tensor which only MTP has. Set the depth to this before laying out.
    pub fn mtp_layers(&self, config: &ModelConfig) -> usize {
        let own = ["eh_proj", "enorm", "hnorm", "shared_head.norm"];
        let present = |k: &usize| {
            let layer = config.num_hidden_layers + k;
            own.iter().any(|part| self.contains(&format!("model.layers.{layer}.{part}.weight")))
        };
        (0..).take_while(present).count()
    }

    pub(super) fn stored(&self, name: &str) -> Option<(&Shard, &Stored)> {
        let shard = &self.shards[*self.tensors.get(name)?];
        Some((shard, shard.info(name)?))
    }

    /// All names, sorted.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Tensors that lie in a file and that the index does not list, so that nobody reads them.
    pub(super) fn unlisted(&self) -> impl Iterator<Item = (&Path, String)> {
        let files = self.shards.iter().flat_map(|s| s.names().into_iter().map(|n| (s.path.as_path(), n)));
        files.filter(|(_, n)| !self.tensors.contains_key(n))
    }

    /// Where a published part lies: under its own name, or as one expert's part of a fused tensor. None if nowhere.
    /// The stored tensor's shape and dtype have been checked, and those of its scales.
    pub(super) fn find(&self, c: &ModelConfig, t: &TensorInfo, p: &Published) -> Result<Option<Source<'_>>, IoError> {
        if let Some((shard, stored)) = self.stored(&p.name) {
            check_shape(shard, &p.name, &p.shape, stored)?;
            return Source::new(self, shard, &p.name, stored, 0).map(Some);
        }
        let Some(fused) = (t.kind == Kind::RoutedExpert).then(|| Fused::of(c, &p.name)).flatten() else {
            return Ok(None);
        };
        let Some((shard, stored)) = self.stored(&fused.name) else { return Ok(None) };
        check_shape(shard, &fused.name, &fused.shape, stored)?;
        Source::new(self, shard, &fused.name, stored, fused.first).map(Some)
    }

    /// Names in the files that a layout of the whole model has no use for: neither its tensors nor their other forms.
    pub(super) fn unused(&self, c: &ModelConfig, whole: &Layout) -> Vec<&str> {
        let mut used: HashMap<&str, ()> = whole.published().map(|(_, p)| (p.name.as_str(), ())).collect();
        let fused: Vec<Fused> = whole
            .published()
            .filter(|(t, p)| t.kind == Kind::RoutedExpert && !self.contains(&p.name))
            .filter_map(|(_, p)| Fused::of(c, &p.name))
            .collect();
        used.extend(fused.iter().map(|f| (f.name.as_str(), ())));
        let copies = mtp_copies(c, c.num_nextn_predict_layers);
        used.extend(copies.iter().map(|(name, _)| (name.as_str(), ())));
        let quantised = |name: &&str| self.stored(name).is_some_and(|(_, stored)| stored.dtype == Dtype::F8_E4M3);
        let scales: Vec<String> = used.keys().copied().filter(quantised).map(scales_name).collect();
        used.extend(scales.iter().map(|name| (name.as_str(), ())));
        self.names().into_iter().filter(|n| !used.contains_key(n)).collect()
    }
}

/// Files of the first writers hold this buffer; it follows from the configuration.
pub(super) fn derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// MTP's copies of embedding and head for `depth` layers: name, and the main tensor copied.
pub(super) fn mtp_copies(c: &ModelConfig, depth: usize) -> Vec<(String, &'static str)> {
    let of = |k| {
        let p = format!("model.layers.{}", c.num_hidden_layers + k);
        let head = (format!("{p}.shared_head.head.weight"), "lm_head.weight");
        [(format!("{p}.embed_tokens.weight"), "model.embed_tokens.weight"), head]
    };
    (0..depth).flat_map(of).collect()
}

pub(super) fn check_shape(shard: &Shard, name: &str, shape: &[usize], stored: &Stored) -> Result<(), IoError> {
    if stored.shape == shape {
        return Ok(());
    }
    Err(IoError::tensor(&shard.path, name, format!("shape {shape:?}"), format!("shape {:?}", stored.shape)))
}

/// One expert's part of the fused form: `experts.gate_up_proj` `[E, 2F, D]`, gate rows first, and `experts.down_proj`
/// `[E, D, F]`, both without `.weight`.
struct Fused {
    name: String,
    shape: [usize; 3],
    first: usize,
}

impl Fused {
    /// From `<layer>.mlp.experts.<e>.<part>.weight`.
    fn of(c: &ModelConfig, name: &str) -> Option<Self> {
        let (head, tail) = name.split_once(".experts.")?;
        let (expert, part) = tail.split_once('.')?;
        let GlobalExpert(expert) = GlobalExpert(expert.parse().ok()?);
        let (e, d, f) = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
        let (stem, shape, row) = match part {
            "gate_proj.weight" => ("gate_up_proj", [e, 2 * f, d], 0),
            "up_proj.weight" => ("gate_up_proj", [e, 2 * f, d], f),
            "down_proj.weight" => ("down_proj", [e, d, f], 0),
            _ => return None,
        };
        let first = (expert * shape[1] + row) * shape[2];
        Some(Self { name: format!("{head}.experts.{stem}"), shape, first })
    }
}
