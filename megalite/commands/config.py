"""Show what a config can say: every key with its type, default and meaning, the presets of models, a
commented config to start from, or the JSON schema by which editors complete and check one."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the verbs below `megalite config`."""
    verbs = parser.add_verbs()
    keys = verbs.add_parser("keys", help="show every key with its type, default and meaning")
    keys.add_argument(
        "prefixes", nargs="*", metavar="KEY", help="only this section or key, such as optimizer"
    )
    keys.add_argument("--markdown", action="store_true", help="as docs/config.md has them")
    keys.set_defaults(verb=_keys)
    presets = verbs.add_parser("presets", help="show the presets of models, with their sizes")
    presets.set_defaults(verb=_presets)
    new = verbs.add_parser("new", help="write a commented config to start from")
    new.add_argument("--preset", required=True, help="of `megalite config presets`")
    new.add_argument("--name", default="my", help="of the run (default: %(default)s)")
    new.add_argument("--output", type=Path, help="a new file (default: the console)")
    new.set_defaults(verb=_new)
    schema = verbs.add_parser("schema", help="print the JSON schema for editors")
    schema.set_defaults(verb=_schema)


def _keys(arguments: argparse.Namespace) -> None:
    """Print the keys, all or those below some prefixes."""
    from megalite.config.catalog import catalog
    from megalite.errors import ConfigError
    from megalite.utils.spelling import did_you_mean

    sections = catalog()
    for prefix in arguments.prefixes:
        names = {key.name for keys in sections.values() for key in keys} | sections.keys()
        # Before anything is printed: a part of what was asked for looks like all of it.
        if not any(_is_below(name, prefix) for name in names):
            raise ConfigError(
                f"no key is {prefix!r}; {did_you_mean(prefix, names, 'see them all')}"
            )
    if arguments.markdown:
        print(markdown(), end="")
        return
    for section, keys in sections.items():
        wanted = [
            key
            for key in keys
            if not arguments.prefixes
            or any(_is_below(key.name, prefix) for prefix in arguments.prefixes)
        ]
        print(*([f"{section}:"] if wanted else []), sep="\n", end="\n" if wanted else "")
        for key in wanted:
            of = f"   of {_kinds(key.kinds)}" if key.kinds else ""
            print(f"  {key.name} = {key.default}   [{key.type}]{of}")
            print(
                textwrap.fill(
                    key.description, 98, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
            )


def _is_below(name: str, prefix: str) -> bool:
    """Return whether a key is `prefix` or within it, the marks of lists left out."""
    name = name.replace("[]", "")
    return name == prefix or name.startswith(f"{prefix}.")


def _kinds(kinds: tuple[str, ...]) -> str:
    """Return the names of the kinds that have a setting; of many, the first."""
    return ", ".join(kinds if len(kinds) <= 4 else (*kinds[:3], f"and {len(kinds) - 3} more"))


def markdown() -> str:
    """Return docs/config.md."""
    from megalite.config import Config
    from megalite.config.catalog import catalog, plain, sections_in

    lines = [
        "# Every key of a config",
        "",
        "Made by `megalite config keys --markdown`; a test holds it against the code. `megalite config keys",
        "optimizer` shows a part of it in the terminal, `megalite config new --preset llama-8m` writes a commented",
        "config to start from, and `megalite config schema` the JSON schema that editors complete and check configs",
        "by. It is stored as `configs/config.schema.json`; the first line of a config beside it,",
        "`# yaml-language-server: $schema=config.schema.json`, names it.",
        "",
        "A config is a YAML file of sections; `section.key=value` behind a command replaces a setting. In the tables",
        "`[]` stands for an item of a list, and *of* names the kinds that have a key: families of models,",
        "optimizers, schedules, objectives.",
    ]
    for section, keys in catalog().items():
        doc = next((s.__doc__ for s in sections_in(Config.model_fields[section].annotation)), "")
        lines += [
            "",
            f"## {section}",
            "",
            plain(doc or ""),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key in keys:
            of = f" *of {_kinds(key.kinds)}*" if key.kinds else ""
            # Bars divide columns.
            cells = [key.type, f"`{key.default}`", key.description + of]
            lines.append(
                f"| `{key.name}` | " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
            )
    return "\n".join(lines) + "\n"


def _presets(arguments: argparse.Namespace) -> None:
    """Print a table of the presets, the smallest first."""
    from megalite.models import model_config, weight_table
    from megalite.utils.counts import compact
    from megalite.utils.resources import presets

    rows: list[tuple[object, ...]] = []
    for name in presets():
        # Sizes follow from the table of weights: a preset does not say them.
        model = model_config({"preset": name})
        size = sum(weight.numel for weight in weight_table(model))
        sizes = (model.num_layers, model.hidden_size, model.num_attention_heads)
        lengths = (model.vocab_size, model.max_positions)
        rows.append((size, name, model.family, model.task, *sizes, *lengths))
    rows = [(compact(size), *row) for size, *row in sorted(rows)]  # type: ignore[arg-type]
    header = "parameters preset family task layers hidden heads vocabulary positions"
    for size, name, family, task, *sizes in (header.split(), *rows):  # type: ignore[assignment]
        shown = "".join(f"{n:>12}" for n in sizes)
        print(f"{name:18}{size:>11}  {family:12}{task:8}{shown}")


def _new(arguments: argparse.Namespace) -> None:
    """Write a commented config. Raises ConfigError where there is a file already."""
    from megalite.config.starter import starter
    from megalite.config_file import parse_config
    from megalite.errors import ConfigError
    from megalite.models import model_config
    from megalite.utils.resources import parse_yaml

    model = model_config({"preset": arguments.preset})
    text = starter(arguments.preset, model, arguments.name)
    parse_config(parse_yaml(text, "the starter"), origin="--name")  # all else is as it should be
    if arguments.output is None:
        print(text, end="")
        return
    try:
        # "x" looks and makes in one: no file that comes meanwhile is lost.
        with arguments.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"--output {arguments.output} exists; name a new file") from None
    except OSError as error:
        raise ConfigError(f"--output {arguments.output}: {error.strerror or error}") from None
    print(f"{arguments.output}: a config to start from; megalite train {arguments.output}")


def _schema(arguments: argparse.Namespace) -> None:
    import json

    from megalite.config.json_schema import json_schema

    # As it stands in the repository, which a test compares letter by letter.
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
