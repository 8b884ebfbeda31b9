"""How a row is asked for. A task makes one row for each slot: a number from which its input, its
examples and the seeds of its requests follow."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from megalite.data.documents import iter_documents
from megalite.data.inputs import Report
from megalite.data.order import permute
from megalite.data.rows import list_rows, read_rows
from megalite.errors import DataError
from megalite.synthesize.config import TaskConfig
from megalite.synthesize.prompts import (
    BACK,
    EXCERPT,
    INSTRUCTION,
    JUDGE,
    PARAPHRASE,
    QUESTION,
    THERE,
    filled,
)
from megalite.utils.keys import key_of
from megalite.utils.outside import is_unicode

ASKED = ("instruction", "prompt", "messages")
"""Fields that hold what a person asks."""
LEAST_PASSAGE = 40
"""Characters below which the rest of a document is no passage of its own."""
_NUMBERED = re.compile(r"^\s*(?:\d+[.):]|[-*•]|(?:task|instruction)\s*\d*:)\s*", re.IGNORECASE)
_IN_BRACES = re.compile(r"\{\w+\}")
_VERDICT = re.compile(r"(?<!\w)[AB](?!\w)")


class Rejected(Exception):
    """Raised where a slot gives no row. `reason` is counted, `detail` is of this one alone."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Input(NamedTuple):
    """Holds what a row is made from."""

    text: str
    source: str
    """File and line."""
    values: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """The row that it is of."""


class Made(NamedTuple):
    """Holds a row, and what of it is judged."""

    row: dict[str, Any]
    new: tuple[str, ...]
    """Texts that the model wrote, which must be of the wanted length and language."""
    distinct: tuple[str, ...]
    """Texts that must not nearly repeat those of another row."""
    parent: str = ""
    """Text that `distinct` must not nearly repeat either."""


Ask = Callable[..., Awaitable[str]]
"""ask(text, judging=False) returns the answer to a message. Raises Rejected for one that was cut off."""


class Slot(NamedTuple):
    """Holds what a row is asked for with."""

    number: int
    input: Input | None
    examples: tuple[str, ...] = ()


