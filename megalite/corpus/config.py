"""What the user asked of a corpus: sources, the stages in the order in which they run, the split, where it runs.

The defaults are FineWeb's. A stage is turned off with null (`c4: null`); a source can skip stages that do not suit it
(`skip: [gopher, c4, fineweb]` for source code)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megalite.config import Section
from megalite.errors import ConfigError
from megalite.mistakes import describe_errors
from megalite.resources import read_yaml, with_overrides

StageName = Literal["encoding", "length", "language", "repetition", "gopher", "c4", "fineweb", "personal", "words"]


class Source(Section):
    path: str = Field(description="file, folder or glob: JSON lines, parquet, Arrow, plain text, WARC")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="in the report and in every document")
    json_key: str = Field("text", description="key of JSON lines, column of parquet and Arrow, that holds the text")
    html: bool = Field(False, description="the text is HTML; always so in WARC's responses")
    skip: tuple[StageName, ...] = Field((), description="stages that leave this source's documents alone")


class ExtractConfig(Section):
    """The text of HTML, by trafilatura."""

    favor: Literal["precision", "recall"] = "precision"
    timeout_seconds: float = Field(60.0, gt=0, description="a page that takes longer is dropped")


class EncodingConfig(Section):
    """Mends text that was decoded wrongly, by ftfy."""

    unescape_html: bool | Literal["auto"] = Field("auto", description="auto: unless the text holds a `<`")
    unicode: Literal["NFC", "NFKC"] | None = "NFC"


class LengthConfig(Section):
    min_chars: int = Field(200, ge=0)
    max_chars: int = Field(1_000_000, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> LengthConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}")
        return self


class LanguageConfig(Section):
    """By fastText's lid.176, in the size that comes inside its package."""

    keep: tuple[str, ...] = Field(("en",), description="ISO 639 codes; [] keeps all and only notes the language")
    min_score: float = Field(0.65, ge=0, le=1)

    @field_validator("keep")
    @classmethod
    def _codes(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := next((code for code in keep if not (code.isalpha() and code.islower() and len(code) <= 3)), None):
            raise ValueError(f"{wrong!r} is not an ISO 639 code such as en or de")
        return keep


class RepetitionConfig(Section):
    """Gopher's rules (Rae et al. 2021, table A1): largest shares of a document that may be repeated."""

    lines: float = Field(0.3, gt=0, le=1)
    paragraphs: float = Field(0.3, gt=0, le=1)
    line_chars: float = Field(0.2, gt=0, le=1)
    paragraph_chars: float = Field(0.2, gt=0, le=1)
    top_ngrams: dict[int, float] = Field({2: 0.2, 3: 0.18, 4: 0.16}, description="characters in the commonest n-gram")
    ngrams: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}, description="characters in n-grams seen before"
    )


class GopherConfig(Section):
    """Gopher's rules of quality (Rae et al. 2021). Ratios are shares of words or lines."""

    min_words: int = Field(50, gt=0)
    max_words: int = Field(100_000, gt=0)
    min_word_length: float = Field(3, gt=0, description="of the mean word")
    max_word_length: float = Field(10, gt=0, description="of the mean word")
    max_symbols: float = Field(0.1, gt=0, description="hashes or ellipses a word")
    max_bullet_lines: float = Field(0.9, gt=0, le=1)
    max_ellipsis_lines: float = Field(0.3, gt=0, le=1)
    min_alphabetic_words: float = Field(0.8, gt=0, le=1)
    min_stop_words: int = Field(2, ge=0)
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")


class C4Config(Section):
    """C4's rules (Raffel et al. 2020), which also take single lines out of a document."""

    terminal_punctuation: bool = Field(False, description="keep only lines that end in . ? ! or a quotation mark")
    min_sentences: int = Field(5, ge=0)
    min_words_per_line: int = Field(3, ge=0)
    max_word_length: int = Field(1000, gt=0)
    curly_bracket: bool = Field(True, description="drop documents with a {")
    javascript: bool = Field(True, description="take lines out that speak of JavaScript")
    policy: bool = Field(True, description="take lines out that speak of cookies and terms of use")
    lorem_ipsum: bool = Field(True, description="drop documents with it")
    citations: bool = Field(True, description="take [1], [edit] and [citation needed] out")


class FineWebConfig(Section):
    """FineWeb's rules (Penedo et al. 2024)."""

    min_punctuated_lines: float = Field(0.12, ge=0, le=1, description="share of lines that end in punctuation")
    max_short_lines: float = Field(0.67, ge=0, le=1)
    short_line_chars: int = Field(30, gt=0)
    max_repeated_chars: float = Field(0.01, ge=0, le=1, description="share of characters in lines seen before")
    max_newlines: float = Field(0.3, ge=0, description="a word")


class PersonalConfig(Section):
    """What is replaced by something of no one's."""

    emails: bool = True
    ips: bool = Field(True, description="public addresses, IPv4 and IPv6; not versions such as `v1.2.3.4`")


class WordsConfig(Section):
    """Documents with listed words are marked `listed_words`; groups of people that are mentioned are counted."""

    file: Path | None = Field(None, description="a word a line; datatrove's list of banned words where left out")
    max_share: float | None = Field(None, gt=0, le=1, description="drop documents with a larger share of such words")
    groups: Path | None = Field(None, description="YAML of `axis: {group: [words]}`; configs/corpus/groups.yaml")


class NearConfig(Section):
    """MinHash over word n-grams: pairs of similarity s are found with probability 1 - (1 - s^hashes)^buckets."""

    ngrams: int = Field(5, gt=0)
    buckets: int = Field(14, gt=0)
    hashes: int = Field(8, gt=0, description="per bucket")
    same_numbers: bool = Field(
        True, description="any two numbers count as the same, so that tables of other numbers are duplicates"
    )


class SplitConfig(Section):
    """By a hash of the text: the same one is on the same side in every corpus, whatever else is in it."""

    valid: float = Field(0.005, ge=0, lt=1, description="share of the documents")
    test: float = Field(0.005, ge=0, lt=1, description="share of the documents")

    @model_validator(mode="after")
    def _some_left(self) -> SplitConfig:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid} and test {self.test} leave nothing for train")
        return self


class SlurmConfig(Section):
    partition: str
    time: str = Field("24:00:00", description="of one job")
    mem_per_cpu_gb: int = Field(4, gt=0)
    max_array_size: int = Field(1001, gt=0, description="the cluster's MaxArraySize")
    setup: str = Field("", description="command that activates the environment, such as `source .venv/bin/activate`")
    sbatch: dict[str, str] = Field({}, description="more options of sbatch, such as {account: mine}")


class CorpusConfig(Section):
    output: Path = Field(description="folder that train/, valid/, test/, report.json and report.html are written to")
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
    exact: bool = Field(True, description="drop documents whose text has been seen before")
    near: NearConfig | None = NearConfig()
    split: SplitConfig = SplitConfig()
    compression: Literal["zst", "gz", "none"] = "zst"
    shard_mb: float | None = Field(None, gt=0, description="input files of one task; by default 1,000 tasks at most")
    workers: int | None = Field(None, gt=0, description="processes, or tasks at a time on Slurm; one a core, or all")
    slurm: SlurmConfig | None = None

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sources are named {twice!r}")
        return sources


def load_corpus_config(path: str | Path, overrides: Sequence[str] = ()) -> CorpusConfig:
    """Read a YAML file and apply overrides such as `language.min_score=0.5`. Raises ConfigError with every mistake."""
    try:
        return CorpusConfig.model_validate(with_overrides(read_yaml(path), overrides))
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_errors(error, CorpusConfig)}") from None
