"""EleutherAI's lm-evaluation-harness with megalite's models. The only module that imports the
harness."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import lm_eval.api.task
import numpy as np
import rich.progress
import torch
import torch.distributed as dist
from lm_eval.api.model import LM, TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from torch import Tensor

from megalite.comm.collectives import all_gather
from megalite.comm.mesh import ALONE, Axis
from megalite.data.contents import without_marks
from megalite.errors import ConfigError, DataError
from megalite.infer.answer import Answer
from megalite.infer.batch import Batch
from megalite.infer.generate import Generator, Score
from megalite.infer.sampling import Sampling
from megalite.utils.spelling import did_you_mean

ROWS_AT_ONCE = 64
"""Number of texts scored between two updates of the progress."""
MOST_TOKENS = 256
"""Length limit of an answer if its task does not say; the harness's own number."""
SECONDS_PER_LINE = 10.0
"""Interval of progress lines outside a terminal."""
T = TypeVar("T")
Pair = tuple[Any, list[int], list[int]]
"""(what was asked, tokens of the context, tokens of the continuation)"""

# Progress bars of these libraries would appear in the middle of our own lines.
lm_eval.api.task.tqdm = lambda items, **_: items
datasets.disable_progress_bars()
logging.getLogger("lm_eval").setLevel(logging.ERROR)


