"""A GPU that is not there. `megalite._dryrun` gives torch's CPU build tensors on it; what else the
program asks of torch.cuda is answered here. `open_device` must be called before torch is
imported."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

# As frames name files, through whatever links the package was imported.
PACKAGE = f"{Path(__file__).parents[1]}/"
OWN = f"{Path(__file__).parent}/"
CAPABILITIES = {
    "V100": (7, 0),
    "A100": (8, 0),
    "A800": (8, 0),
    "B200": (10, 0),
    "B300": (10, 3),
    "GB": (10, 0),
}
"""Compute capabilities of chips; the others count as Hopper."""
PASSING = ("kernels/", "comm/", "parallel/tensor.py", "parallel/expert.py", "engine/gather.py")
"""Code that works for others: a place in it also names who called it."""


class Places:
    """Numbers the places in megalite's code that allocate memory or wait, and counts the waits of
    each phase."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.functions: list[str] = []
        """Of each place, the function of the innermost line."""
        self.phase = "starting"
        self.waits: Counter[tuple[str, str, str]] = Counter()
        """How often the host waited, by phase, reason and place."""
        self.on_wait: Callable[[], object] = lambda: None
        """Called when the host waits for the device."""
        self._numbers: dict[Any, int] = {}

    def ask(self, kind: str) -> int:
        """Return the number of the place that runs. `kind` is the operation at work, or begins with
        `waits: `."""
        number = self.here(sys._getframe().f_back, kind)
        if kind.startswith("waits: "):
            self.on_wait()
            self.waits[self.phase, kind.removeprefix("waits: "), self.names[number]] += 1
        return number

    def here(self, frame: FrameType | None, kind: str) -> int:
        """Return the number of the innermost place of megalite's code at `frame`."""
        frame = _own_code(frame)
        if frame is None:
            return self._number(kind, f"autograd, {kind.removeprefix('aten::')}", "autograd")
        outer: FrameType | None = frame
        # A kernel or a collective allocates for whoever called it: name both.
        if _path(frame).startswith(PASSING):
            while outer is not None and _path(outer).startswith(PASSING):
                outer = _own_code(outer.f_back)
        # Millions of allocations come from few places: the name is made once a place.
        key = (frame.f_code, frame.f_lineno, outer and outer.f_code, outer and outer.f_lineno)
        if (number := self._numbers.get(key)) is not None:
            return number
        name = _line(frame) if outer in (None, frame) else f"{_line(frame)}, for {_line(outer)}"
        return self._number(
            key, name, f"{_path(frame)}:{frame.f_code.co_qualname}:{outer and outer.f_code.co_name}"
        )

    def _number(self, key: Any, name: str, function: str) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.names)
            self.names.append(name)
            self.functions.append(function)
        return self._numbers[key]


def _own_code(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of megalite's code, this package aside."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and not file.startswith(OWN):
            return frame
        frame = frame.f_back
    return None


def _path(frame: FrameType) -> str:
    return frame.f_code.co_filename.removeprefix(PACKAGE)


def _line(frame: FrameType) -> str:
    return f"megalite/{_path(frame)}:{frame.f_lineno} {frame.f_code.co_qualname.rpartition('.<locals>.')[-1]}"


class Event:
    """Stands for torch.cuda.Event: what was recorded has happened."""

    def __init__(self, **options: Any):
        pass

    def record(self, stream: Any = None) -> None:
        """Record."""

    def query(self) -> bool:
        """Return True."""
        return True

    def wait(self, stream: Any = None) -> None:
        """Return: streams are not told apart."""

    def synchronize(self) -> None:
        """Note that the host waits."""
        _places.ask("waits: event")

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds, which mean nothing here."""
        return 1.0


class Stream:
    """Stands for torch.cuda.Stream."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def synchronize(self) -> None:
        """Note that the host waits."""
        _places.ask("waits: stream")

    def wait_stream(self, other: Stream) -> None:
        """Return: streams are not told apart."""

    def wait_event(self, event: Event) -> None:
        """Return: streams are not told apart."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that has happened."""
        return event or Event()

    def query(self) -> bool:
        """Return True."""
        return True


_places = Places()


def open_device(name: str, gpus_per_node: int) -> tuple[Any, Places]:
    """Make torch see `gpus_per_node` GPUs that call themselves `name`. Returns the compiled module,
    which counts their memory, and the places that it is told."""
    assert "torch" not in sys.modules, "torch has looked for its devices already"
    (folder,) = importlib.util.find_spec("torch").submodule_search_locations  # type: ignore[union-attr,misc]
    # Global symbols: the module registers its device in these very tables of torch, not in a copy.
    ctypes.CDLL(f"{folder}/lib/libtorch_cpu.so", mode=ctypes.RTLD_GLOBAL)
    # It registers the device that torch finds.
    _dryrun = importlib.import_module("megalite._dryrun")
    import torch

    _dryrun.start(_places.ask)
    cuda: Any = torch.cuda
    capability = next((it for part, it in CAPABILITIES.items() if part in name), (9, 0))
    cuda.is_available = cuda.is_initialized = lambda: True
    # Nothing of torch.cuda may load a driver.
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: gpus_per_node
    cuda.get_device_name = lambda device=None: name
    cuda.get_device_capability = lambda device=None: capability
    cuda.set_device = lambda device: _current.__setitem__(0, torch.device(device).index)
    cuda.current_device = lambda: _current[0]
    cuda.Event, cuda.Stream = Event, Stream
    # A single stream: what overlaps is not simulated, only what is allocated.
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = cuda.set_rng_state = lambda *arguments: None
    cuda.max_memory_allocated = lambda device=None: _dryrun.peak()
    cuda.memory_allocated = lambda device=None: _dryrun.allocated()
    cuda.empty_cache = lambda: None
    _answer_deepspeed(cuda, name, capability)
    cuda.synchronize = lambda device=None: _places.ask("waits: device") and None
    return _dryrun, _places


def _answer_deepspeed(cuda: Any, name: str, capability: tuple[int, int]) -> None:
    """Answer what DeepSpeed asks of torch.cuda besides."""
    import torch

    cuda.is_bf16_supported = lambda *arguments, **named: True
    # It only prints how much memory is left.
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=2**40
    )
    cuda.get_device_properties = lambda device=None: properties
    for asked in ("memory_reserved", "max_memory_reserved", "memory_cached", "max_memory_cached"):
        setattr(cuda, asked, cuda.memory_allocated)
    # The peaks are the phases' own (rank.py).
    for told in (
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        "reset_max_memory_cached",
    ):
        setattr(cuda, told, lambda device=None: None)
    cuda.memory_stats = lambda device=None: {}
    cuda.is_current_stream_capturing = lambda: False
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    # Blocks are freed when the program drops them, whichever streams use them.
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *arguments: None


_current = [0]
