use super::*;
use crate::{Layout, ModelConfig, ParamId, Params, Precision, Scope};
use hadal_comm::{ExpertRange, GlobalExpert};
use hadal_kernels::{Ctx, DType, Device, Elem, bf16};
use hadal_numerics::{Purpose, Rng};
use safetensors::tensor::{SafeTensors, TensorView};
use safetensors::{Dtype, serialize_to_file};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) fn ctx(threads: usize) -> Ctx {
    Device::cpu(Some(threads)).unwrap().ctx()
}

/// All of V3 in 30 thousand parameters: a dense layer, a MoE layer, an MTP layer.
pub(super) fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 48,
        hidden_size: 16,
        intermediate_size: 24,
        moe_intermediate_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        q_lora_rank: Some(8),
        kv_lora_rank: 8,
        qk_nope_head_dim: 4,
        qk_rope_head_dim: 2,
        v_head_dim: 6,
        n_routed_experts: 8,
        num_experts_per_tok: 2,
        ..ModelConfig::preset("nano").unwrap()
    }
}

pub(super) fn layout(c: &ModelConfig) -> Arc<Layout> {
    Arc::new(Layout::new(c, Scope::whole(c)))
}

/// Weights in which every element differs, norms and biases too.
pub(super) fn weights(c: &ModelConfig) -> Params {
    let mut params = Params::zeros(&ctx(1), layout(c), Precision::Fp32);
    let rng = Rng::new(5, Purpose::Test, 0);
    let master = params.master.view_mut().f32();
    for (_, p) in params.layout.clone().published() {
        p.range().for_each(|i| master[i] = rng.normal(i as u64));
    }
    params
}

fn load_params(
    ctx: &Ctx,
    c: &ModelConfig,
    layout: Arc<Layout>,
    precision: Precision,
    dir: &Path,
) -> Result<(Params, Vec<String>), IoError> {
    Checkpoint::open(dir)?.load(ctx, c, layout, precision)
}

pub(super) fn load(c: &ModelConfig, dir: &Path) -> Result<(Params, Vec<String>), IoError> {
    load_params(&ctx(2), c, layout(c), Precision::Fp32, dir)
}

#[track_caller]
fn assert_same(a: &Params, b: &Params) {
    for (_, p) in a.layout.published() {
        assert_eq!(a.master.view().f32()[p.range()], b.master.view().f32()[p.range()], "{}", p.name);
    }
}

/// A saved tiny model: the directory lives as long as the first value.
fn saved(options: SaveOptions) -> (tempfile::TempDir, PathBuf, ModelConfig, Params) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let c = tiny();
    let params = weights(&c);
    save_checkpoint(&dir, &c, &params, options, &[("tokenizer.json", b"{}")]).unwrap();
    (root, dir, c, params)
}

