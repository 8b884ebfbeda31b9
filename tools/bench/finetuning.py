"""Finetuning a small model on a task it can learn from the examples: what it answers before and
after.

A model that has read random words only is taught by a chat to tell a word's last letter, or to
write it in capitals, now and then in a whole sentence; then to give the bare answer, by adapters
(LoRA) and chats that do, and by DPO that prefers it. Answers are transformers' own greedy
generation, from the folders the runs leave, to words that no row had.

    python tools/bench/finetuning.py [--steps 600] [key=value …]
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import step_folder
from megalite.config_file import parse_config
from megalite.data.formats import Format, Settings
from megalite.data.preprocess import preprocess
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer_training import train_tokenizer
from megalite.train import train

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MODEL = {
    "family": "llama", "hidden_size": 96, "intermediate_size": 256, "num_layers": 3, "num_attention_heads": 4,
    "max_positions": 256, "init_std": 0.05,
}  # fmt: skip


def word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5)))


def question(rng: random.Random) -> tuple[str, str]:
    asked = word(rng)
    return rng.choice(
        [(f"last letter of {asked}?", asked[-1]), (f"{asked} in capitals?", asked.upper())]
    )


def in_a_sentence(answer: str) -> str:
    return f"it is {answer} I think"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(folder: Path, num_rows: int) -> list[tuple[str, str]]:
    """All data of the three runs. Returns questions that none of it has."""
    rng = random.Random(0)
    texts = write(
        folder / "text.jsonl",
        [{"text": " ".join(word(rng) for _ in range(60))} for _ in range(600)],
    )
    train_tokenizer([texts], folder / "tokenizer", 257)
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    preprocess([texts], folder / "text", folder / "tokenizer", append_eod=True)
    asked = sorted({question(rng) for _ in range(num_rows + 500)})
    rng.shuffle(asked)
    seen, unseen = asked[500:], asked[:500]

    def chat(ask: str, answer: str) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        }

    def pair(ask: str, answer: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": ask}],
            "chosen": answer,
            "rejected": in_a_sentence(answer),
        }

    rows: dict[tuple[str, Format], list[dict[str, Any]]] = {
        ("chat", "chat"): [chat(q, a if rng.random() < 0.4 else in_a_sentence(a)) for q, a in seen],
        ("chat-valid", "chat"): [
            chat(q, a if rng.random() < 0.4 else in_a_sentence(a)) for q, a in unseen
        ],
        ("bare", "chat"): [chat(q, a) for q, a in seen],
        ("bare-valid", "chat"): [chat(q, a) for q, a in unseen],
        ("pairs", "preference"): [pair(q, a) for q, a in seen[:2000]],
        ("pairs-valid", "preference"): [pair(q, a) for q, a in unseen],
    }
    for (name, kind), found in rows.items():
        print(
            preprocess_rows(
                [write(folder / f"{name}.jsonl", found)],
                folder / name,
                Settings(kind, str(folder / "tokenizer")),
            )
        )
    return unseen


def run(folder: Path, name: str, model: dict[str, Any], data: str, steps: int, lr: float, rest: dict[str, Any],
        overrides: list[str]) -> Path:  # fmt: skip
    """The checkpoint that a run leaves."""
    labelled = data != "text_text_document"
    config = parse_config(
        {
            "run": {"name": name, "dir": str(folder / "runs")},
            "model": model,
            "data": {
                "train": [{"path": str(folder / data)}], "seq_length": 128, "document_mask": labelled,
                "valid": [{"path": str(folder / f"{data}-valid")}] if labelled else [],
                "tokenizer": str(folder / "tokenizer"),
            },
            "train": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 16, "precision": "fp32"},
            "optimizer": {"lr": lr, "schedule": {"name": "cosine", "warmup_steps": steps // 20}},
            "observe": {"log_every": 50, "eval_every": max(steps // 4, 1)},
            **rest,
        },
        overrides,
    )  # fmt: skip
    train(config)
    return step_folder(config.run.folder / "checkpoints", steps)


def answers(model: Path, questions: list[tuple[str, str]]) -> dict[str, float]:
    """Shares of right answers, bare or in a sentence, and of bare ones."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pad = "<|endoftext|>"
    tokenizer = AutoTokenizer.from_pretrained(
        model, trust_remote_code=False, padding_side="left", pad_token=pad
    )
    network = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=False, dtype=torch.float32
    )
    chats = [[{"role": "user", "content": ask}] for ask, _ in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = network.generate(
        **inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(
        "   ",
        *(f"{ask} → {text!r}" for (ask, _), text in list(zip(questions, said, strict=True))[:3]),
        sep="\n    ",
    )
    bare = sum(text == answer for text, (_, answer) in zip(said, questions, strict=True)) / len(
        said
    )
    told = sum(
        text == in_a_sentence(answer) for text, (_, answer) in zip(said, questions, strict=True)
    ) / len(said)
    return {"right": bare + told, "right and bare": bare}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of supervised finetuning")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = prepare(folder, args.rows)
        overrides = args.overrides
        model = {**MODEL, "vocab_size": 257}
        start = run(folder, "pretrained", model, "text_text_document", 50, 2e-3, {}, overrides)
        print("pretrained", answers(start, questions))
        tuned = run(folder, "chat", {"hf": str(start)}, "chat", args.steps, 2e-3, {}, overrides)
        print("after SFT", answers(tuned, questions))
        lora = {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}}
        adapted = run(
            folder, "lora", {"hf": str(tuned)}, "bare", args.steps // 2, 2e-3, lora, overrides
        )
        print("after LoRA", answers(adapted, questions))
        dpo = {"objective": {"name": "dpo", "beta": 0.1}}
        preferring = run(folder, "dpo", {"hf": str(tuned)}, "pairs", 60, 5e-5, dpo, overrides)
        print("after DPO", answers(preferring, questions))
        lines = (folder / "runs" / "dpo" / "metrics.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            if "valid_loss" in line:
                print({name: round(x, 4) for name, x in line.items()})


if __name__ == "__main__":
    main()
