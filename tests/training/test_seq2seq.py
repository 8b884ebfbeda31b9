"""Runs of encoder-decoders on texts and on rows, on several layouts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from encoder_decoders import MODEL, reversing_rows, rows_config, span_config, write_rows
from megalite.cli import main
from megalite.comm.mesh import Axis
from megalite.data.checks import open_data
from megalite.errors import ConfigError
from megalite.infer.generate import Generator, find_model, load_model
from megalite.infer.seq2seq import TargetGenerator
from megalite.models.context_cut import ContextCut
from megalite.models.layers import IGNORE, SequenceInfo, Source
from megalite.parallel.stage import Inputs
from megalite.plan import plan
from megalite.train import train
from megalite.training.seq2seq import Seq2Seq
from ranks import run_ranks
from small_runs import curve_of, make_config, metrics_of, train_on_rank

LAYOUTS = {
    "alone": ("train.micro_batch_size=2",),
    "data": ("parallel.zero_stage=2",),
    "tensor": ("parallel.tensor=2", "parallel.sequence=false"),
    "pipeline": ("parallel.pipeline=2",),
    "context": ("parallel.context=2",),
}
SHORT = ("train.steps=4", "observe.eval_every=2")
KINDS = {"spans": span_config, "rows": rows_config}


def config_of(folder: Path, kind: str, name: str, *more: str) -> Any:
    return KINDS[kind](folder, *SHORT, f"run.name={kind}-{name}", *LAYOUTS[name], *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    configs = {(kind, name): config_of(folder, kind, name) for kind in KINDS for name in LAYOUTS}
    for kind in KINDS:
        train(configs.pop((kind, "alone")))
    run_ranks(2, train_on_rank, [*configs.values()])
    return folder


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_learn_and_judge_alike(kind: str, name: str, runs: Path) -> None:
    alone, other = (config_of(runs, kind, each) for each in ("alone", name))
    # fp32 sums in another order; 1e-5 is the project's bound for every layout.
    np.testing.assert_allclose(curve_of(other), curve_of(alone), rtol=1e-5)
    judged = [
        [line for line in metrics_of(config) if "valid_exact" in line] for config in (alone, other)
    ]
    assert len(judged[0]) == 2
    for mine, wanted in zip(*judged, strict=True):
        assert (mine["valid_accuracy"], mine["valid_exact"]) == (
            wanted["valid_accuracy"],
            wanted["valid_exact"],
        )
        assert mine["valid_loss"] == pytest.approx(wanted["valid_loss"], rel=1e-5)


def judge_part(rank: int, world_size: int) -> list[float]:
    """What a context rank counts of two targets, and of what fills up: the second target is wrong
    in one token, which is the first rank's."""
    labels, documents = torch.tensor([[5] * 7 + [IGNORE]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    is_right, axis = torch.ones(1, 8), Axis(world_size, rank, dist.group.WORLD, "context")
    is_right[0, 6] = 0.0
    (index,) = ContextCut.of(8, world_size).index_RBT[rank]
    places = SequenceInfo(
        index[None], index[None], documents[:, index], whole_document_BT=documents
    )
    out: Any = SimpleNamespace(
        cross_entropy=torch.zeros_like, target=lambda _: is_right[:, index], largest_BT=0.5
    )
    return Seq2Seq(axis).judge(out, Inputs(index, places, labels[:, index]))[1][0].tolist()


def test_a_target_on_two_ranks_is_right_where_both_are() -> None:
    counts = torch.tensor(run_ranks(2, judge_part)).sum(0)
    assert counts.tolist() == [6, 2, 1], "tokens that are right, targets, and right targets"


def test_validation_is_a_plain_statement(runs: Path) -> None:
    """Cross-entropy and accuracy of the targets' tokens, all alike; each row by itself, whatever
    lies beside it."""
    config = config_of(runs, "rows", "alone")
    model = load_model(find_model(config.run.folder))
    mixture = open_data(config)[2]["valid"]
    assert mixture is not None
    losses, right, exact = [], [], []
    for number in range(mixture.num_batches(4, 3) * 4):
        samples = mixture.read([number])
        assert samples.documents is not None
        assert samples.source is not None
        for document in np.unique(samples.documents):
            here, there = samples.documents[0] == document, samples.source_documents[0] == document
            tokens, labels = (
                torch.from_numpy(x[0, here]) for x in (samples.tokens, samples.labels)
            )
            if (labels < 0).any():  # padding
                continue
            source = Source.whole(torch.from_numpy(samples.source[0, there])[None])
            logits = model(tokens[None], SequenceInfo.whole(len(tokens), tokens.device, source))[0]
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += (is_right := logits.argmax(-1) == labels).tolist()
            exact.append(bool(is_right.all()))
    line = [line for line in metrics_of(config) if "valid_loss" in line][-1]
    assert line["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert line["valid_accuracy"] == pytest.approx(np.mean(right), rel=1e-6)
    assert line["valid_exact"] == pytest.approx(np.mean(exact), rel=1e-6)


def test_a_stopped_run_goes_on_as_if_it_had_not(runs: Path, tmp_path: Path) -> None:
    for more in (("train.stop_at=2",), ()):
        train(config_of(tmp_path, "spans", "alone", *more))
    assert curve_of(config_of(tmp_path, "spans", "alone")) == curve_of(
        config_of(runs, "spans", "alone")
    )


@pytest.mark.parametrize("name", ["spans-pipeline", "rows-tensor"])
def test_a_checkpoint_opens_in_transformers(name: str, runs: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = find_model(runs / "runs" / name)
    theirs, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(theirs).__name__ == "T5ForConditionalGeneration"
    assert not any(report.values()), report
    tokens, source = torch.randint(2, 80, (2, 9)), torch.randint(2, 80, (2, 13))
    with torch.no_grad():
        wanted = theirs.eval()(input_ids=source, decoder_input_ids=tokens).logits
        found = load_model(folder)(
            tokens, SequenceInfo.whole(9, tokens.device, Source.whole(source))
        )
        assert (found - wanted).abs().max().item() <= 1e-4  # the project's bound
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w7 w8").input_ids == [7, 8, 1]
    # transformers 5.23 has room in its cache for as many layers as the encoder has.
    ids = theirs.generate(
        **tokenizer("w7 w8 w9", return_tensors="pt"), max_new_tokens=5, use_cache=False
    )
    assert ids[0, 0] == 0, "generation_config.json names the token to begin with"


def test_adapters_of_a_run_are_opened_by_peft_and_merged(runs: Path, tmp_path: Path) -> None:
    """All linear modules have one, and no table of relative positions, which is none."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = find_model(runs / "runs" / "rows-alone")
    lora = ("lora.rank=3", "lora.targets=all-linear", "lora.dropout=0.1", "optimizer.lr=0.02")
    config = rows_config(tmp_path, f"model.hf={base}", *SHORT, *lora, model={})
    train(config)
    folder = find_model(config.run.folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
    draw = torch.Generator().manual_seed(0)
    tokens, source = (torch.randint(2, 80, (2, length), generator=draw) for length in (9, 13))
    ids = {"input_ids": source, "decoder_input_ids": tokens}
    assert main(["convert", str(folder), str(tmp_path / "merged")]) == 0
    with torch.no_grad():
        before = model.eval()(**ids).logits
        theirs = peft.PeftModel.from_pretrained(model, folder).eval()
        assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
        wanted = theirs(**ids).logits
        places = SequenceInfo.whole(9, tokens.device, Source.whole(source))
        found = [load_model(each)(tokens, places) for each in (folder, tmp_path / "merged")]
    assert (wanted - before).abs().max() > 0.1, "something was learned"
    for each in found:
        # The project's bound; W x + B A x and (W + B A) x are rounded in another order.
        assert (each - wanted).abs().max() <= 1e-4
    generator = TargetGenerator.open(config.run.folder)
    asked = generator.source_ids("w7 w8 w9")
    answer = theirs.generate(
        input_ids=torch.tensor([asked]), max_new_tokens=5, do_sample=False, use_cache=False
    )
    said = [token for token in answer[0, 1:].tolist() if token != 1]
    assert generator.generate([asked], 5) == [said]


def test_a_task_is_learned_and_answered(tmp_path: Path) -> None:
    """Rows of up to three words turned round: after 250 steps nearly all held-out ones are right,
    word for word."""
    model = MODEL | {
        "hidden_size": 48,
        "head_dim": 12,
        "intermediate_size": 96,
        "num_layers": 4,
        "dropout": 0.0,
    }
    few = [(source, target) for source, target in reversing_rows(8000) if len(source) <= 3]
    held_out = [
        (source, target) for source, target in reversing_rows(400, seed=1) if len(source) <= 3
    ]
    for name, rows in (("rows", few), ("held-out", held_out)):
        write_rows(tmp_path / name, rows)
    config = rows_config(
        tmp_path, "train.steps=250", "observe.eval_every=0", "checkpoint.every=0", "train.global_batch_size=8",
        "train.micro_batch_size=8", "data.seq_length=32", "objective.target_length=32", "optimizer.lr=3e-3",
        model=model,
    )  # fmt: skip
    train(config)
    exact = [line["valid_exact"] for line in metrics_of(config) if "valid_exact" in line][-1]
    assert exact >= 0.95
    generator = TargetGenerator.open(config.run.folder)
    said = generator.answer([" ".join(f"w{n}" for n in source) for source, _ in held_out], 8)
    right = [
        text == " ".join(f"w{n}" for n in target)
        for text, (_, target) in zip(said, held_out, strict=True)
    ]
    assert np.mean(right) >= 0.95


def test_other_verbs_refuse_it_by_name(runs: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds an encoder-decoder \(model\.task: seq2seq\).*`megalite generate`"
    ):
        Generator.open(runs / "runs" / "rows-alone")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "parallel={context: 2, context_method: ulysses}",
            "ulysses has no bias of the scores, which model.family = 't5' has; use ring",
        ),
        ("observe.layers_every=2", "of two stacks, needs observe.layers_every: 0"),
        ("optimizer.qk_clip.threshold=30", "of two stacks, needs optimizer.qk_clip: null"),
    ],
)
def test_what_two_stacks_cannot_do_is_refused_by_the_plan(
    override: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(span_config(tmp_path, override), 2)


def test_a_stage_without_adapters_is_refused(runs: Path, tmp_path: Path) -> None:
    base, last = (
        find_model(runs / "runs" / "rows-alone"),
        "decoder.block.2.layer.1.EncDecAttention.q",
    )
    lora = f"lora.targets=[{last}]"
    with pytest.raises(ConfigError, match=r"adapt no module of layers 0 to \d, a stage of"):
        plan(rows_config(tmp_path, f"model.hf={base}", lora, "parallel.pipeline=2", model={}), 2)
    assert plan(rows_config(tmp_path, f"model.hf={base}", lora, model={}), 1).num_trained > 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.seq_length=33", "data.seq_length = 33 must be a multiple of parallel.tensor = 2"),
        (
            "data.seq_length=16",
            "the decoder's length = 5 must be a multiple of parallel.tensor = 2",
        ),
    ],
)
def test_sequence_parallelism_cuts_both_stacks(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(span_config(tmp_path, override, "parallel.tensor=2"), 2)


def test_a_decoder_has_no_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs an encoder-decoder, not model\.task: causal"):
        make_config(tmp_path, "llama", "objective.name=span_corruption")
