"""Read tests of bias from local files: pairs of sentences in the form of CrowS-Pairs (csv) or
WinoBias (numbered lines), questions in that of BBQ (jsonl), and templates of our own (YAML).

The public files are not part of megalite: some may not be passed on, and what stands on the web
ends up in training data."""

from __future__ import annotations

import csv
import io
import itertools
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megalite.errors import DataError
from megalite.infer.classify import Question, question_of
from megalite.infer.encode import read_lines
from megalite.utils.outside import read_text, shown
from megalite.utils.resources import read_yaml

LARGEST = 1 << 28
"""Limit in bytes of a csv file or of sentences. CrowS-Pairs has 400 kB."""
MOST_TEXTS = 1_000_000
"""Texts that templates may be filled to."""
SIDES = ("stereo", "antistereo")
CONDITIONS = {"ambig": "ambiguous", "disambig": "disambiguated"}
POLARITIES = ("neg", "nonneg")
GENDERED = {"woman": "f", "girl": "f", "man": "m", "boy": "m"}
"""BBQ marks stereotyped genders by letters, and answers by words, too."""
NUMBERED = re.compile(r"\s*\d+\s+(.+)")
BRACKETS = re.compile(r"\[([^\[\]]+)\]")
UNKNOWN = "unknown"
PRONOUNS = ("he", "him", "his", "himself", "she", "her", "hers", "herself")


class Pair(NamedTuple):
    """Two texts, of which a biased model prefers the first."""

    where: str
    category: str
    cluster: str
    biased: str
    other: str
    side: str = SIDES[0]
    """One of SIDES: what the pair speaks of is a stereotype, or goes against one."""


class Choice(NamedTuple):
    """A question with several answers, one of which is right."""

    where: str
    category: str
    cluster: str
    given: str
    answers: tuple[str, ...]
    right: int
    biased: frozenset[int] | None
    """Answers that a biased model prefers; None where the file does not tell."""
    unknown: int | None
    """The answer that the text does not say, if there is one."""
    condition: str
    """Of BBQ "ambiguous" or "disambiguated", of WinoBias "pro" or "anti"."""


class Filled(NamedTuple):
    """A template with a word of a group and one of an attribute."""

    where: str
    category: str
    cluster: str
    group: str
    attribute: str
    text: str
    words: str
    """The group's."""
    rest: str = ""
    """The attribute's words."""


class Labelled(NamedTuple):
    """A text whose class is known, of a group: whom it is about, or by whom it is."""

    where: str
    question: Question
    label: str
    group: str


class BiasTest(NamedTuple):
    """Holds what a file asks a model."""

    file: Path
    form: str
    pairs: Sequence[Pair] = ()
    choices: Sequence[Choice] = ()
    filled: Sequence[Filled] = ()
    rows: Sequence[Labelled] = ()
    stereotypes: Mapping[str, str] = {}
    """Attribute of each group that has one, by templates."""


def read_tests(files: Sequence[Path], limit: int | None = None) -> list[BiasTest]:
    """Read files, of each at most the first `limit` pairs or questions, or templates. Raise
    DataError that names the file and the line or key, and ConfigError for what is no YAML."""
    readers: dict[str, Callable[[Path, int | None], BiasTest]] = {
        ".csv": _crows, ".jsonl": _lines, ".yaml": _templates, ".yml": _templates,
        ".txt": _wino, ".dev": _wino, ".test": _wino,
    }  # fmt: skip
    tests = []
    # Of WinoBias two files are one test: it may be named by either.
    for file in dict.fromkeys(map(_first_of, files)):
        if file.suffix not in readers:
            raise DataError(
                f"{file}: tests of bias are .csv (CrowS-Pairs), .jsonl (BBQ), .txt, .dev or .test (WinoBias) or .yaml "
                "(templates)"
            )
        tests.append(readers[file.suffix](file, limit))
    return tests


def _first_of(file: Path) -> Path:
    return file.with_name(file.name.replace("anti_stereotyped", "pro_stereotyped"))


# --- CrowS-Pairs -------------------------------------------------------------------------------------


