"""Holds `hadal convert` against torch, safetensors and transformers. Used by run.sh; each command exits with 1 on a
difference and prints one line of JSON.

    pip install torch transformers safetensors numpy
    python check.py quantised F32 FP8 WIDE SCALES   FP8 is convert's of F32, WIDE convert's fp32 of FP8
    python check.py make DIR                        checkpoints of transformers: bf16, f32, bf16-fused, fp8-fused
    python check.py same A B [DTYPE]                the tensors of A, split by expert and as DTYPE, are B's bytes
    python check.py opens A B                       transformers finds in B all weights, those of A, to the bit
    python check.py widened FP8 WIDE                WIDE is FP8 dequantised
    python check.py sparse-make DIR each|fused      V3, 671B, FP8, all but a few numbers holes
    python check.py sparse-run HADAL SRC DST each|fused    converts it to bf16 and looks at memory and what came out
    python check.py dense HADAL DIR                 the same of 1.6 GB without holes, most of it in one fused tensor
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

BLOCK = 128
MAX = 448.0


def files(directory: Path) -> list[Path]:
    return sorted(Path(directory).glob("*.safetensors"))


def load(directory: Path) -> dict[str, torch.Tensor]:
    out = {}
    for path in files(directory):
        with safe_open(path, "pt") as f:
            out.update({name: f.get_tensor(name) for name in f.keys()})
    return out


def grid(rows: int, cols: int) -> tuple[int, int]:
    return math.ceil(rows / BLOCK), math.ceil(cols / BLOCK)


def spread(scales: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """A scale for each element: that of block (row // 128, column // 128)."""
    r, c = torch.arange(rows) // BLOCK, torch.arange(cols) // BLOCK
    return scales[..., r, :][..., :, c]


def widen(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return q.to(torch.float32) * spread(scales.to(torch.float32), q.shape[-2], q.shape[-1])


def quantise(x: torch.Tensor, powers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """amax / 448 of each 128 x 128 block, edges padded with zeros; the value divided by it, to the nearest E4M3."""
    rows, cols = x.shape[-2:]
    high, wide = grid(rows, cols)
    padded = torch.zeros(*x.shape[:-2], high * BLOCK, wide * BLOCK)
    padded[..., :rows, :cols] = x
    amax = padded.abs().unflatten(-1, (wide, BLOCK)).unflatten(-3, (high, BLOCK)).amax(dim=(-3, -1))
    scales = amax / MAX
    if powers:
        mantissa, exponent = torch.frexp(scales)
        # frexp: mantissa in [1/2, 1); a power of two has 1/2 and stays.
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).to(exponent.dtype))
    scales = torch.where(amax > 0, scales, torch.ones_like(scales))
    return (x / spread(scales, rows, cols)).to(torch.float8_e4m3fn), scales


def is_fp8(name: str) -> bool:
    """The table of the published V3."""
    attention = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    part = name.split(".")[-2] if name.endswith(".weight") else ""
    swiglu = ".mlp." in name and part in ("gate_proj", "up_proj", "down_proj")
    return swiglu or (".self_attn." in name and part in attention)


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def report(good: bool, **values) -> int:
    print(json.dumps({**values, "ok": good}))
    return 0 if good else 1


def quantised(f32: str, fp8: str, wide: str, scales: str) -> int:
    original, found, widened = load(f32), load(fp8), load(wide)
    powers = scales == "ue8m0"
    codes = wrong_codes = wrong_rest = 0
    expected_names = set()
    for name, x in original.items():
        expected_names.add(name)
        if is_fp8(name):
            codes += 1
            expected_names.add(name + "_scale_inv")
            q, s = quantise(x, powers)
            stored = found[name + "_scale_inv"]
            kept = torch.float8_e8m0fnu if powers else torch.float32
            good = raw(q) == raw(found[name]) and stored.dtype == kept and torch.equal(s, stored.to(torch.float32))
            wrong_codes += not good
        else:
            bias = name.endswith("e_score_correction_bias")
            wrong_rest += raw(found[name]) != raw(x if bias else x.to(torch.bfloat16))
    wrong_wide = differences(found, widened)
    names = set(found) == expected_names and set(widened) == set(original)
    good = codes > 0 and names and not (wrong_codes or wrong_rest or wrong_wide)
    return report(good, what=f"fp8 of a trained model, {scales} scales", fp8_tensors=codes, tensors=len(original),
                  unlike_our_quantiser=wrong_codes, others_unlike=wrong_rest, dequantised_unlike=wrong_wide)


def differences(fp8: dict, widened: dict) -> int:
    """Tensors of `widened` that are not, to the bit, `fp8` dequantised here."""
    wrong = 0
    for name, x in fp8.items():
        if name.endswith("_scale_inv"):
            continue
        y = widen(x, fp8[name + "_scale_inv"]) if x.dtype == torch.float8_e4m3fn else x.to(torch.float32)
        parts = split(name, y)
        wrong += any(raw(part) != raw(widened[n]) for n, part in parts.items())
    return wrong


def split(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fused experts under their published names."""
    head, dot, tail = name.rpartition(".")
    if tail == "down_proj" and x.dim() == 3:
        return {f"{head}.{e}.down_proj.weight": x[e] for e in range(x.shape[0])}
    if tail == "gate_up_proj":
        half = x.shape[1] // 2
        out = {f"{head}.{e}.gate_proj.weight": x[e, :half] for e in range(x.shape[0])}
        return out | {f"{head}.{e}.up_proj.weight": x[e, half:] for e in range(x.shape[0])}
    return {name: x}


def make(directory: str) -> int:
    import transformers

    torch.manual_seed(7)
    config = transformers.DeepseekV3Config(
        vocab_size=640, hidden_size=256, intermediate_size=384, moe_intermediate_size=136, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=144, kv_lora_rank=128, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, max_position_embeddings=256, tie_word_embeddings=False)
    root = Path(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(root / "f32")
    model = model.to(torch.bfloat16)
    model.save_pretrained(root / "bf16", max_shard_size="1MB")
    model.save_pretrained(root / "bf16-fused", save_original_format=False)
    fp8_fused(root / "bf16-fused", root / "fp8-fused")
    plain = is_split(load(root / "bf16")) and not is_split(load(root / "bf16-fused"))
    return report(plain, what="checkpoints of transformers", transformers=transformers.__version__,
                  shards=len(files(root / "bf16")))


def is_split(tensors: dict) -> bool:
    return any(".experts.0." in name for name in tensors)


def fp8_fused(source: Path, out: Path) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, x in load(source).items():
        if is_fp8(name) or x.dim() == 3:
            q, s = quantise(x.to(torch.float32), False)
            tensors[name], tensors[name + "_scale_inv"] = q.contiguous(), s.contiguous()
        else:
            tensors[name] = x
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization()
    (out / "config.json").write_text(json.dumps(config))


def quantization() -> dict:
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def same(a: str, b: str, dtype: str | None = None) -> int:
    expected = {}
    for name, x in load(a).items():
        bias = name.endswith("e_score_correction_bias")
        expected |= split(name, x if dtype is None or bias else x.to(getattr(torch, dtype)))
    found = load(b)
    equal = {n for n in expected if n in found and raw(expected[n]) == raw(found[n])
             and (expected[n].dtype, expected[n].shape) == (found[n].dtype, found[n].shape)}
    good = len(expected) > 0 and set(found) == set(expected) == equal
    return report(good, what=f"{Path(a).name} of transformers, converted", dtype=dtype or "as it was",
                  tensors=len(expected), byte_equal=len(equal), additional=len(set(found) - set(expected)))


def opens(a: str, b: str) -> int:
    import transformers

    states, keys = [], []
    for directory in (a, b):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", output_loading_info=True)
        states.append(model.state_dict())
        keys.append(len(info["missing_keys"]) + len(info["unexpected_keys"]))
    expected, found = states
    unlike = sum(name not in found or raw(x) != raw(found[name]) or x.dtype != found[name].dtype
                 for name, x in expected.items())
    good = len(expected) > 0 and set(found) == set(expected) and not unlike and not any(keys)
    return report(good, what=f"{Path(b).name} of hadal in transformers", weights=len(expected), unlike=unlike,
                  missing_or_unexpected=keys[1])


def widened(fp8: str, wide: str) -> int:
    source, found = load(fp8), load(wide)
    wrong = differences(source, found)
    scales = [n for n in source if n.endswith("_scale_inv")]
    return report(wrong == 0 and len(scales) > 0, what=f"{Path(fp8).name}, dequantised", fp8_tensors=len(scales),
                  tensors=len(found), unlike=wrong)


V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    "quantization_config": quantization(),
}


def v3_tensors(fused: bool):
    """Name, dtype, shape of every stored tensor but scales."""
    d, v, e, f = 7168, 129280, 256, 2048
    yield "model.embed_tokens.weight", "BF16", [v, d]
    for layer in range(62):
        p = f"model.layers.{layer}"
        if layer == 61:
            for name, shape in (("embed_tokens", [v, d]), ("enorm", [d]), ("hnorm", [d]), ("eh_proj", [d, 2 * d]),
                                ("shared_head.norm", [d]), ("shared_head.head", [v, d])):
                yield f"{p}.{name}.weight", "BF16", shape
        for name, shape in (("input_layernorm", [d]), ("post_attention_layernorm", [d]),
                            ("self_attn.q_a_layernorm", [1536]), ("self_attn.kv_a_layernorm", [512])):
            yield f"{p}.{name}.weight", "BF16", shape
        for name, shape in (("q_a_proj", [1536, d]), ("q_b_proj", [24576, 1536]), ("kv_a_proj_with_mqa", [576, d]),
                            ("kv_b_proj", [32768, 512]), ("o_proj", [d, 16384])):
            yield f"{p}.self_attn.{name}.weight", "F8_E4M3", shape
        if layer < 3:
            yield from swiglu(f"{p}.mlp", d, 18432)
            continue
        yield f"{p}.mlp.gate.weight", "BF16", [e, d]
        yield f"{p}.mlp.gate.e_score_correction_bias", "F32", [e]
        yield from swiglu(f"{p}.mlp.shared_experts", d, f)
        if fused:
            yield f"{p}.mlp.experts.gate_up_proj", "F8_E4M3", [e, 2 * f, d]
            yield f"{p}.mlp.experts.down_proj", "F8_E4M3", [e, d, f]
        else:
            for i in range(e):
                yield from swiglu(f"{p}.mlp.experts.{i}", d, f)
    yield "model.norm.weight", "BF16", [d]
    yield "lm_head.weight", "BF16", [v, d]


def swiglu(p: str, d: int, f: int):
    for name, shape in (("gate_proj", [f, d]), ("up_proj", [f, d]), ("down_proj", [d, f])):
        yield f"{p}.{name}.weight", "F8_E4M3", shape


WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def with_scales(tensors):
    for name, dtype, shape in tensors:
        yield name, dtype, shape
        if dtype == "F8_E4M3":
            yield name + "_scale_inv", "F32", [*shape[:-2], *grid(*shape[-2:])]


def marks(fused: bool):
    """Numbers that are no holes: (stored name, element index, its bytes). 0x3c is 1.5 in E4M3."""
    yield "model.embed_tokens.weight", 12345, b"\xc0\x3f"  # 1.5 in BF16
    one = torch.tensor(1.0).numpy().tobytes()
    half = torch.tensor(0.5).numpy().tobytes()
    # Row 575, column 7000 of a matrix of 576 rows: block (4, 54) of 5 x 56.
    yield "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 575 * 7168 + 7000, b"\x3c"
    yield "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", 4 * 56 + 54, half
    p = "model.layers.61.mlp.experts"
    if fused:
        # Expert 255: row 100 of up, column 4000; and the last number of down.
        yield f"{p}.gate_up_proj", (255 * 4096 + 2048 + 100) * 7168 + 4000, b"\x3c"
        yield f"{p}.gate_up_proj_scale_inv", (255 * 32 + 16) * 56 + 31, half
        yield f"{p}.down_proj", 256 * 7168 * 2048 - 1, b"\x3c"
        yield f"{p}.down_proj_scale_inv", 256 * 56 * 16 - 1, one
    else:
        yield f"{p}.255.up_proj.weight", 100 * 7168 + 4000, b"\x3c"
        yield f"{p}.255.up_proj.weight_scale_inv", 31, half
        yield f"{p}.255.down_proj.weight", 7168 * 2048 - 1, b"\x3c"
        yield f"{p}.255.down_proj.weight_scale_inv", 56 * 16 - 1, one


# Published name, element index, value in BF16: what the marks above become.
EXPECTED = [
    ("model.embed_tokens.weight", 12345, 1.5),
    ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 575 * 7168 + 7000, 0.75),
    ("model.layers.61.mlp.experts.255.up_proj.weight", 100 * 7168 + 4000, 0.75),
    ("model.layers.61.mlp.experts.255.down_proj.weight", 7168 * 2048 - 1, 1.5),
]


def sparse_make(directory: str, form: str) -> int:
    root = Path(directory)
    root.mkdir()
    shards, held = [[]], 0
    for name, dtype, shape in with_scales(v3_tensors(form == "fused")):
        size = math.prod(shape) * WIDTH[dtype]
        if held and held + size > 4_300_000_000:
            shards.append([])
            held = 0
        shards[-1].append((name, dtype, shape, size))
        held += size
    index, places, total = {}, {}, 0
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):06}.safetensors"
        header, at = {}, 0
        for name, dtype, shape, size in sorted(tensors, key=lambda t: -WIDTH[t[1]]):
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            index[name] = file
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(root / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
        places |= {name: (file, 8 + len(text) + t["data_offsets"][0], WIDTH[t["dtype"]]) for name, t in header.items()}
        total += at
    for name, element, value in marks(form == "fused"):
        file, begin, width = places[name]
        with open(root / file, "r+b") as out:
            out.seek(begin + element * width)
            out.write(value)
    (root / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (root / "config.json").write_text(json.dumps(V3))
    return report(True, what=f"V3 in FP8, experts {form}", files=len(shards), tensors=len(index), bytes=total,
                  bytes_on_disk=on_disk(root))


def on_disk(root: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in root.iterdir())


def header_of(path: Path) -> tuple[dict, int]:
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(size)), 8 + size


# Run by a small interpreter: a child counts as large as the process it was forked from.
WATCH = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)"""


def measured(hadal: str, source: str, out: str, dtype: str) -> tuple[dict, int, float]:
    """What `convert` said, the most memory it held (bytes), and its seconds."""
    command = [sys.executable, "-c", WATCH, hadal, "convert", source, out, "--dtype", dtype, "--json"]
    begin = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    lines = done.stdout.splitlines()
    return json.loads(lines[-2]), int(lines[-1]), time.monotonic() - begin


def sparse_run(hadal: str, source: str, out: str, form: str) -> int:
    result, peak, seconds = measured(hadal, source, out, "bf16")
    root = Path(out)
    index = json.loads((root / "model.safetensors.index.json").read_text())
    found = {}
    for path in files(root):
        header, begin_data = header_of(path)
        header.pop("__metadata__")
        for name, t in header.items():
            found[name] = (path, begin_data + t["data_offsets"][0], t["dtype"], t["shape"])
    expected = {name: ("F32" if dtype == "F32" else "BF16", shape) for name, dtype, shape in v3_tensors(False)}
    shapes = {name: (dtype, shape) for name, (_, _, dtype, shape) in found.items()} == expected
    listed = index["weight_map"] == {name: path.name for name, (path, *_) in found.items()}
    values = []
    for name, element, value in EXPECTED:
        path, begin_data, *_ = found[name]
        with open(path, "rb") as f:
            # The number and its neighbour before it, which is a zero.
            f.seek(begin_data + (element - 1) * 2)
            pair = torch.frombuffer(bytearray(f.read(4)), dtype=torch.bfloat16).tolist()
        values.append(pair == [0.0, value])
    total = sum(math.prod(shape) * WIDTH[dtype] for dtype, shape in expected.values())
    good = (shapes and listed and all(values) and peak < 1e9 and on_disk(root) < 1e9
            and index["metadata"]["total_size"] == result["bytes"] == total)
    return report(good, what=f"V3 to BF16, experts {form}", peak_rss_bytes=peak, allowed=10**9,
                  seconds=round(seconds, 1), bytes_read=sum(p.stat().st_size for p in files(Path(source))),
                  bytes_written=result["bytes"], bytes_on_disk=on_disk(root), tensors=len(found),
                  names_shapes_dtypes=shapes, index=listed, planted_numbers=sum(values), of=len(EXPECTED))


def dense(hadal: str, directory: str) -> int:
    """One layer with 256 experts of 1024 in fused FP8 tensors, random codes; to BF16, and that to FP8."""
    root = Path(directory)
    (root / "fp8").mkdir(parents=True)
    d, f, e = 2048, 1024, 256
    small = {"vocab_size": 256, "hidden_size": d, "moe_intermediate_size": f, "num_hidden_layers": 1,
             "first_k_dense_replace": 0, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 128,
             "num_nextn_predict_layers": 0}
    (root / "fp8/config.json").write_text(json.dumps(V3 | small))
    p = "model.layers.0"
    tensors = [("model.embed_tokens.weight", "BF16", [256, d]), ("lm_head.weight", "BF16", [256, d]),
               ("model.norm.weight", "BF16", [d]), (f"{p}.input_layernorm.weight", "BF16", [d]),
               (f"{p}.post_attention_layernorm.weight", "BF16", [d]),
               (f"{p}.self_attn.q_proj.weight", "F8_E4M3", [384, d]),
               (f"{p}.self_attn.kv_a_proj_with_mqa.weight", "F8_E4M3", [192, d]),
               (f"{p}.self_attn.kv_a_layernorm.weight", "BF16", [128]),
               (f"{p}.self_attn.kv_b_proj.weight", "F8_E4M3", [512, 128]),
               (f"{p}.self_attn.o_proj.weight", "F8_E4M3", [d, 256]), (f"{p}.mlp.gate.weight", "BF16", [e, d]),
               (f"{p}.mlp.gate.e_score_correction_bias", "F32", [e]), *swiglu(f"{p}.mlp.shared_experts", d, f),
               (f"{p}.mlp.experts.gate_up_proj", "F8_E4M3", [e, 2 * f, d]),
               (f"{p}.mlp.experts.down_proj", "F8_E4M3", [e, d, f])]
    generator = torch.Generator().manual_seed(1)
    header, at, largest = {}, 0, 0
    order = sorted(with_scales(tensors), key=lambda t: -WIDTH[t[1]])
    for name, dtype, shape in order:
        size = math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at, largest = at + size, max(largest, size)
    text = json.dumps(header).encode()
    with open(root / "fp8/model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in order:
            left = math.prod(shape)
            while left:
                n = min(left, 1 << 24)
                if dtype == "F8_E4M3":
                    # Every code but NaN, of both signs.
                    part = torch.randint(0, 127, (n,), generator=generator, dtype=torch.uint8)
                    part |= torch.randint(0, 2, (n,), generator=generator, dtype=torch.uint8) << 7
                else:
                    kind = torch.float32 if dtype == "F32" else torch.bfloat16
                    part = torch.rand(n, generator=generator).to(kind)
                out.write(raw(part))
                left -= n
    peaks, seconds, sizes = [], [], []
    for source, to, dtype in (("fp8", "bf16", "bf16"), ("bf16", "back", "fp8")):
        result, peak, took = measured(hadal, str(root / source), str(root / to), dtype)
        peaks, seconds, sizes = peaks + [peak], seconds + [round(took, 1)], sizes + [result["bytes"]]
    # Some of the experts; all of them would need this script to hold what convert does not.
    wrong = 0
    with safe_open(root / "fp8/model.safetensors", "pt") as a, safe_open(root / "bf16/model.safetensors", "pt") as b, \
            safe_open(root / "back/model.safetensors", "pt") as c:
        for expert in (0, 1, 100, 255):
            for fused in ("gate_up_proj", "down_proj"):
                name = f"{p}.mlp.experts.{fused}"
                x = widen(a.get_slice(name)[expert:expert + 1], a.get_slice(name + "_scale_inv")[expert:expert + 1])
                for part, y in split(name, x.to(torch.bfloat16)).items():
                    part = part.replace(".experts.0.", f".experts.{expert}.")
                    q, s = quantise(y.to(torch.float32), False)
                    wrong += raw(y) != raw(b.get_tensor(part))
                    wrong += raw(q) != raw(c.get_tensor(part)) or raw(s) != raw(c.get_tensor(part + "_scale_inv"))
    good = wrong == 0 and max(peaks) < 2e8 < largest
    return report(good, what="a model without holes, to bf16 and that to fp8", bytes=[at, *sizes], largest_tensor=largest,
                  peak_rss_bytes=peaks, allowed=2 * 10**8, seconds=seconds, compared_experts_unlike=wrong)


def main() -> int:
    commands = {"quantised": quantised, "make": make, "same": same, "opens": opens, "widened": widened,
                "sparse-make": sparse_make, "sparse-run": sparse_run, "dense": dense}
    return commands[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
