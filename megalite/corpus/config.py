"""Configuration of a corpus: its sources, its stages in the order in which they run, the split, and
where it runs.

The defaults are FineWeb's. `null` turns a stage off (`c4: null`). A source can skip stages that do
not suit it (`skip: [gopher, c4, fineweb]` for source code).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megalite.config import Section
from megalite.config.errors import describe_errors, refusal
from megalite.utils.resources import read_yaml, with_overrides

StageName = Literal[
    "encoding", "length", "language", "repetition", "gopher", "c4", "fineweb", "personal", "words"
]


class Source(Section):
    """Names files to read documents from."""

    path: str = Field(
        description="file, folder or glob, here or in an object store: JSON lines, parquet, Arrow, plain text or WARC"
    )
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the source in the report and in every document",
    )
    json_key: str = Field(
        "text", description="key (JSON lines) or column (parquet, Arrow) that holds the text"
    )
    html: bool = Field(
        False, description="whether the text is HTML; responses in WARC files are HTML in any case"
    )
    skip: tuple[StageName, ...] = Field(
        (), description="stages that this source's documents do not go through"
    )


class ExtractConfig(Section):
    """Extracts the text of HTML with trafilatura."""

    favor: Literal["precision", "recall"] = Field(
        "precision",
        description="precision: less boilerplate; recall: less text is lost",
    )
    timeout_seconds: float = Field(60.0, gt=0, description="seconds after which a page is dropped")


class EncodingConfig(Section):
    """Repairs text that was decoded wrongly (mojibake) with ftfy."""

    unescape_html: bool | Literal["auto"] = Field(
        "auto",
        description="whether to decode HTML entities; auto: only in texts without a `<`",
    )
    unicode: Literal["NFC", "NFKC"] | None = Field("NFC", description="Unicode normalization")


class LengthConfig(Section):
    """Drops documents that are too short or too long."""

    min_chars: int = Field(200, ge=0, description="lower bound of a document's characters")
    max_chars: int = Field(1_000_000, gt=0, description="upper bound of a document's characters")

    @model_validator(mode="after")
    def _in_order(self) -> LengthConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}")
        return self


class LanguageConfig(Section):
    """Detects the language with fastText's lid.176, in the size that comes inside its package."""

    keep: tuple[str, ...] = Field(
        ("en",),
        description="languages to keep, as ISO 639 codes; [] keeps all and only notes the language",
    )
    min_score: float = Field(
        0.65, ge=0, le=1, description="lower bound of the detector's confidence"
    )

    @field_validator("keep")
    @classmethod
    def _codes(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for code in keep:
            if not (code.isalpha() and code.islower() and len(code) <= 3):
                raise ValueError(f"{code!r} is not an ISO 639 code such as en or de")
        return keep


class RepetitionConfig(Section):
    """Drops repetitive documents by Gopher's rules (Rae et al. 2021, table A1).

    Each number is the largest share of a document that may be repeated."""

    lines: float = Field(0.3, gt=0, le=1, description="largest share of repeated lines")
    paragraphs: float = Field(0.3, gt=0, le=1, description="largest share of repeated paragraphs")
    line_chars: float = Field(
        0.2, gt=0, le=1, description="largest share of characters in repeated lines"
    )
    paragraph_chars: float = Field(
        0.2, gt=0, le=1, description="largest share of characters in repeated paragraphs"
    )
    top_ngrams: dict[int, float] = Field(
        {2: 0.2, 3: 0.18, 4: 0.16},
        description="largest share of characters in the most frequent n-gram, by n",
    )
    ngrams: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="largest share of characters in repeated n-grams, by n",
    )


class GopherConfig(Section):
    """Drops documents by Gopher's quality rules (Rae et al. 2021)."""

    min_words: int = Field(50, gt=0, description="lower bound of a document's words")
    max_words: int = Field(100_000, gt=0, description="upper bound of a document's words")
    min_word_length: float = Field(
        3, gt=0, description="lower bound of the mean word length in characters"
    )
    max_word_length: float = Field(
        10, gt=0, description="upper bound of the mean word length in characters"
    )
    max_symbols: float = Field(
        0.1, gt=0, description="largest number of hashes, and of ellipses, per word"
    )
    max_bullet_lines: float = Field(
        0.9, gt=0, le=1, description="largest share of lines that begin with a bullet"
    )
    max_ellipsis_lines: float = Field(
        0.3, gt=0, le=1, description="largest share of lines that end in an ellipsis"
    )
    min_alphabetic_words: float = Field(
        0.8, gt=0, le=1, description="lower bound of the share of words with a letter"
    )
    min_stop_words: int = Field(2, ge=0, description="lower bound of the number of stop words")
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")


class C4Config(Section):
    """Drops documents, and removes single lines, by C4's rules (Raffel et al. 2020)."""

    terminal_punctuation: bool = Field(
        False, description="keep only lines that end in . ? ! or a quotation mark"
    )
    min_sentences: int = Field(5, ge=0, description="lower bound of a document's sentences")
    min_words_per_line: int = Field(3, ge=0, description="remove lines with fewer words")
    max_word_length: int = Field(
        1000, gt=0, description="remove lines with a longer word (characters)"
    )
    curly_bracket: bool = Field(True, description="drop documents that contain a {")
    javascript: bool = Field(True, description="remove lines that mention JavaScript")
    policy: bool = Field(True, description="remove lines that mention cookies or terms of use")
    lorem_ipsum: bool = Field(True, description="drop documents that contain lorem ipsum")
    citations: bool = Field(True, description="remove [1], [edit] and [citation needed]")


