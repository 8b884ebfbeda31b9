"""Evaluation: the numbers that lm-evaluation-harness gives for the same weights through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from megalite.cli import main
from megalite.errors import ConfigError, DataError
from megalite.infer.evaluate import Asked, evaluate_model
from megalite.infer.generate import Generator
from megalite.infer.harness import HarnessModel, load_tasks, numbers_of
from megalite.infer.references import compare, references_task

from local_tasks import ANIMALS, NAMES, write_tasks, write_tokenizer
from ranks import run_ranks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def random_model(folder: Path, family: str) -> Path:
    """Two layers, 64 positions, fp32; Llama with a token that begins every text, GPT-2 without."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ids = {"bos_token_id": 1 if family == "llama" else None, "eos_token_id": 0, "pad_token_id": None}
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=290, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **ids,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=290, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **ids
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return write_tokenizer(folder, begins=family == "llama")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_numbers_are_those_of_transformers(tmp_path: Path, tasks: Path, family: str) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = random_model(tmp_path / "model", family)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    ours = HarnessModel(Generator.open(folder))
    assert ours.prefix_token_id == theirs.prefix_token_id
    found = [load_tasks(NAMES, tasks).run(model, uncertainty=0, samples=True) for model in (theirs, ours)]
    wanted, got = found
    assert wanted is not None
    assert got is not None
    greedy = 0
    for name in NAMES:
        assert len(got["samples"][name]) == len(wanted["samples"][name]) > 0
        for their_sample, our_sample in zip(wanted["samples"][name], got["samples"][name], strict=True):
            assert our_sample["arguments"] == their_sample["arguments"]
            if name == "next_word":
                assert our_sample["resps"] == their_sample["resps"]
                continue
            if name == "story":
                pairs = zip(our_sample["resps"][0], their_sample["resps"][0], strict=True)
            else:
                pairs = zip(*([r[0][0] for r in s["resps"]] for s in (our_sample, their_sample)), strict=True)
                greedy += sum(bool(r[0][1]) for r in our_sample["resps"])
                assert [r[0][1] for r in our_sample["resps"]] == [r[0][1] for r in their_sample["resps"]]
            for our_sum, their_sum in pairs:
                # Sums of up to 300 logarithms in fp32, each exact to some 1e-6 of its size, which is up to 10.
                assert our_sum == pytest.approx(their_sum, rel=1e-5, abs=1e-4)
    assert greedy > 0, "some continuation is what the model would have said"
    assert numbers_of(got) == pytest.approx(numbers_of(wanted), rel=1e-5)
    assert {"sounds/acc_norm", "letters/acc", "story/word_perplexity", "next_word/bleu"} < set(numbers_of(got))
