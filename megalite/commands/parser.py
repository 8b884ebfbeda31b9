"""The parser of a verb: it is filled when the verb is used, and knows overrides and the nearest
spelling of verbs. Nothing heavy is imported here: `megalite --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.commands.examples import EXAMPLES
from megalite.utils.spelling import did_you_mean

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction["VerbParser"]

HIDDEN = ("job",)
"""Verbs that are for scripts, and neither listed nor offered."""


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)


class VerbParser(argparse.ArgumentParser):
    """Parser of `megalite` or of one verb."""

    def __init__(self, *arguments: Any, **named: Any):
        # Examples, and lists in descriptions, keep their lines.
        named.setdefault("formatter_class", _formatter)
        super().__init__(*arguments, **named)
        self.fill: Callable[[VerbParser], None] | None = None
        """Adds the arguments when they are first needed."""
        self.verbs: Verbs | None = None
        self.spelled: dict[str, int | None] = {}
        """Options whose word is a positional argument, with its number (None: where it stands)."""

    def add_verbs(self, required: bool = True) -> Verbs:
        """Let this parser have verbs of its own."""
        self.verbs = self.add_subparsers(required=required, metavar="VERB", parser_class=VerbParser)
        return self.verbs

    def complete(self) -> None:
        """Add the arguments, if they are not there yet, and the examples."""
        fill, self.fill = self.fill, None
        if fill:
            fill(self)
        examples = EXAMPLES.get(self.prog.partition(" ")[2])
        if examples:
            self.epilog = "\n".join(["examples:", *(f"  {line}" for line in examples)])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete()
        args = sys.argv[1:] if args is None else args
        # Whoever types a name alone wants to know what there is below it.
        alone = self.verbs and self.verbs.required and not args
        args = ["--help"] if alone else self._plain(args)
        if self.verbs and args and args[0][0:1] != "-" and args[0] not in self.verbs.choices:
            known = [verb for verb in self.verbs.choices if verb not in HIDDEN]
            hint = did_you_mean(args[0], known, f"known: {', '.join(known)}")
            self.error(f"there is no verb {args[0]!r}; {hint}")
        return super().parse_known_args(args, namespace)

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
            place = self.spelled[option]
            plain.insert(len(plain) if place is None else place, given)
        return plain


def add_late(verbs: Verbs, name: str, help: str, module: str = "") -> None:
    """Add a verb whose arguments and work are in `megalite.commands.MODULE`, imported when the verb
    is used: its docstring describes the verb, `add_arguments(parser)` does the rest."""
    parser = verbs.add_parser(name, help=help)

    def fill(parser: VerbParser) -> None:
        found = importlib.import_module(f"megalite.commands.{module or name}")
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
