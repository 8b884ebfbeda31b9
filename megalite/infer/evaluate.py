"""Evaluation of a trained model: tasks of EleutherAI's lm-evaluation-harness, or a comparison of
answers with references."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from megalite.checkpoint.folder import write_json
from megalite.checkpoint.train_state import read_train_state
from megalite.comm.mesh import Launch
from megalite.config_file import load_config
from megalite.data.chat import ChatTemplate
from megalite.data.contents import ContentEncoder, without_marks
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.infer.generate import Generator, find_model_on_ranks
from megalite.observe.wandb import WandbSink
from megalite.utils.outside import check_apart


class Asked(NamedTuple):
    """Holds what to evaluate and how."""

    tasks: Sequence[str] = ()
    """Task names, or YAML files."""
    include_path: Path | None = None
    """Folder with additional tasks."""
    data: Path | None = None
    """jsonl file of prompts and reference completions; see `references.py`."""
    tokens: str | None = None
    """Prefix of token files to measure the loss on, where there are neither tasks nor data. None:
    the validation data of the model's run."""
    limit: int | None = None
    """Number of documents per task, or of samples for a loss. None: all, or as many as in the run."""
    shots: int | None = None
    """Few-shot examples before each document. None: as many as the task says."""
    chat: bool = False
    """Render prompts by the model's chat template."""
    max_tokens: int = 128
    """Longest answer to a prompt of `data`, in tokens."""
    stop: Sequence[str] = ()
    """Stop strings of answers to prompts of `data`."""
    samples: bool = False
    """Keep every prompt, answer and reference."""


class Run(NamedTuple):
    """Holds the run that a checkpoint belongs to."""

    folder: Path
    state: dict[str, Any]
    """Content of the checkpoint's train_state.json."""

    @classmethod
    def of(cls, checkpoint: Path) -> Run | None:
        """Return the run that `checkpoint` belongs to, or None for a model without one. Raise
        CheckpointError for a damaged state."""
        root = checkpoint.resolve().parent
        # One that was copied away has no run above it, but any folder.
        if root.name != "checkpoints" or not (checkpoint / "train_state.json").exists():
            return None
        return cls(root.parent, read_train_state(checkpoint))


def load_harness() -> Any:
    """Import and return `harness.py`. Raise ConfigError if lm-evaluation-harness is not
    installed."""
    try:
        from megalite.infer import harness
    except ImportError as error:
        raise ConfigError(
            f"evaluation needs lm-evaluation-harness ({error}); pip install 'megalite[eval]'"
        ) from None
    return harness


def evaluate_model(
    path: Path,
    asked: Asked,
    output: Path | None = None,
    num_slots: int = 8,
    launch: Launch | None = None,
    **layout: Any,
) -> dict[str, float]:
    """Evaluate the model in `path`: a run, a checkpoint or a Hugging Face folder. All ranks of
    `launch` call it.

    Rank 0 prints the results, writes them as JSON to `output` or to the run's folder `evaluations`,
    and sends them to the run's W&B. `asked` says what to evaluate, `num_slots` how many sequences
    are computed at a time, and `layout` how the model is sharded (`tensor`, `pipeline`, `expert`).
    Return the metrics as `numbers_of` names them. Raise ConfigError, DataError or CheckpointError."""
    launch = launch or Launch.from_environment()
    if sum(map(bool, (asked.tasks, asked.data, asked.tokens))) > 1:
        raise ConfigError("give one of --tasks NAME,NAME, --data FILE and --tokens PREFIX")
    if asked.limit is not None and asked.limit < 1:
        raise ConfigError(f"--limit {asked.limit} leaves nothing to measure; give at least 1")
    check_output(output, [asked.data] if asked.data else [])
    if not asked.tasks and not asked.data:
        _check_of_loss(asked)
        return evaluate_loss(path, asked, output, launch, **layout)
    # What may be missing or wrong comes before the weights are read, which takes long.
    harness, folder = load_harness(), find_model_on_ranks(path, launch)
    run = Run.of(folder)  # read it now: training that goes on may remove this checkpoint
    contents = None
    if asked.chat:
        tokenizer = load_tokenizer(folder)
        contents = ContentEncoder(tokenizer, ChatTemplate.of(folder, tokenizer))
    specs: list[str | dict[str, Any]] = list(asked.tasks)
    if asked.data:
        from megalite.infer.references import references_task

        specs = [references_task(asked.data, contents, asked.max_tokens, asked.stop)]
    tasks = harness.load_tasks(specs, asked.include_path, asked.limit, asked.shots)
    generator = Generator.open(folder, num_slots=num_slots, launch=launch, **layout)
    if contents is not None:
        generator.contents = contents  # whose marks the prompts have
        generator.answer_as_chat()
    model = harness.HarnessModel(
        generator, console=Console(stderr=True) if launch.rank == 0 else None
    )
    # Prompts of `data` are rendered by the template already; the harness must not do it again.
    results = tasks.run(model, samples=asked.samples, chat=asked.chat and not asked.data)
    numbers = harness.numbers_of(results)
    if launch.rank == 0:
        report(results, numbers, folder.resolve(), run, asked, output)
    return numbers