class Task(TaskConfig):
    """A task. `inputs` are what slots go through; without any, slots are endless."""

    CALLS: ClassVar[int]
    """Requests of a slot, at most."""
    CARRIED: ClassVar[int]
    """Earlier answers that one of its prompts holds, at most."""
    JUDGED: ClassVar[int] = 0
    """Requests of these that the judge answers."""

    @abstractmethod
    def read(self) -> list[Input]:
        """Return the inputs, or the seeds. Raises DataError where there is none."""

    def num_slots(self, inputs: Sequence[Input], rows: int) -> int:
        """Return how many slots there are, to make `rows` rows."""
        return len(inputs) * self.variants

    variants: int = Field(1, gt=0, description="Rows to ask for from each input, at most.")

    def slot(self, number: int, inputs: Sequence[Input], made: Sequence[str], seed: int) -> Slot:
        """Return a slot. All inputs are gone through before one comes again, in another order.
        `made` are the texts that rows of earlier slots added to the examples."""
        # The permutation is a function, not a list: the slot's input follows from its number alone.
        turn, place = divmod(number, len(inputs))
        return Slot(number, inputs[int(permute(place, len(inputs), key_of(seed, "inputs", turn)))])

    @abstractmethod
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts that it fills, which provenance names by their hash."""

    def num_bytes(self, slot: Slot) -> int:
        """Return the most bytes of a prompt of this slot, without earlier answers."""
        given = [slot.input.text if slot.input else "", *slot.examples]
        filled_in = self.repeats() * sum(_num_bytes(text) + 16 for text in given)
        return max(map(_num_bytes, self.prompts())) + filled_in

    def repeats(self) -> int:
        """Return how often a prompt repeats what it is filled with, at most."""
        counts = (Counter(_IN_BRACES.findall(prompt)).values() for prompt in self.prompts())
        return max(1, *(max(found, default=1) for found in counts))

    @abstractmethod
    async def make(self, slot: Slot, ask: Ask) -> Made:
        """Ask for a row. Raises Rejected for answers that are none."""


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _with_names(prompt: str, *names: str) -> str:
    """Return a prompt. Raises ValueError unless it has these names in braces."""
    for name in names:
        if f"{{{name}}}" not in prompt:
            raise ValueError(f"a prompt must have {{{name}}} in it, once or more")
    return prompt


class Instructions(Task):
    """Instructions like those of seed tasks, and answers to them (self-instruct, Wang et al. 2023)."""

    name: Literal["instructions"] = "instructions"
    seeds: tuple[str, ...] = Field(
        min_length=1, description="Files of rows with an `instruction`, a `prompt` or messages."
    )
    examples: int = Field(6, gt=0, description="Seed tasks that a prompt shows.")
    made_examples: int = Field(
        2, ge=0, description="Tasks among these that earlier rows have added, once there are some."
    )
    tries: int | None = Field(
        None, gt=0, description="Most slots. Defaults to ten for each row that is wanted."
    )
    format: Literal["chat", "completion"] = "chat"
    prompt: str = Field(INSTRUCTION, description="Prompt for a task: {examples}.")

    CALLS: ClassVar[int] = 2
    CARRIED: ClassVar[int] = 1
    LOOKS_BACK: ClassVar[bool] = True

    @field_validator("prompt")
    @classmethod
    def _names(cls, prompt: str) -> str:
        return _with_names(prompt, "examples")

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,)

    def read(self) -> list[Input]:
        return _rows_of(self.seeds, ASKED)

    def num_slots(self, inputs: Sequence[Input], rows: int) -> int:
        return self.tries or 10 * rows

    def slot(self, number: int, inputs: Sequence[Input], made: Sequence[str], seed: int) -> Slot:
        random = np.random.Generator(np.random.Philox(key_of(seed, "examples", number)))
        # At least one example is a person's: a model that only sees its own tasks drifts from them.
        num_made = min(self.made_examples, self.examples - 1, len(made))
        num_given = min(self.examples - num_made, len(inputs))
        # Drawn in this order: slots of a seed stay what they are.
        of_model = [made[at] for at in _some(random, len(made), num_made)]
        of_people = [inputs[at].text for at in _some(random, len(inputs), num_given)]
        return Slot(number, None, (*of_model, *of_people))

    async def make(self, slot: Slot, ask: Ask) -> Made:
        examples = "\n\n".join(f"{n}. {text}" for n, text in enumerate(slot.examples, 1))
        asked = await ask(filled(self.prompt, {"examples": examples}))
        instruction = _unquoted(_NUMBERED.sub("", asked, count=1))
        if not instruction:
            raise Rejected("no instruction", asked)
        answer = (await ask(instruction)).strip()
        row = _talk(self.format, instruction, answer)
        return Made(row, (instruction, answer), (instruction,))


class Questions(Task):
    """Questions about documents, with answers."""

    name: Literal["questions"] = "questions"
    documents: tuple[str, ...] = Field(
        min_length=1, description="Files of documents: JSON lines, parquet, Arrow, plain text."
    )
    json_key: str = Field("text", description="Key or column that holds the text.")
    passage_chars: int = Field(
        4000, ge=LEAST_PASSAGE, description="Most characters of a passage, cut between paragraphs."
    )
    format: Literal["chat", "completion", "answers", "pairs"] = Field(
        "chat",
        description="answers: the passage, with the place of the answer in it; pairs: the question with its passage, "
        "for embeddings.",
    )
    with_passage: bool = Field(
        False, description="Put the passage before the question, in chats and completions."
    )
    prompt: str | None = Field(
        None, description="Prompt for JSON of a question and an answer: {document}."
    )

    CALLS: ClassVar[int] = 1
    CARRIED: ClassVar[int] = 0

    @field_validator("prompt")
    @classmethod
    def _names(cls, prompt: str | None) -> str | None:
        return prompt if prompt is None else _with_names(prompt, "document")

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt or (EXCERPT if self.format == "answers" else QUESTION),)

    def read(self) -> list[Input]:
        report, found = Report(), []
        for document in iter_documents(self.documents, self.json_key, report):
            source = f"{document.path}:{document.line}"
            passages = list(_passages(document.text, self.passage_chars))
            for number, passage in enumerate(passages):
                part = f"#{number}" if len(passages) > 1 else ""
                found.append(Input(passage, source + part))
        if not found:
            raise DataError(
                f"task.documents: no text in {', '.join(self.documents)}\n{report}".rstrip()
            )
        return found

    async def make(self, slot: Slot, ask: Ask) -> Made:
        assert slot.input is not None
        passage = slot.input.text
        values = _json_in(await ask(filled(self.prompts()[0], {"document": passage})))
        question, answer = (_field(values, name) for name in ("question", "answer"))
        new, distinct = (question, answer), (question,)
        if self.format == "pairs":
            return Made({"anchor": question, "positive": passage}, new, distinct)
        if self.format == "answers":
            # The first place where it stands: which of several was meant, the model did not say.
            start = passage.find(answer)
            if start < 0:
                raise Rejected("the answer does not stand in the passage", answer)
            place = {"text": [answer], "answer_start": [start]}
            return Made({"question": question, "context": passage, "answers": place}, new, distinct)
        prompt = f"{passage}\n\n{question}" if self.with_passage else question
        return Made(_talk(self.format, prompt, answer), new, distinct)


class Rewriting(Task):
    """A task that rewrites one field of each row, and keeps the others: labels stay as they are."""

    data: tuple[str, ...] = Field(min_length=1, description="Files of rows to rewrite.")
    field: str = Field("text", description="Field to rewrite.")

    def read(self) -> list[Input]:
        return _rows_of(self.data, [self.field])

    def _made(self, slot: Slot, answer: str) -> Made:
        assert slot.input is not None
        text = _unquoted(answer)
        if not text:
            raise Rejected("no text", answer)
        # The parent's other fields, its label among them, are those of the new row.
        row = {**slot.input.values, self.field: text}
        return Made(row, (text,), (text,), slot.input.text)


class Paraphrases(Rewriting):
    """Texts of labelled rows in other words."""

    name: Literal["paraphrases"] = "paraphrases"
    prompt: str = Field(PARAPHRASE, description="Prompt for another wording: {text}.")

    CALLS: ClassVar[int] = 1
    CARRIED: ClassVar[int] = 0

    @field_validator("prompt")
    @classmethod
    def _names(cls, prompt: str) -> str:
        return _with_names(prompt, "text")

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,)

    async def make(self, slot: Slot, ask: Ask) -> Made:
        assert slot.input is not None
        return self._made(slot, await ask(filled(self.prompt, {"text": slot.input.text})))


class BackTranslation(Rewriting):
    """Texts of labelled rows, translated there and back (Sennrich et al. 2016)."""

    name: Literal["back_translation"] = "back_translation"
    language: str = Field("English", min_length=1, description="Language of the texts.")
    through: str = Field("German", min_length=1, description="Language in between.")
    prompt_there: str = Field(THERE, description="Prompt: {text}, {through}, {language}.")
    prompt_back: str = Field(BACK, description="Prompt: {text}, {through}, {language}.")

    CALLS: ClassVar[int] = 2
    CARRIED: ClassVar[int] = 1

    @field_validator("prompt_there", "prompt_back")
    @classmethod
    def _names(cls, prompt: str) -> str:
        return _with_names(prompt, "text")

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt_there, self.prompt_back)

    async def make(self, slot: Slot, ask: Ask) -> Made:
        assert slot.input is not None
        text = slot.input.text
        for prompt in self.prompts():
            languages = {"language": self.language, "through": self.through}
            text = (await ask(filled(prompt, {"text": text, **languages}))).strip()
            if not text:
                raise Rejected("no text", "the translation is empty")
        return self._made(slot, text)


class Preferences(Task):
    """Two answers to each prompt, of which a judge says twice which is better, once in either
    order: judges prefer what stands first (Zheng et al. 2023)."""

    name: Literal["preferences"] = "preferences"
    data: tuple[str, ...] = Field(
        min_length=1, description="Files of rows with an `instruction`, a `prompt` or messages."
    )
    messages: bool = Field(
        True, description="Write messages, which a chat template renders; false: plain texts."
    )
    prompt: str = Field(JUDGE, description="Prompt for a verdict: {prompt}, {first}, {second}.")

    CALLS: ClassVar[int] = 4
    CARRIED: ClassVar[int] = 2
    JUDGED: ClassVar[int] = 2

    @field_validator("prompt")
    @classmethod
    def _names(cls, prompt: str) -> str:
        return _with_names(prompt, "prompt", "first", "second")

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,)

    def read(self) -> list[Input]:
        return _rows_of(self.data, ASKED)

    async def make(self, slot: Slot, ask: Ask) -> Made:
        assert slot.input is not None
        prompt = slot.input.text
        one, other = [(await ask(prompt)).strip() for _ in range(2)]
        if one == other or not (one and other):  # before the judge, who is paid as well
            raise Rejected("two answers that are the same, or none")
        verdicts = []
        for first, second in ((one, other), (other, one)):
            values = {"prompt": prompt, "first": first, "second": second}
            told = (await ask(filled(self.prompt, values), judging=True)).strip()
            # Of several lines the first counts: what follows are reasons, which name both.
            letters = set(_VERDICT.findall(told.partition("\n")[0]))
            if len(letters) != 1:
                raise Rejected("no verdict", told)
            verdicts.append(first if letters == {"A"} else second)
        if verdicts[0] != verdicts[1]:
            raise Rejected("the judge prefers a place, not an answer")
        chosen, rejected = verdicts[0], one if verdicts[0] == other else other
        sides: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if self.messages:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            sides = {k: [{"role": roles[k], "content": text}] for k, text in sides.items()}
        return Made(sides, (chosen, rejected), (chosen,))


def texts_in(values: Any) -> Iterator[str]:
    """Yield every text of a row: of fields, lists and messages, but no roles and no provenance."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, list):
        for value in values:
            yield from texts_in(value)
    elif isinstance(values, dict):
        for name, value in values.items():
            if name not in ("role", "from", "metadata"):
                yield from texts_in(value)