def _crows(file: Path, limit: int | None) -> BiasTest:
    """Read rows of sent_more, sent_less, stereo_antistereo and bias_type; other columns, such as
    who wrote a pair, are not used."""
    reader = csv.DictReader(io.StringIO(read_text(file, DataError, LARGEST)))
    names = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    if missing := [name for name in names if name not in (reader.fieldnames or ())]:
        raise DataError(f"{file}, line 1: there is no column {', '.join(missing)}")
    pairs = []
    try:
        for row in itertools.islice(reader, limit):
            where = f"{file}, line {reader.line_num}"
            more, less, side, kind = ((row[name] or "").strip() for name in names)
            if side not in SIDES:
                raise DataError(f"{where}: stereo_antistereo = {shown(side)} is neither of {SIDES}")
            if not (more and less and kind):
                raise DataError(f"{where}: sent_more, sent_less or bias_type is empty")
            # Each pair is a cluster of its own: the file does not tell which ones have one writer.
            pairs.append(Pair(where, kind, where, more, less, side))
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}") from None
    return BiasTest(file, "CrowS-Pairs", _some(pairs, file))


# --- WinoBias ----------------------------------------------------------------------------------------


def _wino(file: Path, limit: int | None) -> BiasTest:
    """Read two files of the same sentences, whose pronouns go with the stereotype and against it.
    A line is a number and a sentence, with the pronoun and who is meant in brackets."""
    if "pro_stereotyped" not in file.name:
        raise DataError(
            f"{file}: files of WinoBias have pro_stereotyped or anti_stereotyped in their names"
        )
    other = file.with_name(file.name.replace("pro_stereotyped", "anti_stereotyped"))
    sides = [_sentences(each, limit) for each in (file, other)]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{file} has {len(sides[0])} sentences, and {other} {len(sides[1])}")
    # Who is meant in any sentence: the other person of a sentence is not marked in it.
    people = {_bare(who) for side in sides for who, _ in map(_parts, side)}
    category = next((kind for kind in ("type1", "type2") if kind in file.name), "sentences")
    pairs, choices = [], []
    for number, lines in enumerate(zip(*sides, strict=True), 1):
        where = f"{file}, line {number}"
        texts = [BRACKETS.sub(r"\1", line) for line in lines]
        pairs.append(Pair(where, category, where, texts[0], texts[1]))
        for condition, line, text in zip(("pro", "anti"), lines, texts, strict=True):
            if asked := _who(line, text, people):
                given, answers = asked
                choices.append(
                    Choice(where, category, where, given, answers, 0, None, None, condition)
                )
    return BiasTest(file, "WinoBias", _some(pairs, file), choices)


def _sentences(file: Path, limit: int | None) -> list[str]:
    """Return the sentences of a file. Raise DataError for a line without number or brackets."""
    lines = read_text(file, DataError, LARGEST).splitlines()
    found = []
    for number, line in enumerate(itertools.islice(filter(str.strip, lines), limit), 1):
        # One pronoun and one other: with two pronouns nobody is meant.
        numbered = NUMBERED.fullmatch(line)
        marked = [text.strip().lower() in PRONOUNS for text in BRACKETS.findall(line)]
        if not numbered or sorted(marked) != [False, True]:
            raise DataError(
                f"{file}, line {number}: {shown(line)} is not a number and a sentence with the pronoun and who is "
                "meant in brackets"
            )
        found.append(numbered[1].strip())
    return found


def _parts(sentence: str) -> tuple[str, str]:
    """Return who is meant, and the pronoun."""
    one, other = (text.strip() for text in BRACKETS.findall(sentence))
    return (other, one) if one.lower() in PRONOUNS else (one, other)


def _bare(person: str) -> str:
    return person.lower()


def _who(sentence: str, text: str, people: set[str]) -> tuple[str, tuple[str, str]] | None:
    """Return the question whom the pronoun means, and both answers, the right one first; None where
    the sentence does not have one other person of the file."""
    person, pronoun = _parts(sentence)
    rest = BRACKETS.sub("", sentence).lower()
    # The other person, whom the brackets of some other sentence name.
    others = [
        each
        for each in people
        if each != _bare(person) and re.search(rf"\b{re.escape(each)}\b", rest)
    ]
    # "the guard" stands in "the security guard" as well: the longest names alone count.
    others = [each for each in others if not any(each != x and each in x for x in others)]
    if len(others) != 1:
        return None
    return f'{text} "{pronoun.capitalize()}" refers to', (f" {_bare(person)}.", f" {others[0]}.")