pub(super) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub(super) fn tensors(file: &Path) -> Tensors {
    let bytes = std::fs::read(file).unwrap();
    let st = SafeTensors::deserialize(&bytes).unwrap();
    let own = |(n, v): (String, TensorView<'_>)| (n, (v.dtype(), v.shape().to_vec(), v.data().to_vec()));
    st.tensors().into_iter().map(own).collect()
}

pub(super) fn write(file: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    serialize_to_file(views, None, file).unwrap();
}

#[test]
fn f32_round_trip_is_exact() {
    let (_root, dir, c, params) = saved(SaveOptions::new(DType::F32));
    for threads in [1, 5] {
        let (read, warnings) = load_params(&ctx(threads), &c, layout(&c), Precision::Fp32, &dir).unwrap();
        assert_same(&read, &params);
        assert_eq!(warnings, Vec::<String>::new());
    }
    let (read, warnings) = ModelConfig::from_hf(&dir.join("config.json")).unwrap();
    assert_eq!((read, warnings), (c, vec![]));
    assert_eq!(std::fs::read(dir.join("tokenizer.json")).unwrap(), b"{}");
}

/// Weights that transformers loaded itself, under the names it reads: what is loaded into a model and written again has
/// the bytes of every tensor, and the configuration says the same.
#[test]
fn loading_and_exporting_keep_every_byte() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/v3_mtp2");
    let own = |(name, t): (String, _)| Some((name.strip_prefix("w.")?.to_string(), t));
    let f32s: Tensors = tensors(&golden.join("golden.safetensors")).into_iter().filter_map(own).collect();
    let round = |b: &[u8]| <bf16 as Elem>::round(f32::from_le_bytes(b.try_into().unwrap())).to_bits().to_le_bytes();
    let rounded = |(name, (dtype, shape, bytes)): (&String, &(Dtype, Vec<usize>, Vec<u8>))| match name {
        bias if bias.ends_with("e_score_correction_bias") => (bias.clone(), (*dtype, shape.clone(), bytes.clone())),
        name => (name.clone(), (Dtype::BF16, shape.clone(), bytes.chunks_exact(4).flat_map(round).collect())),
    };
    let bf16s: Tensors = f32s.iter().map(rounded).collect();
    for (given, dtype, precision) in [(f32s, DType::F32, Precision::Fp32), (bf16s, DType::Bf16, Precision::Bf16)] {
        let root = tempfile::tempdir().unwrap();
        let (source, out) = (root.path().join("source"), root.path().join("out"));
        std::fs::create_dir(&source).unwrap();
        write(&source.join("model.safetensors"), &given);
        std::fs::copy(golden.join("config.json"), source.join("config.json")).unwrap();
        let mut c = ModelConfig::from_hf(&source.join("config.json")).unwrap().0;
        c.num_nextn_predict_layers = Checkpoint::open(&source).unwrap().mtp_layers(&c);
        let params = load_params(&ctx(2), &c, layout(&c), precision, &source).unwrap().0;
        save_checkpoint(&out, &c, &params, SaveOptions::new(dtype), &[]).unwrap();
        let found = tensors(&out.join("model.safetensors"));
        given.iter().for_each(|(name, t)| assert_eq!(&found[name], t, "{name}"));
        let added: Vec<&String> = found.keys().filter(|name| !given.contains_key(*name)).collect();
        assert_eq!(added.len(), 2 * c.num_nextn_predict_layers, "MTP's copies of embedding and head: {added:?}");
        assert_eq!(ModelConfig::from_hf(&out.join("config.json")).unwrap().0, c);
    }
}

#[test]
fn bf16_rounds_once_and_keeps_the_bias() {
    let (_root, dir, c, params) = saved(SaveOptions::new(DType::Bf16));
    let (read, _) = load(&c, &dir).unwrap();
    let (found, original) = (read.master.view().f32(), params.master.view().f32());
    for (_, p) in read.layout.published() {
        let exact = p.name.ends_with("e_score_correction_bias");
        for i in p.range() {
            let expected = if exact { original[i] } else { <bf16 as Elem>::round(original[i]).f32() };
            assert_eq!(found[i], expected, "{}", p.name);
        }
    }
}

/// In BF16, the compute copy is ready after loading.
#[test]
fn loading_rounds_the_compute_copy() {
    let (_root, dir, c, params) = saved(SaveOptions::new(DType::F32));
    let (read, _) = load_params(&ctx(2), &c, layout(&c), Precision::Bf16, &dir).unwrap();
    assert_same(&read, &params);
    let compute = read.compute.as_ref().unwrap().view().bf16();
    for (_, p) in read.layout.published() {
        for i in p.range() {
            assert_eq!(compute[i], <bf16 as Elem>::round(params.master.view().f32()[i]), "{}", p.name);
        }
    }
}

/// Inference in BF16 holds no masters, and every weight reads as training's does.
#[test]
fn inference_reads_the_same_weights_without_masters() {
    let (_root, dir, c, _) = saved(SaveOptions::new(DType::F32));
    let checkpoint = Checkpoint::open(&dir).unwrap();
    for precision in [Precision::Bf16, Precision::Fp32] {
        let (training, _) = checkpoint.load(&ctx(2), &c, layout(&c), precision).unwrap();
        let (lean, _) = checkpoint.load_for_inference(&ctx(5), &c, layout(&c), precision).unwrap();
        assert_eq!(lean.has_masters(), precision == Precision::Fp32);
        for i in 0..lean.layout.tensors.len() {
            let (a, b) = (lean.weight(ParamId(i)), training.weight(ParamId(i)));
            let name = &lean.layout.tensors[i].published[0].name;
            assert_eq!(a.data.dtype(), b.data.dtype(), "{name}");
            assert_eq!(a.data.to_f32(), b.data.to_f32(), "{name}");
        }
        if precision == Precision::Bf16 {
            assert!(lean.bytes() < training.bytes() / 2, "{} of {} bytes", lean.bytes(), training.bytes());
        }
    }
}

