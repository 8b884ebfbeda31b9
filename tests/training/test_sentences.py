"""BERT that also tells whether two texts follow each other, on several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoders import MODEL, masked_config
from megalite.config import Config
from megalite.data.checks import open_data
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import IGNORE
from megalite.errors import ConfigError, DataError
from megalite.infer.generate import find_model
from megalite.train import train
from ranks import run_ranks
from small_runs import VOCAB, curve_of, metrics_of, train_on_rank

NSP = "objective.sentences=nsp"
ALONE = {
    "alone": ("train.micro_batch_size=2",),
    "alone-nsp": (NSP, "train.micro_batch_size=2"),
}
LAYOUTS = {
    "data": (NSP, "parallel.zero_stage=2"),
    "sequence": ("parallel.tensor=2", "parallel.sequence=true"),
    "pipeline": ("parallel.pipeline=2", "parallel.tensor=1"),
    "context": (NSP, "parallel.context=2"),
    "tensor": ("parallel.tensor=2",),
}
RESUMED = ("data", "pipeline", "context")
OVERRIDES = (
    "objective.sentences=sop",
    "data.document_mask=true",
    "data.seq_length=32",
    "train.steps=4",
    "observe.eval_every=2",
)
STILL = ("optimizer.lr=1e-30", "optimizer.schedule.min_lr=0")
PAIRED = MODEL | {"sentence_head": True}


def write_sentences(prefix: Path) -> None:
    """Documents of a few short sentences, which begin and end as BERT's do."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(30):
            counts = 1 + number % 5
            lengths = rng.integers(2, 12, counts)
            tokens = rng.integers(5, VOCAB, lengths.sum())
            tokens[0], tokens[-1] = 2, 3
            writer.add_documents(tokens, lengths, counts=[counts])


def config_of(folder: Path, *overrides: str, model: dict[str, Any] = PAIRED) -> Config:
    if not (folder / "corpus.idx").exists():
        write_sentences(folder / "corpus")
    return masked_config(folder, *OVERRIDES, *overrides, model=model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, more in ALONE.items():
        train(config_of(folder, f"run.name={name}", *more))
    configs = [config_of(folder, f"run.name={name}", *more) for name, more in LAYOUTS.items()]
    for name in RESUMED:
        broken = f"run.name={name}-resumed", *LAYOUTS[name]
        configs += [config_of(folder, *broken, "train.stop_at=2"), config_of(folder, *broken)]
    run_ranks(2, train_on_rank, configs)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_learn_and_judge_alike(name: str, runs: Path) -> None:
    one = "alone-nsp" if NSP in LAYOUTS[name] else "alone"
    alone, other = (config_of(runs, f"run.name={each}") for each in (one, name))
    # fp32 sums in another order; 1e-5 is the project's bound for every layout.
    np.testing.assert_allclose(curve_of(other), curve_of(alone), rtol=1e-5)
    judged = [
        [line for line in metrics_of(config) if "valid_accuracy" in line]
        for config in (alone, other)
    ]
    assert len(judged[0]) == 2
    for mine, wanted in zip(*judged, strict=True):
        for key in ("valid_accuracy", "valid_sentence_accuracy"):
            assert mine[key] == wanted[key]
        for key in ("valid_loss", "valid_masked_loss", "valid_sentence_loss"):
            assert mine[key] == pytest.approx(wanted[key], rel=1e-5)


def test_a_checkpoint_is_berts_of_pretraining(runs: Path) -> None:
    """transformers finds the losses and accuracies that validation told."""
    transformers = pytest.importorskip("transformers")
    config = config_of(runs, "run.name=alone")
    model, info = transformers.BertForPreTraining.from_pretrained(
        find_model(config.run.folder), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    mixture = open_data(config)[2]["valid"]
    assert mixture is not None
    masked, told, orders = [], [], []
    for number in range(mixture.num_batches(4, 3) * 4):
        samples = mixture.read([number])
        types = mixture.types(samples)
        assert samples.documents is not None
        assert samples.sentences is not None
        assert types is not None
        for document in np.unique(samples.documents):
            here = samples.documents[0] == document
            order = samples.sentences[0, here]
            if (order == IGNORE).all():  # padding
                continue
            assert (order[1:] == IGNORE).all()
            tokens, labels, kinds = (
                torch.from_numpy(x[0, here]) for x in (samples.tokens, samples.labels, types)
            )
            with torch.no_grad():
                out = model.eval()(tokens[None], token_type_ids=kinds[None])
            logits = out.prediction_logits[0]
            masked += F.cross_entropy(logits, labels, reduction="none")[labels >= 0].tolist()
            told.append(out.seq_relationship_logits[0])
            orders.append(int(order[0]))
    line = [line for line in metrics_of(config) if "valid_loss" in line][-1]
    logits, wanted = torch.stack(told), torch.tensor(orders)
    of_pairs = F.cross_entropy(logits, wanted).item()
    assert line["valid_masked_loss"] == pytest.approx(np.mean(masked), rel=1e-5)
    assert line["valid_sentence_loss"] == pytest.approx(of_pairs, rel=1e-5)
    assert line["valid_loss"] == pytest.approx(np.mean(masked) + of_pairs, rel=1e-5)
    right = (logits.argmax(1) == wanted).float().mean().item()
    assert line["valid_sentence_accuracy"] == pytest.approx(right)
    assert 0 < wanted.float().mean() < 1


def test_both_heads_of_a_published_model_are_read(runs: Path) -> None:
    """A step at next to no rate leaves what was read."""
    folder = find_model(config_of(runs, "run.name=alone").run.folder)
    from safetensors.torch import load_file

    model = {"hf": str(folder), "sentence_head": True}
    config = config_of(runs, "run.name=again", "train.steps=1", *STILL, model=model)
    train(config)
    before, after = (
        load_file(x / "model.safetensors") for x in (folder, find_model(config.run.folder))
    )
    assert before.keys() == after.keys()
    assert "cls.seq_relationship.weight" in after
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, runs: Path) -> None:
    from safetensors.torch import load_file

    unbroken, resumed = (config_of(runs, f"run.name={each}") for each in (name, f"{name}-resumed"))
    assert curve_of(resumed) == curve_of(unbroken)
    folders = [find_model(config.run.folder) for config in (unbroken, resumed)]
    assert all(folder.name.endswith("4") for folder in folders)
    files = [sorted(folder.rglob("*.safetensors")) for folder in folders]
    for wanted, found in zip(*files, strict=True):
        assert wanted.relative_to(folders[0]) == found.relative_to(folders[1])
        tensors = load_file(found)
        for key, tensor in load_file(wanted).items():
            assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize(
    ("overrides", "model", "words"),
    [
        ((), MODEL, "sop does not go with model.sentence_head: false"),
        (("objective.sentences=null",), PAIRED, "null does not go with model.sentence_head: true"),
        (("data.document_mask=false",), PAIRED, "needs data.document_mask: true"),
        (("data.order=megatron",), PAIRED, "its BERT makes samples by another rule"),
        ((), PAIRED | {"family": "roberta", "token_types": 1}, "not known for the roberta family"),
    ],
)
def test_what_does_not_go_together_is_refused(
    overrides: tuple[str, ...], model: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, *overrides, model=model)


def test_a_file_without_borders_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_documents(np.arange(5, 65), [20, 20, 20])
    with pytest.raises(DataError, match=r"has no borders of sentences.*--split-sentences"):
        open_data(config_of(tmp_path))
