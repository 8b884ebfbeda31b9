"""Train a tokenizer: byte-level BPE, also with T5's special tokens, SentencePiece BPE or unigram
with byte fallback, or BERT's WordPiece.

The result is a folder that `transformers.AutoTokenizer.from_pretrained` and `load_tokenizer` open,
with the same ids, and from which every text comes back unchanged, including spaces and unknown
scripts. (One exception: U+2581 is SentencePiece's own mark for a space, and comes back from its
tokenizers as one.) WordPiece alone keeps neither white space nor characters that it has not seen:
it is for models that read."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megalite.data.documents import Document, iter_documents
from megalite.data.inputs import Report
from megalite.data.sentencepiece_json import GRID
from megalite.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    write_tokenizer_config,
)
from megalite.data.tokenizer_files import tokenizer_file
from megalite.errors import DataError
from megalite.utils.files import replacing

END = "<|endoftext|>"
BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""Special tokens of WordPiece by role, in the order of their ids."""
BERT_SETTINGS = {
    **{f"{role}_token": token for role, token in BERT.items()},
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}
T5_SPECIAL = {"pad": "<pad>", "eos": "</s>"}
"""Special tokens for an encoder-decoder by role, in the order of their ids: a target begins with
the first."""
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""Stand for hidden spans, in their order."""
T5_SETTINGS = {
    **{f"{role}_token": token for role, token in T5_SPECIAL.items()},
    "additional_special_tokens": SENTINELS,
}
GROUPS = {
    "fim": ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""Special tokens that many models have, by the name under which they are asked for."""
RESERVED = "reserved:"
"""Beginning of the name of a group of tokens for later uses; the count follows."""
MOST_RESERVED = 10_000
Kind = Literal["bpe", "sp-bpe", "sp-unigram", "t5", "wordpiece"]
# Qwen2's pattern: contractions, words with one preceding sign, single digits, runs of punctuation
# with the line ends behind them, and indentation that leaves its last space to the following word.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCE_BYTES = 1 << 14
# Characters of byte and control pieces. Unigram models need them as pieces, for texts that spell
# such a piece out.
SPELLED = "".join(sorted({*"<0x123456789ABCDEF>", *"<unk>", *END}))


def train_tokenizer(
    inputs: Sequence[str],
    output: str | Path,
    vocab_size: int,
    kind: Kind = "bpe",
    json_key: str = "text",
    max_bytes: int = 256_000_000,
    special_tokens: Sequence[str] = (),
) -> tuple[Tokenizer, Report]:
    """Train on the first `max_bytes` of text (UTF-8) in `inputs` and write the folder `output`.

    `kind` is the type, `vocab_size` the number of tokens; small inputs may give a smaller
    byte-level vocabulary. `json_key` names the text in JSON lines, parquet and Arrow.
    `special_tokens` are more of these, as `expanded` takes them. Return the tokenizer and a report on
    the inputs. Raise DataError, also where the folder holds a tokenizer."""
    if kind not in get_args(Kind):
        raise DataError(
            f"tokenizer type {kind!r} is unknown; choose from {', '.join(get_args(Kind))}"
        )
    more = expanded(special_tokens, kind)
    # Every byte, <unk>, the end, and some room for characters; T5's special tokens.
    smallest = {"bpe": 257, "t5": 256 + len(T5_SPECIAL) + len(SENTINELS)}.get(kind, 300) + len(more)
    if vocab_size < smallest:
        raise DataError(
            f"vocabulary size {vocab_size} is too small for type {kind}; the least is {smallest}"
        )
    report, folder = Report(), Path(output)
    if folder.is_dir() and (file := tokenizer_file(folder)):
        raise DataError(
            f"{folder} holds a tokenizer already ({file.name}), with which token files and models may have been made; "
            "name a new folder, or delete it"
        )
    documents = _first_bytes(iter_documents(inputs, json_key, report), max_bytes)
    if not kind.startswith("sp-"):
        train, end, settings = {
            "bpe": (_train_byte_bpe, END, {}),
            "t5": (_train_t5, T5_SPECIAL["eos"], T5_SETTINGS),
            "wordpiece": (_train_wordpiece, None, BERT_SETTINGS),
        }[kind]
        tokenizer = train(documents, vocab_size, more)
        _some_text(report)
        if more:
            also = (*settings.get("additional_special_tokens", ()), *more)
            settings = settings | {"additional_special_tokens": also}
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer_config(folder, end, more=settings)
        # Last and whole: what holds a tokenizer.json is never trained anew.
        with replacing(folder / "tokenizer.json") as temporary:
            tokenizer.save(str(temporary))
    else:
        model = _train_sentencepiece(documents, vocab_size, kind.removeprefix("sp-"), report)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "tokenizer.model")
            file.write_bytes(model)
            SentencePieceTokenizer(file).save(folder)
    return load_tokenizer(folder), report