def check_output(output: Path | None, inputs: Sequence[Path]) -> None:
    """Raise ConfigError for a file of results that cannot be written, or that would be written over
    one of `inputs`, before hours of work for it."""
    if output is None:
        return
    for written in (output, output.with_suffix(".samples.jsonl")):
        check_apart(written, inputs, ConfigError)
    there = next(folder for folder in output.absolute().parents if folder.exists())
    if output.is_dir() or not there.is_dir():
        raise ConfigError(
            f"--output {output}: {output if output.is_dir() else there} is in its place"
        )
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--output {output}: nothing may be written in {there}")


def _check_of_loss(asked: Asked) -> None:
    """Raise ConfigError for options that a loss does not know, rather than measure without them."""
    of_answers = {
        "include_path": asked.include_path is not None,
        "shots": asked.shots is not None,
        "chat": asked.chat,
        "stop": bool(asked.stop),
        "samples": asked.samples,
    }
    if given := [name for name, is_given in of_answers.items() if is_given]:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} goes with --tasks NAME,NAME or --data FILE; without both the loss is told"
        )


def evaluate_loss(
    path: Path, asked: Asked, output: Path | None, launch: Launch, **layout: Any
) -> dict[str, float]:
    """Measure the held-out loss of the model in `path`, and report it as `evaluate_model` does."""
    from megalite.infer.held_out import measure

    folder = find_model_on_ranks(path, launch)
    run = Run.of(folder)
    # `run` was read before: training that goes on may remove the checkpoint meanwhile.
    found = measure(folder, asked.tokens, asked.limit, launch, **layout)
    if launch.rank == 0:
        console = Console(soft_wrap=True, highlight=False)
        console.print(
            f"{folder} on {found.data}: {found.num_samples:,} samples, {found.num_labels:,} labels"
        )
        console.print(
            ", ".join(
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.numbers.items()
            )
        )
        results = {"held_out": found._asdict()}
        keep_results(results, asked._asdict(), folder.resolve(), run, output, console)
        if run and (run.folder / "config.yaml").is_file():
            tell_wandb(run, {f"held_out/{name}": x for name, x in found.numbers.items()}, console)
    return found.numbers


