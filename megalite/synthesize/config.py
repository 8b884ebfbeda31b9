"""What a recipe of synthetic rows says: the endpoint, the task, the checks and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from megalite.config import Choice, Section
from megalite.config.errors import describe_errors, refusal
from megalite.corpus.config import LanguageConfig, LengthConfig, NearConfig
from megalite.registry import Registry
from megalite.utils.resources import read_yaml, with_overrides
from megalite.utils.urls import check_no_secret, is_url

MOST_CONCURRENT = 512
LOOK_BACK = 64
"""A slot whose examples are earlier rows sees those of slots that are further back than this, and of
no others: the order in which answers arrive changes nothing."""
OF_A_REQUEST = (
    "messages",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "n",
    "stream",
)


class Price(Section):
    """What tokens cost, in any currency."""

    input: float = Field(ge=0, description="Price of a million tokens of prompts.")
    output: float = Field(ge=0, description="Price of a million tokens of answers.")


class EndpointConfig(Section):
    """A model behind OpenAI's API, and how it is asked."""

    base_url: str = Field(description="Address up to /v1, such as http://127.0.0.1:8000/v1.")
    model: str = Field(min_length=1, description="Name of the model at that address.")
    key_from: str | None = Field(
        None, description="Environment variable that holds the API key. null: none is sent."
    )
    system: str | None = Field(None, min_length=1, description="System prompt of each request.")
    temperature: float = Field(0.8, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(512, gt=0, description="Most tokens of an answer.")
    stop: tuple[str, ...] = Field((), description="Texts before which an answer ends.")
    send_seed: bool = Field(True, description="Whether the endpoint takes a `seed`.")
    options: dict[str, Any] = Field(
        {}, description="More fields of each request, such as {top_k: 50}."
    )
    concurrency: int = Field(
        8, gt=0, le=MOST_CONCURRENT, description="Requests under way at a time."
    )
    timeout_s: float = Field(120.0, gt=0, description="Seconds to wait for an answer.")
    retries: int = Field(
        6, ge=0, description="Further tries of a request, each after twice the time of the last."
    )
    price: Price | None = Field(None, description="null: costs are not counted, only tokens.")

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        if not (is_url(url) and url.startswith(("http://", "https://"))):
            raise ValueError("must be an address such as http://127.0.0.1:8000/v1")
        check_no_secret(url)
        return url.rstrip("/")

    @field_validator("options")
    @classmethod
    def _others(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in OF_A_REQUEST:
            if name in options:
                raise ValueError(
                    f"{name} is no option: it has a key of its own, or is not yours to set"
                )
        return options


class BudgetConfig(Section):
    """Limits on what is spent, over all starts of a recipe. A row is asked for only if its answers
    fit at their longest."""

    requests: int | None = Field(None, gt=0, description="Most answered requests.")
    tokens: int | None = Field(None, gt=0, description="Most tokens, of prompts and answers.")
    cost: float | None = Field(
        None, gt=0, description="Highest cost, in the currency of the prices."
    )


class NearRowsConfig(NearConfig):
    """Drops rows that nearly repeat an earlier one, or one of `train` and `test`.

    Candidates are found by MinHash, and compared by the share of n-grams that both have (Jaccard)."""

    ngrams: int = Field(3, gt=0, description="words of an n-gram")
    buckets: int = Field(32, gt=0)
    hashes: int = Field(4, gt=0, description="hash functions per bucket")
    same_numbers: bool = Field(
        False,
        description="treat all numbers as equal, so that sums of other numbers are duplicates",
    )
    similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="share of common n-grams from which on two texts are duplicates",
    )


class ContaminationConfig(Section):
    """Drops rows that hold a run of words of an evaluation text."""

    data: tuple[str, ...] = Field(
        (), description="Files of rows of `text`, or of `prompt` and `completion`."
    )
    tasks: tuple[str, ...] = Field((), description="Tasks of lm-evaluation-harness.")
    include_path: Path | None = Field(None, description="Folder of more tasks.")
    ngram: int = Field(
        13, ge=5, description="Words that must be the same in a row; a shorter text counts whole."
    )


class RowLengthConfig(LengthConfig):
    """Drops rows whose new text is too short or too long."""

    min_chars: int = Field(1, ge=0, description="lower bound of the characters of the new text")
    max_chars: int = Field(
        20_000, gt=0, description="upper bound of the characters of the new text"
    )


class ChecksConfig(Section):
    """Checks that each row must pass."""

    train: tuple[str, ...] = Field((), description="Files of rows that are trained on already.")
    test: tuple[str, ...] = Field((), description="Files of rows that are held out.")
    near: NearRowsConfig = NearRowsConfig()
    contamination: ContaminationConfig | None = None
    length: RowLengthConfig = RowLengthConfig()
    language: LanguageConfig | None = Field(
        None, description="null: texts of a few words are too short to tell their language."
    )


class TaskConfig(Choice):
    """What is asked for. `name` says which of the tasks."""

    KINDS: ClassVar[Registry[Any]] = Registry(
        "task.name",
        {
            "instructions": "megalite.synthesize.tasks:Instructions",
            "questions": "megalite.synthesize.tasks:Questions",
            "paraphrases": "megalite.synthesize.tasks:Paraphrases",
            "back_translation": "megalite.synthesize.tasks:BackTranslation",
            "preferences": "megalite.synthesize.tasks:Preferences",
        },
    )
    LOOKS_BACK: ClassVar[bool] = False
    """Whether slots see earlier rows. The inputs are examples then, which no row may repeat."""


class RecipeConfig(Section):
    """Holds all settings of a recipe."""

    output: Path = Field(
        description="Folder to write rows.jsonl, rejected.jsonl and report.json to."
    )
    rows: int = Field(gt=0, description="Rows to make.")
    seed: int = Field(0, ge=0, description="Decides inputs, examples and the seeds of requests.")
    task: TaskConfig
    endpoint: EndpointConfig
    judge: EndpointConfig | None = Field(
        None, description="Who judges preferences. null: the endpoint itself, at temperature 0."
    )
    checks: ChecksConfig = ChecksConfig()
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> RecipeConfig:
        # An unknown price would count as nothing, and the budget would never be spent.
        if self.budget.cost is not None:
            for name, each in (("endpoint", self.endpoint), ("judge", self.judge)):
                if each is not None and each.price is None:
                    raise ValueError(f"budget.cost = {self.budget.cost} needs {name}.price")
        most = self.endpoint.concurrency
        if self.task.LOOKS_BACK and most > LOOK_BACK:
            raise ValueError(
                f"endpoint.concurrency = {most}: task {self.task.name} takes {LOOK_BACK} at most: its prompts show "
                "what earlier rows have added"
            )
        return self

    @property
    def judging(self) -> EndpointConfig:
        """Return the endpoint that judges."""
        # A verdict should be the likeliest one; variety is for what is written.
        return self.judge or self.endpoint.model_copy(update={"temperature": 0.0})


OF_THE_WORK = {"base_url", "key_from", "concurrency", "timeout_s", "retries", "price"}
"""Settings of an endpoint that change how it is asked, but not what."""


def decisive(recipe: RecipeConfig) -> dict[str, Any]:
    """Return the settings that decide which rows come out, as JSON. More rows or a larger budget
    only add to them."""
    # With the fields of the very task, not only those that all tasks have.
    told = recipe.model_dump(
        mode="json", exclude={"output", "rows", "budget"}, serialize_as_any=True
    )
    # A recipe may go on at another address, with more patience or another key.
    for each in (told["endpoint"], told["judge"]):
        for name in OF_THE_WORK if each else ():
            del each[name]
    return told


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read a YAML file and apply overrides such as `rows=400`. Raises ConfigError with every
    mistake."""
    values = with_overrides(read_yaml(path), overrides)
    try:
        return RecipeConfig.model_validate(values)
    except ValidationError as error:
        mistakes = describe_errors(error, RecipeConfig, values).split("\n  ")
        raise refusal(mistakes, str(path), overrides) from None
