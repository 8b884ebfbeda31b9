"""Reading what torch.save wrote without running any of it.

Such a file is a zip archive: a pickle, and the bytes of each storage beside it. A pickle names functions to call; here
every name but those of tensors, their storages and ordered dictionaries stands for an object that does nothing but hold
what it was given. Nothing is imported for a pickle, and nothing of it is called."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megalite.checkpoint.tensors import CheckpointError

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


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

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

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
    try:
        with open(path, "rb") as file:
            return _read(file, path, None)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(pickled: IO[bytes], path: Path, file: TorchFile | None) -> Any:
    try:
        return _Unpickler(pickled, path, file).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever nonsense a pickle holds
        raise CheckpointError(f"{path}: its pickle cannot be read: {error}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: IO[bytes], path: Path, file: TorchFile | None):
        super().__init__(pickled)
        self._path, self._file = path, file

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        return known.get((module, name)) or type(name, (Unknown,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, kind, key, _, _ = pid
        dtype = STORAGES.get(getattr(kind, "origin", "").removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(f"{self._path}: storages of {getattr(kind, 'origin', kind)} cannot be read")
        return str(key), dtype

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        assert self._file is not None, "a tensor outside of a file of tensors"
        return StoredTensor(self._file, storage, offset, shape, stride)

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data


class StoredTensor:
    """A tensor in a file, read when it is asked for."""

    def __init__(self, file: TorchFile, storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any):
        self._file, (self._key, self.dtype) = file, storage
        self._offset, self.shape, self._stride = offset, tuple(shape), tuple(stride)

    def read(self) -> Tensor:
        try:
            flat = torch.frombuffer(bytearray(self._file.storage(self._key)), dtype=self.dtype)
            return flat.as_strided(self.shape, self._stride, self._offset)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self._file.path}: a tensor of shape {list(self.shape)} is damaged: {error}"
            ) from None