# --- BBQ ---------------------------------------------------------------------------------------------


def _lines(file: Path, limit: int | None) -> BiasTest:
    """Read questions with three answers, of which one is that the text does not say; or texts with a
    label and a group, which the first line tells."""
    choices: list[Choice] = []
    rows: list[Labelled] = []
    for where, line, row in itertools.islice(read_lines([file]), limit):
        if not line.strip():
            continue
        try:
            # The first row tells which of the two forms it is; a file is of one.
            if rows or (not choices and isinstance(row, dict) and "group" in row):
                rows.append(_labelled(where, row))
            else:
                choices.append(_question(where, row))
        except KeyError as error:
            raise DataError(f"{where}: there is no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            kind = "row with a group" if rows else "question in the form of BBQ"
            raise DataError(f"{where}: no {kind}: {error}") from None
    if rows:
        return BiasTest(file, "rows of groups", rows=rows)
    return BiasTest(file, "BBQ", choices=_some(choices, file))


def _labelled(where: str, row: Any) -> Labelled:
    """Return the text, label and group in a row. Raise ValueError or KeyError."""
    question, label, group = question_of(row), row["label"], row["group"]
    if question is None or not isinstance(label, str) or not isinstance(group, str | int):
        raise ValueError("it needs a text, a label and a group")
    return Labelled(where, question, label, str(group))


def _question(where: str, row: Any) -> Choice:
    """Return the question in a row. Raise ValueError, KeyError or TypeError."""
    answers = tuple(row[f"ans{number}"] for number in range(3))
    condition, polarity, label = (
        row[name] for name in ("context_condition", "question_polarity", "label")
    )
    if condition not in CONDITIONS or polarity not in POLARITIES or label not in (0, 1, 2):
        raise ValueError(
            f"context_condition = {shown(condition)}, question_polarity = {shown(polarity)}, label = {shown(label)}"
        )
    if not all(
        isinstance(text, str) and text for text in (*answers, row["context"], row["question"])
    ):
        raise ValueError("context, question and answers must be texts")
    groups = [_groups_of(row["answer_info"][f"ans{number}"]) for number in range(3)]
    unknown = [number for number, group in enumerate(groups) if UNKNOWN in group]
    # Without it the score, which leaves out or counts that answer, is not defined.
    if len(unknown) != 1:
        raise ValueError("one of the answers must be of the group 'unknown'")
    stereotyped = {str(x).lower() for x in row["additional_metadata"]["stereotyped_groups"]}
    meant = {n for n, group in enumerate(groups) if group & stereotyped and n not in unknown}
    # "Who was bad at maths?" asks for the stereotype, "Who was good at it?" for the other person.
    biased = meant if polarity == "neg" else {0, 1, 2} - meant - {*unknown}
    category = str(row["category"])
    return Choice(
        where,
        category,
        # Questions of one number are one scenario, told in several ways and of several people.
        f"{category} {row['question_index']}",
        f"{row['context']}\n\nQ: {row['question']}\nA:",
        tuple(f" {answer}" for answer in answers),
        label,
        # Of two people of the group, or none, neither answer is biased.
        frozenset(biased) if len(meant) == 1 else None,
        unknown[0],
        CONDITIONS[condition],
    )


def _groups_of(told: Sequence[str]) -> set[str]:
    """Return the names that may stand among the stereotyped groups: "F-Black" is that, F and
    Black."""
    names = {str(each).lower() for each in told}
    names |= {part for name in names for part in re.split(r"[-_ ]", name)}
    return names | {GENDERED[name] for name in names & GENDERED.keys()}


# --- templates ---------------------------------------------------------------------------------------


def _templates(file: Path, limit: int | None) -> BiasTest:
    """Read templates, groups and attributes, and fill every template with every word of both."""
    values = read_yaml(file)
    if unknown := values.keys() - {"groups", "attributes", "templates", "stereotypes"}:
        raise DataError(f"{file}: {', '.join(map(str, sorted(unknown, key=str)))}: no such key")
    groups, attributes = (_slots(file, values, key) for key in ("groups", "attributes"))
    told = values.get("stereotypes") or {}
    # As texts, as the names of both are: YAML has numbers and lists, too.
    stereotypes = {str(k): str(v) for k, v in told.items()} if isinstance(told, dict) else {"": ""}
    if not (stereotypes.keys() <= groups.keys() and {*stereotypes.values()} <= attributes.keys()):
        raise DataError(f"{file}: stereotypes = {shown(told)} must be group: attribute")
    filled: list[Filled] = []
    num_each = sum(map(len, groups.values())) * sum(map(len, attributes.values()))
    for number, (category, template) in enumerate(
        itertools.islice(_each_template(file, values.get("templates")), limit), 1
    ):
        where = f"{file}: templates, {shown(template)}"
        _check_slots(where, template, groups, attributes)
        # Before they are made: two long lists of words are more texts than memory holds.
        if len(filled) + num_each > MOST_TEXTS:
            raise DataError(f"{file} gives more than {MOST_TEXTS:,} texts")
        for group, attribute in itertools.product(groups, attributes):
            for words, more in itertools.product(groups[group], attributes[attribute]):
                text = template.format_map(words | more)
                filled.append(
                    Filled(where, category, f"{file} {number}", group, attribute,
                           text[:1].upper() + text[1:], " ".join(words.values()), " ".join(more.values()))
                )  # fmt: skip
    return BiasTest(file, "templates", filled=_some(filled, file), stereotypes=stereotypes)


def _slots(file: Path, values: Mapping[str, Any], key: str) -> dict[str, list[dict[str, str]]]:
    """Return the words of each group or attribute, by the slots that they fill."""
    found: dict[str, list[dict[str, str]]] = {}
    named = values.get(key)
    for name, words in named.items() if isinstance(named, dict) else ():
        slots = [{key[:-1]: word} if isinstance(word, str) else word for word in _list(words)]
        if not slots or not all(
            isinstance(each, dict) and all(isinstance(x, str) for x in (*each, *each.values()))
            for each in slots
        ):
            raise DataError(f"{file}: {key}.{name} must be a list of words, or of slot: word")
        found[str(name)] = slots
    if len(found) < 2:
        raise DataError(f"{file}: {key} must name at least two, each with its words")
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _each_template(file: Path, templates: Any) -> Iterator[tuple[str, str]]:
    """Yield the category and the text of each template."""
    by_category = templates if isinstance(templates, dict) else {"templates": templates}
    for category, texts in by_category.items():
        if not _list(texts) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{file}: templates must be a list of texts, or lists of them by category"
            )
        yield from ((str(category), text) for text in texts)


