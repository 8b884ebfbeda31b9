"""Reading what torch.save wrote without running any of it.

Such a file is a zip archive: a pickle, and the bytes of each storage beside it. A pickle names functions to call; here
every name but those of tensors, their storages and ordered dictionaries stands for an object that does nothing but hold
what it was given. Nothing is imported for a pickle, and nothing of it is called."""

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
from megalite.outside import check_regular, reading, shown

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


MOST_CLASSES = 1000
"""Names that a pickle may have; those of a checkpoint are some dozens."""
LONGEST_KEY = 64
"""Items of a tuple that is a dictionary's key."""


class Unknown:
    """Stands for an object of a class that is not loaded. What it was made of is in `arguments`, and in `state` what
    would have become its attributes."""

    origin = ""
    """Of the class: module.name"""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Unknown:
        made = super().__new__(cls)
        made.__dict__["arguments"], made.__dict__["state"] = arguments, None
        return made

    def __init__(self, *arguments: Any, **named: Any):
        """Takes anything, as `__new__` has."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Of a dictionary that is not loaded."""

    def append(self, value: Any) -> None:
        """Of a list that is not loaded."""

    def extend(self, values: Any) -> None:
        """The same."""

    def __call__(self, *arguments: Any, **named: Any) -> Unknown:
        return type(self)(*arguments)


class TorchFile:
    """A file, or a part of one, that torch.save wrote."""

    def __init__(self, path: Path, begin: int = 0, size: int | None = None):
        """`size` bytes from `begin` on. Raises CheckpointError where they are not such a file."""
        self.path = path
        check_regular(path, CheckpointError)
        try:
            file: IO[bytes] = open(path, "rb")  # noqa: SIM115 storages are read from it later
            if size is not None:
                if not 0 <= begin <= begin + size <= path.stat().st_size:
                    raise CheckpointError(f"{path} has no {size} bytes from byte {begin} on")
                file.seek(begin)
                file = io.BytesIO(file.read(size))
            self._zip = zipfile.ZipFile(file)
            self._root = next(name for name in self._zip.namelist() if name.endswith("data.pkl")).removesuffix(
                "data.pkl"
            )
        except (OSError, zipfile.BadZipFile, StopIteration, NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path} is not a file of torch.save's since torch 1.6 ({error})") from None
        if f"{self._root}byteorder" in self._zip.namelist() and self._read("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine")

    def _read(self, name: str) -> bytes:
        """A member, of which a damaged archive says anything; torch packs none, and what is packed may be of any size
        when it is unpacked."""
        try:
            member = self._zip.getinfo(f"{self._root}{name}")
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{member.filename} is packed, as torch.save packs nothing")
            return self._zip.read(member)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from None

    def load(self) -> Any:
        """What was saved, with `StoredTensor` for tensors and `Unknown` for what is not loaded."""
        return _read(io.BytesIO(self._read("data.pkl")), self.path, self)

    def storage(self, key: str) -> bytes:
        return self._read(f"data/{key}")


def load_pickle(path: Path) -> Any:
    """What lies in a file that is a pickle alone, `Unknown` for what is not loaded. Raises CheckpointError."""
    check_regular(path, CheckpointError)
    with reading(path, CheckpointError):
        return _read(io.BytesIO(path.read_bytes()), path, None)


def _read(pickled: io.BytesIO, path: Path, file: TorchFile | None) -> Any:
    """Raises CheckpointError for whatever nonsense a pickle holds."""
    with reading(f"{path}: its pickle", CheckpointError):
        return _Unpickler(pickled, path, file).load()


def _key(key: Any) -> Any:
    """Return a dictionary's key. Raises CheckpointError for one whose hash takes more than a moment: those of nested
    tuples are computed anew each time and in depth, and chosen large numbers all have the same one."""
    items = key if isinstance(key, tuple) else (key,)
    plain = all(
        isinstance(item, (str, bytes, float, type, Unknown, type(None)))
        or (isinstance(item, int) and item.bit_length() <= 60)
        for item in items[:LONGEST_KEY]
    )
    if not plain or len(items) > LONGEST_KEY:
        raise CheckpointError(f"a key is {shown(key)}, which no checkpoint has")
    return key


READER: Any = pickle._Unpickler


class _Unpickler(READER):
    dispatch: ClassVar[dict[int, Any]] = dict(READER.dispatch)

    def __init__(self, pickled: IO[bytes], path: Path, file: TorchFile | None):
        super().__init__(pickled)
        self._path, self._file = path, file
        self._classes: dict[tuple[str, str], type[Unknown]] = {}

    def find_class(self, module: str, name: str) -> Any:
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
                raise CheckpointError(f"{self._path}: its pickle names more than {MOST_CLASSES:,} classes")
            self._classes[module, name] = type(name, (Unknown,), {"origin": f"{module}.{name}"})
        return self._classes[module, name]

    def load_build(self) -> None:
        """What would become an object's attributes; of known ones, all that matters is known already."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Unknown):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def load_additems(self) -> None:
        self.stack[-1].update(map(_key, self.pop_mark()))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    dispatch |= {
        pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict, pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
    }  # fmt: skip
    for opcode in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[opcode[0]]  # allocate what they ask for, or find objects of this process

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, kind, key, _, _ = pid
        if not isinstance(key, str):
            raise CheckpointError(f"{self._path}: a storage is named {shown(key)}, which is no name")
        dtype = STORAGES.get(getattr(kind, "origin", "").removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(f"{self._path}: storages of {shown(getattr(kind, 'origin', kind))} cannot be read")
        return key, dtype

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        assert self._file is not None, "a tensor outside of a file of tensors"
        return StoredTensor(self._file, storage, offset, shape, stride)

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in items)


class StoredTensor:
    """A tensor in a file, read when it is asked for."""

    def __init__(self, file: TorchFile, storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any):
        self._file, (self._key, self.dtype) = file, storage
        self._offset, self.shape, self._stride = offset, tuple(shape), tuple(stride)
        if not all(isinstance(number, int) and 0 <= number < 2**48 for number in (offset, *self.shape, *self._stride)):
            raise CheckpointError(f"{file.path}: a tensor has the shape {shown(self.shape)}, which is none")

    def read(self) -> Tensor:
        """The tensor, on memory of its own. Raises CheckpointError where the file has not as many numbers."""
        with reading(f"{self._file.path}: a tensor of shape {shown(self.shape)}", CheckpointError):
            flat = torch.frombuffer(bytearray(self._file.storage(self._key)), dtype=self.dtype)
            if math.prod(self.shape) > len(flat):  # strides of 0 make a few numbers as many as one likes
                raise CheckpointError(
                    f"{self._file.path}: a tensor of shape {shown(self.shape)} has {len(flat):,} numbers"
                )
            return flat.as_strided(self.shape, self._stride, self._offset)