def report(
    results: dict[str, Any],
    numbers: Mapping[str, float],
    folder: Path,
    run: Run | None,
    asked: Asked,
    output: Path | None,
) -> None:
    """Print the `results` as a table, write them to a file and send the `numbers` to W&B.

    `folder` is the evaluated model's and `run` the run that it belongs to, if any; the file is
    `output`, or a new one in the run's folder `evaluations`; `asked` is recorded with the
    results."""
    console = Console(soft_wrap=True)
    console.print(table_of(results))
    # In a file of their own: they are far larger than the results.
    samples = results.pop("samples", {})
    results = results | {"lm_eval": version("lm_eval")}
    file = keep_results(results, asked._asdict(), folder, run, output, console)
    if file and asked.samples:
        with file.with_suffix(".samples.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(line, default=_plainly) + "\n" for line in kept(samples))
    if run and (run.folder / "config.yaml").is_file():
        tell_wandb(run, numbers, console)


def keep_results(
    results: Mapping[str, Any],
    asked: Mapping[str, Any],
    folder: Path,
    run: Run | None,
    output: Path | None,
    console: Console,
) -> Path | None:
    """Write results as JSON, and return the file; None where there is neither an output nor a run."""
    when = time.strftime("%Y-%m-%dT%H-%M-%S")
    file = output or (
        _new_file(run.folder / "evaluations", f"{folder.name}-{when}") if run else None
    )
    if file:
        told: dict[str, Any] = {"model": str(folder), "asked": asked, **results}
        file.parent.mkdir(parents=True, exist_ok=True)
        # Through a text: what JSON cannot hold becomes what it can.
        write_json(file, json.loads(json.dumps(told, default=_plainly)))
        console.print(f"written to {file}")
    return file


def _new_file(folder: Path, name: str) -> Path:
    """Create and return NAME.json, or NAME-2.json and so on, since others may write results in the
    same second."""
    folder.mkdir(parents=True, exist_ok=True)
    file, number = folder / f"{name}.json", 1
    while True:
        try:
            file.touch(exist_ok=False)
            return file
        except FileExistsError:
            number += 1
            file = folder / f"{name}-{number}.json"


def table_of(results: Mapping[str, Any]) -> Table:
    """Return the harness's results as a table: one line per task and metric, with standard error
    and number of documents."""
    table = Table("task", "metric", "value", "±", "documents", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            # The harness names a metric "acc,none" and its error "acc_stderr,none", where "none" is
            # the filter that extracts the answer. Keys without a comma, such as "alias", are no
            # metrics.
            if not how or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{how}")
            count = results["n-samples"].get(task, {}).get("effective", "")
            name = metric if how == "none" else f"{metric} ({how})"
            table.add_row(
                task,
                name,
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, float) else "",
                str(count),
            )
    return table


def kept(samples: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one record per document from the harness's samples: what was asked, said and wanted,
    and each metric."""
    for task, found in samples.items():
        for sample in found:
            asked = [without_marks(request[0]) for request in sample["arguments"]]
            yield {
                "task": task,
                "asked": asked,
                "said": sample["filtered_resps"],
                "wanted": sample["target"],
                "judged": {
                    name: sample[name]
                    for name in sample["metrics"]
                    if isinstance(sample[name], (int, float))
                },
            }


def tell_wandb(run: Run, numbers: Mapping[str, float], console: Console) -> None:
    """Send the `numbers` to a separate W&B run beside that of training, which may still be active:
    two processes must not write to one run. `console` gets a warning if it fails."""
    try:
        config, state = load_config(run.folder / "config.yaml"), run.state
        if config.observe.wandb.mode == "disabled" or not state["wandb_id"]:
            return
        # A config's Pydantic models are frozen: a change is a copy.
        named = config.run.model_copy(update={"name": f"{config.run.name}-evaluations"})
        config = config.model_copy(update={"run": named})
        sink = WandbSink(config, run.folder, f"{state['wandb_id']}-evaluations", console.print)
        sink.tasks(
            {"checkpoint_step": state["step"]}
            | {f"tasks/{name}": value for name, value in numbers.items()}
        )
        sink.close("finished")
    # The results are written and shown already: neither W&B nor a config of an older version of
    # megalite, which is not needed for them, makes the command fail.
    except Exception as error:
        console.print(f"warning: W&B: {error}")


def _plainly(value: Any) -> Any:
    """Convert numpy numbers, paths, sets, and functions that some tasks contain, to what JSON can
    hold."""
    if hasattr(value, "item"):
        return value.item()
    return getattr(value, "__name__", None) or str(value)