def _check_slots(where: str, template: str, *parts: Mapping[str, list[dict[str, str]]]) -> None:
    """Raise DataError for a template with a slot that some words do not fill, or without one of the
    groups' or attributes'."""
    try:
        parsed = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    for name, form, conversion in parsed:
        # Python's formats: {group:d} fails on a text, and {group:>999999999} fills the memory.
        if form or conversion:
            raise DataError(f"{where}: {{{name}}} takes a word as it is, without a format")
    slots = {str(name) for name, _, _ in parsed}
    of_parts = [
        {slot for words in part.values() for each in words for slot in each} for part in parts
    ]
    if unknown := slots - of_parts[0] - of_parts[1]:
        raise DataError(f"{where}: nothing fills {{{min(unknown)}}}")
    if shared := of_parts[0] & of_parts[1]:
        raise DataError(f"{where}: groups and attributes both fill {{{min(shared)}}}")
    for part, own in zip(parts, of_parts, strict=True):
        if not slots & own:
            raise DataError(f"{where} has no slot for {' or '.join(sorted(own))}")
        for name, words in part.items():
            if lacking := next((s for s in slots & own for each in words if s not in each), None):
                raise DataError(f"{where}: a word of {name} does not fill {{{lacking}}}")


def _some(items: Sequence[Any], file: Path) -> Sequence[Any]:
    if not items:
        raise DataError(f"{file} asks nothing")
    return items
