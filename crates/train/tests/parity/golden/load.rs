//! Reads a golden model: config through the product's own reader, tensors as they lie in golden.safetensors.

use crate::support::gpu;
use hadal_kernels::{Ctx, DType, Device};
use hadal_model::{Batch, Grads, Layout, Model, ModelConfig, Params, Precision, Sequence};
use safetensors::{Dtype, SafeTensors};
use std::path::PathBuf;
use std::sync::Arc;

pub struct Golden {
    pub name: String,
    pub config: ModelConfig,
    bytes: Vec<u8>,
}

/// Directory of the goldens: beside the crates, or, where the tests run without their sources, what HADAL_GOLDENS names.
pub fn root() -> PathBuf {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
    std::env::var_os("HADAL_GOLDENS").map_or_else(beside, PathBuf::from)
}

/// All cases, in alphabetical order.
pub fn all() -> Vec<Golden> {
    let mut names: Vec<String> = std::fs::read_dir(root())
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.path().join("golden.safetensors").exists())
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 12, "only {} goldens found under {}", names.len(), root().display());
    names.iter().map(|n| Golden::read(n)).collect()
}

impl Golden {
    pub fn read(name: &str) -> Self {
        let dir = root().join(name);
        let (config, _) = ModelConfig::from_hf(&dir.join("config.json")).unwrap();
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        Self { name: name.to_string(), config, bytes }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    pub fn names(&self, prefix: &str) -> Vec<String> {
        let mut n: Vec<String> =
            self.file().names().into_iter().filter_map(|n| Some(n.strip_prefix(prefix)?.to_string())).collect();
        n.sort();
        n
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let file = self.file();
        let t = file.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        assert_eq!(t.dtype(), Dtype::F32, "{name}");
        t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn i32(&self, name: &str) -> Vec<i32> {
        let file = self.file();
        let t = file.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        assert_eq!(t.dtype(), Dtype::I32, "{name}");
        t.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn sequences(&self) -> Vec<Sequence> {
        let (ids, targets, cu) = (self.i32("ids"), self.i32("targets"), self.i32("cu"));
        cu.windows(2)
            .map(|w| {
                let r = w[0] as usize..w[1] as usize;
                Sequence { tokens: ids[r.clone()].to_vec(), targets: targets[r].to_vec() }
            })
            .collect()
    }

    pub fn batch(&self, ctx: &Ctx) -> Batch {
        Batch::new(ctx, &self.sequences(), self.config.num_nextn_predict_layers)
    }

    pub fn model(&self, ctx: &Ctx) -> Model {
        Model::whole(ctx, self.config.clone())
    }

    /// Params filled from `<prefix><published name>`; every tensor must be there and every one in the file be used.
    pub fn params(&self, ctx: &Ctx, layout: &Arc<Layout>, precision: Precision) -> Params {
        let mut masters = ctx.on_host().zeros(DType::F32, layout.len);
        let mut used = 0;
        for (_, p) in layout.published() {
            let w = self.f32(&format!("w.{}", p.name));
            masters.view_mut().f32()[p.range()].copy_from_slice(&w);
            used += 1;
        }
        assert_eq!(used, self.names("w.").len(), "{}: tensors in the file that the model has no place for", self.name);
        Params::of_masters(ctx, layout.clone(), precision, masters)
    }
}

/// A context of CPUs; where there is a GPU one of it, and one of it with the kernels that GPUs before Hopper get and none
/// of cuBLASLt.
#[track_caller]
pub fn contexts() -> Vec<Ctx> {
    let cpu = Device::cpu(Some(2)).unwrap().ctx();
    let Some((default, _)) = gpu() else { return vec![cpu] };
    let Some((older, cuda)) = gpu() else { return vec![cpu, default] };
    cuda.set_plain();
    cuda.set_invariant(true);
    vec![cpu, default, older]
}

/// A tensor's part of an arena by published name.
pub fn part(layout: &Layout, arena: &[f32], name: &str) -> Vec<f32> {
    let (_, p) = layout.published().find(|(_, p)| p.name == name).unwrap_or_else(|| panic!("no tensor {name}"));
    arena[p.range()].to_vec()
}

/// The gradient of one published tensor.
pub fn gradient(grads: &Grads, name: &str) -> Vec<f32> {
    part(&grads.layout, grads.arena.host().view().f32(), name)
}
