"""`megalite annotate`: the rows of which a model is least certain become tasks of an annotation
tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalite.data.annotation_tasks import (
    PAIR,
    WRITERS,
    Kind,
    Task,
    label_studio_config,
    spans_of,
)
from megalite.data.annotations import OUTSIDE
from megalite.errors import ConfigError, DataError
from megalite.infer.classify import TASKS, Classifier, Question, question_of
from megalite.infer.encode import read_lines
from megalite.infer.generate import Generator, find_model
from megalite.infer.sampling import Sampling
from megalite.infer.uncertainty import (
    Measure,
    Uncertain,
    least_certain_answers,
    least_certain_texts,
)
from megalite.models import model_config
from megalite.utils.files import replacing
from megalite.utils.outside import shown


class Asked(NamedTuple):
    """Holds what to export."""

    input: Sequence[Path]
    tool: str
    """A key of WRITERS."""
    output: Path
    num_rows: int = 100
    by: Measure | None = None
    """None: entropy of classes, surprisal of answers."""
    diverse: bool = False
    chat: bool = False
    max_tokens: int = 128


def write_tasks(path: Path, asked: Asked) -> list[str]:
    """Write the tasks of the model in `path`, a run, a checkpoint or a Hugging Face folder, and for
    Label Studio the labelling config beside them. Return lines that say so. Raise ConfigError or
    DataError."""
    if asked.num_rows < 1:
        raise ConfigError(f"--count {asked.num_rows} leaves nothing to label; give at least 1")
    folder = find_model(path)
    of_classes = model_config({"hf": str(folder)}).task in TASKS
    if of_classes and asked.chat:
        raise ConfigError("--chat goes with models that answer, not with models of classes")
    if not of_classes and (asked.by or asked.diverse):
        raise ConfigError(
            "--by and --diverse go with models of classes; of answers it is surprisal"
        )
    make = _tasks_of_classes if of_classes else _tasks_of_answers
    tasks, kind, labels, count = make(folder, asked)
    text = WRITERS[asked.tool](tasks, kind, f"{path.name or folder.name}")
    config = asked.output.with_suffix(".config.xml")
    try:
        with replacing(asked.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
        if asked.tool == "label-studio":
            names = list(dict.fromkeys(name for task in tasks for name in task.shown))
            with replacing(config) as temporary:
                temporary.write_text(label_studio_config(names, kind, labels), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {asked.output}: {error.strerror or error}") from None
    most, least = (tasks[at].uncertainty for at in (0, -1))  # the least certain come first
    lines = [
        f"{asked.output}: {len(tasks):,} of {count:,} rows, uncertain by {most:.3f} to {least:.3f}"
    ]
    if asked.tool == "label-studio":
        lines.append(f"{config}: the labelling config of a project for them")
    return lines


def _tasks_of_classes(folder: Path, asked: Asked) -> tuple[list[Task], Kind, Sequence[str], int]:
    """Return the tasks of a model of classes, their kind, its labels, and how many rows there were."""
    found: dict[Question, str] = {}
    for where, line, row in read_lines(asked.input):
        question = Question(row) if isinstance(row, str) and row.strip() else question_of(row)
        if question is None:
            raise DataError(f"{where}: {shown(line)} has neither a 'text' nor a list of 'tokens'")
        found.setdefault(question, where)  # the same text is labelled once
    questions = [*found]
    if not questions:
        raise DataError(f"{', '.join(map(str, asked.input))}: there are no rows")
    classifier = Classifier.open(folder)
    chosen = least_certain_texts(
        classifier, questions, asked.num_rows, asked.by or "entropy", asked.diverse
    )
    kind: Kind = "classes" if classifier.problem == "multi_label" else "classification"
    labels: Sequence[str] = classifier.labels
    if classifier.task == "labels":
        kind, labels = "labels", _names_of_spans(classifier.labels)
    tasks = []
    for each in chosen:
        question = questions[each.number]
        tasks.append(_task(question, each, kind, found[question]))
    return tasks, kind, list(dict.fromkeys(labels)), len(questions)


def _names_of_spans(labels: Sequence[str]) -> list[str]:
    """Return the labels of spans, given those of their words: B-NAME and I-NAME are both NAME."""
    names = []
    for label in labels:
        part, dash, name = label.partition("-")
        if label != OUTSIDE:
            names.append(name if dash and part in ("B", "I") else label)
    return names


def _task(question: Question, chosen: Uncertain, kind: Kind, origin: str) -> Task:
    texts, said = {"text": question.text}, chosen.said
    if question.pair:
        texts[PAIR] = question.pair
    if kind == "labels":
        texts["text"] = " ".join(question.tokens)
        said = spans_of(question.tokens, said)
    return Task(texts, said, chosen.probability, chosen.uncertainty, origin)


def _tasks_of_answers(folder: Path, asked: Asked) -> tuple[list[Task], Kind, Sequence[str], int]:
    """Return the tasks of a generator: its answers, to be corrected."""
    found: dict[str, str] = {}
    for where, line, row in read_lines(asked.input):
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: {shown(line)} is no text, or has none under 'prompt'")
        found.setdefault(prompt, where)
    prompts = [*found]
    if not prompts:
        raise DataError(f"{', '.join(map(str, asked.input))}: there are no rows")
    generator = Generator.open(folder)
    sampling = Sampling(temperature=0.0, rules=generator.sampling.rules)
    requests = []
    for prompt in prompts:
        ids = generator.chat_ids([{"role": "user", "content": prompt}]) if asked.chat else prompt
        # Greedy: the answer to be corrected is the one that the model would give.
        request = generator.request(ids, asked.max_tokens, sampling)
        requests.append(generator.as_chat(request) if asked.chat else request)
    chosen = least_certain_answers(generator, requests, asked.num_rows)
    if not chosen:
        raise DataError("the model answers none of the prompts with a text that could be corrected")
    tasks = [
        Task({"prompt": prompts[x.number]}, x.said, None, x.uncertainty, found[prompts[x.number]])
        for x in chosen
    ]
    return tasks, "completion", (), len(prompts)
