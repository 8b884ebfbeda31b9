"""Reads what torch.save wrote, without running any of it.

Such a file is a zip archive: a pickle, and the bytes of each storage beside it. A pickle names
functions to call. Here only the names of tensors, their storages and ordered dictionaries are
known; every other one stands for an object that does nothing but hold what it was given. Nothing is
imported for a pickle, and nothing of it is called.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from megalite.errors import CheckpointError
from megalite.utils.outside import check_regular, reading, shown

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


MOST_CLASSES = 1000
"""Largest number of class names in a pickle. Checkpoints have some dozens."""
LONGEST_KEY = 64
"""Largest number of items of a tuple that is a dictionary's key."""


class Unknown:
    """Stands for an object of a class that is not loaded."""

    origin = ""
    """Name of the class: module.name."""
    arguments: tuple[Any, ...]
    """What it was made of."""
    state: Any
    """What would have become its attributes."""

    def __new__(cls, *arguments: Any, **named: Any) -> Unknown:
        made = super().__new__(cls)
        made.__dict__["arguments"], made.__dict__["state"] = arguments, None
        return made

    def __init__(self, *arguments: Any, **named: Any):
        """Take anything and do nothing: `__new__` has stored it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item of a kind of dictionary that is not loaded."""

    def append(self, value: Any) -> None:
        """Ignore an item of a kind of list that is not loaded."""

    def extend(self, values: Any) -> None:
        """Ignore items of a kind of list that is not loaded."""

    def __call__(self, *arguments: Any, **named: Any) -> Unknown:
        return type(self)(*arguments)


class TorchFile:
    """Opens a file, or a part of one, that torch.save wrote."""

    def __init__(self, path: Path, begin: int = 0, size: int | None = None):
        """Open `size` bytes from byte `begin` on, or the whole file. Raises CheckpointError for
        anything else."""
        self.path = path
        check_regular(path, CheckpointError)
        try:
            file: IO[bytes] = open(path, "rb")  # noqa: SIM115 storages are read from it later
            if size is not None:
                if not 0 <= begin <= begin + size <= path.stat().st_size:
                    raise CheckpointError(f"{path} has no {size} bytes from byte {begin} on")
                # One piece of a .distcp file is a whole archive of torch.save.
                file.seek(begin)
                file = io.BytesIO(file.read(size))
            self._zip = zipfile.ZipFile(file)
            # The archive's folder is called as the file was when it was saved.
            pickled = next(name for name in self._zip.namelist() if name.endswith("data.pkl"))
            self._root = pickled.removesuffix("data.pkl")
        except (
            OSError,
            zipfile.BadZipFile,
            StopIteration,
            NotImplementedError,
            ValueError,
        ) as error:
            raise CheckpointError(
                f"{path} is not a file of torch.save's since torch 1.6 ({error})"
            ) from None
        if (
            f"{self._root}byteorder" in self._zip.namelist()
            and self._read("byteorder") != b"little"
        ):
            raise CheckpointError(f"{path} was written on a big-endian machine")

    def _read(self, name: str) -> bytes:
        """Read a member of the archive. Raises CheckpointError if it is damaged or compressed."""
        try:
            member = self._zip.getinfo(f"{self._root}{name}")
            # torch compresses nothing, and a compressed member may unpack to any size.
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(
                    f"{member.filename} is packed, as torch.save packs nothing"
                )
            return self._zip.read(member)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from None

    def load(self) -> Any:
        """Return what was saved, with `StoredTensor` for tensors and `Unknown` for what is not
        loaded."""
        return _read(io.BytesIO(self._read("data.pkl")), self.path, self)

    def storage(self, key: str) -> bytes:
        """Read the bytes of a storage."""
        return self._read(f"data/{key}")


def load_pickle(path: Path) -> Any:
    """Read a file that is a bare pickle, with `Unknown` for what is not loaded. Raises
    CheckpointError."""
    check_regular(path, CheckpointError)
    with reading(path, CheckpointError):
        return _read(io.BytesIO(path.read_bytes()), path, None)


def _read(pickled: io.BytesIO, path: Path, file: TorchFile | None) -> Any:
    """Read a pickle. Raises CheckpointError for whatever nonsense it holds."""
    with reading(f"{path}: its pickle", CheckpointError):
        return _Unpickler(pickled, path, file).load()