/// What other readers rely on: metadata, alignment, dtypes, MTP's copies.
#[test]
fn the_file_is_as_others_expect() {
    let (_root, dir, _, _) = saved(SaveOptions::new(DType::Bf16));
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(header % 8, 0);
    for (name, info) in metadata.tensors() {
        assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0, "{name}");
    }
    let t = tensors(&dir.join("model.safetensors"));
    assert_eq!(t["model.layers.2.embed_tokens.weight"], t["model.embed_tokens.weight"]);
    assert_eq!(t["model.layers.2.shared_head.head.weight"], t["lm_head.weight"]);
    assert_eq!(t["model.layers.1.mlp.experts.7.down_proj.weight"].1, [16, 12]);
    assert_eq!(t["model.layers.2.eh_proj.weight"].1, [16, 32]);
    for (name, (dtype, ..)) in &t {
        let bias = name.ends_with("e_score_correction_bias");
        assert_eq!(*dtype, if bias { Dtype::F32 } else { Dtype::BF16 }, "{name}");
    }
}

#[test]
fn shards_keep_to_the_limit() {
    let limit = 8000;
    let (_root, dir, c, params) = saved(SaveOptions { dtype: DType::F32, shard_bytes: limit });
    assert!(!dir.join("model.safetensors").exists());
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let files: std::collections::BTreeSet<&str> = map.values().map(|v| v.as_str().unwrap()).collect();
    assert!(files.len() > 5);
    assert!(files.contains(format!("model-00001-of-{:05}.safetensors", files.len()).as_str()));
    let mut total = 0;
    for file in files {
        let t = tensors(&dir.join(file));
        let bytes: usize = t.values().map(|(_, _, b)| b.len()).sum();
        assert!(bytes <= limit || t.len() == 1, "{file}: {bytes} bytes in {} tensors", t.len());
        assert!(t.keys().all(|name| map[name] == file));
        total += bytes;
    }
    assert_eq!(index["metadata"]["total_size"], total);
    let (read, warnings) = load(&c, &dir).unwrap();
    assert_same(&read, &params);
    assert_eq!(warnings, Vec::<String>::new());
}

/// Stacks the experts of each layer as transformers holds them in memory.
fn fuse(t: &mut Tensors, c: &ModelConfig, layers: &[usize]) {
    let (e, d, f) = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
    for layer in layers {
        let p = format!("model.layers.{layer}.mlp.experts");
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for i in 0..e {
            gate_up.extend(t.remove(&format!("{p}.{i}.gate_proj.weight")).unwrap().2);
            gate_up.extend(t.remove(&format!("{p}.{i}.up_proj.weight")).unwrap().2);
            down.extend(t.remove(&format!("{p}.{i}.down_proj.weight")).unwrap().2);
        }
        t.insert(format!("{p}.gate_up_proj"), (Dtype::F32, vec![e, 2 * f, d], gate_up));
        t.insert(format!("{p}.down_proj"), (Dtype::F32, vec![e, d, f], down));
    }
}

/// Fused experts, whole and for a rank that holds some of the experts of one layer.
#[test]
fn fused_experts_and_partial_scopes() {
    let (_root, dir, c, params) = saved(SaveOptions::new(DType::F32));
    let scope =
        Scope { layers: 1..2, embedding: false, head: true, mtp: 0, experts: ExpertRange::new(GlobalExpert(3), 3) };
    let part = Arc::new(Layout::new(&c, scope));
    let whole: BTreeMap<_, _> = params.layout.published().map(|(_, p)| (p.name.clone(), p.range())).collect();
    for fused in [false, true] {
        if fused {
            let mut t = tensors(&dir.join("model.safetensors"));
            fuse(&mut t, &c, &[1, 2]);
            write(&dir.join("model.safetensors"), &t);
        }
        let (read, warnings) = load(&c, &dir).unwrap();
        assert_same(&read, &params);
        assert_eq!(warnings, Vec::<String>::new());
        let (read, _) = load_params(&ctx(1), &c, part.clone(), Precision::Fp32, &dir).unwrap();
        for (_, p) in part.published() {
            let expected = &params.master.view().f32()[whole[&p.name].clone()];
            assert_eq!(&read.master.view().f32()[p.range()], expected, "{}", p.name);
        }
    }
}

