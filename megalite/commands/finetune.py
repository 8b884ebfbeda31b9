"""Finetune a model on rows of labelled data: from a file to a trained model in one command.

The rows' fields say what is learned (`megalite preprocess --help` shows them), and with it which of
configs/finetune-*.yaml the config is made from: chats and completions are learned (sft, or lora for
an adapter), preferences compared (dpo), classes told (classify), sources answered (seq2seq).
Lengths and the batch are fitted to the rows, for three epochs; every key can be given behind.

Token files go to RUN/rows. The config is printed; --output FILE writes it and stops, for
`bash slurm/finetune.sh FILE`, which trains on several ranks or a cluster. The same command goes on
where it stopped."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.commands.parser import VerbParser, add_overrides
from megalite.runtime.exit_codes import Exit

if TYPE_CHECKING:
    from megalite.config import Config
    from megalite.data.formats import Format
    from megalite.data.indexed import IndexedDataset

METHODS: dict[str, tuple[str, tuple[Format, ...]]] = {
    "sft": ("finetune-chat", ("chat", "completion")),
    "lora": ("finetune-lora", ("chat", "completion")),
    "dpo": ("finetune-dpo", ("preference",)),
    "classify": ("finetune-classes", ("classification", "labels")),
    "seq2seq": ("finetune-seq2seq", ("seq2seq",)),
}
"""Methods, each with the config it begins with and the formats of rows that it learns from; of a
format that several learn from, the first is taken."""
EPOCHS = 3
SHORTEST = 256
"""Least tokens of a sample: shorter rows are packed."""
FEWEST_STEPS = 10
"""Steps of an epoch, below which the batch is halved, down to SMALLEST_BATCH."""
SMALLEST_BATCH = 4


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "model", type=Path, help="a Hugging Face folder, a run, or owner/name in the hub's cache"
    )
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILE",
        help="rows: a file, a folder or a quoted glob; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=METHODS, help="(default: what the fields of the rows are for)"
    )
    parser.add_argument(
        "--output", type=Path, help="write the config to this new file, and do not train"
    )
    add_overrides(parser, "such as run.name=first optimizer.lr=2e-5; also as --set key=value")
    parser.set_defaults(verb=_finetune)


def _finetune(arguments: argparse.Namespace) -> Exit:
    """Make the token files and the config, and train."""
    import yaml

    from megalite.comm.mesh import Launch, leave
    from megalite.config_file import parse_config
    from megalite.errors import ConfigError
    from megalite.train import train
    from megalite.utils.outside import check_output
    from megalite.utils.resources import with_overrides

    # Ranks would all write the same token files.
    if Launch.from_environment().world_size > 1:
        raise ConfigError(
            "finetune prepares rows in one process: give --output FILE, and start `megalite train FILE` on the ranks"
        )
    if arguments.output:
        check_output(arguments.output)
        if arguments.output.exists():
            raise ConfigError(f"--output {arguments.output} exists; name a new file")
    model, data, overrides = arguments.model, arguments.data, arguments.overrides
    values = _config_values(model, data, arguments.method, overrides)
    config = parse_config(values, overrides, origin="finetune")
    # What was asked for, not the whole config: a person goes on editing it.
    text = yaml.safe_dump(with_overrides(values, overrides), sort_keys=False)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
        print(f"{arguments.output}: megalite train {arguments.output}")
        return Exit.DONE
    print(text)
    ended = train(config)
    leave(ended)
    return ended


def finetune_config(
    model: str | Path,
    data: Sequence[str],
    method: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the config by which `megalite finetune` trains `model` on the rows in `data` (files,
    folders, globs), and make their token files in the run's folder.

    `method` is one of METHODS (default: what the fields of the rows are for), `overrides` are
    settings such as `optimizer.lr=2e-5`. Raise ConfigError, or DataError for rows that cannot be
    used."""
    from megalite.config_file import parse_config

    values = _config_values(Path(model), data, method, overrides)
    return parse_config(values, overrides, origin="finetune")


