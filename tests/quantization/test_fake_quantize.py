"""Training with rounded weights: the model that is trained is, to the bit, the one that quantising gives,
on every layout, and it is better than one that is quantised afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megalite.checkpoint.folder import step_folder
from megalite.cli import main
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import ConfigError
from megalite.infer.ranks import load_stage
from megalite.kernels.fake_quantize import FakeQuantised, Switch
from megalite.kernels.linear import linear
from megalite.kernels.schemes import make_scheme
from megalite.models import model_config, weight_table
from megalite.models.layers import SequenceInfo
from megalite.parallel.stage import Inputs
from megalite.plan import StageSpan, make_plan
from megalite.train import train
from quantized_folders import SMALL, weights_of
from ranks import run_ranks
from small_runs import VOCAB, make_config, metrics_of, train_on_rank
from tiny_models import GPT2, LLAMA, MIXTRAL, save_model

SCHEMES = ("w8a8", "w4a16", "fp8", "fp8_block")
MODEL: dict[str, Any] = {
    "family": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64, "init_std": 0.1,
}  # fmt: skip
LAYOUTS: dict[str, list[str]] = {
    "tensor": ["parallel.tensor=2"],
    "zero bubble": ["parallel.pipeline=2", "parallel.schedule=zero_bubble"],
    "zero": ["parallel.zero_stage=1"],
}


def config_of(folder: Path, scheme: str, *overrides: str) -> Config:
    return make_config(
        folder, MODEL, f"train.fake_quantize.scheme={scheme}", "train.fake_quantize.group=16", "train.steps=4",
        "optimizer.schedule.warmup_steps=1", "checkpoint.every=0", *overrides,
    )  # fmt: skip


TOKENS = torch.arange(32)[None] * 7 % VOCAB


def logits_of(folder: Path, config: Config | None = None, tokens: Tensor = TOKENS) -> Tensor:
    """Return the logits of the model in `folder` behind `tokens`, as a run of `config` computes them."""
    model = model_config({"hf": folder})
    values = {
        "run": {"name": "x"}, "model": {"hf": str(folder)}, "data": {"train": [{"path": "-"}], "seq_length": 1},
        "train": {"steps": 1, "global_batch_size": 1}, "optimizer": {"lr": 1.0},
    }  # fmt: skip
    plain = parse_config(values)
    plan = make_plan(plain, weight_table(model), 1)
    span = StageSpan(0, 0, model.num_layers, first=True, last=True)
    how = (config or plain).train
    stage, *_ = load_stage(folder, model, plan, span, Mesh.alone(), how)
    with torch.no_grad():
        places = SequenceInfo.whole(tokens.shape[1], tokens.device)
        found = stage(None, Inputs(tokens, places))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trained_model_is_the_quantised_one(
    scheme: str, precision: str, tmp_path: Path
) -> None:
    """Not nearly: every logit has the same bits."""
    config = config_of(
        tmp_path, scheme, "train.fake_quantize.inputs=false", f"train.precision={precision}"
    )
    train(config)
    saved = step_folder(config.run.folder / "checkpoints", 4)
    arguments = ["quantize", str(saved), str(tmp_path / "out"), "--scheme", scheme]
    assert main([*arguments, "--group", "16"]) == 0
    trained = logits_of(saved, config)
    assert torch.equal(trained, logits_of(tmp_path / "out"))
    assert not torch.equal(trained, logits_of(saved)), "a checkpoint has its weights as they were"


def test_inputs_are_rounded_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "w8a8"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    seen: list[tuple[torch.nn.Linear, Tensor, Tensor]] = []
    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda m, given, out: seen.append((m, given[0], out)))
    with torch.no_grad():
        theirs(torch.arange(40)[None] % 99)
    made = make_scheme("w8a8")
    recipe = FakeQuantised(made, made.inputs(), Switch(on=True))
    assert len(seen) == 14
    for module, x, out in seen:
        weight = module.weight.detach()
        off, unrounded = (recipe.x(x) @ weight.t() - out, x @ weight.t() - out)
        # The largest number of a token is 127.5 steps from 0: fp32's last bit of the scale decides
        # where to it is rounded.
        assert off.abs().mean() < 0.4 * unrounded.abs().mean()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_go_straight_through(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator) for shape in ((2, 8, 32), (48, 32), (2, 8, 48))
    )
    x.requires_grad_()
    weight.requires_grad_()
    made = make_scheme(scheme, 16)
    recipe = FakeQuantised(made, made.inputs(), Switch(on=True))
    out = linear(x, weight, recipe=recipe)
    out.backward(grad)
    # x + (rounded − x).detach(): autograd sees x.
    plain_x, plain_weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    rounded = made.decode(
        made.encode(weight.detach(), made.spread(made.scales(weight.detach(), torch.float32), (48, 32))),
        made.spread(made.scales(weight.detach(), torch.float32), (48, 32)),
    )  # fmt: skip
    through_x = plain_x + (recipe.x(x.detach()) - plain_x).detach()
    wanted = through_x @ (plain_weight + (rounded - plain_weight).detach()).t()
    wanted.backward(grad)
    for found, other in ((out, wanted), (x.grad, plain_x.grad), (weight.grad, plain_weight.grad)):
        assert found is not None
        assert other is not None
        # (rounded − w) + w has another last bit than rounded.
        assert torch.allclose(found, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(recipe.weight(weight), weight)
    assert torch.equal(FakeQuantised(made, None, Switch(on=False)).weight(weight), weight)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_ranks_agree_on_what_a_row_is_scaled_by(scheme: str) -> None:
    """Half of the columns is rounded as in the whole, of weights and of inputs."""
    whole = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    made, largest = make_scheme(scheme), whole.abs().amax(1, keepdim=True)
    alone = FakeQuantised(made, made.inputs(), Switch(on=True))
    half = FakeQuantised(made, made.inputs(), Switch(on=True), "row", lambda _: largest)
    for of in ("weight", "x"):
        found = torch.cat([getattr(half, of)(part) for part in whole.split(32, 1)], 1)
        assert torch.equal(found, getattr(alone, of)(whole))
    # By output features nothing is agreed on: each rank has whole rows.
    column = FakeQuantised(made, made.inputs(), Switch(on=True), "column", lambda _: largest * 9)
    assert torch.equal(column.weight(whole), alone.weight(whole))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8_block"])
def test_every_layout_trains_the_same_model(scheme: str, tmp_path: Path) -> None:
    """Of one step: then a weight that is within fp32's last bits of the middle between two numbers may
    become the other, and what is learned from there on differs by the rounding."""

    def config(name: str, *overrides: str) -> Config:
        return config_of(
            tmp_path, scheme, "train.fake_quantize.inputs=false", f"run.name={name}", "train.steps=1",
            # Adam's update of a gradient of nothing but last bits would be as large as any.
            "optimizer.eps=1e-3", "optimizer.schedule.warmup_steps=0", *overrides,
        )  # fmt: skip

    layouts = LAYOUTS if scheme == "w8a8" else {"tensor": LAYOUTS["tensor"]}
    configs = [config(name.replace(" ", "-"), *given) for name, given in layouts.items()]
    one = config("one")
    train(one)
    run_ranks(2, train_on_rank, configs)
    (wanted,) = (line for line in metrics_of(one) if "loss" in line)
    weights = weights_of(step_folder(one.run.folder / "checkpoints", 1))
    for each in configs:
        (found,) = (line for line in metrics_of(each) if "loss" in line)
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-6), each.run.name
        saved = weights_of(step_folder(each.run.folder / "checkpoints", 1))
        for name, tensor in saved.items():
            assert torch.allclose(tensor, weights[name], rtol=1e-5, atol=1e-6), (each, name)


def write_table(prefix: Path, num_tokens: int = 4096) -> None:
    """Two tokens decide the next, by a table that a model of this size can just learn."""
    table = np.random.default_rng(0).integers(0, 16, (16, 16))
    tokens = [1, 2]
    draw = np.random.default_rng(1)
    for _ in range(num_tokens):
        known = table[tokens[-2], tokens[-1]]
        tokens.append(int(known if draw.random() < 0.85 else draw.integers(16)))
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array(tokens))


def test_it_beats_quantising_afterwards(tmp_path: Path) -> None:
    write_table(tmp_path / "corpus")
    rows = torch.from_numpy(
        IndexedDataset(str(tmp_path / "corpus")).read(0, 64 * 33).astype("int64")
    )
    rows = rows.view(64, 33)

    def loss_of(folder: Path, config: Config | None = None) -> float:
        logits = logits_of(folder, config, rows[:, :-1])
        return float(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    def run(name: str, *overrides: str) -> tuple[float, float]:
        """Return the losses of a model as it was trained, and of what w4a16 makes of it."""
        config = make_config(
            tmp_path, MODEL, "train.steps=60", "train.global_batch_size=16", "optimizer.lr=2e-2",
            "checkpoint.every=0", "observe.eval_every=0", f"run.name={name}", *overrides,
        )  # fmt: skip
        train(config)
        folder, out = step_folder(config.run.folder / "checkpoints", 60), tmp_path / name
        assert main(["quantize", str(folder), str(out), "--scheme", "w4a16", "--group", "32"]) == 0
        return loss_of(folder, config), loss_of(out)

    plain, afterwards = run("plain")
    trained, exported = run("trained", "train.fake_quantize.group=32")
    assert exported == pytest.approx(trained, rel=1e-6)
    assert afterwards > plain
    assert exported - plain < 0.5 * (afterwards - plain)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"train.fp8": {"first_last_bf16": [0, 0], "recipe": "rowwise"}},
            "train.fake_quantize needs train.fp8: null",
        ),
        ({"train.compile": True}, "needs train.compile: false"),
        ({"parallel.engine": "deepspeed"}, "needs parallel.engine: native"),
        ({"train.fake_quantize.group": 24}, "group: 24 does not divide the 32 input features"),
        ({"train.fake_quantize.group": 12}, "multiple of 8"),
        ({"parallel.tensor": 2, "train.fake_quantize.group": 32}, "over parallel.tensor = 2"),
        (
            {"train.fake_quantize.scheme": "fp8_block", "train.fake_quantize.group": 64},
            "does not divide the 32 output features of model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = [f"{name}={value}".replace("'", "") for name, value in values.items()]

    def plan() -> None:
        config = config_of(tmp_path, "w4a16", *given)
        make_plan(config, weight_table(config.model), config.parallel.tensor)

    with pytest.raises(ConfigError, match=words):
        plan()


@pytest.mark.parametrize(("model", "what"), [(GPT2, "stored as"), (MIXTRAL, "experts")])
def test_models_that_are_not_quantised_are_refused(
    model: dict[str, Any], what: str, tmp_path: Path
) -> None:
    config = make_config(
        tmp_path, {"hf": str(save_model(tmp_path / "model", model))}, "train.fake_quantize.group=16"
    )
    with pytest.raises(ConfigError, match=what):
        make_plan(config, weight_table(config.model), 1)