class FineWebConfig(Section):
    """Drops documents by FineWeb's rules (Penedo et al. 2024)."""

    min_punctuated_lines: float = Field(
        0.12, ge=0, le=1, description="lower bound of the share of lines that end in punctuation"
    )
    max_short_lines: float = Field(0.67, ge=0, le=1, description="largest share of short lines")
    short_line_chars: int = Field(30, gt=0, description="characters up to which a line is short")
    max_repeated_chars: float = Field(
        0.01, ge=0, le=1, description="largest share of characters in repeated lines"
    )
    max_newlines: float = Field(0.3, ge=0, description="largest number of newlines per word")


class PersonalConfig(Section):
    """Replaces personal addresses with addresses that nobody has."""

    emails: bool = Field(True, description="replace email addresses")
    ips: bool = Field(
        True,
        description="replace public IPv4 and IPv6 addresses, but no versions such as `v1.2.3.4`",
    )


class WordsConfig(Section):
    """Marks documents with listed words (`listed_words`), and counts mentions of groups of
    people."""

    file: Path | None = Field(
        None, description="list of words, one a line; default: datatrove's list of banned words"
    )
    max_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="drop documents with a larger share of listed words; null: none",
    )
    groups: Path | None = Field(
        None,
        description="YAML file of `axis: {group: [words]}`; default: configs/corpus/groups.yaml",
    )


class NearConfig(Section):
    """Drops near duplicates by MinHash over word n-grams.

    A pair of similarity s is found with probability 1 - (1 - s^hashes)^buckets."""

    ngrams: int = Field(5, gt=0, description="words of an n-gram")
    buckets: int = Field(14, gt=0)
    hashes: int = Field(8, gt=0, description="hash functions per bucket")
    same_numbers: bool = Field(
        True,
        description="treat all numbers as equal, so that tables which differ in their numbers are duplicates",
    )


class SplitConfig(Section):
    """Splits by a hash of the text: a text is in the same split of every corpus, whatever else is
    in it."""

    valid: float = Field(0.005, ge=0, lt=1, description="share of the documents for validation")
    test: float = Field(0.005, ge=0, lt=1, description="share of the documents for test")

    @model_validator(mode="after")
    def _some_left(self) -> SplitConfig:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid} and test {self.test} leave nothing for train")
        return self


class SlurmConfig(Section):
    """Runs the phases as job arrays on Slurm."""

    partition: str
    time: str = Field("24:00:00", description="time limit of one job")
    mem_per_cpu_gb: int = Field(4, gt=0, description="memory of one task in GB")
    max_array_size: int = Field(1001, gt=0, description="the cluster's MaxArraySize")
    setup: str = Field(
        "",
        description="command that activates the environment, such as `source .venv/bin/activate`",
    )
    sbatch: dict[str, str] = Field(
        {}, description="more options of sbatch, such as {account: mine}"
    )


class CorpusConfig(Section):
    """Holds all settings of a corpus."""

    output: Path = Field(
        description="folder to write train/, valid/, test/, report.json and report.html to"
    )
    sources: tuple[Source, ...] = Field(min_length=1)
    extract: ExtractConfig = ExtractConfig()
    encoding: EncodingConfig | None = EncodingConfig()
    length: LengthConfig | None = LengthConfig()
    language: LanguageConfig | None = LanguageConfig()
    repetition: RepetitionConfig | None = RepetitionConfig()
    gopher: GopherConfig | None = GopherConfig()
    c4: C4Config | None = C4Config()
    fineweb: FineWebConfig | None = FineWebConfig()
    personal: PersonalConfig | None = PersonalConfig()
    words: WordsConfig | None = WordsConfig()
    exact: bool = Field(True, description="drop exact duplicates, all but the first")
    near: NearConfig | None = NearConfig()
    split: SplitConfig = SplitConfig()
    compression: Literal["zst", "gz", "none"] = "zst"
    shard_mb: float | None = Field(
        None,
        gt=0,
        description="MB of input files that one task reads; default: at least 4, and 1,000 tasks at most",
    )
    workers: int | None = Field(
        None,
        gt=0,
        description="processes here (default: one a core), or tasks at a time on Slurm (default: all)",
    )
    slurm: SlurmConfig | None = None

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}")
        return sources


def load_corpus_config(path: str | Path, overrides: Sequence[str] = ()) -> CorpusConfig:
    """Read a YAML file and apply overrides such as `language.min_score=0.5`. Raises ConfigError
    with every mistake."""
    values = with_overrides(read_yaml(path), overrides)
    try:
        return CorpusConfig.model_validate(values)
    except ValidationError as error:
        mistakes = describe_errors(error, CorpusConfig, values).split("\n  ")
        raise refusal(mistakes, str(path), overrides) from None