/// Other writers' dtypes: F16 weights and a BF16 bias.
#[test]
fn narrow_dtypes_are_widened() {
    let (_root, dir, c, params) = saved(SaveOptions::new(DType::F32));
    let file = dir.join("model.safetensors");
    let mut t = tensors(&file);
    let ones = |n: usize, bits: u16| std::iter::repeat_n(bits.to_le_bytes(), n).flatten().collect::<Vec<u8>>();
    t.insert("model.norm.weight".into(), (Dtype::F16, vec![16], ones(16, 0x3e00)));
    t.insert("model.layers.1.mlp.gate.e_score_correction_bias".into(), (Dtype::BF16, vec![8], ones(8, 0xbf80)));
    write(&file, &t);
    let (read, _) = load(&c, &dir).unwrap();
    assert_eq!(read.f32(params.layout.norm.unwrap()).f32(), [1.5; 16]);
    let crate::FeedForwardIds::Moe(moe) = params.layout.blocks[1].feed_forward else { panic!("layer 1 has experts") };
    assert_eq!(read.f32(moe.bias.unwrap()).f32(), [-1.0; 8]);
}

#[test]
fn mtp_depth_goes_by_the_tensors() {
    let (_root, dir, c, params) = saved(SaveOptions::new(DType::F32));
    let none = ModelConfig { num_nextn_predict_layers: 0, ..c.clone() };
    assert_eq!(Checkpoint::open(&dir).unwrap().mtp_layers(&none), 1);
    // Depth 0 of a file with MTP layers: the rest is named, not refused.
    let (read, warnings) = load(&none, &dir).unwrap();
    assert_same(&read, &params);
    assert!(!warnings.is_empty() && warnings.iter().all(|w| w.contains("model.layers.2.")), "{warnings:?}");
    // A file that promises a depth it does not hold, as transformers writes it.
    let file = dir.join("model.safetensors");
    let mut t = tensors(&file);
    t.retain(|name, _| !name.starts_with("model.layers.2."));
    write(&file, &t);
    assert_eq!(Checkpoint::open(&dir).unwrap().mtp_layers(&c), 0);
    assert_eq!(load(&none, &dir).unwrap().1, Vec::<String>::new());
    let e = load(&c, &dir).err().unwrap().to_string();
    assert!(e.contains("tensors are missing, the first is model.layers.2.enorm.weight"), "{e}");
}

/// Names of a few bytes each may claim any number of layers; a layout of all of them would fill the memory.
#[test]
fn mtp_depth_stays_within_what_a_model_can_have() {
    let (_root, dir, c, _) = saved(SaveOptions::new(DType::F32));
    let names = (0..50_000).map(|k| (format!("model.layers.{}.enorm.weight", 2 + k), (Dtype::F32, vec![0], vec![])));
    write(&dir.join("model.safetensors"), &names.collect());
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let depth = checkpoint.mtp_layers(&c);
    assert_eq!(depth, 4096);
    ModelConfig { num_nextn_predict_layers: depth, ..c }.validate().unwrap();
    // V2 has none; the tensors are then ones too many.
    let v2 = ModelConfig { num_hidden_layers: 2, ..ModelConfig::preset("v2-lite").unwrap() };
    assert_eq!(checkpoint.mtp_layers(&v2), 0);
}

