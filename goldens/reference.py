"""The Hugging Face model under its published names, and the parts of DeepSeek's training that transformers lacks.

Each sequence is run on its own. The MTP layers are transformers' own MtpModel, driven as its drafting loop drives them
but with the sequence's real tokens: row i of depth k takes the hidden state of position i (after the final norm; from
depth 2 on, the previous MTP layer's, after its norm), the embedding and the position of token i + k, and predicts
token i + k + 1.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from cases import Case


@dataclass
class Call:
    """What a router did with the rows of one sequence. Indices are in descending order of choice."""

    scores: torch.Tensor
    indices: torch.Tensor


@dataclass
class Output:
    """Of a batch. `logits` and `targets` by MTP depth (0: the main model), then by sequence; a sequence too short for
    a depth is absent from its logits, targets and routers."""

    logits: list[list[torch.Tensor]]
    targets: list[list[torch.Tensor]]
    routers: dict[int, list[Call]]
    n_main: int


@dataclass
class Margins:
    """The smallest gap that decides: choice (experts and groups), plain (the balance loss's top-K of the scores), order
    (among the chosen). An exact tie makes choice 0, except in a case that is there to have ties."""

    choice: float
    plain: float
    order: float
    exact_ties: bool


@contextlib.contextmanager
def recorded_topk(tape: list[torch.Tensor], lowest_index: bool):
    """Writes every choice of experts and groups to the tape. torch.topk does not say which of equal values it takes; with
    `lowest_index` it is the one with the lowest index."""
    original = torch.topk

    def topk(values, k, dim=-1, largest=True, sorted=True):
        assert largest and dim == -1
        if lowest_index:
            values, indices = torch.sort(values, dim=dim, descending=True, stable=True)
            values, indices = values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
        else:
            values, indices = original(values, k, dim=dim, sorted=sorted)
        tape.append(indices)
        return values, indices

    torch.topk = topk
    try:
        yield
    finally:
        torch.topk = original


@contextlib.contextmanager
def replayed_topk(tape: list[torch.Tensor]):
    """The choices are those on the tape and the values alone are this run's, so that rounding cannot change the routing."""
    original, choices = torch.topk, iter(tape)

    def topk(values, k, dim=-1, largest=True, sorted=True):
        indices = next(choices)
        return values.gather(dim, indices), indices

    torch.topk = topk
    try:
        yield
    finally:
        torch.topk = original
    assert next(choices, None) is None, "fewer choices than on the tape"


class Hf:
    """A transformers model with its MTP layers."""

    def __init__(self, case: Case, checkpoint: str, dtype: torch.dtype):
        self.case = case
        # The choices of the last run that made its own.
        self.tape: list[torch.Tensor] = []
        self.main = getattr(transformers, case.architecture).from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
        assert self.main.config._attn_implementation == "eager"
        assert self.main.config._experts_implementation == "eager"
        layers = case.config["num_hidden_layers"]
        self.mtp = None
        if case.mtp:
            # transformers knows V3's MTP layer as number 61; here it follows the last layer.
            self.main._keys_to_ignore_on_load_unexpected = [
                rf"model\.layers\.{layers + k}\..*" for k in range(case.mtp)]
            self.mtp = MtpModel.from_pretrained(self.main)
        self._records: dict[int, list] = defaultdict(list)
        for name, module in self.modules():
            if name.endswith("mlp.gate"):
                layer = int(name.split(".")[2])
                module.register_forward_hook(lambda _m, _i, out, layer=layer: self._records[layer].append(out))

    def published_prefix(self, name: str) -> str:
        """model.layers.L.* for the MTP model's layers.0.*."""
        _, k, rest = name.split(".", 2)
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        return f"model.layers.{self.case.config['num_hidden_layers'] + int(k)}.{rest}"

    def modules(self):
        yield from self.main.named_modules()
        if self.mtp is not None:
            for name, module in self.mtp.named_modules():
                if name.startswith("layers.") and name.count(".") >= 2:
                    yield self.published_prefix(name), module

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trainable tensors as transformers holds them (experts fused). Embedding and head are shared, so once."""
        found = dict(self.main.named_parameters())
        if self.mtp is not None:
            found |= {self.published_prefix(n): p for n, p in self.mtp.named_parameters() if n.startswith("layers.")}
        return found

    def gates(self) -> dict[int, torch.nn.Module]:
        return {int(n.split(".")[2]): m for n, m in self.modules() if n.endswith("mlp.gate")}

    def published(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Splits the fused experts into the tensors of the checkpoint."""
        found = {}
        for name, tensor in tensors.items():
            stem, _, last = name.rpartition(".")
            if not stem.endswith("mlp.experts"):
                found[name] = tensor
                continue
            for e, fused in enumerate(tensor):
                if last == "gate_up_proj":
                    found[f"{stem}.{e}.gate_proj.weight"], found[f"{stem}.{e}.up_proj.weight"] = fused.chunk(2)
                else:
                    found[f"{stem}.{e}.down_proj.weight"] = fused
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight by published name, correction biases included."""
        found = {name: p.detach() for name, p in self.parameters().items()}
        if self.case.is_v3:
            for layer, gate in self.gates().items():
                found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = gate.e_score_correction_bias
        return self.published(found)

    def run(self, sequences: list[torch.Tensor], tape: list[torch.Tensor] | None = None) -> Output:
        """With the tape of another run's choices the routing is that run's."""
        replay = tape is not None
        if not replay:
            self.tape = []
        depths = range(self.case.mtp + 1)
        output = Output([[] for _ in depths], [[] for _ in depths], {}, sum(len(s) - 1 for s in sequences))
        self._records.clear()
        with replayed_topk(tape) if replay else recorded_topk(self.tape, bool(self.case.copies)):
            for ids in sequences:
                self._run_one(ids, output)
        for layer, outs in sorted(self._records.items()):
            output.routers[layer] = [self._call(layer, out, check=not replay) for out in outs]
        return output

    def _run_one(self, ids: torch.Tensor, output: Output) -> None:
        ids = ids[None]
        positions = torch.arange(ids.shape[1])[None]
        hidden = self.main.model(ids, use_cache=False).last_hidden_state
        cache = MtpCache(config=self.main.config.get_mtp_config()) if self.mtp is not None else None
        for depth in range(self.case.mtp + 1):
            if depth >= ids.shape[1]:
                break
            if depth:
                hidden = self.mtp.forward_layer(
                    depth - 1, hidden[:, :-1], positions[:, depth:], cache, input_ids=ids[:, depth:])
            output.logits[depth].append(self.main.lm_head(hidden)[0].float())
            output.targets[depth].append(ids[0, depth + 1:])

    def _call(self, layer: int, out: tuple[torch.Tensor, ...], check: bool) -> Call:
        """The router's record; checked, if the choice was its own, against the reports' (V2 and V3) rule."""
        logits, _, indices = out
        scores = logits.sigmoid() if self.case.is_v3 else logits.softmax(-1)
        if not check:
            return Call(scores, indices)
        choice = group_limited(self.case, scores.detach(), self.bias(layer))[0]
        ours = choice.sort(dim=-1, descending=True, stable=True).indices[:, :indices.shape[1]]
        assert torch.equal(ours.sort(-1).values, indices.sort(-1).values), "the choice is not the reports'"
        return Call(scores, ours)

    def bias(self, layer: int) -> torch.Tensor:
        """A copy, as the bias update works in place."""
        gate = self.gates()[layer]
        return gate.e_score_correction_bias.clone() if self.case.is_v3 else torch.zeros(gate.num_experts)


def group_limited(case: Case, scores: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The choice values with the experts of dropped groups at -inf; and the group scores, if groups limit at all."""
    choice = scores + bias
    groups, kept = case.config["n_group"], case.config["topk_group"]
    if groups == kept or case.config.get("topk_method") == "greedy":
        return choice, None
    grouped = choice.view(len(choice), groups, -1)
    best = grouped.sort(-1, descending=True).values
    group_scores = best[..., :2].sum(-1) if case.is_v3 else best[..., 0]
    dropped = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, kept:]
    mask = torch.zeros_like(group_scores).scatter(1, dropped, -math.inf)
    return (grouped + mask[..., None]).flatten(1), group_scores


