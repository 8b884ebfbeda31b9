"""Tasks of one's own for lm-evaluation-harness: a folder of YAML and jsonl that needs no network;
and a tokenizer."""

from __future__ import annotations

import json
import string
from pathlib import Path

import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

ANIMALS = ("cat", "dog", "hen", "cow", "fox", "owl", "bee", "pig", "ant")
LETTERS = string.ascii_letters + string.digits + string.punctuation
NAMES = ("sounds", "letters", "story", "next_word")
"""multiple choice; of one letter, some of which are what the model would say; rolling perplexity;
generation"""

JUDGE = """
import zlib

def judge(row, answers):
    return {"exact_match": float(answers[0] == row["answer"]), "said": zlib.crc32(answers[0].encode())}
"""
"""`said` is another number for another text."""
CHAT = """\
{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    rows = {
        "sounds": [
            {"query": f"What does the {animal} say on day {day}?", "gold": day % 3,
             "choices": ["moo", "wuff and wuff", "nothing at all"]}
            for day, animal in enumerate(ANIMALS)
        ],
        "letters": [{"query": f"the {animal}", "choices": list(LETTERS), "gold": day}
                    for day, animal in enumerate(ANIMALS)],
        "story": [{"text": f"The {animal} met a {other}. " * (2 + 3 * day)}
                  for day, (animal, other) in enumerate(zip(ANIMALS, ANIMALS[3:], strict=False))],
        "next_word": [{"prompt": f"{animal} " * (1 + 7 * day), "answer": f"{animal}a"}
                      for day, animal in enumerate(ANIMALS)],
    }  # fmt: skip
    multiple_choice = {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    tasks = {
        "sounds": multiple_choice | {
            "num_fewshot": 1, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"},
        },
        "letters": multiple_choice | {"target_delimiter": ""},
        "story": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "next_word": {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("exact_match", "said")
            ],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(source | {"test_split": "test"} | task))
    with (folder / "next_word.yaml").open("a") as file:
        file.write("process_results: !function judges.judge\n")
    (folder / "judges.py").write_text(JUDGE)
    return folder


def write_tokenizer(folder: Path, vocab_size: int = 290, begins: bool = False) -> Path:
    """A byte-level BPE. `begins`: with a token that it puts before every text, and a chat template
    that does, too."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>"] if begins else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [" ".join(ANIMALS), "What does the say on day? The met a."] * 9, trainer
    )
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if begins:
        config["bos_token"] = "<s>"
        (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
