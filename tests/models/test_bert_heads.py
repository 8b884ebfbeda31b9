"""A published BERT has heads for masked tokens and for pairs of sentences, and a pooler: all of them
are read, trained or held, and written as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from encoders import masked_config
from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.unneeded import left_behind
from megalite.config import Config
from megalite.infer.generate import find_model, load_model
from megalite.models import model_config
from megalite.models.layers import SequenceInfo
from ranks import run_ranks
from small_runs import VOCAB, train_on_rank
from tiny_models import randomize

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3,
    "num_attention_heads": 6, "max_position_embeddings": 40, "type_vocab_size": 3, "layer_norm_eps": 1e-3,
    "hidden_act": "gelu_new", "hidden_dropout_prob": 0.2, "initializer_range": 0.1,
}  # fmt: skip
HEADS = ("bert.pooler.dense", "cls.seq_relationship")
LAYOUTS = {
    "data": ("parallel.zero_stage=2",),
    "sequence": (
        "parallel.tensor=2",
        "parallel.sequence=true",
        "optimizer.groups=[{match: '*', weight_decay: 0.1}]",
    ),
    "pipeline": ("parallel.pipeline=2",),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertForPreTraining of unusual sizes, whose biases are no zeros."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertForPreTraining(config).eval()
    randomize(model)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Two steps with masked tokens alone."""
    folder = tmp_path_factory.mktemp("runs")
    found = {
        name: config_of(folder, published, f"run.name={name}", *more)
        for name, more in LAYOUTS.items()
    }
    run_ranks(2, train_on_rank, [*found.values()])
    return found


def config_of(folder: Path, published: Path, *overrides: str) -> Config:
    small = (
        "train.steps=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "data.document_mask=true",
    )
    return masked_config(folder, *small, *overrides, model={"hf": str(published)})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_against_transformers(folder: Path) -> None:
    """Their classes find all that they ask for, and tell what ours does of texts with two types."""
    ours = load_model(folder)
    tokens = torch.randint(5, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    types = (torch.arange(30) > 12).long().expand(2, 30)
    index = torch.arange(30)[None]
    with torch.no_grad():
        places = SequenceInfo(index, index, None, type_BT=types)
        x = ours.run_layers(ours.embed(tokens, places), places)
        masked, pairs = ours.predict(x), ours.sentences(x[:, 0][None])[0]
        wanted = {
            "PreTraining": (masked, pairs),
            "MaskedLM": (masked,),
            "NextSentencePrediction": (pairs,),
        }
        for kind, logits in wanted.items():
            theirs, info = getattr(transformers, f"BertFor{kind}").from_pretrained(
                folder, output_loading_info=True
            )
            assert not info["missing_keys"]
            out = theirs.eval()(tokens, token_type_ids=types).to_tuple()
            for found, their in zip(logits, out, strict=True):
                assert their.std() > 0.1, "logits large enough that the bound means something"
                # The project's bound; fp32 sums in another order give 1e-6.
                assert (found - their).abs().max().item() <= 1e-4, kind


def test_all_heads_go_there_and_back_bit_for_bit(published: Path, tmp_path: Path) -> None:
    assert model_config({"hf": str(published)}).sentence_head == "kept"
    write_model(open_source(published), tmp_path / "ours")
    before, after = (tensors_of(x) for x in (published, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    check_against_transformers(tmp_path / "ours")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_with_masked_tokens_alone_holds_the_other_heads(
    name: str, runs: dict[str, Config], published: Path
) -> None:
    check_run(runs[name], published)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_holds_them_too(
    stage: int, published: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("takes --whole: DeepSpeed is long to start")
    pytest.importorskip("deepspeed")
    more = "parallel.engine=deepspeed", f"parallel.zero_stage={stage}"
    config = config_of(tmp_path, published, *more)
    run_ranks(2, train_on_rank, [config], deepspeed=True)
    check_run(config, published)


def check_run(config: Config, published: Path) -> None:
    """All that it trains has changed, and nothing of what it holds."""
    folder = find_model(config.run.folder)
    before, after = (tensors_of(x) for x in (published, folder))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) == key.startswith(HEADS), key
    check_against_transformers(folder)


def test_what_goes_along_with_another_task_or_part(published: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(published)})
    )
    assert model_config({"hf": str(adapter)}).sentence_head == "kept"
    classes = {"task": "classification", "labels": ["a", "b"]}
    assert model_config({"hf": str(published)} | classes).sentence_head is False


def test_what_is_left_behind_is_said(published: Path, tmp_path: Path) -> None:
    assert left_behind(config_of(tmp_path, published)) == []
    without = config_of(tmp_path, published, "model.sentence_head=false")
    (line,) = left_behind(without)
    assert line == f"{published}: {' and '.join(HEADS)} will not be in the run's checkpoints"
    body = transformers.BertModel.from_pretrained(published)
    body.save_pretrained(tmp_path / "body")
    (line,) = left_behind(config_of(tmp_path, tmp_path / "body"))
    assert line.endswith("body: bert.pooler.dense will not be in the run's checkpoints")