/// Each change of the tensors, and what the message must name.
#[test]
fn wrong_tensors_are_named() {
    let (_root, dir, c, _) = saved(SaveOptions::new(DType::F32));
    let file = dir.join("model.safetensors");
    let good = tensors(&file);
    let gate = "model.layers.1.mlp.gate.weight";
    let check = |change: &dyn Fn(&mut Tensors), parts: &[&str]| {
        let mut t = good.clone();
        change(&mut t);
        write(&file, &t);
        let e = load(&c, &dir).err().expect("an error").to_string();
        assert!(e.starts_with(&dir.display().to_string()) && !e.contains('\n'), "{e}");
        parts.iter().for_each(|p| assert!(e.contains(p), "{e}: {p}"));
    };
    check(&|t| drop(t.remove(gate)), &["1 of", "tensors are missing, the first is", gate]);
    let shape = |t: &mut Tensors, name: &str, s: &[usize]| t.get_mut(name).unwrap().1 = s.to_vec();
    check(&|t| shape(t, gate, &[16, 8]), &["model.safetensors: ", gate, "expected shape [8, 16], found shape [16, 8]"]);
    check(
        &|t| t.get_mut(gate).unwrap().0 = Dtype::I32,
        &[gate, "expected BF16, F16, F32 or F8_E4M3 with scales, found I32"],
    );
    let fp8 = (Dtype::F8_E4M3, vec![8, 16], vec![0; 128]);
    check(&|t| drop(t.insert(gate.into(), fp8.clone())), &[gate, "expected quantization_config in config.json"]);
    let copy = "model.layers.2.embed_tokens.weight";
    check(&|t| shape(t, copy, &[16, 48]), &[copy, "expected shape [48, 16], found shape [16, 48]"]);
    let fused = |t: &mut Tensors| {
        fuse(t, &c, &[1]);
        shape(t, "model.layers.1.mlp.experts.gate_up_proj", &[8, 16, 24]);
    };
    check(&fused, &["experts.gate_up_proj", "expected shape [8, 24, 16], found shape [8, 16, 24]"]);
    // One tensor too many is a warning; a derived buffer of old files is none.
    let mut t = good.clone();
    t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![1], vec![0; 4]));
    t.insert("model.layers.9.thing\n".into(), (Dtype::F32, vec![1], vec![0; 4]));
    write(&file, &t);
    let (_, warnings) = load(&c, &dir).unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("model.layers.9.thing\\n: the configuration has no such tensor"), "{warnings:?}");
}

#[track_caller]
fn open_fails(dir: &Path, parts: &[&str]) {
    let e = Checkpoint::open(dir).expect_err("an error").to_string();
    assert!(!e.contains('\n'), "{e}");
    parts.iter().for_each(|p| assert!(e.contains(p), "{e}: {p}"));
}

#[test]
fn damaged_single_files() {
    let (_root, dir, c, _) = saved(SaveOptions::new(DType::F32));
    let file = dir.join("model.safetensors");
    let good = std::fs::read(&file).unwrap();
    let put = |bytes: &[u8], parts: &[&str]| {
        std::fs::write(&file, bytes).unwrap();
        open_fails(&dir, parts);
    };
    put(&[], &["model.safetensors: expected a safetensors file of at least 8 bytes, found 0 bytes"]);
    put(&good[..good.len() - 1], &["bytes of data after the header, found"]);
    put(&good[..20], &["header of at most 12 bytes"]);
    put(&[0xff; 64], &["header of at most 56 bytes, found 18446744073709551615 bytes"]);
    put(&[&8u64.to_le_bytes()[..], b"not json"].concat(), &["expected a safetensors header, found"]);
    let huge = br#"{"a":{"dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,0]}}"#;
    put(&[&(huge.len() as u64).to_le_bytes()[..], huge].concat(), &["expected a safetensors header"]);
    // Cut short between opening and reading.
    std::fs::write(&file, &good).unwrap();
    let open = Checkpoint::open(&dir).unwrap();
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    let e = open.load(&ctx(2), &c, layout(&c), Precision::Fp32).err().unwrap().to_string();
    assert!(e.contains("model.safetensors: reading a tensor: "), "{e}");
    std::fs::remove_file(&file).unwrap();
    open_fails(&dir, &["expected model.safetensors or model.safetensors.index.json in it, found neither"]);
    open_fails(&dir.join("absent"), &["found no such directory"]);
}

