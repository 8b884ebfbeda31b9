"""A base model that is given a chat template and finetuned on chats ends its answers, here and in
transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chats import CHATML, write_rows, write_tokenizer
from megalite.checkpoint.convert import open_source, write_model
from megalite.cli import main
from megalite.config_file import parse_config
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import load_tokenizer
from megalite.infer.generate import find_model
from megalite.train import train

transformers = pytest.importorskip("transformers")
ANSWER = "the capital"


@pytest.mark.parametrize(("lora", "is_special"), [(False, True), (True, False)])
def test_a_finetuned_base_model_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: bool, is_special: bool
) -> None:
    base = write_tokenizer(tmp_path / "base", CHATML)
    if not is_special:
        values = json.loads((base / "tokenizer.json").read_text())
        for token in values["added_tokens"]:
            token["special"] = token["content"] != "<|im_end|>"
        (base / "tokenizer.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}] * 2
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}] * 8)
    preprocess_rows([str(rows)], tmp_path / "chats", Settings("chat", str(base)))
    run = parse_config(
        {
            "run": {"name": "chats", "dir": str(tmp_path)}, "model": {"hf": str(base)},
            "data": {"train": [{"path": str(tmp_path / "chats")}], "seq_length": 48, "tokenizer": str(base)},
            "train": {"steps": 30, "global_batch_size": 2, "precision": "fp32"}, "checkpoint": {"every": 0},
            "optimizer": {"lr": 1e-2, "schedule": {"name": "constant"}},
            **({"lora": {"rank": 16, "alpha": 64, "targets": "all-linear"}} if lora else {}),
        }
    )  # fmt: skip
    train(run)
    capsys.readouterr()
    asked = ["generate", str(run.run.folder), "--chat", "--prompt", "hello", "--temperature", "0"]
    assert main(asked) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    # What is handed on: the checkpoint, and what is made of it.
    folder, tokenizer = find_model(run.run.folder), load_tokenizer(base)
    end = tokenizer.vocabulary()["<|im_end|>"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    write_model(open_source(folder), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor(
        [tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")]
    )
    said = theirs.generate(prompt, do_sample=False, max_new_tokens=40)[
        0, prompt.shape[1] :
    ].tolist()
    assert said == [*tokenizer.encode(ANSWER), end]
