"""What encoder-decoders and encoders learn, on tasks that a script makes: how many targets of unseen
sources a small T5 gives word for word, and how much better a BERT tells classes that has been
trained on masked tokens before, at as many steps as one that has not.

The sources begin with what is asked: to say the digits behind it backwards, sorted, or each twice
but for zeros. The texts of the classes are words of one of eight subjects, of which the few
labelled rows have not all: a BERT that has read other texts knows which words go together. Runs are
ordinary ones, made with `megalite train` on one core each; a run that is there already is not made
again. Ends with status 1 where less than 95% of the targets are right, or the first BERT tells no
more than the other.

    python tools/bench/stack_learning.py FOLDER [targets] [classes] [--short]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runs import train

from megalite.data.indexed_writer import IndexedWriter

END, FIRST_DIGIT, NUM_DIGITS = 1, 5, 10
TASKS = (2, 3, 4)
"""Tokens that ask for the digits backwards, sorted, and twice."""
T5 = {
    "family": "t5", "vocab_size": 16, "hidden_size": 64, "head_dim": 16, "intermediate_size": 256, "num_layers": 4,
    "encoder_layers": 2, "num_attention_heads": 4, "max_positions": 64,
}  # fmt: skip
PAD, CLS, SEP, MASK, FIRST_WORD = 0, 2, 3, 4, 5
SUBJECTS, WORDS = 8, 64
VOCAB = FIRST_WORD + SUBJECTS * WORDS
BERT = {
    "family": "bert", "vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64,
}  # fmt: skip
LABELS = [f"subject {number}" for number in range(SUBJECTS)]


def target_of(task: int, digits: Sequence[int]) -> list[int]:
    """Return what answers a source."""
    if task == TASKS[0]:
        return [*reversed(digits)]
    if task == TASKS[1]:
        return sorted(digits)
    return [x for digit in digits for x in (digit,) * (1 if digit == FIRST_DIGIT else 2)]


def write_rows(prefix: Path, count: int, longest: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16, np.uint8) as writer:
        for number in range(count):
            task = TASKS[number % len(TASKS)]
            length = draw.integers(2, longest + 1)
            digits = (FIRST_DIGIT + draw.integers(NUM_DIGITS, size=length)).tolist()
            source, target = [task, *digits, END], [*target_of(task, digits), END]
            values = [0] * len(source) + [1] * len(target)
            ids = np.array([*source, *target], np.uint16)
            writer.add_documents(ids, [len(ids)], np.array(values, np.uint8))
    prefix.with_name(f"{prefix.name}.json").write_text('{"format": "seq2seq"}')


def write_texts(prefix: Path, count: int, seed: int, labelled: bool) -> None:
    """Write texts of six words, most of them of one subject; `labelled` with it as their class."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16, np.uint16 if labelled else None) as writer:
        for _ in range(count):
            subject = int(draw.integers(SUBJECTS))
            subjects = np.where(draw.random(6) < 0.8, subject, draw.integers(SUBJECTS, size=6))
            words = FIRST_WORD + subjects * WORDS + draw.integers(WORDS, size=6)
            ids = np.array([CLS, *words, SEP], np.uint16)
            values = np.full(len(ids), 1 + subject, np.uint16)
            writer.add_documents(ids, [len(ids)], values if labelled else None)
    note = {"format": "classification", "labels": LABELS} if labelled else {}
    prefix.with_name(f"{prefix.name}.json").write_text(json.dumps(note))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of BERT's special tokens and words."""
    import tokenizers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += [f"w{number}" for number in range(FIRST_WORD, VOCAB)]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]")
    )
    made.add_special_tokens(names[:FIRST_WORD])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    tokens = {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def config_of(folder: Path, kind: str, steps: int, lr: float, **sections: Any) -> dict[str, Any]:
    source, valid = ([{"path": str(folder / f"{kind}-{part}")}] for part in ("train", "valid"))
    data = {"train": source, "valid": valid, "document_mask": True} | sections.pop("data")
    return {
        "data": data,
        "train": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 16, "precision": "fp32"},
        "optimizer": {"lr": lr, "schedule": {"name": "linear", "warmup_steps": 0.1, "min_lr": 0.0}},
        "checkpoint": {"every": 0, "keep": 1},
        "observe": {"log_every": 50, "eval_every": 0, "eval_batches": 20},
        **sections,
    }  # fmt: skip


def last(lines: Sequence[dict[str, Any]], name: str) -> float:
    return next(line[name] for line in reversed(lines) if name in line)


def targets(folder: Path, short: bool) -> bool:
    """Train the T5 and tell how many targets are right."""
    longest, steps = (4, 900) if short else (8, 4000)
    for part, count, seed in (("train", 20_000 if short else 100_000, 1), ("valid", 1500, 2)):
        write_rows(folder / f"rows-{part}", count, longest, seed)
    config = config_of(
        folder, "rows", steps, 2e-3, model=T5, objective={"name": "seq2seq", "target_length": 64},
        data={"seq_length": 48},
    )  # fmt: skip
    exact = last(train("targets", config, folder), "valid_exact")
    print(f"T5 after {steps} steps: {exact:.1%} of the targets of unseen sources word for word")
    return exact >= 0.95


def classes(folder: Path, short: bool) -> bool:
    """Finetune a pretrained BERT and one that is not, and tell how many classes each tells."""
    steps, count = (400, 20_000) if short else (2000, 100_000)
    write_tokenizer(folder / "words")
    for part, texts, seed in (("train", count, 1), ("valid", 500, 2)):
        write_texts(folder / f"texts-{part}", texts, seed, labelled=False)
    for part, rows, seed in (("train", 96, 3), ("valid", 1000, 4)):
        write_texts(folder / f"classes-{part}", rows, seed, labelled=True)
    data = {"seq_length": 64, "tokenizer": str(folder / "words")}
    masked = {"name": "masked_lm", "share": 0.3}
    pretrain = config_of(
        folder, "texts", steps, 3e-3, model=BERT, objective=masked, data=data | {"packing": "best_fit"}
    )  # fmt: skip
    train("pretrained", pretrain, folder)
    checkpoint = folder / "runs" / "pretrained" / "checkpoints" / f"step-{steps:08d}"
    head = {"task": "classification", "labels": LABELS}
    found = {}
    for name, model in (("finetuned", {"hf": str(checkpoint)}), ("from scratch", BERT)):
        config = config_of(folder, "classes", 100, 1e-3, model=model | head, data=data)
        found[name] = last(train(name.replace(" ", "-"), config, folder), "valid_accuracy")
        print(
            f"BERT {name}, 100 steps on 96 rows: {found[name]:.1%} of the classes of unseen texts"
        )
    return found["finetuned"] > found["from scratch"]


PARTS = {"targets": targets, "classes": classes}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for data and runs")
    parser.add_argument(
        "parts", nargs="*", default=[*PARTS], help="targets, classes (default: both)"
    )
    parser.add_argument("--short", action="store_true", help="easier tasks, in two minutes")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    succeeded = [PARTS[part](arguments.folder, arguments.short) for part in arguments.parts]
    return int(not all(succeeded))


if __name__ == "__main__":
    sys.exit(main())
