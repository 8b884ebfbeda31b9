"""Comparison of generated answers with references from a jsonl file: BLEU, ROUGE, F1, exact match,
accuracy."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megalite.data.contents import ContentEncoder
from megalite.errors import DataError
from megalite.utils.spelling import instead_of

ROUGES = ("rouge1", "rouge2", "rougeL")
CORPUS_ROUGES = ("rouge1", "rouge2", "rougeLsum")


def references_task(
    file: Path, contents: ContentEncoder | None, max_tokens: int, stop: Sequence[str]
) -> dict[str, Any]:
    """Return a task for the harness, named after `file`.

    Each line of the file holds a `prompt`, a text or a list of messages, and a `completion`, the
    reference answer or a list of them, of which the best counts; or `messages`, whose last is the
    reference answer. `contents` renders messages, and
    also plain texts, by the chat template; None leaves texts as they are and refuses messages.
    `max_tokens` and the strings `stop` end an answer. Raise DataError, which names the line."""
    import datasets

    rows = list(_read(file, contents))
    if not rows:
        raise DataError(f"{file} holds no rows")
    # BLEU is no mean over rows: its counts are summed over all of them first.
    measures = {"bleu": _bleu, **dict.fromkeys([*ROUGES, "f1", "exact_match", "accuracy"], _mean)}
    return {
        "task": file.stem,
        # Instead of a dataset's name; the harness passes settings that are not needed here.
        "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": lambda row: row["wanted"],
        "process_results": lambda row, said: compare(said[0], row["wanted"]),
        "generation_kwargs": {"until": list(stop), "max_gen_toks": max_tokens, "do_sample": False},
        "metric_list": [
            {"metric": name, "aggregation": gather, "higher_is_better": True}
            for name, gather in measures.items()
        ],
    }


def _read(file: Path, contents: ContentEncoder | None) -> Iterator[dict[str, Any]]:
    """Yield prompt and references of each line. Raise DataError, which names the line."""
    try:
        # Not splitlines: a text may hold other characters that end lines.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        hint = instead_of(file) if isinstance(error, FileNotFoundError) else ""
        why = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"{file} cannot be read: {why}{hint}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _without_answer(json.loads(line))
            prompt, wanted = row["prompt"], row["completion"]
            wanted = [wanted] if isinstance(wanted, str) else wanted
            is_list = isinstance(wanted, list) and bool(wanted)
            if not is_list or not all(isinstance(text, str) for text in wanted):
                raise ValueError("`completion` must be a text, or a list of texts")
            if isinstance(prompt, str) and contents:
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(prompt, list):
                if contents is None:
                    raise ValueError("messages need --chat, and a model with a chat template")
                if not all(isinstance(message, dict) for message in prompt):
                    raise ValueError("a message of `prompt` is no object")
                prompt = contents.render(prompt)
            if not isinstance(prompt, str):
                raise ValueError("`prompt` must be a text, or a list of messages")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{file}, line {number}: {reason}; rows hold a prompt and a completion, or messages: {line[:200]}"
            ) from None
        yield {"prompt": prompt, "wanted": wanted}


def _without_answer(row: Any) -> Any:
    """Return a row of a chat, as `preprocess --format chat` takes them, as its prompt and its last
    answer; any other row as it is. Raise ValueError where a chat ends without an answer."""
    if not isinstance(row, dict) or "messages" not in row or "prompt" in row:
        return row
    messages = row["messages"]
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or len(messages) < 2:
        raise ValueError(
            "`messages` must be a list that ends with an answer, of the role assistant"
        )
    return {"prompt": messages[:-1], "completion": last.get("content")}


def compare(said: str, wanted: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of the answer `said` against the references `wanted`; the best reference
    counts.

    `bleu` holds the pair itself, since it is computed over the whole corpus. ROUGE is its F-measure
    with stems (Lin 2004). `f1` and `exact_match` are SQuAD's (Rajpurkar et al. 2016), which ignore
    case, articles and punctuation; `accuracy` ignores only the white space around a text."""
    rouges = [_rouge().score(text, said) for text in wanted]
    return {
        "bleu": (said, wanted),
        **{name: max(rouge[name].fmeasure for rouge in rouges) for name in ROUGES},
        "f1": max(f1(said, text) for text in wanted),
        "exact_match": exact_match(said, wanted),
        "accuracy": float(said.strip() in [text.strip() for text in wanted]),
    }


def corpus_scores(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return how near the texts `said` are to those `wanted`: BLEU and chrF of the whole corpus, 0
    to 100, as sacrebleu computes them, and means of ROUGE's F-measures with stems, 0 to 1. ROUGE-L
    takes each line of a text as a sentence (rougeLsum)."""
    import sacrebleu

    scored = [_rouge(CORPUS_ROUGES).score(*pair) for pair in zip(wanted, said, strict=True)]
    rouges = {name: _mean([each[name].fmeasure for each in scored]) for name in CORPUS_ROUGES}
    streams = [list(wanted)]
    bleu, chrf = (
        measure(list(said), streams).score
        for measure in (sacrebleu.corpus_bleu, sacrebleu.corpus_chrf)
    )
    return {"bleu": bleu, "chrf": chrf, **rouges}


@cache
def _rouge(names: tuple[str, ...] = ROUGES) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(names, use_stemmer=True)


def exact_match(said: str, wanted: Sequence[str]) -> float:
    """Return 1 where `said` is one of the texts `wanted`, word for word, else 0."""
    return float(_bare(said) in map(_bare, wanted))


def f1(said: str, wanted: str) -> float:
    """Return the harmonic mean of precision and recall over words, 0 to 1."""
    one, other = _bare(said), _bare(wanted)
    if not one or not other:
        return float(one == other)
    # Words that come several times count as often as both have them.
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))


def _bare(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation and articles."""
    # In SQuAD's own order: punctuation goes before articles are looked for.
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _bleu(pairs: Sequence[tuple[str, Sequence[str]]]) -> float:
    """Return the BLEU of the whole corpus, 0 to 100, as sacrebleu computes it (Post 2018)."""
    import sacrebleu

    most = max(len(wanted) for _, wanted in pairs)
    # sacrebleu wants reference streams of equal length: answers with fewer references have None in
    # the later ones.
    padded = [[*wanted, *[None] * (most - len(wanted))] for _, wanted in pairs]
    streams = [list(stream) for stream in zip(*padded, strict=True)]
    return sacrebleu.corpus_bleu([said for said, _ in pairs], streams).score


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