def margins(case: Case, hf: Hf, output: Output) -> Margins:
    found = Margins(math.inf, math.inf, math.inf, False)

    def gap(values: torch.Tensor, last: int) -> float:
        """Between the values of rank `last` and `last` + 1 (from 1), over all rows."""
        ordered = values.sort(-1, descending=True).values
        if last >= ordered.shape[1]:
            return math.inf
        gaps = ordered[:, last - 1] - ordered[:, last]
        found.exact_ties |= bool((gaps == 0).any())
        gaps = gaps[gaps > 0]
        return gaps.min().item() if len(gaps) else math.inf

    k = case.config["num_experts_per_tok"]
    for layer, calls in output.routers.items():
        scores = torch.cat([call.scores for call in calls]).detach()
        choice, group_scores = group_limited(case, scores, hf.bias(layer))
        found.choice = min(found.choice, gap(choice, k))
        found.plain = min(found.plain, gap(scores, k))
        found.order = min([found.order] + [gap(choice, rank) for rank in range(1, k)])
        if group_scores is not None:
            found.choice = min(found.choice, gap(group_scores, case.config["topk_group"]))
    if found.exact_ties and not case.copies:
        found.choice = 0.0
    return found


def losses(case: Case, output: Output) -> dict[str, torch.Tensor]:
    """Cross-entropy over n_main for every depth (V3 report, eq. 24-25) and the sequence-wise balance loss."""

    def cross_entropy(depth: int) -> torch.Tensor:
        pairs = zip(output.logits[depth], output.targets[depth], strict=True)
        return sum(F.cross_entropy(logits[:len(t)], t, reduction="sum") for logits, t in pairs if len(t))

    main = cross_entropy(0) / output.n_main
    mtp = torch.zeros(())
    for depth in range(1, case.mtp + 1):
        mtp = mtp + case.hyper["lambda"] / case.mtp * cross_entropy(depth) / output.n_main
    balance = torch.zeros(())
    for calls in output.routers.values():
        balance = balance + torch.stack([sequence_balance(case, call.scores) for call in calls]).mean()
    balance = case.hyper["alpha"] * balance
    return {"main": main, "mtp": mtp, "seq": balance, "total": main + mtp + balance}


def sequence_balance(case: Case, scores: torch.Tensor) -> torch.Tensor:
    """sum_i f_i P_i (V3 report, eq. 17-20), without alpha; top-K of the plain scores, ties to the lowest index."""
    tokens, experts = scores.shape
    k = case.config["num_experts_per_tok"]
    chosen = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    frequency = torch.bincount(chosen.flatten(), minlength=experts) * (experts / (k * tokens))
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return (frequency * share).sum()


def bias_update(case: Case, hf: Hf, output: Output) -> None:
    """Auxiliary-loss-free balancing: one step of gamma against the load of the whole batch."""
    if not case.is_v3:
        return
    experts, gamma = case.config["n_routed_experts"], case.hyper["gamma"]
    for layer, calls in output.routers.items():
        counts = torch.bincount(torch.cat([call.indices for call in calls]).flatten(), minlength=experts)
        # count > mean, in integers.
        hf.gates()[layer].e_score_correction_bias -= gamma * torch.sign(counts * experts - counts.sum())
