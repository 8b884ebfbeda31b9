"""A run that starts from a Hugging Face model gives one back: sharded weights, tokenizer, chat
template, ids of special tokens and generation settings, also when the model it started from is
gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.export import keep_source
from megalite.checkpoint.folder import step_folder
from megalite.train import train
from small_runs import VOCAB, make_config
from tiny_models import CASES

transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEMPLATES = {"default": TEMPLATE, "tool_use": "{{ tools | tojson }}" + TEMPLATE}


def save_model(folder: Path) -> Any:
    """In several files, with a tokenizer and all its settings."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        **CASES["qwen3"] | {"vocab_size": VOCAB, "eos_token_id": [3, 5]}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(
        temperature=0.7, top_k=20, do_sample=True, eos_token_id=[3]
    )
    model.save_pretrained(folder, max_shard_size="20KB")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w3", unk_token="w0"
    )
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    return model


def test_what_lies_beside_the_weights_is_taken_along(tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    overrides = f"model.hf={tmp_path / 'hf'}", "checkpoint.every=1", "train.steps=2"
    overrides += "optimizer.lr=1e-30", "optimizer.schedule.min_lr=0.0"
    train(make_config(tmp_path, {}, *overrides, "train.stop_at=1"))
    (tmp_path / "hf").rename(tmp_path / "gone")
    # A run's own config has every field written out, and needs the folder no more.
    shutil.copy(tmp_path / "gone" / "config.json", tmp_path)
    config = make_config(tmp_path, {}, f"model.hf={tmp_path}", *overrides[1:])
    train(config)
    folder = step_folder(config.run.folder / "checkpoints", 2)
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder)
    stored = theirs.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in ours.state_dict().items()), (
        "no step changed them"
    )
    assert ours.config.eos_token_id == [3, 5]
    assert ours.generation_config.to_diff_dict() == theirs.generation_config.to_diff_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("w7 w9") == [7, 9]
    assert tokenizer.eos_token == "w3"
    assert tokenizer.chat_template == TEMPLATES
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "additional_chat_templates/tool_use.jinja" in manifest["files"]
    write_model(open_source(folder), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False)
        == "<user>w7"
    )
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None


def test_a_start_that_is_cut_short_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "hf")
    config = make_config(tmp_path, {}, f"model.hf={tmp_path / 'hf'}")
    copy, copied = shutil.copyfile, list[Path]()

    def fail_at_the_third(source: Path, target: Path) -> None:
        if len(copied) == 2:
            raise OSError(28, "No space left on device")
        copied.append(source)
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail_at_the_third)
    with pytest.raises(OSError, match="No space"):
        keep_source(config)
    monkeypatch.undo()
    keep_source(config)
    kept = {path.name for path in (config.run.folder / "source").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= kept
    assert not (config.run.folder / "source.tmp").exists()
