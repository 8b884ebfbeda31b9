"""Text generation for many prompts at a time: from a model folder to text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.folder import complete_steps, read_worth, sound_steps, step_folder
from megalite.checkpoint.load import dtype_of, from_hf
from megalite.comm.collectives import broadcast_text
from megalite.comm.mesh import Launch, Mesh
from megalite.data.answers import find_answers
from megalite.data.chat import ChatTemplate, Message
from megalite.data.contents import ContentEncoder
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megalite.data.tokenizer_files import tokenizer_file
from megalite.data.turn_end import TurnEndIds
from megalite.errors import ConfigError, DataError, NotFinite, TemplateLimit
from megalite.infer.answer import Answer, Request, TextStream, link
from megalite.infer.batch import NOT_FINITE, Batch, Predictor
from megalite.infer.cache import CachedModel
from megalite.infer.cells import CacheKind, memory_line
from megalite.infer.habits import LIKELY, Habits, read_habits
from megalite.infer.integer_linears import keep_integers
from megalite.infer.ranks import RanksModel, load_on_ranks
from megalite.infer.sampling import Sampling
from megalite.models import build_model, model_config, set_parameters, weight_table
from megalite.models.layers import Decoder, SequenceInfo
from megalite.models.peft import is_adapter
from megalite.utils.hub import how_to_get, local
from megalite.utils.notebook import NotebookBar, in_notebook
from megalite.utils.spelling import instead_of

SCORED_TOKENS = 4096
"""Most tokens of a batch whose rows are scored, padding included."""


MOST_RUNS = 5
"""Most runs that a message names."""
# GPT-2 writes bytes that are no visible characters of Latin-1 as those from U+0100 on, in order.
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + n): b for n, b in enumerate(HIDDEN)}
"""Byte of each character of a vocabulary in GPT-2's manner."""


def _what_else(path: Path) -> str:
    """Return, as the end of a message about a path that holds no model, what may be meant."""
    if (path / "config.yaml").is_file():
        return "; this run has saved none yet"
    found = "" if path.exists() else instead_of(path)
    runs = sorted(str(each.parent) for each in path.glob("*/checkpoints"))
    runs = runs or sorted(str(each.parent) for each in path.parent.glob("*/checkpoints"))
    if runs and not found:
        more = ", …" * (len(runs) > MOST_RUNS)
        return f"; the runs there are {', '.join(runs[:MOST_RUNS])}{more}"
    return found or how_to_get(path)


def find_model(path: Path) -> Path:
    """Return the Hugging Face folder, or the adapter folder, that `path` refers to: a run, a
    checkpoint, such a folder, or the name of a model in the hub's cache.

    For a run it is the newest checkpoint. If that was saved after steps whose updates were refused
    for bad numbers, or before one that ended the run, it is the newest checkpoint known to be good,
    and a line on stderr says so. Raise ConfigError if there is no complete model."""
    path = local(path)
    # A run's own folder has a config.yaml and no config.json.
    if (path / "config.json").exists() or is_adapter(path):
        return path
    # A run's folder.
    root = path / "checkpoints"
    steps = complete_steps(root)
    if not steps:
        if damaged := sorted(root.glob("step-*")):
            raise ConfigError(
                f"{path} has no whole checkpoint: {damaged[-1].name} is unfinished or damaged"
            )
        raise ConfigError(
            f"{path} is neither a run with a checkpoint nor a Hugging Face folder with a config.json"
            f"{_what_else(path)}"
        )
    newest = step_folder(root, steps[-1])
    worth = read_worth(newest, steps[-1])
    # Bad numbers that were refused leave weights as they were; so many of them are a sign that
    # these weights are where they come from.
    if not (worth.refused or worth.doubted):
        return newest
    sound = sound_steps(steps, worth)
    taken = step_folder(root, sound[-1]) if sound else newest
    follows = (
        f"{taken}, the newest that is known to be good, is taken"
        if sound
        else "there is none from before them"
    )
    if Launch.from_environment().rank == 0:
        when = f"after {worth.refused} step{'s' if worth.refused > 1 else ''} in a row with bad numbers"
        when = when if worth.refused else "before a step with bad numbers, which ended the run"
        print(f"warning: {newest} was saved {when}; {follows}", file=sys.stderr, flush=True)
    return taken


