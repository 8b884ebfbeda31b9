"""Opening what a server answers with, at its start and again while it serves: whatever a path leads
to then."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megalite.checkpoint.folder import Damage, damage_of, read_manifest
from megalite.errors import CheckpointError, NotFinite
from megalite.infer.batch import NOT_FINITE
from megalite.infer.cache import Row, lay_out
from megalite.infer.cells import CacheKind
from megalite.infer.classify import Classifier
from megalite.infer.classify import Row as TextRow
from megalite.infer.encode import Encoder
from megalite.infer.generate import Generator, check_keeps_bits, find_model
from megalite.infer.seq2seq import TargetGenerator
from megalite.models import model_config

Model = Generator | Encoder | Classifier | TargetGenerator
"""What a server can answer with."""
PIECES, PIECE_BYTES = 64, 16 << 10
"""How much of a file of weights its version is made of: so many pieces, evenly spread."""


class Opened(NamedTuple):
    """Holds a model in memory, and where it was read from."""

    model: Model
    folder: Path
    """Without links: what the path led to when the model was read."""
    version: str


Open = Callable[[bool], Opened]
"""Opens a model; given True, after its files were compared with their checksums. Raises
ConfigError, DataError, CheckpointError or NotFinite."""


def open_model(
    path: Path,
    num_slots: int,
    max_length: int,
    check: bool,
    kv_cache: CacheKind | None = None,
) -> Opened:
    """Load what `path` leads to now: a run's newest checkpoint, a checkpoint or a Hugging Face
    folder, also behind a link.

    A decoder computes `num_slots` answers at a time, each of at most `max_length` tokens with its
    prompt. With `check`, the files of a checkpoint are compared with its manifest first, which
    takes as long as reading them. `kv_cache` keeps a decoder's keys and values in 8 bits; it is
    refused for other models. Raise ConfigError, DataError or CheckpointError, and NotFinite
    for a model whose logits are no numbers."""
    # A link that is turned meanwhile must not have one model's weights read with another's config.
    folder = find_model(path).resolve()
    if check:
        check_whole(folder)
    # Of the files that are read next, not of those that may lie there afterwards.
    version = version_of(folder)
    config = model_config({"hf": str(folder)})
    if kv_cache is not None:
        check_keeps_bits(folder, config.task)
    model: Model
    if config.PREDICTS == "masked":
        model = Encoder.open(folder)
    elif config.has_classes:
        model = Classifier.open(folder)
    elif config.task == "seq2seq":
        model = TargetGenerator.open(folder)
    else:
        model = Generator.open(
            folder, num_slots=num_slots, max_length=max_length, kv_cache=kv_cache
        )
    warm_up(model)
    return Opened(model, folder, version)


def warm_up(model: Model) -> None:
    """Ask the model once, of a decoder the last token of a longest sequence: that allocates the
    memory of all slots now, rather than fail for lack of it later. Raise NotFinite for what is NaN
    or infinite."""
    # The token 0, for each model has it; a text need not have any token.
    if isinstance(model, Encoder):
        model.embed_rows([[0]])
    elif isinstance(model, Classifier):
        list(model.logits([TextRow([0], 1)]))
    elif isinstance(model, TargetGenerator):
        model.generate([[0]], max_tokens=1)
    else:
        predictor = model.model
        row = Row(0, predictor.capacity - 1, [0], predictor.capacity)
        if not predictor.predict(*lay_out([row], predictor.device)).isfinite().all():
            raise NotFinite(NOT_FINITE)


def check_whole(folder: Path) -> None:
    """Compare the files of a checkpoint with its manifest, those of the optimizer excepted. Raise
    CheckpointError for a damaged one. A folder without a manifest passes."""
    files = read_manifest(folder)
    if files is Damage.MISSING:
        return
    if isinstance(files, Damage):
        raise CheckpointError(f"{folder}: its manifest {files.words}")
    for name, entry in files.items():
        if Path(name).parts[0] != "optimizer" and (damage := damage_of(folder / name, entry)):
            raise CheckpointError(f"{folder / name} {damage.words}")


def version_of(folder: Path) -> str:
    """Return 12 hexadecimal digits that tell a model from others of the same shape, by samples of
    its files. Replicas that serve copies of one folder have one version."""
    digest = hashlib.sha256()
    names = [
        name for ending in ("safetensors", "json", "jinja") for name in folder.glob(f"*.{ending}")
    ]
    for file in sorted(names):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()[:12]


def _pieces(file: Path) -> Iterator[bytes]:
    """Yield evenly spread pieces of a file: of large files of weights a finetune changes almost
    every part, and reading all of it would take as long as loading."""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        stride = max(PIECE_BYTES, (size - PIECE_BYTES) // (PIECES - 1))
        for start in range(0, size, stride):
            opened.seek(start)
            yield opened.read(PIECE_BYTES)
