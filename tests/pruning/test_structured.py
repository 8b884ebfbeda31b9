"""Models of which parts are left out: those that do least by a plain measurement of transformers'
model, whose logits with these parts at 0 are those of the smaller model."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.cli import main
from megalite.quantization.layers import read_rows
from tiny_models import GPT2, GROUPED, LLAMA, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, save_model

DEEP = {"num_hidden_layers": 4, "hidden_size": 48}
WINDOWS = {
    "use_sliding_window": True, "sliding_window": 9,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
MODELS = {
    "llama": GROUPED | DEEP | {"attention_bias": True, "mlp_bias": True},
    "llama-tied": LLAMA | DEEP | {"tie_word_embeddings": True},
    "mistral": GROUPED | DEEP | {"model_type": "mistral", "sliding_window": 9, "head_dim": 12},
    "qwen2": QWEN2 | DEEP,
    "qwen3": QWEN3 | DEEP | WINDOWS,
    "mixtral": MIXTRAL | DEEP,
    "qwen3-moe": QWEN3_MOE | DEEP | {"decoder_sparse_step": 2, "norm_topk_prob": True},
}
ASKED = {
    "layers": ["--layers", "3"],
    "hidden": ["--hidden", "36"],
    "heads": ["--heads", "2"],
    "groups": ["--kv-heads", "1"],
    "inner": ["--inner", "20"],
    "experts": ["--experts", "4"],
    "all": ["--layers", "2", "--hidden", "32", "--kv-heads", "1", "--inner", "16"],
}
CASES = [
    (model, asked)
    for model in MODELS
    for asked in ASKED
    if (asked != "experts" or model in ("mixtral", "qwen3-moe"))
    and (asked in ("all", "layers") or model not in ("llama-tied", "mistral"))
]
SAMPLE = {*((model, "all") for model in MODELS), *(("llama", asked) for asked in ASKED)}
SAMPLE |= {
    ("qwen3", "layers"),
    ("qwen3-moe", "layers"),
    ("mixtral", "inner"),
    ("mixtral", "experts"),
}


class Measured:
    """What the parts of transformers' model do on `rows`, by plain hooks."""

    def __init__(self, model: Any, rows: Tensor):
        self.layers, self.model = model.model.layers, model
        self.seen: dict[Any, list[Tensor]] = defaultdict(list)
        for number, layer in enumerate(self.layers):
            self._keep(number, "heads", layer.self_attn.o_proj)
            self._keep(number, "block", layer)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(self._noting("hidden"))
            self._keep(number, "mlp", layer.mlp)
            if hasattr(layer.mlp, "down_proj"):
                self._keep(number, "inner", layer.mlp.down_proj)
        with torch.no_grad():
            for row in rows:
                model(row[None, :-1], use_cache=False)

    def _keep(self, number: int, what: str, module: nn.Module) -> None:
        def note(module: nn.Module, inputs: Any, out: Any) -> None:
            self.seen[number, what].append(inputs[0][0])
            self.seen[number, what, "out"].append(out[0])

        module.register_forward_hook(note)

    def _noting(self, what: str) -> Any:
        return lambda module, inputs, out: self.seen[what].append(out[0])

    def turned(self, number: int) -> float:
        pairs = zip(self.seen[number, "block"], self.seen[number, "block", "out"], strict=True)
        return sum((1 - F.cosine_similarity(a, b, dim=-1).mean()) ** 2 for a, b in pairs)

    def hidden(self) -> Tensor:
        """By channel; a sum of roots, a layer each."""
        by_layer = len(self.layers)
        outs = torch.stack(self.seen["hidden"]).unflatten(0, (-1, by_layer, 2))
        return outs.abs().mean(3).square().sum((0, 2)).sqrt().sum(0)

    def heads(self, number: int, count: int) -> Tensor:
        x = torch.stack(self.seen[number, "heads"]).unflatten(-1, (count, -1))
        return x.norm(dim=-1).mean(1).square().sum(0)

    def inner(self, number: int) -> Tensor | None:
        """[I], or [E,I] of experts."""
        mlp = self.layers[number].mlp
        if not hasattr(mlp, "experts"):
            return torch.stack(self.seen[number, "inner"]).abs().mean(1).square().sum(0)
        found = 0.0
        for x in self.seen[number, "mlp"]:
            chosen = mlp.gate(x)[2]
            rows = []
            for expert, matrix in enumerate(mlp.experts.gate_up_proj):
                gate, up = F.linear(x[(chosen == expert).any(1)], matrix).chunk(2, -1)
                rows.append((F.silu(gate) * up).abs().sum(0))
            found = found + torch.stack(rows).square()
        return found

    def experts(self, number: int) -> Tensor:
        gate, found = self.layers[number].mlp.gate, 0.0
        for x in self.seen[number, "mlp"]:
            _, weights, chosen = gate(x)
            sums = [weights[chosen == e].sum() for e in range(len(gate.weight))]
            found = found + torch.stack(sums).square()
        return found


def least(scores: Tensor, keep: int) -> list[int]:
    """Return the numbers of all but the `keep` largest."""
    return scores.argsort(descending=True)[keep:].tolist()


