"""What T5 has beside other families, against plain statements: buckets, initial values, the files
of several versions of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.tensors import CheckpointError
from megalite.errors import ConfigError
from megalite.infer.generate import load_model
from megalite.models import model_config, to_hf_config, weight_table
from megalite.models.layers import SequenceInfo
from megalite.models.t5 import buckets
from tiny_models import CASES, OWN_HEAD, our_logits, randomize, their_logits

MODEL: dict[str, Any] = {
    "family": "t5", "vocab_size": 99, "hidden_size": 48, "head_dim": 8, "intermediate_size": 80, "num_layers": 5,
    "encoder_layers": 2, "num_attention_heads": 4, "init_std": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("both_sides", "relative", "bucket"),
    [
        *(
            (True, *each)
            for each in (
                (-128, 15),
                (-20, 10),
                (-8, 8),
                (-7, 7),
                (0, 0),
                (1, 17),
                (8, 24),
                (64, 30),
            )
        ),
        *(
            (False, *each)
            for each in ((-20, 17), (-16, 16), (-100, 30), (-128, 31), (0, 0), (1, 0), (90, 0))
        ),
        (True, 127, 31),
    ],
)
def test_buckets_are_those_of_the_paper(both_sides: bool, relative: int, bucket: int) -> None:
    """32 buckets up to a distance of 128, as Mesh TensorFlow gives them."""
    query, key = torch.tensor([200]), torch.tensor([200 + relative])
    assert buckets(query, key, both_sides, 32, 128).item() == bucket


def test_initial_values_are_those_of_t5() -> None:
    """Deviations make up for what scores lack, a scale; a head of its own has that of t5x."""
    config = model_config(MODEL)
    hidden, heads, inner = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.intermediate_size,
    )
    q = (hidden * config.head_dim) ** -0.5
    wanted = {
        "embedding": 1.0, "bias": hidden**-0.5, "source_bias": hidden**-0.5, "head": hidden**-0.5, "cross.q": q,
        "cross.kv": hidden**-0.5, "cross.out": heads**-0.5, "attention.out": heads**-0.5, "mlp.up": hidden**-0.5,
        "mlp.down": inner**-0.5,
    }  # fmt: skip
    for weight in weight_table(config):
        values = weight.initial_rows(0, 0, weight.num_rows, None).double()
        name = (
            weight.name.removesuffix(".weight").partition("layers.")[2].partition(".")[2]
            or weight.name[:-7]
        )
        if "norm" in name:
            assert torch.equal(values, torch.ones_like(values)), weight.name
            continue
        parts = [values] if name != "attention.qkv" else values.chunk(3)
        stds = [wanted[name]] if name != "attention.qkv" else [q, hidden**-0.5, hidden**-0.5]
        for part, std in zip(parts, stds, strict=True):
            # The deviation of n samples is off by std/√(2n); five times that is met by chance once
            # in a million.
            assert abs(part.std().item() / (0.5 * std) - 1) < 5 / math.sqrt(2 * part.numel()), (
                weight.name
            )


def test_an_encoder_decoder_needs_a_source() -> None:
    model = load_tiny("t5")
    with pytest.raises(ValueError, match=r"needs `SequenceInfo\.source`"):
        model(torch.zeros(1, 4, dtype=torch.int64), SequenceInfo.whole(4, torch.device("cpu")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder_layers": 5}, "encoder_layers 5 must be less than num_layers 5"),
        ({"relative_buckets": 30}, "relative_buckets 30 must be a multiple of 4"),
        ({"relative_distance": 16}, "relative_distance 16 must be more than half of the 32"),
        ({"task": "causal"}, "task = 'causal': should be 'seq2seq'"),
        ({"family": "mt5", "scale_head": True}, "scale_head = True: should be False"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_config(MODEL | change)


def theirs_in(folder: Path, case: str) -> Any:
    """A random model of transformers, saved to a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case])
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    randomize(model, own_head=case in OWN_HEAD)
    model.save_pretrained(folder)
    return model


def load_tiny(case: str) -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        theirs_in(Path(folder), case)
        return load_model(Path(folder))


TOKENS = torch.randint(2, 99, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", ["t5", "t5-gated", "mt5"])
def test_a_copy_opens_in_transformers_with_the_same_head(case: str, tmp_path: Path) -> None:
    """transformers 5 says of every T5 that it is tied; a head of its own is known by its tensor,
    and unscaled."""
    transformers = pytest.importorskip("transformers")
    theirs = theirs_in(tmp_path / "theirs", case)
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (case in OWN_HEAD)
    write_model(open_source(tmp_path / "theirs"), tmp_path / "ours")
    copied = load_file(tmp_path / "ours" / "model.safetensors")
    assert copied.keys() == stored.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in stored.items())
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert torch.equal(their_logits(again, TOKENS), their_logits(theirs, TOKENS))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_config_says_of_the_head(tied: bool, scaled: bool) -> None:
    """Both keys are written: transformers 4 takes the first for both facts, and 5 the second where
    it is there."""
    written = to_hf_config(model_config(MODEL | {"tie_embeddings": tied, "scale_head": scaled}))
    assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == (tied, scaled)
    transformers = pytest.importorskip("transformers")
    assert transformers.T5Config(**written).scale_decoder_outputs is scaled


def test_a_config_of_transformers_4_says_both_by_one_key(tmp_path: Path) -> None:
    theirs_in(tmp_path, "t5-gated")
    values = json.loads((tmp_path / "config.json").read_text())
    for tied in (True, False):
        old = {key: value for key, value in values.items() if key != "scale_decoder_outputs"}
        (tmp_path / "config.json").write_text(json.dumps(old | {"tie_word_embeddings": tied}))
        config = model_config({"hf": str(tmp_path)})
        # Of a T5 that is tied and scaled, another head in the file is found when it is loaded.
        assert (config.tie_embeddings, config.scale_head) == (tied, tied)


def test_copies_of_the_embedding_are_passed_over_and_nothing_else(tmp_path: Path) -> None:
    theirs = theirs_in(tmp_path, "t5")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert (
            our_logits(load_model(tmp_path), TOKENS) - their_logits(theirs, TOKENS)
        ).abs().max().item() <= 1e-4
    tensors["encoder.embed_tokens.weight"][7] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"encoder\.embed_tokens\.weight must be a copy .* row 7 is the first"
    ):
        load_model(tmp_path)