#[test]
fn damaged_indices() {
    let (_root, dir, c, _) = saved(SaveOptions { dtype: DType::F32, shard_bytes: 20_000 });
    let path = dir.join("model.safetensors.index.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let put = |from: &str, to: &str| std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
    let first: serde_json::Value = serde_json::from_str(&good).unwrap();
    let shard = first["weight_map"]["lm_head.weight"].as_str().unwrap();
    let listed = format!("\"lm_head.weight\": \"{shard}\"");
    put(&listed, "\"lm_head.weight\": \"absent.safetensors\"");
    open_fails(&dir, &["index.json: expected the file absent.safetensors beside it", "found no such file"]);
    put(&listed, "\"lm_head.weight\": \"../model/config.json\"");
    open_fails(&dir, &["index.json: lm_head.weight: expected the name of a file beside the index, found ../model"]);
    put("\"lm_head.weight\"", "\"lm_head.bias\"");
    open_fails(&dir, &[shard, "lm_head.bias: expected a tensor, as the index says, found none of that name"]);
    put("\"weight_map\"", "\"map\"");
    open_fails(&dir, &["index.json: expected JSON with weight_map"]);
    // A tensor that the index leaves out is not read, whatever the shard holds.
    put(&format!("{listed},"), "");
    let e = load(&c, &dir).err().unwrap().to_string();
    assert!(e.contains("1 of") && e.contains("the first is lm_head.weight"), "{e}");
}

/// Random damage anywhere in the header or the file's length gives an answer, never a panic.
#[test]
fn no_bytes_panic() {
    let (_root, dir, c, _) = saved(SaveOptions::new(DType::F32));
    let file = dir.join("model.safetensors");
    // A file of the first tensors only, so that a damaged copy is quick to write.
    let few: Tensors = tensors(&file).into_iter().take(4).collect();
    write(&file, &few);
    let good = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize + 8;
    let rng = Rng::new(7, Purpose::Test, 0);
    let mut refused = 0;
    for i in 0..400u64 {
        let mut bytes = good.clone();
        let at = rng.below(3 * i, header as u64) as usize;
        bytes[at] = rng.below(3 * i + 1, 256) as u8;
        if i % 4 == 0 {
            bytes.truncate(rng.below(3 * i + 2, good.len() as u64) as usize);
        }
        std::fs::write(&file, &bytes).unwrap();
        match Checkpoint::open(&dir) {
            Err(e) => {
                refused += 1;
                assert!(!e.to_string().contains('\n'), "{e}");
            }
            Ok(open) => assert!(open.load(&ctx(1), &c, layout(&c), Precision::Fp32).is_err()),
        }
    }
    assert!(refused > 200, "{refused}");
}

#[test]
fn a_checkpoint_appears_whole_or_not_at_all() {
    let root = tempfile::tempdir().unwrap();
    let c = tiny();
    let params = weights(&c);
    let options = SaveOptions::new(DType::F32);
    let save = |dir: &Path, extra: &[(&str, &[u8])]| save_checkpoint(dir, &c, &params, options, extra);
    let names = || -> Vec<String> {
        std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    let dir = root.path().join("a");
    for name in ["../b", "", "config.json", "model.safetensors"] {
        let e = save(&dir, &[(name, b"x")]).unwrap_err().to_string();
        assert!(e.contains("expected extra files with plain names of their own"), "{e}");
        assert_eq!(names(), Vec::<String>::new(), "nothing is left after {name:?}");
    }
    // What an interrupted writer left is replaced; an empty directory is taken.
    std::fs::create_dir_all(root.path().join(".a.partial/old")).unwrap();
    std::fs::create_dir(&dir).unwrap();
    save(&dir, &[]).unwrap();
    assert_eq!(names(), ["a"]);
    let e = save(&dir, &[]).unwrap_err().to_string();
    assert!(e.ends_with("a: expected a path that does not exist yet, found a directory that is not empty"), "{e}");
    assert_same(&load(&c, &dir).unwrap().0, &params);
    // Nowhere to write.
    let e = save(&dir.join("config.json"), &[]).unwrap_err().to_string();
    assert!(e.ends_with("found a file"), "{e}");
    let e = save(&dir.join("config.json/b"), &[]).unwrap_err().to_string();
    assert!(e.contains("config.json/b: "), "{e}");
    assert!(save(Path::new("/"), &[]).is_err());
    // Missing parents are made.
    save(&root.path().join("x/y"), &[]).unwrap();
    assert!(root.path().join("x/y/model.safetensors").exists());
}