class HarnessModel(TemplateLM):
    """Adapts a `Generator` to the harness's model interface.

    Data ranks, which hold the same part of the model, share the documents: each evaluates its own.
    Tokenizing, truncating and stopping are those of the harness's `hf` model."""

    def __init__(self, generator: Generator, data: Axis = ALONE, console: Console | None = None):
        """Wrap `generator`. `data` is the axis of ranks that share the documents; `console` shows
        the progress, None shows none."""
        super().__init__()
        self.generator, self._data, self._console = generator, data, console
        self._rank, self._world_size, self._device = data.rank, data.size, generator.model.device

    @property
    def eot_token_id(self) -> int | None:
        """Return the id of the end-of-document token, or None."""
        return self.generator.tokenizer.eod_id

    @cached_property
    def prefix_token_id(self) -> int:
        """Return the token that a text without a context begins with. Raise ConfigError if the
        tokenizer has none."""
        tokenizer = self.generator.tokenizer
        found = next((i for i in (tokenizer.begin_id, tokenizer.eod_id) if i is not None), None)
        if found is None:
            raise ConfigError(
                "the model's tokenizer has neither a token that begins a text nor one that ends it"
            )
        return found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of `string`. Unless `add_special_tokens` is False or the text
        already begins so, they begin with the tokenizer's begin token. Rendered conversations are
        told by their marks."""
        tokenizer = self.generator.tokenizer
        if (plain := without_marks(string)) != string:  # a conversation's, by `apply_chat_template`
            # Templates often write the begin token themselves; it must not be there twice.
            begins = add_special_tokens is False or plain.startswith(
                tokenizer.decode([self.prefix_token_id])
            )
            return [
                *([] if begins else tokenizer.begin_ids),
                *self.generator.contents.encode_marked(string),
            ]
        if add_special_tokens is False or string.startswith(
            tokenizer.decode([self.prefix_token_id])
        ):
            return tokenizer.encode(string)
        return tokenizer.encode_prompt(string)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (logprob, is greedy) of each continuation. Progress is shown by `_track`, not by
        tqdm."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Return (logprob, is greedy) of each continuation given its context. An empty
        continuation, merged by the tokenizer into the context's last token, counts as certain, as
        in the `hf` model. Raise ConfigError for one longer than the model."""
        capacity = self.generator.model.capacity
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > capacity:
            raise ConfigError(
                f"a continuation of {longest} tokens cannot be scored: the model takes {capacity}"
            )
        # One more than the capacity: the last token is only predicted, never an input.
        rows = [[*context, *continuation][-capacity - 1 :] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        results = [(0.0, True)] * len(rows)
        # Longest first, so that a batch too large for the memory fails at once.
        order = sorted(
            (number for number, count in enumerate(counts) if count),
            key=lambda number: -len(rows[number]),
        )
        chunks = [
            order[start : start + ROWS_AT_ONCE] for start in range(0, len(order), ROWS_AT_ONCE)
        ]
        for chunk in self._track(chunks, f"scoring {len(order):,} texts", len(chunks)):
            scores = self._score([rows[number] for number in chunk])
            for number, (logprobs, likeliest) in zip(chunk, scores, strict=True):
                count = counts[number]
                # Only the continuation, which stands at the end, is judged.
                results[number] = float(logprobs[-count:].sum()), bool(likeliest[-count:].all())
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the logprob of each whole text, summed over disjoint windows of the model's
        capacity."""
        windows: list[Pair] = []
        counts: list[int] = []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.generator.model.capacity,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(window)) for window in cut]
            windows += found
            counts.append(len(found))
        # All windows of all texts in one call, so that batches are full; then each text takes its
        # own.
        each = iter(self._loglikelihood_tokens(windows))
        return [sum(next(each)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the generated text of each request, cut at its stop strings."""
        generator, answers, stops = self.generator, [], []
        batch = Batch(generator.model, generator.ends)
        # The number is the seed, since a task may repeat a request to get several samples.
        for number, request in enumerate(requests):
            context, settings = request.args
            answer, stop = self._answer(context, settings, number)
            batch.add(answer)
            answers.append(answer)
            stops.append(stop)
        for _ in self._track(self._finish(batch), "answering", len(answers)):
            pass
        texts = [generator.tokenizer.decode_plain(answer.tokens) for answer in answers]
        return [
            postprocess_generated_text(text, stop, None)
            for text, stop in zip(texts, stops, strict=True)
        ]

    def _answer(
        self, context: str, settings: Mapping[str, Any], seed: int
    ) -> tuple[Answer, list[str]]:
        """Return the Answer to start and its stop strings. `settings` are the task's generation
        settings. Raise ConfigError for settings that are not supported, and for answers as long as
        the model's capacity."""
        generator = self.generator
        known = normalize_gen_kwargs(dict(settings), MOST_TOKENS)
        eos = None if self.eot_token_id is None else generator.tokenizer.decode([self.eot_token_id])
        stop = [*handle_stop_sequences(known.pop("until"), eos), *generator.habits.stop]
        most, sampled = known.pop("max_gen_toks"), {}
        drawn = known.pop("do_sample")
        for name, value in known.items():
            if name not in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
                raise ConfigError(
                    f"a task asks for generation with {name} = {value!r}, which megalite does not know"
                )
            sampled[name] = value
        # What the task leaves open is greedy, not as the model's folder says, but for its penalty
        # and rules.
        usual = generator.sampling
        sampled = {
            "repetition_penalty": usual.repetition_penalty,
            "rules": usual.rules,
            "seed": seed,
        } | sampled
        sampling = Sampling(
            **sampled | {"temperature": sampled.get("temperature", 0.0) if drawn else 0.0}
        )
        # The prompt is cut on the left, as the `hf` model does, so that the answer fits.
        room = generator.model.capacity - most
        if room <= 0:
            raise ConfigError(
                f"a task asks for answers of {most} tokens from a model that takes {generator.model.capacity} in all"
            )
        prompt = generator.prompt_ids(self.tok_encode(context) or context)[-room:]
        return generator.start(generator.request(prompt, most, sampling, stop)), stop

    def _score(self, rows: Sequence[Sequence[int]]) -> Sequence[Score]:
        """Return the Scores of `rows`; Rehearsal overrides it."""
        return self.generator.score(rows)

    def _finish(self, batch: Batch) -> Iterator[Answer]:
        """Yield the answers as they end; Rehearsal overrides it."""
        yield from (answer for answer in batch.finish() if answer.finish)

    def _track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield `items` and show progress as `what` of `total`: a bar on a terminal, otherwise (a
        job's log) a line every few seconds."""
        if self._console is not None and self._console.is_terminal:
            yield from rich.progress.track(
                items, what, total, console=self._console, transient=True
            )
            return
        said = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            if self._console is not None and time.monotonic() - said >= SECONDS_PER_LINE:
                said = time.monotonic()
                self._console.print(f"{what}: {number:,} of {total:,}", highlight=False)

    # Interface for chats.

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the rendered conversation, with control tokens of its messages marked for
        `tok_encode`."""
        return self.generator.contents.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the source of the chat template for the harness's records; empty if
        `chat_template` is false."""
        return self.generator.chat_template.source if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's fingerprint, which the harness caches requests by."""
        return self.generator.tokenizer.fingerprint()

    # Collectives among the ranks that share the documents.

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather a tensor of every data rank, flattened and concatenated."""
        return all_gather(tensor.reshape(-1), self._data, 0)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all data ranks on rank `dst`, and None on the others."""
        if self._data.size == 1:
            return [obj]
        found: list[Any] = [None] * self._data.size
        dist.all_gather_object(found, obj, group=self._data.group)
        return found if self._data.rank == dst else None


class Rehearsal(HarnessModel):
    """Does everything that a `HarnessModel` does except run the model, to find errors
    beforehand."""

    def _score(self, rows: Sequence[Sequence[int]]) -> Sequence[Score]:
        return [
            Score(torch.zeros(len(row) - 1), torch.zeros(len(row) - 1, dtype=torch.bool))
            for row in rows
        ]

    def _finish(self, batch: Batch) -> Iterator[Answer]:
        return iter(batch.waiting)


class Tasks(NamedTuple):
    """Holds loaded tasks and the limit of documents per task."""

    loaded: dict[str, Any]
    """The harness's own form: tasks, groups, group_map."""
    limit: int | None

    @property
    def fewest(self) -> int:
        """Return the number of documents of the smallest task, the limit applied."""
        with _seeded():
            # Some tasks draw their documents when these are first asked for.
            counts = [len(task.eval_docs) for task in self.loaded["tasks"].values()]
        return min([*counts, self.limit] if self.limit else counts)

    def texts(self) -> Iterator[tuple[str, int, tuple[str, ...]]]:
        """Yield the task, the number and the texts of each document: what is asked, with each answer
        that is judged or wanted."""
        with _seeded():
            for name, task in self.loaded["tasks"].items():
                task.build_all_requests(limit=self.limit, rank=0, world_size=1)
                texts: dict[int, list[str]] = {}
                for request in task.instances:
                    parts = request.args
                    if request.request_type == "generate_until":
                        wanted = task.doc_to_target(request.doc)
                        parts = (parts[0], f" {wanted}" if isinstance(wanted, str) else "")
                    texts.setdefault(request.doc_id, []).append("".join(parts))
                yield from ((name, number, tuple(found)) for number, found in texts.items())

    def rehearse(self, generator: Generator) -> None:
        """Run the tasks without the model, to find in a moment what would fail after hours. Raise
        ConfigError or DataError."""
        try:
            self.run(Rehearsal(generator), uncertainty=0)
        except (ConfigError, DataError):
            raise
        except Exception as error:  # tasks hold code of their own, which may raise anything
            names = ", ".join(self.loaded["tasks"])
            raise DataError(
                f"the tasks {names} cannot be evaluated: {type(error).__name__}: {error}"
            ) from error

    def run(
        self, model: LM, uncertainty: int = 1000, samples: bool = False, chat: bool = False
    ) -> dict[str, Any] | None:
        """Evaluate `model` and return the harness's results on the first of the ranks that share
        the documents, None on the others. `uncertainty` is the number of bootstrap iterations for
        standard errors without a formula, 0 for no standard errors. `samples` keeps each document's
        answers; `chat` applies the chat template."""
        with _seeded():
            return evaluate(
                model,
                self.loaded,
                limit=self.limit,
                bootstrap_iters=uncertainty,
                log_samples=samples,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )


def load_tasks(
    names: Sequence[str | dict[str, Any]],
    include_path: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> Tasks:
    """Load tasks, groups or tags with their data; `names` are names, YAML files or the harness's
    configs.

    `include_path` is a folder with more tasks, `limit` the number of documents per task. `shots` is
    the number of few-shot examples, except for tasks that want none. Raise ConfigError for an
    unknown name, and DataError for a dataset that cannot be loaded."""
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"{include_path}, where tasks should be, is not a folder")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _seeded():
        manager = _index_tasks(names, str(include_path) if include_path else None)
        for name in names:
            found = _load_task(manager, name)
            twice = sorted(loaded["tasks"].keys() & found.get("tasks", {}).keys())
            # Of a group, a task may come again.
            if twice and isinstance(name, str) and Path(name).is_file():
                raise ConfigError(
                    f"{name}: a task before it is named {twice[0]!r} as well; name one of them otherwise"
                )
            for part in loaded:
                loaded[part] |= found.get(part, {})
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        # A task with num_fewshot: 0 is made for no examples, as the harness's own command sees it,
        # too.
        if own is None or (shots is not None and own != 0):
            task.set_config("num_fewshot", shots or 0)
        # Examples must be the same on all ranks, and in every evaluation of a run.
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return Tasks(loaded, limit)


def _index_tasks(names: Sequence[str | dict[str, Any]], include_path: str | None) -> TaskManager:
    """Return an index of the user's own tasks if they include all `names`. Otherwise index also the
    harness's more than ten thousand, which takes a while."""
    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(
        not isinstance(name, str) or name in own.all_subtasks or Path(name).is_file()
        for name in names
    ):
        return own
    return TaskManager(include_path=include_path)


def _load_task(manager: TaskManager, name: str | dict[str, Any]) -> dict[str, Any]:
    """Load one task or group. Raise ConfigError for an unknown name and DataError if loading
    fails."""
    if isinstance(name, str) and name not in manager.all_tasks and not Path(name).is_file():
        hint = did_you_mean(
            name, manager.all_tasks, "`lm-eval ls tasks` lists those of the harness"
        )
        raise ConfigError(
            f"no task is named {name!r}; {hint}; a task of your own is found by --include-path FOLDER"
        )
    try:
        return manager.load([name])
    except Exception as error:  # whatever datasets, the network and the task's own code raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"task {name if isinstance(name, str) else name['task']} cannot be loaded: {reason} (without a network, "
            "its dataset must be in the Hugging Face cache, or a file that the task names)"
        ) from error


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global random generators as the harness's own command does, and restore them
    afterwards. Some tasks draw from them, and every rank must draw the same."""
    restore: list[tuple[Callable[[Any], None], Any]]
    restore = [(random.setstate, random.getstate()), (np.random.set_state, np.random.get_state())]
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            for put_back, state in restore:
                put_back(state)


def numbers_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics as TASK/METRIC, or TASK/METRIC/FILTER for a task that extracts answers in
    several ways. Standard errors are left out."""
    return {name: value for name, _, _, value in _metrics(results)}


def directions_of(results: Mapping[str, Any]) -> dict[str, bool | None]:
    """Return whether a higher number is better, by the names of `numbers_of`; None where the task
    does not say."""
    said = results["higher_is_better"]
    return {name: said.get(task, {}).get(metric) for name, task, metric, _ in _metrics(results)}


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Yield the name of `numbers_of`, the task, the metric and its value."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if how and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                name = f"{task}/{metric}" + ("" if how == "none" else f"/{how}")
                yield name, task, metric, float(value)
