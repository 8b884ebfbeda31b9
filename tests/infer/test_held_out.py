"""`megalite eval RUN`: the loss that the run itself measured, on any layout; and what a text of other
token files costs, by the byte too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from encoder_decoders import span_config
from encoders import masked_config
from megalite.cli import main
from megalite.comm.mesh import Launch
from megalite.config import Config
from megalite.data.indexed import IndexedDataset
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import ConfigError
from megalite.infer import generate
from megalite.infer.evaluate import Asked, evaluate_model
from megalite.infer.generate import Generator, find_model, load_model
from megalite.infer.held_out import measure
from megalite.models.layers import SequenceInfo
from megalite.train import train
from ranks import run_ranks
from small_runs import make_config, metrics_of


def validated(config: Config) -> float:
    """The last validation loss that a run recorded."""
    return [line["valid_loss"] for line in metrics_of(config) if "valid_loss" in line][-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(tmp_path_factory.mktemp("run"))
    train(config)
    return config


def test_a_run_is_measured_as_it_measured_itself(
    run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run.run.folder)]) == 0
    out = capsys.readouterr().out
    assert f"12 samples, 192 labels\nloss {validated(run):.4f}, perplexity" in out
    (file,) = (run.run.folder / "evaluations").glob("*.json")
    held_out = json.loads(file.read_text())["held_out"]
    assert held_out["numbers"]["loss"] == validated(run), "the same bits, in fp32 on one rank"
    assert "bits_per_byte" not in held_out["numbers"], "there is no tokenizer"


@pytest.mark.parametrize("size", [20, 40])
def test_as_many_samples_are_read_as_the_run_reads(size: int, tmp_path: Path) -> None:
    """Of 33: whole batches, or one that begins again from the first sample."""
    config = make_config(tmp_path, "llama", f"train.global_batch_size={size}", "train.steps=1")
    train(config)
    found = measure(find_model(config.run.folder), None, None, Launch(0, 1, 0))
    assert found.num_samples == size
    assert found.numbers["loss"] == pytest.approx(validated(config), rel=1e-12)


@pytest.mark.parametrize("make", [masked_config, span_config])
def test_other_tasks_are_measured_by_their_own_objective(make: type, tmp_path: Path) -> None:
    config = make(tmp_path, "train.steps=2", "checkpoint.every=0")
    train(config)
    found = measure(find_model(config.run.folder), None, None, Launch(0, 1, 0))
    assert found.numbers["loss"] == validated(config)
    assert found.num_labels > 0


def measure_on_rank(
    rank: int, world_size: int, folder: Path, layouts: list[tuple[int, ...]]
) -> list[tuple[float, int]]:
    """The loss and the labels of 12 samples, which all of the layouts divide."""
    launch = Launch.from_environment()
    found = [measure(folder, None, 12, launch, *layout) for layout in layouts]
    return [(each.numbers["loss"], each.num_labels) for each in found]


def test_every_layout_measures_the_same(run: Config) -> None:
    folder = find_model(run.run.folder)
    for found in run_ranks(2, measure_on_rank, folder, [(1, 1), (2, 1), (1, 2)]):
        # fp32 sums in another order.
        assert [loss for loss, _ in found] == pytest.approx([validated(run)] * 3, rel=1e-6)
        assert [labels for _, labels in found] == [192] * 3


def evaluate_on_rank(rank: int, world_size: int, run: Path) -> tuple[dict[str, float], str]:
    """The numbers of a run whose second checkpoint was saved when rank 0 had looked, and what is
    said where there was none yet."""
    steps = generate.complete_steps
    if rank == 0:
        generate.complete_steps = lambda root: steps(root)[:1]
    numbers = evaluate_model(run, Asked(), tensor=2)
    if rank == 0:
        generate.complete_steps = lambda root: []
    try:
        Generator.open(run, tensor=2)
    except ConfigError as error:
        return numbers, str(error)
    return numbers, ""


def test_ranks_beside_a_training_take_the_same_checkpoint(run: Config) -> None:
    folders = sorted((run.run.folder / "checkpoints").glob("step-*"))
    first, second = (measure(x, None, None, Launch(0, 1, 0)).numbers["loss"] for x in folders)
    assert first != pytest.approx(second, rel=1e-3)
    for numbers, said in run_ranks(2, evaluate_on_rank, run.run.folder):
        assert numbers["loss"] == pytest.approx(first, rel=1e-6)  # sums in another order
        assert "has no whole checkpoint" in said


def test_ranks_that_hold_different_experts_measure_the_same(tmp_path: Path) -> None:
    config = make_config(tmp_path, "experts", "train.steps=3")
    train(config)
    folder = find_model(config.run.folder)
    alone = measure(folder, None, 12, Launch(0, 1, 0)).numbers["loss"]
    for ((loss, _),) in run_ranks(2, measure_on_rank, folder, [(2, 1, 2)]):
        assert loss == pytest.approx(alone, rel=1e-6)  # fp32 sums in another order


def test_a_text_is_measured_by_the_byte(tmp_path: Path) -> None:
    """Held against the model's own logits, token by token, and the length of the text."""
    texts = [f"{number} times {number} are {number * number}, or så er det" for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "tokenizer", 300)
    preprocess([str(tmp_path / "a.jsonl")], tmp_path / "a", tmp_path / "tokenizer", append_eod=True)
    tokens = tmp_path / "a_text_document"
    config = make_config(
        tmp_path, "llama", "train.steps=2", "data.valid=[]", "model.vocab_size=300", "observe.eval_every=0",
        f"data.tokenizer={tmp_path / 'tokenizer'}", f"data.train=[{{path: {tokens}}}]", "data.seq_length=32",
    )  # fmt: skip
    train(config)
    folder = find_model(config.run.folder)
    with pytest.raises(ConfigError, match="no validation data"):
        measure(folder, None, None, Launch(0, 1, 0))
    found = measure(folder, str(tokens), None, Launch(0, 1, 0))
    ids = torch.from_numpy(IndexedDataset(str(tokens)).tokens.astype("int64"))
    rows = (len(ids) - 1) // 32
    assert (found.num_samples, found.num_labels) == (rows, rows * 32)
    x_BT, y_BT = ids[: rows * 32].view(rows, 32), ids[1 : rows * 32 + 1].view(rows, 32)
    with torch.no_grad():
        logits = load_model(folder)(x_BT, SequenceInfo.whole(32, x_BT.device))
    nats = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), y_BT.flatten()).item()
    # fp32 sums in another order.
    assert found.numbers["loss"] == pytest.approx(nats, rel=1e-5)
    # All of the text but the first token and what does not fill a row; ends of documents are no bytes.
    whole = sum(len(text.encode()) for text in texts)
    length = found.numbers["loss"] * found.num_labels / math.log(2) / found.numbers["bits_per_byte"]
    text_of = load_tokenizer(tmp_path / "tokenizer").decode_plain
    left_out = text_of(ids[:1].tolist()) + text_of(ids[rows * 32 + 1 :].tolist())
    assert length == pytest.approx(whole - len(left_out.encode()), rel=1e-9)


def test_what_cannot_be_measured_is_said(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = find_model(run.run.folder)
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in ("config.json", "model.safetensors"):
        (alone / file).write_bytes((folder / file).read_bytes())
    corpus = str(run.run.dir.parent / "corpus")
    for words, told in (
        ([alone], "is of no run, whose validation data could be taken: give --tokens PREFIX"),
        ([alone, "--tokens", tmp_path / "no"], "no.bin does not exist"),
        ([alone, "--tokens", corpus, "--tasks", "x"], "give one of --tasks"),
        ([alone, "--tokens", corpus, "--tensor", "2"], "no multiple of --tensor 2"),
        ([alone, "--tokens", corpus, "--limit", "0"], "leaves nothing to measure"),
        ([alone, "--tokens", corpus, "--shots", "0"], "--shots goes with --tasks NAME,NAME or"),
        ([alone, "--tokens", corpus, "--chat"], "--chat goes with --tasks NAME,NAME or --data"),
    ):
        assert main(["eval", *map(str, words)]) == 2
        assert told in capsys.readouterr().err
    assert main(["eval", str(alone), "--tokens", corpus]) == 0
    assert "perplexity" in capsys.readouterr().out
