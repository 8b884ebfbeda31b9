"""Runs of an encoder that learns masked tokens, on several layouts."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoders import MODEL, masked_config
from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import make_mesh
from megalite.config import Config
from megalite.data.checks import open_data
from megalite.data.loader import Loader
from megalite.errors import ConfigError
from megalite.infer.generate import Generator, find_model, load_model
from megalite.models import weight_table
from megalite.models.layers import IGNORE
from megalite.parallel.stage import Picked
from megalite.plan import make_plan
from megalite.train import train
from megalite.training.masked_lm import MaskedLM
from megalite.training.parts import build, forward_backward
from ranks import run_ranks
from small_runs import VOCAB, curve_of, make_config, metrics_of, train_on_rank

LAYOUTS = {
    "alone": ("train.micro_batch_size=2",),
    "data": ("parallel.zero_stage=1",),
    "tensor": ("parallel.tensor=2",),
    "sequence": ("parallel.tensor=2", "parallel.sequence=true"),
    "pipeline": ("parallel.pipeline=2",),
    "context": ("parallel.context=2",),
}
MODERN = {
    "family": "modernbert", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64, "init_std": 0.1, "sliding_window": 5,
}  # fmt: skip
OVERRIDES = (
    "data.document_mask=true",
    "data.packing=best_fit",
    "train.steps=4",
    "observe.eval_every=2",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    configs = {
        name: masked_config(folder, *OVERRIDES, f"run.name={name}", *more)
        for name, more in LAYOUTS.items()
    }
    train(configs.pop("alone"))
    run_ranks(2, train_on_rank, [*configs.values()])
    return folder


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone"])
def test_layouts_learn_and_judge_alike(name: str, runs: Path) -> None:
    alone, other = (masked_config(runs, *OVERRIDES, f"run.name={each}") for each in ("alone", name))
    # fp32 sums in another order; 1e-5 is the project's bound for every layout.
    np.testing.assert_allclose(curve_of(other), curve_of(alone), rtol=1e-5)
    judged = [
        [line for line in metrics_of(config) if "valid_accuracy" in line]
        for config in (alone, other)
    ]
    assert len(judged[0]) == 2
    for mine, wanted in zip(*judged, strict=True):
        assert mine["valid_accuracy"] == wanted["valid_accuracy"]
        assert mine["valid_loss"] == pytest.approx(wanted["valid_loss"], rel=1e-5)


def test_validation_is_a_plain_statement(runs: Path) -> None:
    """Cross-entropy and accuracy of the masked tokens, of all of them alike."""
    config = masked_config(runs, *OVERRIDES, "run.name=alone")
    model = load_model(find_model(config.run.folder))
    mixture = open_data(config)[2]["valid"]
    assert mixture is not None
    losses, right = [], []
    for number in range(mixture.num_batches(4, 3) * 4):
        samples = mixture.read([number])
        assert samples.documents is not None
        for document in np.unique(samples.documents):
            here = samples.documents[0] == document
            tokens, labels = (
                torch.from_numpy(x[0, here]) for x in (samples.tokens, samples.labels)
            )
            logits = model(tokens[None])[0]  # each document by itself
            losses += F.cross_entropy(logits, labels, reduction="none")[labels >= 0].tolist()
            right += (logits.argmax(-1) == labels)[labels >= 0].tolist()
    line = [line for line in metrics_of(config) if "valid_loss" in line][-1]
    assert line["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert line["valid_accuracy"] == pytest.approx(np.mean(right), rel=1e-6)


def step_of(
    config: Config, monkeypatch: pytest.MonkeyPatch | None = None
) -> dict[str, torch.Tensor]:
    """The loss of a step and its gradients, of weights drawn from the seed; with `monkeypatch`, the
    head is computed of all tokens."""
    if monkeypatch:
        monkeypatch.setattr(MaskedLM, "complete", lambda self, inputs, micro, split: inputs)
    table = weight_table(config.model)
    plan = make_plan(config, table, 1)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(config.train.seed, mesh))
    mixture = open_data(config)[2]["train"]
    assert mixture is not None
    with Loader(mixture, 4, 2, 0, 1) as loader:
        loss = forward_backward(parts, next(loader), mesh, seed=0)["loss"]
    return {"loss": loss, **parts.engine.gather("grad", {weight.name: 0 for weight in table})}


@pytest.mark.parametrize("share", ["0.15", "0.9"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_head_of_masked_tokens_alone_trains_the_same(
    family: str, share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODEL if family == "bert" else MODERN
    config = masked_config(tmp_path, *OVERRIDES, f"objective.share={share}", model=model)
    found, wanted = step_of(config), step_of(config, monkeypatch)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        # Products of other shapes sum in another order; 1e-5 is the project's bound.
        assert ((found[name] - x).norm() / x.norm()).item() <= 1e-5, name


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_picked_tokens_come_from_their_places_and_go_back(slices: int) -> None:
    """Slices of a sequence have other numbers of them, one has none, and one row has none."""
    labels = torch.full((3, 8), IGNORE)
    labels[0, 1], labels[0, 2], labels[2, 0], labels[2, 7] = 5, 6, 7, 8
    x = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
    alone = torch.device("cpu")
    pieces = [Picked.of(labels, slices, rank, alone) for rank in range(slices)]
    taken = torch.cat(
        [p.take(piece) for p, piece in zip(pieces, x.chunk(slices, 1), strict=True)], 1
    )
    for picked in pieces:
        assert torch.equal(picked.labels_1M, pieces[0].labels_1M)
        assert (picked.labels_1M != IGNORE).sum() == 4
        there = picked.labels_1M != IGNORE
        back = picked.spread(taken[..., 0] * there)
        assert torch.equal(back, torch.where(labels != IGNORE, x[..., 0], 0.0))
        assert torch.equal(picked.spread(picked.labels_1M * there), labels.clamp(min=0))
    none = Picked.of(torch.full((2, 8), IGNORE), slices, 0, alone)
    assert none.labels_1M.shape[1] >= 1, "collectives take nothing of no size"


def test_a_checkpoint_opens_in_transformers(runs: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = find_model(runs / "runs" / "tensor")
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(theirs).__name__ == "BertForMaskedLM"
    assert not any(report.values()), report
    tokens = torch.randint(5, 97, (2, 16))
    with torch.no_grad():
        # The project's bound.
        assert (
            theirs.eval()(tokens).logits - load_model(folder)(tokens)
        ).abs().max().item() <= 1e-4
    assert transformers.AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"


def test_adapters_open_in_peft(runs: Path, tmp_path: Path) -> None:
    """The head's transform is called `dense`, as modules of layers are, and is not adapted."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tmp_path / "base"
    shutil.copytree(find_model(runs / "runs" / "alone"), base)
    config = masked_config(
        tmp_path, *OVERRIDES, "lora.rank=2", model={"hf": str(base), "hidden_dropout": 0.0}
    )
    train(config)
    folder = find_model(config.run.folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(
            transformers.AutoModelForMaskedLM.from_pretrained(base), folder
        ).eval()
    tokens = torch.randint(5, 97, (2, 16))
    with torch.no_grad():
        found, wanted = load_model(folder, torch.float32)(tokens), theirs(tokens).logits
        assert (found - wanted).abs().max().item() <= 1e-4  # the project's bound
        assert (wanted - load_model(base)(tokens)).abs().max().item() > 1e-3, (
            "the adapters have learned"
        )


def test_an_encoder_says_no_text(runs: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds an encoder \(model\.task: masked\).*`megalite fill`"
    ):
        Generator.open(runs / "runs" / "alone")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "objective.name=next_token",
            "next_token hides no tokens, without which model.task: masked learns nothing",
        ),
        ("data.tokenizer=null", "masked_lm needs data.tokenizer"),
        ("data.border_loss=false", r"leave data\.fim and \.border_loss out"),
        ("train.loss_chunk=8", "masked_lm needs train.loss_chunk: null, not 8"),
        (
            "model.task=causal",
            "model: task = 'causal': should be 'masked', 'classification', 'labels' or 'answers'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        masked_config(tmp_path, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("objective.name=masked_lm",), "masked_lm needs an encoder, not model.task: causal"),
        (
            ("model.task=masked",),
            "'masked' is not known for the llama family, whose own task is causal",
        ),
    ],
)
def test_a_decoder_fills_no_gaps(overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(tmp_path, "llama", *overrides)
