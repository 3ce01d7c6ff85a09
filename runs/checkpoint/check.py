"""Loads a hadal checkpoint with transformers as it is and compares: no missing weight, nothing unexpected but the MTP layer,
the same logits as `hadal logits`, the same tokens from the tokenizer.

    pip install torch transformers safetensors
    python check.py CHECKPOINT LOGITS.safetensors IDS TEXT

IDS are what `hadal logits --tokens` was given (TEXT's first tokens are compared with them). Exits with 1 on a difference.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def main() -> int:
    checkpoint, logits, ids, text = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    ids = [int(i) for i in ids.split(",")]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    config = json.loads((checkpoint / "config.json").read_text())
    mtp = f"model.layers.{config['num_hidden_layers']}."
    other = [k for k in info["unexpected_keys"] if not k.startswith(mtp)]
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0]
    found = load_file(logits)["logits"]
    rms = expected.square().mean().sqrt()
    worst = ((found - expected).abs() / (expected.abs() + rms)).max().item()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    result = {
        "transformers": transformers.__version__, "missing_keys": len(info["missing_keys"]),
        "unexpected_keys_of_mtp": len(info["unexpected_keys"]) - len(other), "other_unexpected_keys": len(other),
        "worst_logit_difference": worst, "allowed": 1e-4, "tokenizer_agrees": tokens == ids,
        "round_trip": tokenizer.decode(tokens) == text,
    }
    print(json.dumps(result))
    good = not info["missing_keys"] and not other and worst <= 1e-4 and tokens == ids and result["round_trip"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