def find_model_on_ranks(path: Path, launch: Launch) -> Path:
    """Return what `find_model` finds on rank 0, the same on all ranks of `launch`, which all call
    it. Where it raises there, the others raise ConfigError with the same text."""
    if launch.world_size == 1:
        return find_model(path)
    launch.join()
    # A training that goes on saves and removes checkpoints: ranks that looked one after the other
    # could each hold a part of another step's model, and nothing later would tell.
    if launch.rank > 0:
        folder, refusal = json.loads(broadcast_text(""))
        if refusal:
            raise ConfigError(refusal)
        return Path(folder)
    try:
        found = find_model(path)
    except Exception as error:  # the other ranks would wait for ever
        broadcast_text(json.dumps(["", str(error) or type(error).__name__]))
        raise
    broadcast_text(json.dumps([str(found), ""]))
    return found


def check_speaks(folder: Path) -> None:
    """Raise ConfigError for a model that classifies instead of generating text, and DataError for
    one without a tokenizer."""
    config = model_config({"hf": str(folder)})
    if config.task == "masked":
        raise ConfigError(
            f"{folder} holds an encoder (model.task: masked), which fills gaps and says no text; `megalite fill` and "
            "`megalite embed` ask it"
        )
    if config.task == "seq2seq":
        raise ConfigError(
            f"{folder} holds an encoder-decoder (model.task: seq2seq), which answers a source; `megalite generate` "
            "and `megalite serve` ask it on one device; here only models of model.task: causal are known"
        )
    if config.task != "causal":
        labels = ", ".join(config.labels[:8]) + (" …" if len(config.labels) > 8 else "")
        raise ConfigError(
            f"{folder} holds a model of model.task: {config.task}, which tells classes ({labels}) and says no text; "
            "`megalite classify` asks it; give here one of model.task: causal"
        )
    if tokenizer_file(folder) is None:
        raise DataError(
            f"{folder} has no tokenizer, without which it can neither read nor say a text; copy there the files of the "
            "one that its data was made with, which data.tokenizer has a run put into its checkpoints"
        )


def check_keeps_bits(folder: Path, task: str) -> None:
    """Raise ConfigError for a model of `task` that has no cache to be kept in 8 bits."""
    if task != "causal":
        raise ConfigError(
            f"--kv-cache: {folder} holds a model of model.task: {task}; only the keys and values of decoders "
            "(model.task: causal) are kept in 8 bits"
        )


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    seed: int | None = None,
) -> Decoder:
    """Return an unsharded model with the weights of a Hugging Face `folder`, on `device`, in
    `dtype` or the stored precision. A head that the folder lacks is drawn from `seed`; None: it is
    an error. Raise ConfigError or CheckpointError."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config({"hf": str(folder)}).without_predictors()
    weights, model = weight_table(config), build_model(config)
    # `read` gives a flat range of a weight's elements, as ranks ask for their shards; here the
    # whole.
    read = from_hf(folder, weights, config, Mesh.alone(), seed)
    # An adapter is merged in fp32, and rounded only where it must be.
    kind = "master" if dtype else "weight"
    tensors = {
        weight.name: read(weight, kind, 0, weight.numel).view(weight.shape) for weight in weights
    }
    dtype = dtype or dtype_of(tensors.values(), folder)
    kept = {weight.name: weight.dtype_in(dtype) for weight in weights}
    set_parameters(
        model,
        {name: nn.Parameter(tensor.to(device, kept[name])) for name, tensor in tensors.items()},
    )
    return model.eval().requires_grad_(False)


class Score(NamedTuple):
    """Holds what a model predicts for the tokens of a text, the first excepted, given those before
    each: [T-1]."""

    logprobs: Tensor
    """Log probability of each token, fp32."""
    likeliest: Tensor
    """Whether each token is the model's greedy choice, bool."""