def expanded(names: Sequence[str], kind: Kind) -> tuple[str, ...]:
    """Return the special tokens that `names` ask for: tokens, groups of GROUPS, or reserved:N for
    <|reserved_0|> and so on. Raise DataError for what the type cannot have, or has already."""
    if names and kind.startswith("sp-"):
        raise DataError(
            f"special tokens are for types bpe, t5 and wordpiece; SentencePiece (type {kind}) would take them for text"
        )
    tokens: list[str] = []
    for name in names:
        if name.startswith(RESERVED):
            count = name.removeprefix(RESERVED)
            if not count.isdecimal() or not 0 < int(count) <= MOST_RESERVED:
                raise DataError(
                    f"special tokens {name!r}: give reserved:N with N up to {MOST_RESERVED:,}"
                )
            tokens += [f"<|reserved_{number}|>" for number in range(int(count))]
        else:
            tokens += GROUPS.get(name, (name,))
    own = {"bpe": (END,), "t5": (*T5_SPECIAL.values(), *SENTINELS)}.get(kind, (*BERT.values(),))
    seen: set[str] = set()
    for token in tokens:
        # A word without marks would be cut out of every text that has it.
        if len(token) < 3 or token[0] not in "<[" or token[-1] not in ">]":
            known = ", ".join((*GROUPS, f"{RESERVED}N"))
            raise DataError(
                f"special token {token!r} must be marked, as <|{token}|> or [{token}] is; groups are {known}"
            )
        if token in own or token in seen:
            raise DataError(
                f"special token {token!r} is there twice, or is one of type {kind} anyway"
            )
        seen.add(token)
    return tuple(tokens)


def _first_bytes(documents: Iterator[Document], max_bytes: int) -> Iterator[str]:
    """Yield the texts until `max_bytes` are reached."""
    seen = 0
    for document in documents:
        yield document.text
        seen += document.num_bytes
        if seen >= max_bytes:
            return


def _some_text(report: Report) -> None:
    """Raise DataError if the inputs had no text."""
    if not report.num_documents:
        raise DataError(f"the inputs hold no text to train on\n{report}".rstrip())


def _train_byte_bpe(
    texts: Iterator[str], vocab_size: int, more: Sequence[str] = (), own: Sequence[str] = (END,)
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer with the special tokens `own` and `more`, trained on the
    texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*own, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_t5(texts: Iterator[str], vocab_size: int, more: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer with T5's special tokens trained on the texts, each of
    which it ends."""
    tokenizer = _train_byte_bpe(texts, vocab_size, more, (*T5_SPECIAL.values(), *SENTINELS))
    end = T5_SPECIAL["eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}",
        pair=f"$A {end} $B:1 {end}:1",
        special_tokens=[(end, tokenizer.token_to_id(end))],
    )
    return tokenizer


def _train_wordpiece(
    texts: Iterator[str], vocab_size: int, more: Sequence[str]
) -> tokenizers.Tokenizer:
    """Return a WordPiece tokenizer that keeps upper and lower case, trained on the texts."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=BERT["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT.values(), *more],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = BERT["cls"], BERT["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


def _train_sentencepiece(
    texts: Iterator[str], vocab_size: int, model_type: str, report: Report
) -> bytes:
    """Return the content of a SentencePiece model file. Its pieces never cross a line: the newline
    stays a byte, as in Llama's own models. Raise DataError."""
    try:
        import sentencepiece
    except ImportError:
        raise DataError(
            "training this type needs sentencepiece; pip install 'megalite[data]'"
        ) from None
    model = io.BytesIO()
    sentences = (piece for text in texts for line in text.split("\n") for piece in _cut(line))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            # The next four keep every space where it was.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=SENTENCE_BYTES,
            unk_id=0,
            eos_id=1,
            eos_piece=END,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
            required_chars=SPELLED if model_type == "unigram" else "",
        )
    except RuntimeError as error:
        _some_text(report)
        raise DataError(
            f"SentencePiece could not train {vocab_size} {model_type} pieces: {error}"
        ) from None
    return _with_exact_sums(model.getvalue()) if model_type == "unigram" else model.getvalue()


def _with_exact_sums(model: bytes) -> bytes:
    """Return the model with its log-probabilities rounded to a grid, on which fp32 adds up those of
    a long text exactly.

    Otherwise SentencePiece (fp32) and tokenizers (fp64) break ties between reorderings of the same
    pieces, common in code, differently: one line of Python in two hundred came out different."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    parsed = proto.ModelProto.FromString(model)
    for piece in parsed.pieces:
        piece.score = round(piece.score * GRID) / GRID
    return parsed.SerializeToString()


def _cut(line: str) -> Iterator[str]:
    """Return a line in pieces short enough for the trainer, which skips sentences above its
    limit."""
    step = SENTENCE_BYTES // 4  # a character has at most four bytes
    return (line[start : start + step] for start in range(0, len(line), step))
