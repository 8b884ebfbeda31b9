"""The parser of a verb: it is filled when the verb is used, and knows overrides and the nearest
spelling of verbs. Nothing heavy is imported here: `megalite --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megalite.commands.examples import EXAMPLES
from megalite.commands.numbers import at_least
from megalite.utils.spelling import did_you_mean, nearest

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction["VerbParser"]


class _Formatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a description at the terminal's width. Those with indented lines, such
    as tables and examples, keep their lines."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(
            paragraph
            if "\n " in paragraph or paragraph.startswith(" ")
            else textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False)
            for paragraph in paragraphs
        )


def not_empty(path: str) -> str:
    """Return the path that an argument gives. Raise ArgumentTypeError for an empty one, such as of a
    variable that is not set: pathlib takes it for the folder at work."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    return path


class VerbParser(argparse.ArgumentParser):
    """Parser of `megalite` or of one verb."""

    def __init__(self, *arguments: Any, **named: Any):
        named.setdefault("formatter_class", _Formatter)
        super().__init__(*arguments, **named)
        # argparse looks types up here: every option of a path is checked so.
        self.register("type", Path, lambda path: Path(not_empty(path)))
        self.fill: Callable[[VerbParser], None] | None = None
        """Adds the arguments when they are first needed."""
        self.listed = True
        """Whether the verb is listed, and offered to who misspells one."""
        self.verbs: Verbs | None = None
        self.spelled: dict[str, int | None] = {}
        """Options whose word is a positional argument, with its number (None: where it stands)."""

    def add_verbs(self, required: bool = True) -> Verbs:
        """Let this parser have verbs of its own."""
        self.verbs = self.add_subparsers(required=required, metavar="VERB", parser_class=VerbParser)
        return self.verbs

    def complete(self) -> None:
        """Add the arguments, if they are not there yet, and the examples."""
        # Once only: argparse refuses an option that is added twice.
        fill, self.fill = self.fill, None
        if fill:
            fill(self)
        # `prog` is "megalite VERB"; of the program itself nothing is left behind the blank.
        examples = EXAMPLES.get(self.prog.partition(" ")[2])
        if examples:
            self.epilog = "\n".join(["examples:", *(f"  {line}" for line in examples)])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete()
        args = sys.argv[1:] if args is None else args
        # Whoever types a name alone wants to know what there is below it.
        alone = self.verbs and self.verbs.required and not args
        args = ["--help"] if alone else self._plain(args)
        # argparse itself would list all verbs, but offer none.
        if self.verbs and args and args[0][0:1] != "-" and args[0] not in self.verbs.choices:
            known = [name for name, verb in self.verbs.choices.items() if verb.listed]
            hint = did_you_mean(args[0], known, f"known: {', '.join(known)}")
            self.error(f"there is no verb {args[0]!r}; {hint}")
        found, rest = super().parse_known_args(args, namespace)
        return (found, rest) if self.verbs else (found, self._late_overrides(found, rest))

    def error(self, message: str) -> NoReturn:
        """End with what is wrong in one line, as all mistakes are told."""
        # A question offers something already.
        hint = "" if message.endswith("?") else f"; `{self.prog} --help` shows how it is called"
        self.exit(2, f"error: {message}{hint}\n")

    def _late_overrides(self, found: argparse.Namespace, rest: Sequence[str]) -> list[str]:
        """Add the overrides behind an option, which argparse leaves over in `rest` since it collects
        positional arguments only once; end with an error for any other word."""
        for word in rest:
            # Words in front of an option are in `overrides` already: the order stays.
            if not hasattr(found, "overrides") or word[0] == "-" or "=" not in word:
                self.error(self._not_taken(word))
            found.overrides.append(word)
        return []

    def _not_taken(self, word: str) -> str:
        """Return the message for a word that no argument takes."""
        if word[0] != "-":
            return f"{self.prog} does not take the argument {word!r}"
        option, _, _ = word.partition("=")
        # Of verbs that take settings. The catalog imports all families: for a mistake only.
        if "--config" in self.spelled:
            from megalite.config.aliases import key_of
            from megalite.config.catalog import catalog

            known = [
                key.name for keys in catalog().values() for key in keys if "[]" not in key.name
            ]
            name = option.lstrip("-").replace("-", "_")
            if key := name if name in known else key_of(name, known):
                return f"there is no option {option}; did you mean the setting `{key}=…`, without dashes?"
        # Letters are compared; dashes, which all have, would make all of them alike.
        known = [name.lstrip("-") for name in self._option_string_actions if name != "-h"]
        close = nearest(option.lstrip("-"), known)
        return f"there is no option {option}" + (f"; did you mean '--{close}'?" if close else "")

    def _plain(self, args: Sequence[str]) -> list[str]:
        """Return the arguments with the words of `spelled` options in their places."""
        plain: list[str] = []
        words = iter(args)
        for word in words:
            option, equals, value = word.partition("=")
            if option not in self.spelled:
                plain.append(word)
                continue
            given = value if equals else next(words, None)
            if given is None:
                self.error(f"argument {option}: expected one argument")
            # The file is the first argument wherever it is given; settings stay in their order.
            place = self.spelled[option]
            plain.insert(len(plain) if place is None else place, given)
        return plain


