"""A server over ranks: rank 0 answers clients and schedules the batch, and tells the other ranks what
each forward pass computes. They hold their parts of the weights and of the KV cache, and choose nothing."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.comm.mesh import Launch
from megalite.errors import ConfigError
from megalite.infer.batch import Predictor
from megalite.infer.cache import CachedSequenceInfo
from megalite.infer.cells import CacheKind
from megalite.infer.generate import Generator, find_model_on_ranks
from megalite.infer.ranks import RankLost
from megalite.infer.serving.front import Host
from megalite.infer.serving.loading import Opened, version_of, warm_up
from megalite.infer.serving.run import serve
from megalite.infer.serving.settings import Settings
from megalite.models import model_config
from megalite.models.layers import SequenceInfo

LOG = logging.getLogger("megalite.serve")
BEAT_S = 1.0
"""Seconds without a forward pass after which rank 0 tells the others to go on waiting: an end of
theirs is noticed when nobody asks anything, and no wait reaches the timeout of the process group."""
END_S = 5.0
"""Most seconds that the end waits for a forward pass under way."""
HEADER = 6
"""Numbers in front of each message."""


class Kind(IntEnum):
    """Names what a message of rank 0 asks the others to do."""

    WAIT = 0
    STEP = 1
    END = 2
    COPY = 3


def open_on_ranks(
    path: Path,
    num_slots: int,
    max_length: int,
    launch: Launch,
    layout: dict[str, int],
    kv_cache: CacheKind | None = None,
) -> tuple[Generator, str]:
    """Load this rank's part of what `path` leads to, a decoder, and ask it once. Return it with its
    version. All ranks of `launch` call it; `layout` has the sizes that `Generator.open` takes,
    `kv_cache` is as there. Raise ConfigError, DataError, CheckpointError or NotFinite."""
    folder = find_model_on_ranks(path, launch).resolve()
    task = model_config({"hf": str(folder)}).task
    if task != "causal":
        raise ConfigError(
            f"{folder} holds a model of model.task: {task}, which is served on one device: start `megalite serve` "
            "without torchrun, --tensor, --pipeline and --expert"
        )
    version = version_of(folder)
    generator = Generator.open(
        folder,
        num_slots=num_slots,
        max_length=max_length,
        launch=launch,
        kv_cache=kv_cache,
        **layout,
    )
    warm_up(generator)
    return generator, version


def lead(
    generator: Generator, version: str, settings: Settings, address: socket.socket, grace_s: float
) -> bool:
    """Serve `generator` on rank 0 as `serve` does, while the other ranks `follow`. Return False where
    one of them is gone before the end."""
    leader = Leader(generator.model, BEAT_S)
    generator.model = leader
    opened = Opened(generator, generator.folder or Path(), version)
    try:
        serve(lambda: Host(opened, settings, _refuse), address, grace_s, lambda: leader.lost)
    finally:
        is_whole = leader.end()
        if not is_whole:
            LOG.error("the server has ended: %s", leader.lost)
    return is_whole


class Leader:
    """Runs a sharded model on rank 0 as a `batch.Predictor`: what it is asked, it has the other ranks
    compute as well, which are in `follow`."""

    # Where the inputs are laid out: gloo sends them from the host.
    device = torch.device("cpu")

    def __init__(self, model: Predictor, beat_s: float):
        """Lead the ranks of `model`, which get a message every `beat_s` seconds at least."""
        self.model, self.num_slots, self.vocab_size = model, model.num_slots, model.vocab_size
        self.capacity, self.turning_points = model.capacity, model.turning_points
        self.lost = ""
        """Why the ranks can compute nothing any more; empty while they can."""
        # Messages come from two threads: the engine's, and that of beats.
        self._turn = threading.Lock()
        self._ended, self._beat_s, self._is_fresh = threading.Event(), beat_s, False
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        """Return the next-token logits, see `batch.Predictor`. Raise RankLost where a rank is gone, or
        a forward pass has failed on one: the others wait within it, and no message reaches them."""
        with self._turn, self._losing():
            _tell(*_packed(tokens_BT, places, last_B))
            self._is_fresh = True
            return _run(self.model, tokens_BT, places, last_B)

    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        """Raise ConfigError: no request needs the logits behind every token."""
        raise ConfigError("a server over ranks does not score texts; `megalite eval` does")

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Copy cached sequences between slots, on all ranks. Raise RankLost as `predict` does."""
        pairs = torch.tensor([*sources, *targets, *[0] * len(sources)])
        with self._turn, self._losing():
            _tell(_header(Kind.COPY, len(sources), 0, num_tokens), pairs)
            self._is_fresh = True
            self.model.copy_slots(sources, targets, num_tokens)

    def end(self) -> bool:
        """Let the other ranks end. Return whether all are there to do so. May be called again."""
        if self._ended.is_set():
            return not self.lost
        self._ended.set()
        if not self._turn.acquire(timeout=END_S):
            self.lost = self.lost or "a forward pass does not end"
            return False
        with contextlib.suppress(RankLost), self._losing():
            _tell(_header(Kind.END))
        self._turn.release()
        return not self.lost

    def _beat(self) -> None:
        """Tell the other ranks to wait, as long as nothing else is told them."""
        while not self._ended.wait(self._beat_s) and not self.lost:
            with self._turn, contextlib.suppress(RankLost), self._losing():
                if not (self._is_fresh or self._ended.is_set()):
                    _tell(_header(Kind.WAIT))
                self._is_fresh = False

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Turn any error within into RankLost, from then on."""
        if self.lost:
            raise RankLost(self.lost)
        try:
            yield
        except BaseException as error:
            said = (str(error) or type(error).__name__).splitlines()[0]
            # Gloo's own lines of a connection that was closed say less than this.
            is_closed = "gloo" in said
            self.lost = "a rank is gone" if is_closed else f"a forward pass failed: {said}"
            raise RankLost(self.lost) from error


def follow(model: Predictor) -> bool:
    """Compute what rank 0 tells, until it says that this is the end. Return False where rank 0 is
    gone without a word."""
    # The launcher sends these to every rank at once, and rank 0 still has answers to end.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            header, numbers = _told()
        except RuntimeError:
            return False
        if header[0] == Kind.END:
            return True
        if header[0] == Kind.STEP:
            _run(model, *_unpacked(header, numbers))
        if header[0] == Kind.COPY:
            sources, targets, _ = numbers.view(3, -1).tolist()
            model.copy_slots(sources, targets, header[3])


def _run(model: Predictor, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
    """Run `model` on inputs that lie on the host."""
    to = partial(Tensor.to, device=model.device)
    # Those of a CachedSequenceInfo that are set; biases are made on the device of the positions.
    names = ("index_BT", "position_BT", "whole_length", "slot_B", "cell_BT")
    moved: dict[str, Any] = {name: to(getattr(places, name)) for name in names}
    return model.predict(to(tokens_BT), replace(places, **moved), to(last_B))


def _packed(
    tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor
) -> tuple[list[int], Tensor]:
    """Return the inputs of a forward pass as a header and int64 numbers [3·B·T + 3·B]."""
    assert isinstance(places.whole_length, Tensor)
    header = _header(
        Kind.STEP,
        *tokens_BT.shape,
        places.num_cells,
        int(places.fresh),
        int(places.slots is not None),
    )
    of_tokens = torch.stack([tokens_BT, places.position_BT, places.cell_BT])
    of_rows = torch.stack([places.slot_B, places.whole_length.view(-1), last_B])
    return header, torch.cat([of_tokens.view(-1), of_rows.view(-1)])


def _unpacked(header: list[int], numbers: Tensor) -> tuple[Tensor, CachedSequenceInfo, Tensor]:
    """Return what `_packed` was given."""
    _, rows, width, num_cells, fresh, neighbours = header
    of_tokens, of_rows = numbers.split([3 * rows * width, 3 * rows])
    tokens_BT, position_BT, cell_BT = of_tokens.view(3, rows, width)
    slot_B, length_B, last_B = of_rows.view(3, rows)
    first = int(slot_B[0])
    places = CachedSequenceInfo(
        torch.arange(width)[None], position_BT, whole_length=length_B[:, None, None], slot_B=slot_B,
        slots=slice(first, first + rows) if neighbours else None, cell_BT=cell_BT, num_cells=num_cells,
        fresh=bool(fresh),
    )  # fmt: skip
    return tokens_BT, places, last_B


def _header(kind: Kind, *numbers: int) -> list[int]:
    return [kind, *numbers, *[0] * (HEADER - 1 - len(numbers))]


def _tell(header: list[int], numbers: Tensor | None = None) -> None:
    """Send a message of rank 0 to all ranks."""
    dist.broadcast(torch.tensor(header), 0)
    if numbers is not None:
        dist.broadcast(numbers, 0)


def _told() -> tuple[list[int], Tensor]:
    """Return the header and the numbers of the next message of rank 0."""
    head = torch.empty(HEADER, dtype=torch.int64)
    dist.broadcast(head, 0)
    header = head.tolist()
    _, rows, width, *_ = header
    numbers = torch.empty(3 * rows * width + 3 * rows, dtype=torch.int64)
    if len(numbers):
        dist.broadcast(numbers, 0)
    return header, numbers


def _refuse(check: bool) -> Opened:
    """Raise ConfigError for a reload: ranks that follow read no weights."""
    raise ConfigError(
        "a server over ranks keeps the model that it was started with; start another one with the newer model"
    )