def _rows_of(inputs: Sequence[str], names: Sequence[str]) -> list[Input]:
    """Return the rows of files with their texts, of the first of these fields that a row has. Raises
    DataError for a row without any."""
    report, found = Report(), []
    for row in read_rows(list_rows(inputs, report), report):
        source = f"{row.path}:{row.line}"
        text = "" if row.why else _text_of(row.values, names)
        if not text:
            there = ", ".join(map(str, row.values)) or "none"
            wanted = " or ".join(map(repr, names))
            raise DataError(f"{source}: {row.why or f'no text in {wanted}; fields here: {there}'}")
        found.append(Input(text, source, dict(row.values)))
    if not found:
        raise DataError(f"{', '.join(inputs)}: there is no row in it")
    return found


def _text_of(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the text of the first of these fields that is there; of messages, the user's first."""
    found = next((values[name] for name in names if values.get(name)), None)
    if isinstance(found, list):
        # An endpoint is asked what begins a conversation: what follows depends on another's answer.
        turns = (each for each in found if isinstance(each, dict) and each.get("role") == "user")
        found = next(turns, {}).get("content")
    return found.strip() if isinstance(found, str) and is_unicode(found) else ""


def _passages(text: str, longest: int) -> Iterator[str]:
    """Yield the passages of a document, cut at the last border within `longest` characters:
    between paragraphs, else lines, else sentences, else words."""
    text = text.strip()
    while len(text) > longest:
        # In the second half only, so that no passage is much shorter than it may be.
        places = [text.rfind(mark, longest // 2, longest) for mark in ("\n\n", "\n", ". ", " ")]
        cut = next((place + 1 for place in places if place >= 0), longest)
        yield text[:cut].strip()
        text = text[cut:].strip()
    if len(text) >= LEAST_PASSAGE:
        yield text


def _some(random: np.random.Generator, size: int, count: int) -> list[int]:
    """Return `count` different numbers below `size`."""
    # A number for each and the smallest of them: which are drawn does not depend on how NumPy's
    # `choice` is written.
    return np.argsort(random.random(size), kind="stable")[:count].tolist()


def _unquoted(text: str) -> str:
    """Return a text without the quotation marks that models put around what they were asked for."""
    text = text.strip()
    for begin, end in ('""', "“”", "«»"):
        # Marks within belong to the text: "Yes", he said, "no".
        if len(text) > 2 and text[0] == begin and text[-1] == end and begin not in text[1:-1]:
            return text[1:-1].strip()
    return text


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in an answer, which may have words or a fence around it."""
    # From the first brace on: `raw_decode` leaves alone what follows the object.
    start = text.find("{")
    if start >= 0:
        try:
            values, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            return values
    raise Rejected("no JSON object", text)


def _field(values: dict[str, Any], name: str) -> str:
    """Return a text of a JSON object."""
    found = values.get(name)
    if not isinstance(found, str) or not found.strip() or not is_unicode(found):
        raise Rejected(f"no {name}", json.dumps(values))
    return found.strip()


def _talk(format: str, prompt: str, answer: str) -> dict[str, Any]:
    """Return a question and its answer as a row."""
    if not answer:
        raise Rejected("no answer", prompt)
    if format == "chat":
        turns = (("user", prompt), ("assistant", answer))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    return {"prompt": prompt, "completion": answer}