def add_late(verbs: Verbs, name: str, help: str | None, module: str = "") -> None:
    """Add a verb whose arguments and work are in `megalite.commands.MODULE`, imported when the verb
    is used: its docstring describes the verb, `add_arguments(parser)` does the rest. A verb without
    `help` is not listed."""
    parser = verbs.add_parser(name, help=help) if help else verbs.add_parser(name)
    parser.listed = help is not None

    def fill(parser: VerbParser) -> None:
        # Here, not above: `megalite --help` imports no verb.
        found = importlib.import_module(f"megalite.commands.{(module or name).replace('-', '_')}")
        parser.description = found.__doc__
        found.add_arguments(parser)

    parser.fill = fill


def add_config(
    parser: VerbParser, overrides: str, name: str = "config", help: str = "YAML file; see configs/"
) -> None:
    """Add the arguments of a verb that takes a YAML file, as `arguments.<name>`, and settings that
    replace some of its own, such as `overrides`, as `arguments.overrides`."""
    parser.add_argument(name, type=Path, help=f"{help}; also as --config FILE")
    parser.spelled["--config"] = 0
    add_overrides(parser, f"such as {overrides}; also as --set key=value")


def add_overrides(parser: VerbParser, help: str) -> None:
    """Add settings that replace those of a file, as `arguments.overrides`, in their order."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)
    parser.spelled["--set"] = None


def add_model(parser: VerbParser) -> None:
    """Add the argument of a verb that takes a model."""
    parser.add_argument(
        "model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder"
    )


def add_texts(parser: VerbParser, text: str | None, file: str) -> None:
    """Add what a verb works on: texts in the command line (described by `text`; None: it takes
    none there) and in files of the form `file`, as `arguments.texts` and `arguments.input`."""
    if text is not None:
        parser.add_argument("texts", nargs="*", metavar="TEXT", help=text)
    parser.add_argument(
        "--input", type=Path, action="append", default=[], metavar="FILE", help=file
    )


def add_layout(parser: VerbParser) -> None:
    """Add the options of a verb that can run over ranks."""
    parser.add_argument(
        "--tensor",
        type=at_least(1),
        default=1,
        help="ranks that share every matrix, under torchrun",
    )
    parser.add_argument(
        "--pipeline",
        type=at_least(1),
        default=1,
        help="ranks that each hold some layers, under torchrun",
    )
    parser.add_argument(
        "--expert",
        type=at_least(1),
        default=1,
        help="of the tensor ranks, that each hold some experts",
    )


def layout_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Return what `add_layout` has added, by name."""
    return {name: getattr(arguments, name) for name in ("tensor", "pipeline", "expert")}


def add_kv_cache(parser: VerbParser) -> None:
    """Add the option of a verb that generates."""
    parser.add_argument(
        "--kv-cache",
        choices=("int8", "fp8"),
        help="keep keys and values in 8 bits (docs/quantization.md; default: in the model's precision)",
    )


def add_cluster(parser: VerbParser) -> None:
    """Add the options of a verb that asks about a cluster that need not be there."""
    parser.add_argument("--gpus", type=at_least(1), required=True, help="how many, all together")
    parser.add_argument(
        "--gpu",
        required=True,
        help="a name from configs/chips.yaml, or a YAML file with the same fields",
    )
    parser.add_argument(
        "--nodes-of", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)"
    )


def add_calibration(parser: VerbParser) -> None:
    """Add the options of a verb that runs a model over rows of token files."""
    parser.add_argument(
        "--data", metavar="PREFIX", help="token files to calibrate and measure with"
    )
    parser.add_argument(
        "--rows", type=at_least(2), default=128, help="rows taken from them (default: 128)"
    )
    parser.add_argument(
        "--length", type=at_least(1), default=512, help="tokens of a row (default: 512)"
    )
