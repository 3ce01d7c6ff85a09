use super::*;
use crate::io::tests::{Tensors, ctx, layout, load, tensors, tiny, weights, write};
use crate::{ParamId, Params, Precision, SaveOptions, save_checkpoint};
use hadal_files::{Fault, Faults};
use hadal_kernels::{DType, Elem, bf16};
use hadal_numerics::{e4m3, ue8m0};
use safetensors::Dtype;
use std::io::ErrorKind::StorageFull;
use std::path::PathBuf;
use std::sync::Arc;

/// Blocks with cut edges everywhere, and fused experts whose up rows begin within a block.
fn ragged() -> ModelConfig {
    ModelConfig {
        hidden_size: 144,
        intermediate_size: 200,
        moe_intermediate_size: 136,
        q_lora_rank: Some(130),
        kv_lora_rank: 72,
        n_routed_experts: 4,
        n_group: 1,
        topk_group: 1,
        ..tiny()
    }
}

struct Silent;

impl ConvertObserver for Silent {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// A directory for models, and one saved in F32.
struct Place {
    root: tempfile::TempDir,
    config: ModelConfig,
    params: Params,
}

impl Place {
    fn new(config: ModelConfig) -> Self {
        let place = Self { root: tempfile::tempdir().unwrap(), params: weights(&config), config };
        let options = SaveOptions::new(DType::F32);
        let extra: &[(&str, &[u8])] = &[("tokenizer.json", b"{}")];
        save_checkpoint(&place.dir("f32"), &place.config, &place.params, options, extra).unwrap();
        place
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn try_convert(&self, from: &str, to: &str, target: Target, shard_bytes: usize) -> Result<Converted, IoError> {
        convert(&ctx(2), &self.dir(from), &self.dir(to), ConvertOptions { target, shard_bytes }, &Silent)
    }

    #[track_caller]
    fn convert(&self, from: &str, to: &str, target: Target) -> Tensors {
        let done = self.try_convert(from, to, target, usize::MAX).unwrap();
        assert_eq!((done.files, done.warnings), (1, vec![]));
        self.tensors(to)
    }

    fn tensors(&self, name: &str) -> Tensors {
        tensors(&self.dir(name).join("model.safetensors"))
    }

    /// What every published tensor is when loaded.
    fn loaded(&self, name: &str) -> Params {
        load(&self.config, &self.dir(name)).unwrap().0
    }

    /// Changes the tensors of a model, and expects a message with these parts of loading and converting it.
    #[track_caller]
    fn refused(&self, name: &str, change: impl Fn(&mut Tensors), parts: &[&str]) {
        let file = self.dir(name).join("model.safetensors");
        let good = self.tensors(name);
        let mut bad = good.clone();
        change(&mut bad);
        write(&file, &bad);
        let loaded = load(&self.config, &self.dir(name)).err().expect("an error").to_string();
        for e in [loaded, self.try_convert(name, "refused", Target::Bf16, usize::MAX).unwrap_err().to_string()] {
            assert!(e.starts_with(&self.dir(name).display().to_string()) && !e.contains('\n'), "{e}");
            parts.iter().for_each(|p| assert!(e.contains(p), "{e}: {p}"));
        }
        assert!(!self.dir("refused").exists() && !self.dir(".refused.partial").exists());
        write(&file, &good);
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn scales((dtype, _, bytes): &(Dtype, Vec<usize>, Vec<u8>)) -> Vec<f32> {
    match dtype {
        Dtype::F32 => f32s(bytes),
        Dtype::F8_E8M0 => bytes.iter().map(|&b| ue8m0::decode(b)).collect(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_same(a: &Params, b: &Params) {
    for (_, p) in a.layout.published() {
        assert_eq!(a.master.view().f32()[p.range()], b.master.view().f32()[p.range()], "{}", p.name);
    }
}

/// The obvious quantiser: for each element, its block's largest magnitude.
fn reference(x: &[f32], cols: usize, power: bool) -> (Vec<u8>, Vec<f32>) {
    let across = cols.div_ceil(128);
    let block = |i: usize| i / cols / 128 * across + i % cols / 128;
    let mut amax = vec![0.0f32; (x.len() / cols).div_ceil(128) * across];
    (0..x.len()).for_each(|i| amax[block(i)] = amax[block(i)].max(x[i].abs()));
    let exact = |a: f32| a / 448.0;
    let scale = |a: f32| if power { 2f64.powf(f64::from(exact(a)).log2().ceil()) as f32 } else { exact(a) };
    let scales: Vec<f32> = amax.into_iter().map(scale).collect();
    (x.iter().enumerate().map(|(i, x)| e4m3::encode(x / scales[block(i)])).collect(), scales)
}

#[test]
fn fp8_is_what_the_obvious_quantiser_gives_and_loads_as_that() {
    let place = Place::new(ragged());
    let original = place.tensors("f32");
    for (format, name, key) in [(ScaleFormat::F32, "a", "null"), (ScaleFormat::Ue8m0, "b", "\"ue8m0\"")] {
        let t = place.convert("f32", name, Target::Fp8(format));
        let mut codes = 0;
        let loaded = place.loaded(name);
        for (_, p) in loaded.layout.published() {
            let x = f32s(&original[&p.name].2);
            let found = &loaded.master.view().f32()[p.range()];
            let Some(scale) = t.get(&format!("{}_scale_inv", p.name)) else {
                let bias = p.name.ends_with("e_score_correction_bias");
                assert_eq!(t[&p.name].0, if bias { Dtype::F32 } else { Dtype::BF16 }, "{}", p.name);
                let round = |x: f32| if bias { x } else { <bf16 as Elem>::round(x).f32() };
                assert!(x.iter().zip(found).all(|(x, y)| round(*x) == *y), "{}", p.name);
                continue;
            };
            codes += 1;
            let cols = p.shape[1];
            let (expected, grid) = reference(&x, cols, format == ScaleFormat::Ue8m0);
            assert_eq!((t[&p.name].0, &t[&p.name].1), (Dtype::F8_E4M3, &p.shape));
            assert_eq!(scale.1, [p.shape[0].div_ceil(128), cols.div_ceil(128)]);
            assert_eq!((&t[&p.name].2, &scales(scale)), (&expected, &grid), "{}", p.name);
            let across = cols.div_ceil(128);
            let value = |i: usize| e4m3::decode(expected[i]) * grid[i / cols / 128 * across + i % cols / 128];
            assert!((0..x.len()).all(|i| value(i) == found[i]), "{}", p.name);
        }
        // Five of attention in each of three blocks, a dense layer, four experts and a shared one in two blocks.
        assert_eq!(codes, 3 * 5 + 3 + 2 * 5 * 3);
        let config = std::fs::read(place.dir(name).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let q = &config["quantization_config"];
        assert_eq!((q["scale_fmt"].to_string(), config["torch_dtype"].as_str()), (key.into(), Some("bfloat16")));
        assert_eq!(place.dir(name).join("tokenizer.json").metadata().unwrap().len(), 2);
        // Inference rounds the same numbers.
        let checkpoint = Checkpoint::open(&place.dir(name)).unwrap();
        let (lean, warnings) =
            checkpoint.load_for_inference(&ctx(5), &place.config, layout(&place.config), Precision::Bf16).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        let full = checkpoint.load(&ctx(1), &place.config, layout(&place.config), Precision::Bf16).unwrap().0;
        for i in 0..lean.layout.tensors.len() {
            let (a, b) = (lean.weight(ParamId(i)), full.weight(ParamId(i)));
            assert_eq!(a.data.to_f32(), b.data.to_f32(), "{}", lean.layout.tensors[i].published[0].name);
        }
    }
}

#[test]
fn from_fp8_and_back() {
    let place = Place::new(ragged());
    let fp8 = place.convert("f32", "fp8", Target::Fp8(ScaleFormat::F32));
    let f32 = place.convert("fp8", "wide", Target::F32);
    assert!(f32.values().all(|(dtype, ..)| *dtype == Dtype::F32));
    assert_same(&place.loaded("wide"), &place.loaded("fp8"));
    let config = std::fs::read_to_string(place.dir("wide/config.json")).unwrap();
    assert!(config.contains("\"torch_dtype\": \"float32\"") && !config.contains("quantization"), "{config}");
    let bf16s = place.convert("fp8", "bf16", Target::Bf16);
    for (name, (_, _, bytes)) in &bf16s {
        let round = |x: f32| <bf16 as Elem>::round(x).to_bits().to_le_bytes();
        let bias = name.ends_with("e_score_correction_bias");
        let expected =
            if bias { f32[name].2.clone() } else { f32s(&f32[name].2).into_iter().flat_map(round).collect() };
        assert_eq!(bytes, &expected, "{name}");
    }
    // Nothing changes where nothing has to.
    assert_eq!(place.convert("fp8", "again", Target::Fp8(ScaleFormat::F32)), fp8);
    assert_eq!(place.convert("bf16", "same", Target::Bf16), bf16s);
    assert_eq!(place.convert("f32", "copy", Target::F32), place.tensors("f32"));
    // Powers of two are kept in either form; other scales need new codes.
    let powers = place.convert("f32", "powers", Target::Fp8(ScaleFormat::Ue8m0));
    let wide = place.convert("powers", "powers-f32", Target::Fp8(ScaleFormat::F32));
    assert_same(&place.loaded("powers-f32"), &place.loaded("powers"));
    for (name, t) in &powers {
        assert_eq!(name.ends_with("_scale_inv"), t != &wide[name], "{name}");
    }
    assert_eq!(place.convert("powers-f32", "powers-back", Target::Fp8(ScaleFormat::Ue8m0)), powers);
    let rounded = place.convert("fp8", "rounded", Target::Fp8(ScaleFormat::Ue8m0));
    assert_eq!(rounded, place.convert("wide", "rounded-wide", Target::Fp8(ScaleFormat::Ue8m0)));
}

/// Stacks FP8 experts into fused tensors, each matrix with its own grid of scales.
fn fuse(t: &mut Tensors, wide: &Tensors, c: &ModelConfig) {
    let (e, d, f) = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
    for layer in 1..3 {
        let p = format!("model.layers.{layer}.mlp.experts");
        let parts = |i: usize, names: &[&str]| -> Vec<f32> {
            names.iter().flat_map(|n| f32s(&wide[&format!("{p}.{i}.{n}_proj.weight")].2)).collect()
        };
        for (name, of, rows, cols) in
            [("gate_up_proj", &["gate", "up"][..], 2 * f, d), ("down_proj", &["down"][..], d, f)]
        {
            let (mut codes, mut grids) = (Vec::new(), Vec::new());
            for i in 0..e {
                let (code, grid) = reference(&parts(i, of), cols, false);
                codes.extend(code);
                grids.extend(grid.into_iter().flat_map(f32::to_le_bytes));
            }
            t.insert(format!("{p}.{name}"), (Dtype::F8_E4M3, vec![e, rows, cols], codes));
            let shape = vec![e, rows.div_ceil(128), cols.div_ceil(128)];
            t.insert(format!("{p}.{name}_scale_inv"), (Dtype::F32, shape, grids));
        }
        t.retain(|name, _| !name.starts_with(&format!("{p}.")) || !name.contains("_proj.weight"));
    }
}

/// Experts of 136 rows, so that the up rows share blocks with the gate rows, and of 128, where they do not.
#[test]
fn fused_experts() {
    for rows in [136, 128] {
        let place = Place::new(ModelConfig { moe_intermediate_size: rows, ..ragged() });
        let mut t = place.convert("f32", "fp8", Target::Fp8(ScaleFormat::F32));
        let each = t.clone();
        fuse(&mut t, &place.tensors("f32"), &place.config);
        assert!(t.len() < each.len());
        write(&place.dir("fp8/model.safetensors"), &t);
        let (loaded, warnings) = load(&place.config, &place.dir("fp8")).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        let f32 = place.convert("fp8", "wide", Target::F32);
        assert!(f32.contains_key("model.layers.1.mlp.experts.3.up_proj.weight"));
        assert_same(&place.loaded("wide"), &loaded);
        let (e, f, d) = (1, place.config.moe_intermediate_size, place.config.hidden_size);
        let (codes, grid) =
            (&t["model.layers.2.mlp.experts.gate_up_proj"], "model.layers.2.mlp.experts.gate_up_proj_scale_inv");
        let grid = scales(&t[grid]);
        let (across, high) = (d.div_ceil(128), (2 * f).div_ceil(128));
        for (row, col) in [(0, 0), (f - 1, d - 1), (3, 130)] {
            // An up row of the second expert, by hand.
            let code = codes.2[(e * 2 * f + f + row) * d + col];
            let expected = e4m3::decode(code) * grid[(e * high + (f + row) / 128) * across + col / 128];
            assert_eq!(f32s(&f32["model.layers.2.mlp.experts.1.up_proj.weight"].2)[row * d + col], expected);
        }
        let split = place.convert("fp8", "split", Target::Fp8(ScaleFormat::F32));
        assert_eq!(split.keys().collect::<Vec<_>>(), each.keys().collect::<Vec<_>>());
        // Blocks that lie alike keep codes and scales; the up rows need new ones where they begin within a block.
        let fresh = place.convert("wide", "split-wide", Target::Fp8(ScaleFormat::F32));
        let kept = place.convert("split", "split-f32", Target::F32);
        for (name, x) in &kept {
            if rows == 136 && name.contains(".experts.") && name.contains("up_proj") {
                let scale = format!("{name}_scale_inv");
                assert_eq!((&split[name], &split[&scale]), (&fresh[name], &fresh[&scale]), "{name}");
            } else {
                assert_eq!(x, &f32[name], "{name}");
            }
        }
        assert!(rows == 136 || split == each);
    }
}

/// Small shards: scales beside their weights, an index that counts, and the same numbers.
#[test]
fn shards_and_scales_in_other_files() {
    let place = Place::new(ragged());
    let whole = place.convert("f32", "whole", Target::Fp8(ScaleFormat::F32));
    let done = place.try_convert("f32", "shards", Target::Fp8(ScaleFormat::F32), 100_000).unwrap();
    assert!(done.files > 5, "{done:?}");
    let index = std::fs::read(place.dir("shards/model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let bytes: usize = whole.values().map(|t| t.2.len()).sum();
    let weights = whole.iter().filter(|(name, _)| !name.ends_with("_scale_inv"));
    let numbers: usize = weights.map(|(_, t)| t.1.iter().product::<usize>()).sum();
    assert_eq!((done.bytes, done.parameters, done.tensors), (bytes, numbers, whole.len()));
    assert_eq!(index["metadata"], json!({ "total_parameters": numbers, "total_size": bytes }));
    let mut all = Tensors::new();
    for i in 0..done.files {
        let name = shard_name("model", i, done.files);
        let part = tensors(&place.dir("shards").join(&name));
        part.keys().for_each(|t| assert_eq!(index["weight_map"][t], name));
        all.extend(part);
    }
    assert_eq!(all, whole);
    assert_same(&place.loaded("shards"), &place.loaded("whole"));
    // One file for weights, one for scales.
    let (scales, weights): (Tensors, Tensors) = whole.into_iter().partition(|(name, _)| name.ends_with("_scale_inv"));
    let file = |part: &Tensors, name: &'static str| {
        write(&place.dir("shards").join(name), part);
        part.keys().map(move |t| (t.clone(), json!(name))).collect::<Vec<_>>()
    };
    let map: serde_json::Map<_, _> =
        file(&weights, "w.safetensors").into_iter().chain(file(&scales, "s.safetensors")).collect();
    let text = json!({ "weight_map": map }).to_string();
    std::fs::write(place.dir("shards/model.safetensors.index.json"), text).unwrap();
    assert_same(&place.loaded("shards"), &place.loaded("whole"));
}

#[test]
fn scales_of_every_dtype_and_weights_left_in_bf16() {
    let place = Place::new(ragged());
    let mut t = place.convert("f32", "fp8", Target::Fp8(ScaleFormat::Ue8m0));
    let expected = place.loaded("fp8");
    let put = |t: &Tensors| write(&place.dir("fp8/model.safetensors"), t);
    let recode = |t: &mut Tensors, dtype: Dtype, f: &dyn Fn(u8) -> Vec<u8>| {
        for (_, s) in t.iter_mut().filter(|(name, _)| name.ends_with("_scale_inv")) {
            *s = (dtype, s.1.clone(), s.2.iter().flat_map(|&b| f(b)).collect());
        }
    };
    for (dtype, f) in [
        (Dtype::U8, &(|b| vec![b]) as &dyn Fn(u8) -> Vec<u8>),
        (Dtype::F32, &|b| ue8m0::decode(b).to_le_bytes().to_vec()),
        (Dtype::BF16, &|b| <bf16 as Elem>::round(ue8m0::decode(b)).to_bits().to_le_bytes().to_vec()),
    ] {
        let mut other = t.clone();
        recode(&mut other, dtype, f);
        put(&other);
        assert_same(&place.loaded("fp8"), &expected);
    }
    // As transformers leaves what is no multiple of 128.
    let name = "model.layers.0.self_attn.q_a_proj.weight";
    t.remove(&format!("{name}_scale_inv"));
    let (_, shape, codes) = t[name].clone();
    let ones = codes.iter().flat_map(|_| [0x80, 0x3f]).collect();
    t.insert(name.into(), (Dtype::BF16, shape, ones));
    put(&t);
    let loaded = place.loaded("fp8");
    let p = loaded.layout.published().find(|(_, p)| p.name == name).unwrap().1.range();
    assert!(loaded.master.view().f32()[p].iter().all(|x| *x == 1.0));
    let wide = place.convert("fp8", "wide", Target::F32);
    assert!(f32s(&wide[name].2).iter().all(|x| *x == 1.0));
    // Another block size, if all tensors agree.
    let config = std::fs::read_to_string(place.dir("fp8/config.json")).unwrap();
    let config = config.replace("128", "256");
    std::fs::write(place.dir("fp8/config.json"), config).unwrap();
    let e = load(&place.config, &place.dir("fp8")).err().unwrap().to_string();
    assert!(e.contains("expected shape [1, 1] (blocks of 256 x 256), found shape ["), "{e}");
}

#[test]
fn bad_quantised_tensors() {
    let place = Place::new(ragged());
    place.convert("f32", "fp8", Target::Fp8(ScaleFormat::F32));
    let name = "model.layers.0.mlp.down_proj.weight";
    let scale = &format!("{name}_scale_inv");
    let missing = format!("expected its scales, {scale}, beside an F8_E4M3 tensor, found none of that name");
    place.refused("fp8", |t| drop(t.remove(scale)), &[name, &missing]);
    let shape = |t: &mut Tensors| t.get_mut(scale).unwrap().1 = vec![4, 1];
    place.refused("fp8", shape, &[scale, "expected shape [2, 2] (blocks of 128 x 128), found shape [4, 1]"]);
    let dtype = |t: &mut Tensors| t.get_mut(scale).unwrap().0 = Dtype::I32;
    place.refused("fp8", dtype, &[scale, "expected F32, BF16, F8_E8M0 or U8 scales, found I32"]);
    let number = |x: f32| move |t: &mut Tensors| t.get_mut(scale).unwrap().2[12..].copy_from_slice(&x.to_le_bytes());
    place.refused("fp8", number(f32::NAN), &[scale, "expected finite numbers, found NaN"]);
    place.refused("fp8", number(f32::INFINITY), &[scale, "expected finite numbers, found inf"]);
    place.refused("fp8", number(-1.0), &[scale, "expected scales of at least 0, found -1"]);
    place.refused("fp8", number(3e38), &[name, "expected finite numbers, found "]);
    let bytes = |t: &mut Tensors| *t.get_mut(scale).unwrap() = (Dtype::U8, vec![2, 2], vec![127, 127, 255, 127]);
    place.refused("fp8", bytes, &[scale, "expected finite numbers, found NaN"]);
    place.refused("fp8", |t| t.get_mut(name).unwrap().2[5] = 0xff, &[name, "expected finite numbers, found NaN"]);
    let other = |t: &mut Tensors| t.get_mut(name).unwrap().0 = Dtype::F8_E5M2;
    place.refused("fp8", other, &[name, "expected BF16, F16, F32 or F8_E4M3 with scales, found F8_E5M2"]);
    let norm = "model.norm.weight";
    let vector = |t: &mut Tensors| drop(t.insert(norm.into(), (Dtype::F8_E4M3, vec![144], vec![0; 144])));
    place.refused("fp8", vector, &[norm, "expected BF16, F16 or F32 (a vector has no blocks), found F8_E4M3"]);
    // NaN codes that would be copied.
    let mut t = place.tensors("fp8");
    t.get_mut(name).unwrap().2[5] = 0x7f;
    write(&place.dir("fp8/model.safetensors"), &t);
    let e = place.try_convert("fp8", "x", Target::Fp8(ScaleFormat::F32), usize::MAX).unwrap_err().to_string();
    assert!(e.contains(name) && e.contains("expected finite numbers, found NaN"), "{e}");
    // Without the key, codes mean nothing.
    let config = std::fs::read(place.dir("f32/config.json")).unwrap();
    std::fs::write(place.dir("fp8/config.json"), config).unwrap();
    place.refused("fp8", |_| (), &["expected quantization_config in config.json beside an F8_E4M3 tensor, found none"]);
    // F32 beyond what BF16 holds.
    let mut t = place.tensors("f32");
    t.get_mut(norm).unwrap().2[..4].copy_from_slice(&f32::MAX.to_le_bytes());
    write(&place.dir("f32/model.safetensors"), &t);
    let e = place.try_convert("f32", "x", Target::Bf16, usize::MAX).unwrap_err().to_string();
    assert!(e.contains(norm) && e.contains("expected numbers that BF16 holds, found 3.4028235e38"), "{e}");
    assert!(!place.dir("x").exists());
}

/// Rows longer than a strip are quantised in parts.
#[test]
fn wide_rows() {
    let config = ModelConfig { intermediate_size: 33_000, ..tiny() };
    let place = Place::new(config);
    let t = place.convert("f32", "fp8", Target::Fp8(ScaleFormat::F32));
    let name = "model.layers.0.mlp.down_proj.weight";
    let (codes, grid) = reference(&f32s(&place.tensors("f32")[name].2), 33_000, false);
    assert_eq!((&t[name].2, scales(&t[&format!("{name}_scale_inv")])), (&codes, grid));
}

/// What lies beside the tensors that the configuration has.
#[test]
fn other_tensors_and_files() {
    let place = Place::new(tiny());
    let file = place.dir("f32/model.safetensors");
    let mut t = place.tensors("f32");
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq";
    t.insert(inv_freq.into(), (Dtype::F32, vec![1], vec![1; 4]));
    t.insert("extra".into(), (Dtype::I64, vec![2], vec![7; 16]));
    t.insert("lost.weight_scale_inv".into(), (Dtype::F32, vec![1], vec![7; 4]));
    write(&file, &t);
    std::fs::create_dir(place.dir("f32/state")).unwrap();
    std::fs::write(place.dir("f32/.hidden"), "x").unwrap();
    std::fs::File::create(place.dir("f32/large.bin")).unwrap().set_len((64 << 20) + 1).unwrap();
    let done = place.try_convert("f32", "out", Target::Bf16, usize::MAX).unwrap();
    let expected = [
        "model.safetensors: extra: the configuration has no such tensor: copied as it is",
        "model.safetensors: lost.weight_scale_inv: scales of no FP8 tensor that the configuration has: left out",
        "large.bin: a file of more than 64 MiB: not copied",
    ];
    assert_eq!(done.warnings.len(), 3, "{:?}", done.warnings);
    done.warnings.iter().zip(expected).for_each(|(w, e)| assert!(w.ends_with(e), "{w}"));
    let out = place.tensors("out");
    assert_eq!((&out[inv_freq], &out["extra"]), (&t[inv_freq], &t["extra"]));
    let names = |dir: &str| {
        let entries = std::fs::read_dir(place.dir(dir)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names("out"), ["config.json", "model.safetensors", "tokenizer.json"]);
    // Codes of unknown use cannot be carried over.
    t.insert("extra".into(), (Dtype::F8_E4M3, vec![2], vec![7; 2]));
    write(&file, &t);
    let e = place.try_convert("f32", "no", Target::Bf16, usize::MAX).unwrap_err().to_string();
    assert!(e.contains("extra: expected only tensors that the configuration has in this dtype"), "{e}");
    // A place that is taken, itself included, and what an interrupted conversion left.
    let e = place.try_convert("out", "out", Target::F32, usize::MAX).unwrap_err().to_string();
    assert!(e.ends_with("out: expected a path that does not exist yet, found a directory that is not empty"), "{e}");
    std::fs::create_dir_all(place.dir(".next.partial/old")).unwrap();
    place.try_convert("out", "next", Target::F32, usize::MAX).unwrap();
    assert_eq!(names(""), ["f32", "next", "out"]);
    let mut few = out.clone();
    few.remove("model.norm.weight");
    write(&place.dir("out/model.safetensors"), &few);
    let e = place.try_convert("out", "no", Target::F32, usize::MAX).unwrap_err().to_string();
    assert!(e.contains("1 of") && e.contains("missing, the first is model.norm.weight"), "{e}");
}

/// A disk that is full from any operation on, one that fails once, and a death in the middle of it: DST is whole or not
/// there, the error is one line, and the same conversion then succeeds.
#[test]
fn every_operation_may_fail() {
    let few = ModelConfig { n_routed_experts: 2, n_group: 1, topk_group: 1, num_nextn_predict_layers: 0, ..tiny() };
    let place = Place::new(few);
    let options = ConvertOptions { target: Target::Bf16, shard_bytes: 8_000 };
    let run = |disk: &Disk| convert_on(disk, &ctx(2), &place.dir("f32"), &place.dir("out"), options, &Silent);
    let all = || {
        let files = std::fs::read_dir(place.dir("out")).unwrap().map(|e| e.unwrap().path());
        files.map(|f| (f.file_name().unwrap().to_owned(), std::fs::read(f).unwrap())).collect::<BTreeMap<_, _>>()
    };
    let faults = Arc::new(Faults::none());
    let files = run(&Disk::with(faults.clone())).unwrap().files;
    assert!(files > 1 && faults.count() > 30, "{files} files, {} operations", faults.count());
    let expected = all();
    std::fs::remove_dir_all(place.dir("out")).unwrap();
    for (fault, stride) in [(Fault::Full, 1), (Fault::Once(StorageFull), 5), (Fault::Death, 5)] {
        // The last one, too, whatever the stride.
        for at in (0..faults.count()).rev().step_by(stride) {
            let result = run(&Disk::with(Arc::new(Faults::at(at, fault))));
            match &result {
                Ok(_) => assert_eq!(all(), expected),
                Err(e) => {
                    let e = e.to_string();
                    let named = e.starts_with(&place.root.path().display().to_string());
                    assert!(named && !e.contains('\n'), "{e}");
                    assert!(
                        fault == Fault::Death
                            || e.ends_with(&StorageFull.to_string())
                            || e.ends_with("a planned fault"),
                        "{e}"
                    );
                    // Only what comes after the renaming can fail with a whole directory there.
                    let whole = place.dir("out").exists();
                    assert!(!whole || (fault != Fault::Full && at + 1 == faults.count()), "{at}: {e}");
                    assert!(fault != Fault::Full || !place.dir(".out.partial").exists(), "{at}: {e}");
                }
            }
            if place.dir("out").exists() {
                std::fs::remove_dir_all(place.dir("out")).unwrap();
            } else {
                run(&Disk::new()).unwrap();
                assert_eq!(all(), expected);
                std::fs::remove_dir_all(place.dir("out")).unwrap();
            }
        }
    }
}

/// Two conversions into one directory: the second is refused, and the first one's files stay.
#[test]
fn one_conversion_a_directory() {
    struct Second<'a>(&'a Place);
    impl ConvertObserver for Second<'_> {
        fn start(&self, _: u64) {
            let e = self.0.try_convert("f32", "out", Target::F32, usize::MAX).unwrap_err().to_string();
            let me = std::process::id();
            let expected =
                format!("out: expected a directory that no other process writes, found process {me} writing it");
            assert!(e.ends_with(&expected), "{e}");
        }
        fn advance(&self, _: u64) {}
    }
    let place = Place::new(tiny());
    let options = ConvertOptions { target: Target::F32, shard_bytes: usize::MAX };
    convert(&ctx(1), &place.dir("f32"), &place.dir("out"), options, &Second(&place)).unwrap();
    assert_eq!(place.tensors("out"), place.tensors("f32"));
    assert!(!place.dir("out").join(Lock::NAME).exists());
}

/// Holes stay holes, and what lies between them is converted.
#[test]
#[cfg(target_os = "linux")]
fn sparse_files_stay_sparse() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let config = ModelConfig { vocab_size: 1 << 20, ..tiny() };
    let place = Place { root: tempfile::tempdir().unwrap(), params: weights(&tiny()), config };
    let whole = layout(&place.config);
    let mut at = 0;
    let mut entry = |p: &crate::Published| {
        let begin = at;
        at += 4 * p.len();
        let dtype = Dtype::F32;
        (p.name.clone(), safetensors::tensor::TensorInfo { dtype, shape: p.shape.clone(), data_offsets: (begin, at) })
    };
    let header = crate::io::save::header(whole.published().map(|(_, p)| entry(p)).collect()).unwrap();
    std::fs::create_dir(place.dir("f32")).unwrap();
    let text = place.config.to_hf_json(DType::F32).to_string();
    std::fs::write(place.dir("f32/config.json"), text).unwrap();
    let file = std::fs::File::create(place.dir("f32/model.safetensors")).unwrap();
    file.set_len((header.len() + at) as u64).unwrap();
    file.write_all_at(&header, 0).unwrap();
    // The embedding's element of index 10 million: numbers in a desert.
    let middle = 10_000_000;
    file.write_all_at(&1.5f32.to_le_bytes(), (header.len() + 4 * middle) as u64).unwrap();
    drop(file);
    for (target, bytes, one) in [(Target::Bf16, 2, vec![0xc0, 0x3f]), (Target::F32, 4, 1.5f32.to_le_bytes().to_vec())] {
        let done = place.try_convert("f32", "out", target, usize::MAX).unwrap();
        let out = std::fs::File::open(place.dir("out/model.safetensors")).unwrap();
        let meta = out.metadata().unwrap();
        assert!(meta.len() as usize >= done.bytes && done.bytes > bytes * (32 << 20));
        assert!(meta.blocks() * 512 < 1 << 20, "{} of {} bytes are stored", meta.blocks() * 512, meta.len());
        let out = Checkpoint::open(&place.dir("out")).unwrap();
        let (shard, stored) = out.stored("model.embed_tokens.weight").unwrap();
        let mut found = vec![9; bytes * 3];
        shard.read_bytes(stored, middle - 1, &mut found).unwrap();
        assert_eq!(found, [vec![0; bytes], one, vec![0; bytes]].concat());
        // Not from the first element on: it shares a page with the header.
        assert!(shard.is_hole(stored, middle / 4, middle / 4) && !shard.is_hole(stored, middle - 1, 3));
        std::fs::remove_dir_all(place.dir("out")).unwrap();
    }
    // Zeros that are written out are holes afterwards too.
    let zeros = vec![0; 1 << 20];
    let file = std::fs::OpenOptions::new().write(true).open(place.dir("f32/model.safetensors")).unwrap();
    file.write_all_at(&zeros, header.len() as u64).unwrap();
    place.try_convert("f32", "out", Target::F32, usize::MAX).unwrap();
    let meta = std::fs::metadata(place.dir("out/model.safetensors")).unwrap();
    assert!(meta.blocks() * 512 < 1 << 20, "{} bytes are stored", meta.blocks() * 512);
}