def _key(key: Any) -> Any:
    """Return a dictionary's key. Raises CheckpointError for one whose hash may take long.

    Hashes of nested tuples are computed in depth, and anew each time; chosen large numbers all have
    the same hash."""
    items = key if isinstance(key, tuple) else (key,)
    if len(items) > LONGEST_KEY or not all(map(_is_plain, items)):
        raise CheckpointError(f"a key is {shown(key)}, which no checkpoint has")
    return key


def _is_plain(item: Any) -> bool:
    if isinstance(item, int):
        return item.bit_length() <= 60
    return isinstance(item, (str, bytes, float, type, Unknown, type(None)))


READER: Any = pickle._Unpickler
"""The unpickler in Python, not in C: its methods for single opcodes can be replaced."""


class _Unpickler(READER):
    """Reads a pickle without calling or importing anything that it names."""

    dispatch: ClassVar[dict[int, Any]] = dict(READER.dispatch)

    def __init__(self, pickled: IO[bytes], path: Path, file: TorchFile | None):
        super().__init__(pickled)
        self._path = path
        self._file = file
        self._classes: dict[tuple[str, str], type[Unknown]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name: one of the known functions, or a class of `Unknown`."""
        # The only callables that a pickle gets; none of them runs anything of the pickle's.
        known = {
            ("collections", "OrderedDict"): _ordered,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if (module, name) not in self._classes:
            if len(self._classes) == MOST_CLASSES:
                raise CheckpointError(
                    f"{self._path}: its pickle names more than {MOST_CLASSES:,} classes"
                )
            self._classes[module, name] = type(name, (Unknown,), {"origin": f"{module}.{name}"})
        return self._classes[module, name]

    def load_build(self) -> None:
        """Keep what would become an object's attributes. The known objects need none."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Unknown):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        pairs = zip(items[::2], items[1::2], strict=True)
        self.append({_key(key): value for key, value in pairs})

    def load_additems(self) -> None:
        self.stack[-1].update(map(_key, self.pop_mark()))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    dispatch |= {
        pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict, pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
    }  # fmt: skip
    # These allocate whatever size they are told, or find objects of this process.
    for opcode in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[opcode[0]]

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        """Return the key and the dtype of a storage, which torch.save refers to by a persistent
        id."""
        _, kind, key, _, _ = pid
        if not isinstance(key, str):
            raise CheckpointError(
                f"{self._path}: a storage is named {shown(key)}, which is no name"
            )
        origin = getattr(kind, "origin", "")
        dtype = STORAGES.get(origin.removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: storages of {shown(getattr(kind, 'origin', kind))} cannot be read"
            )
        return key, dtype

    def _tensor(
        self,
        storage: Any,
        offset: int,
        shape: Any,
        stride: Any,
        *rest: Any,
    ) -> StoredTensor:
        assert self._file is not None, "a tensor outside of a file of tensors"
        return StoredTensor(self._file, storage, offset, shape, stride)

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in items)


class StoredTensor:
    """Refers to a tensor in a file, and reads it on demand."""

    def __init__(
        self,
        file: TorchFile,
        storage: tuple[str, torch.dtype],
        offset: int,
        shape: Any,
        stride: Any,
    ):
        """Refer to a view of `storage` (its key and dtype): `offset`, `shape` and `stride` count
        elements.

        Raises CheckpointError for numbers that cannot be those of a tensor in `file`."""
        self._file = file
        self._key, self.dtype = storage
        self._offset = offset
        self.shape = tuple(shape)
        self._stride = tuple(stride)
        numbers = (offset, *self.shape, *self._stride)
        if not all(isinstance(number, int) and 0 <= number < 2**48 for number in numbers):
            raise CheckpointError(
                f"{file.path}: a tensor has the shape {shown(self.shape)}, which is none"
            )

    def read(self) -> Tensor:
        """Read the tensor into memory of its own. Raises CheckpointError if the file has fewer
        numbers."""
        with reading(f"{self._file.path}: a tensor of shape {shown(self.shape)}", CheckpointError):
            data = bytearray(self._file.storage(self._key))
            flat = torch.frombuffer(data, dtype=self.dtype)
            # Strides of 0 make a few numbers as many as one likes.
            if math.prod(self.shape) > len(flat):
                raise CheckpointError(
                    f"{self._file.path}: a tensor of shape {shown(self.shape)} has {len(flat):,} numbers"
                )
            # torch refuses a view that goes beyond the storage; `reading` makes an error of it.
            return flat.as_strided(self.shape, self._stride, self._offset)