def _config_values(
    model: Path, data: Sequence[str], method: str | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the config's values before the overrides; the token files are there then."""
    import torch

    from megalite.config_file import parse_config
    from megalite.data.indexed import IndexedDataset, read_note
    from megalite.models import model_config
    from megalite.utils.resources import configs_dir, read_yaml, with_overrides

    model, format = _model(model), _format(data)
    name, _ = METHODS[_method(method, format)]
    values = read_yaml(configs_dir() / f"{name}.yaml")
    most = model_config({"hf": str(model)}).max_positions
    values["model"] |= {"hf": str(model)}
    # The model's own tokenizer: ids of another one would name other rows of its embedding.
    values["data"] |= {
        "tokenizer": str(model),
        "seq_length": min(values["data"]["seq_length"], most),
    }
    # Steps of the shipped configs are for their data; here epochs of these rows count.
    del values["train"]["steps"]
    values["train"] |= {"epochs": EPOCHS}
    # A share of the steps: there may be few.
    values["optimizer"]["schedule"]["warmup_steps"] = 0.05
    if not torch.cuda.is_available():
        values["train"]["precision"] = "fp32"  # most CPUs have no bf16
    if format == "labels":
        values["model"]["task"] = "labels"
    # Before any work: the data changes nothing about what is wrong with a setting.
    parse_config(values, overrides, origin=f"configs/{name}.yaml")
    given = with_overrides(values, overrides)
    # In the run's folder: another run of other rows cannot take these for its own.
    prefix = Path(given["run"]["dir"], given["run"]["name"], "rows")
    _tokenize(data, prefix, format, str(given["data"]["tokenizer"]))
    values["data"]["train"] = [{"path": str(prefix)}]
    if names := read_note(str(prefix)).get("labels"):
        values["model"]["labels"] = names
    _fit(values, IndexedDataset(prefix), pairs=format == "preference")
    return values


def _model(path: Path) -> Path:
    """Return the Hugging Face folder of a model: of a run its newest checkpoint. Raise ConfigError,
    also for an adapter."""
    from megalite.errors import ConfigError
    from megalite.infer.generate import find_model
    from megalite.models.peft import is_adapter

    folder = find_model(path)
    # Its weights are differences from those of a model, which is not in this folder.
    if is_adapter(folder):
        raise ConfigError(
            f"{folder} is an adapter; `megalite convert {path} OUT` merges it into its model, and OUT can be finetuned"
        )
    return folder


def _format(inputs: Sequence[str]) -> Format:
    """Return the format of rows by the fields of the first. Raise DataError where none has them."""
    from megalite.data.formats import FORMATS, format_of
    from megalite.data.inputs import Report
    from megalite.data.rows import excerpt, list_rows, read_rows
    from megalite.errors import DataError

    # The first row stands for all: preprocessing refuses one of another format by its line.
    row = next(read_rows(list_rows(inputs, Report()), Report()), None)
    found = row and format_of(row.values)
    known = {format for _, formats in METHODS.values() for format in formats}
    if found in known:
        return found
    if row is None or row.why:
        raise DataError(f"{', '.join(inputs)}: there is no row{': ' + row.why if row else ''}")
    why = f"of --format {found}" if found in FORMATS else "of no format that is known"
    raise DataError(
        f"{row.path}:{row.line}: the row is {why}; finetune takes {', '.join(sorted(known))} "
        f"(`megalite preprocess --help` shows their fields), others by a config of yours: {excerpt(row.values)}"
    )


def _method(wished: str | None, format: Format) -> str:
    """Return the method for rows of a format. Raise ConfigError where the one that is wished for does
    not learn from them."""
    from megalite.errors import ConfigError

    fitting = [method for method, (_, formats) in METHODS.items() if format in formats]
    if wished is None:
        return fitting[0]
    if wished not in fitting:
        raise ConfigError(
            f"--method {wished} does not learn from rows of format {format}: {' or '.join(fitting)} does"
        )
    return wished


def _tokenize(inputs: Sequence[str], prefix: Path, format: Format, tokenizer: str) -> None:
    """Make the token files, unless they are there from the same rows. Raise ConfigError where they
    are there from others."""
    from rich.console import Console

    from megalite.data.formats import Settings
    from megalite.data.indexed import read_note
    from megalite.data.inputs import Report
    from megalite.data.preprocess_rows import preprocess_rows
    from megalite.data.rows import list_rows
    from megalite.errors import ConfigError

    note = Path(f"{prefix}.json")
    if note.is_file():
        # By names and times, not by contents: rows may be many gigabytes. An object in a store has
        # no time here.
        files = (path for path in list_rows(inputs, Report()) if os.path.exists(path))
        newest = max(map(os.path.getmtime, files), default=0.0)
        if read_note(str(prefix)).get("inputs") == [*inputs] and newest <= note.stat().st_mtime:
            return
        raise ConfigError(
            f"{prefix.parent} was made of other rows, or they have changed since: choose another run.name"
        )
    print(
        preprocess_rows(inputs, prefix, Settings(format, tokenizer), console=Console(stderr=True))
    )


def _fit(values: dict[str, Any], rows: IndexedDataset, pairs: bool) -> None:
    """Set the tokens of a sample and the batch as the rows ask for it."""
    # Both answers of a preference are side by side in a sample.
    longest = int(rows.lengths(0, rows.num_sequences).max()) * (2 if pairs else 1)
    length = SHORTEST
    # Doubled, so that it divides over tensor and context ranks.
    while length < longest:
        length *= 2
    data, train = values["data"], values["train"]
    data["seq_length"] = length = min(length, data["seq_length"])
    batch = train["global_batch_size"]
    while batch > SMALLEST_BATCH and rows.num_tokens < FEWEST_STEPS * batch * length:
        batch //= 2
    train["global_batch_size"] = batch
    # It must divide the batch, which may just have become smaller.
    train["micro_batch_size"] = min(train["micro_batch_size"], batch)