@torch.no_grad()
def set_to_zero(model: Any, found: Measured, asked: dict[str, int]) -> None:
    """Set what the options leave out to 0, in place."""
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    each = heads // groups
    head_size = model.model.layers[0].self_attn.head_dim
    gone = least(found.hidden(), asked["hidden"]) if "hidden" in asked else []
    model.model.embed_tokens.weight[:, gone] = 0.0
    for number, layer in enumerate(model.model.layers):
        score = found.heads(number, heads).view(groups, each)
        lost = [] if "kv-heads" not in asked else least(score.sum(1), asked["kv-heads"])
        out = [(group, head) for group in lost for head in range(each)]
        if "heads" in asked:
            out += [
                (g, h) for g in range(groups) for h in least(score[g], asked["heads"] // groups)
            ]
        for group, head in out:
            first = (group * each + head) * head_size
            layer.self_attn.o_proj.weight[:, first : first + head_size] = 0.0
        routed = hasattr(layer.mlp, "experts")
        downs = layer.mlp.experts.down_proj if routed else [layer.mlp.down_proj.weight]
        outputs = [layer.self_attn.o_proj, *([] if routed else [layer.mlp.down_proj])]
        for matrix in [*(module.weight for module in outputs), *downs]:
            matrix[gone] = 0.0
        for bias in (module.bias for module in outputs):
            if bias is not None:
                bias[gone] = 0.0
        dense_beside = not routed and config.model_type == "qwen3_moe"
        if "inner" in asked and not dense_beside:
            scores = found.inner(number)
            for matrix, score in zip(downs, scores if routed else [scores], strict=True):
                matrix[:, least(score, asked["inner"])] = 0.0
        if "experts" in asked and routed:
            never_choose(layer.mlp.gate, least(found.experts(number), asked["experts"]))
    if "layers" in asked:
        lost = least(
            torch.tensor([found.turned(n) for n in range(len(model.model.layers))]), asked["layers"]
        )
        for number in lost:
            model.model.layers[number].forward = lambda x, *args, **kwargs: x


def never_choose(gate: Any, experts: list[int]) -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, gate.hidden_dim), gate.weight)
        logits[:, experts] = -torch.inf
        weights, chosen = logits.softmax(-1).topk(gate.top_k, -1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    gate.forward = forward


@pytest.mark.parametrize(("name", "asked"), CASES)
def test_the_smaller_model_is_the_larger_with_parts_at_zero(
    name: str,
    asked: str,
    tokens: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
) -> None:
    if (name, asked) not in SAMPLE and not pytestconfig.getoption("--whole"):
        pytest.skip("one of many; --whole runs all")
    transformers = pytest.importorskip("transformers")
    source, out = weaken(save_model(tmp_path / "source", MODELS[name])), tmp_path / "out"
    given = ["--data", tokens, "--rows", "8", "--length", "24"]
    assert main(["prune", str(source), str(out), *ASKED[asked], *given]) == 0
    rows = read_rows(tokens, 8, 24)
    held_out, calibration = rows[3::4], rows[torch.arange(8) % 4 != 3]
    open_model = transformers.AutoModelForCausalLM.from_pretrained
    larger = open_model(source)
    before = F.cross_entropy(*outputs(larger, held_out)).exp().item()
    words = ASKED[asked]
    numbers = {key[2:]: int(x) for key, x in zip(words[::2], words[1::2], strict=True)}
    measured = Measured(open_model(source), calibration)
    set_to_zero(larger, measured, numbers)
    smaller = open_model(out)
    logits, labels = outputs(smaller, held_out)
    wanted, _ = outputs(larger, held_out)
    assert (logits - wanted).abs().max() < 2e-5 * max(1.0, wanted.abs().max())
    for parameter in smaller.parameters():
        assert parameter.numel()
    after = F.cross_entropy(logits, labels).exp().item()
    said = capsys.readouterr().out
    assert ("without layer" in said) == ("layers" in numbers)
    assert "layers" not in numbers or re.search(r"without layers? (0, )?1\b", said)
    found = said.split("held out: ")[1].split(" → ")
    assert [float(x) for x in found] == pytest.approx([before, after], rel=1e-4)


def weaken(folder: Path) -> Path:
    """Have the second layer do least, so that those behind it move up."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1." in name and any(out in name for out in ("o_proj", "down_proj", "w2")):
            tensor *= 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def outputs(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten()


@pytest.mark.parametrize(
    ("values", "given", "words"),
    [
        (LLAMA, ["--layers", "3"], "--layers 3: the model has 2"),
        (LLAMA, ["--experts", "3"], "--experts: a llama model has none"),
        (GROUPED, ["--heads", "3"], "must be 1 to 2 for each of 2 kv heads"),
        (LLAMA, ["--hidden", "30"], "hidden_size 30 must be a multiple of num_attention_heads 4"),
        (MIXTRAL, ["--experts", "1"], "num_experts"),
        (GPT2, ["--layers", "1"], "is a gpt2 model; parts are left out of llama"),
    ],
)
def test_what_cannot_be_left_out(
    values: dict[str, Any], given: list[str], words: str, tokens: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of it before the model is run, which takes long."""
    monkeypatch.setattr("megalite.pruning.structured.measure", lambda *_: pytest.fail("too late"))
    source = save_model(tmp_path / "source", values)
    data = ["--data", tokens, "--rows", "4", "--length", "8"]
    assert main(["prune", str(source), str(tmp_path / "out"), *given, *data]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_need_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model(tmp_path / "source", LLAMA)
    assert main(["prune", str(source), str(tmp_path / "out"), "--layers", "1"]) == 2
    assert "measured on token files: give --data" in capsys.readouterr().err