class Generator:
    """Generates and scores text with a model. On several ranks, every rank makes the same calls and
    gets the same answers."""

    def __init__(
        self,
        model: Predictor,
        tokenizer: Tokenizer,
        ends: frozenset[int] = frozenset(),
        sampling: Sampling = LIKELY,
        folder: Path | None = None,
        habits: Habits | None = None,
    ):
        """Create a generator from a loaded `model` and its `tokenizer`.

        `ends` are token ids that end an answer; `sampling` applies to calls that give none;
        `folder` is where the chat template is read from; `habits` hold stop strings and the default
        length."""
        self.model, self.tokenizer, self.ends, self.sampling, self.folder = (
            model,
            tokenizer,
            ends,
            sampling,
            folder,
        )
        self.habits = habits or Habits(ends, sampling)
        self._token_texts: dict[int, str] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_slots: int = 8,
        max_length: int | None = None,
        launch: Launch | None = None,
        tensor: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        kv_cache: CacheKind | None = None,
    ) -> Generator:
        """Load a run, a checkpoint or a Hugging Face folder, on one device or over ranks that all
        call this.

        `num_slots` sequences are computed at a time, each of at most `max_length` tokens (default:
        the model's `max_positions`). `tensor` and `pipeline` are the sizes of the model-parallel
        groups over the ranks of `launch`; `expert` of the tensor ranks hold different experts.
        `kv_cache` keeps keys and values in 8 bits, and says on stderr what that saves. Raise
        ConfigError, DataError or CheckpointError."""
        launch = launch or Launch.from_environment()
        folder = find_model_on_ranks(Path(path), launch)
        if num_slots < 1 or (max_length is not None and max_length < 2):
            raise ConfigError(
                f"{num_slots} slots of {max_length} tokens: give at least one, of two tokens or more"
            )
        # Check these first: reading the weights takes long.
        check_speaks(folder)
        tokenizer = load_tokenizer(folder)
        habits = read_habits(folder, tokenizer)
        if habits.warning and launch.rank == 0:
            print(habits.warning, file=sys.stderr, flush=True)
        model: CachedModel | RanksModel
        if launch.world_size == tensor == pipeline == expert == 1:
            whole = load_model(folder)
            keep_integers(whole, folder)
            model = CachedModel(whole, num_slots, max_length, kv_cache)
        else:
            layout = launch, tensor, pipeline
            model = load_on_ranks(folder, *layout, num_slots, max_length, expert, kv_cache)
        if kv_cache is not None and launch.rank == 0:
            part = model.model if isinstance(model, CachedModel) else model.stage.model
            size = next(part.parameters()).dtype, kv_cache, model.num_slots * model.capacity
            print(memory_line(part.config.architecture, *size), file=sys.stderr, flush=True)
        return cls(model, tokenizer, habits.ends, habits.sampling, folder, habits)

    def request(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Request:
        """Return a Request for `prompt` (text or ids) of at most `max_tokens` tokens, with
        `sampling` (default: the generator's) and stop strings `stop`."""
        return Request(self.prompt_ids(prompt), max_tokens, sampling or self.sampling, tuple(stop))

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt; ids pass through. An empty text starts a document.
        Raise ConfigError if the tokenizer has no token for that."""
        if not isinstance(prompt, str):
            return list(prompt)
        end = self.tokenizer.eod_id
        ids = self.tokenizer.encode_prompt(prompt) or ([end] if end is not None else [])
        if not ids:
            raise ConfigError("an empty prompt needs a tokenizer that has an end-of-document token")
        return ids

    def token_text(self, token: int) -> str:
        """Return a token's text as it reads within a text, with the space that it may begin
        with."""
        # Kept: an answer with logprobs asks for twenty and one a token, all in a server's one loop.
        if token not in self._token_texts:
            before = self._before_a_token
            text = self.tokenizer.decode([*before, token])
            self._token_texts[token] = text[len(self.tokenizer.decode(before)) :]
        return self._token_texts[token]

    def token_bytes(self, token: int) -> bytes | None:
        """Return a token's bytes, which of part of a character its text does not tell; None where
        they are not known."""
        text = self.token_text(token)
        if "\ufffd" not in text:
            return text.encode()
        found = _bytes_of(self._pieces.get(token, ""))
        # Only what reads like the token: a piece may also stand for what it spells.
        return found if found.decode(errors="replace") == text else None

    @cached_property
    def _pieces(self) -> dict[int, str]:
        """Return the tokens as the vocabulary spells them."""
        return {token: piece for piece, token in self.tokenizer.vocabulary().items()}

    @cached_property
    def _before_a_token(self) -> list[int]:
        # Decoders in SentencePiece's manner drop a space at the start of a text, but not behind a
        # token.
        return self.tokenizer.encode("a")

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Return the model's chat template. Raise DataError if it has none."""
        if self.folder is None:
            raise DataError("this model has no chat template")
        return ChatTemplate.of(self.folder, self.tokenizer)

    @cached_property
    def contents(self) -> ContentEncoder:
        """Return the encoder of conversations. Raise DataError if the model has no chat
        template."""
        return ContentEncoder(self.tokenizer, self.chat_template)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where the model's next answer begins.

        Control tokens that a message spells out are encoded as text. Raise DataError without a chat
        template, and ConfigError with the template's own message for `messages` that it cannot
        render."""
        with _said_by_template():
            return self.contents.encode(messages)

    def check_answer(self, messages: Sequence[Message]) -> None:
        """Check that a conversation's last answer can be learned. Raise as `chat_ids` does if
        not."""
        with _said_by_template():
            find_answers(self.chat_template, self.contents.mark(messages), [len(messages) - 1])

    @cached_property
    def turn_end(self) -> TurnEndIds:
        """Return how the chat template ends an answer. Raise DataError without a template."""
        return self.chat_template.turn_end.ids(self.tokenizer)

    def as_chat(self, request: Request) -> Request:
        """Return `request` as that of an answer in a conversation: it ends where the chat template
        ends a turn, and is decoded without control tokens. Raise DataError without a chat
        template."""
        # A stop string that is a control token never appears in decoded text: stop at its id
        # instead.
        named = [self._controls[text] for text in request.stop if text in self._controls]
        ends = request.ends | {*self.turn_end.tokens, *named}
        return replace(request, ends=ends, stop=(*request.stop, *self.turn_end.texts), plain=True)

    @cached_property
    def _controls(self) -> dict[str, int]:
        """Return the ids of the control tokens by their texts."""
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return {}
        # Once: the vocabulary is a new dictionary of all tokens at every call.
        vocabulary = self.tokenizer.vocabulary()
        return {text: vocabulary[text] for text in self.tokenizer.control_tokens()}

    def answer_as_chat(self) -> None:
        """Make every answer end where the chat template ends a turn. Raise DataError without a chat
        template."""
        self.ends |= set(self.turn_end.tokens)
        self.habits = self.habits._replace(stop=(*self.habits.stop, *self.turn_end.texts))

    def _plain_text(self, ids: Sequence[int]) -> str:
        """Decode `ids` without control tokens."""
        # What ends a turn is flagged special in most tokenizers, but not in all.
        return self.tokenizer.decode_plain(
            [token for token in ids if token not in self.turn_end.tokens]
        )

    def start(self, request: Request) -> Answer:
        """Return a new Answer for a `Batch` to work on."""
        decode = self._plain_text if request.plain else self.tokenizer.decode
        return Answer(
            request, TextStream(decode, request.prompt, (*request.stop, *self.habits.stop))
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Generate and return all answers, in the order of their requests. Raise ConfigError for a
        prompt that is too long, and NotFinite for logits that are not finite."""
        # A batch of its own: one that an error leaves behind would go on computing dead answers.
        batch, answers = Batch(self.model, self.ends), [self.start(request) for request in requests]
        link(answers)
        for answer in answers:
            batch.add(answer)
        bar = NotebookBar() if in_notebook() else None
        for _ in batch.finish():
            if bar:
                done = sum(answer.finish is not None for answer in answers)
                tokens = sum(len(answer.tokens) for answer in answers)
                bar.show(done, len(answers), f"{done} of {len(answers)} answers, {tokens:,} tokens")
        if bar:
            bar.close()
        return answers

    def stream(self, request: Request) -> Iterator[str]:
        """Yield the text of one answer, piece by piece. Raise as `answer` does."""
        batch, answer = Batch(self.model, self.ends), self.start(request)
        batch.add(answer)
        for _ in batch.finish():
            if piece := answer.stream.take():
                yield piece

    def score(self, rows: Sequence[Sequence[int]]) -> list[Score]:
        """Return the Score of each text in `rows`, in their order.

        A text has at least two tokens, and at most one more than the model's capacity, since the
        last token is never an input. Raise ConfigError for other lengths, and NotFinite for logits
        that are not finite."""
        longest = self.model.capacity + 1
        for row in rows:
            if not 1 < len(row) <= longest:
                raise ConfigError(
                    f"a text of {len(row)} tokens cannot be scored, only of 2 to {longest}"
                )
        # Texts that differ only in their last token, such as the choices of a question, share one
        # forward pass.
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            alike.setdefault(tuple(row[:-1]), []).append(number)
        # Sorted by length, rows of a batch need little padding.
        left = sorted(alike, key=lambda given: -len(given))
        scores: dict[int, Score] = {}
        while left:
            # The first is the longest: all are padded to its length.
            count = max(1, SCORED_TOKENS // len(left[0]))
            batch, left, wholes = left[:count], left[count:], []
            for given, logits_TV in zip(batch, self._logits(batch), strict=True):
                likeliest_T, whole_T = logits_TV.argmax(-1), logits_TV.logsumexp(-1)
                for number in alike[given]:
                    # Row t predicts token t + 1.
                    wanted_T = torch.tensor(rows[number][1:], device=logits_TV.device)
                    # Equals log_softmax at the wanted tokens, without a second tensor of [T,V].
                    logprobs_T = logits_TV.gather(1, wanted_T[:, None])[:, 0] - whole_T
                    scores[number] = Score(logprobs_T, likeliest_T == wanted_T)
                wholes.append(whole_T)
            if not torch.cat(wholes).isfinite().all():
                raise NotFinite(NOT_FINITE)
        return [scores[number] for number in range(len(rows))]

    def _logits(self, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield for each row the next-token logits behind each token, [T,V] fp32. Padding stands
        behind a row's tokens, which do not attend to it."""
        device, width = self.model.device, max(map(len, rows))
        tokens_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        index_T = torch.arange(width, device=device)
        # For RoPE that is scaled by the length: each row's own, and not the padded width.
        lengths = torch.tensor([len(row) for row in rows], device=device)[:, None, None]
        logits_BTV = self.model.logits(
            tokens_BT, SequenceInfo(index_T[None], index_T[None], whole_length=lengths)
        )
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            yield logits_TV[: len(row)].float()


def _bytes_of(piece: str) -> bytes:
    """Return the bytes that a piece of a vocabulary spells: as <0xE2> in SentencePiece's manner, or
    in GPT-2's, which has a character for each byte."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    if all(character in BYTES for character in piece):
        return bytes(BYTES[character] for character in piece)
    return piece.encode()


@contextmanager
def _said_by_template() -> Iterator[None]:
    """Turn a template's errors about messages into ConfigError. Other DataErrors pass."""
    try:
        yield
    except DataError as error:
        if not isinstance(error, TemplateLimit):
            raise
        raise ConfigError(str(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
