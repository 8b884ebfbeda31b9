"""A plugin of pytest (`-p emulated_cuda`): run tests of kernels with the CUDA kernels, on the
emulated device.

Tests are taken as they are: what they hand to the CPU's operators goes to the CUDA kernels. At the
end, each kernel must have been launched, in every instance that its code can launch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

import build_library
from megalite.kernels import library


class EmulatedCuda:
    """The loaded library."""

    def __init__(self) -> None:
        module = library.own()
        if module is None:
            raise pytest.UsageError(f"emulated CUDA: {library.why_not_built()}")
        module.set_isa(0)  # tests find one set of instructions of the CPU, not each
        path = build_library.build()
        # Torch warns that operators of the CPU are registered once more.
        torch.ops.load_library(path)
        loaded = ctypes.CDLL(str(path))
        self._launches, self._try = loaded.emulated_cuda_launches, loaded.try_launch
        self._launches.restype = self._try.restype = ctypes.c_char_p

    def launches(self) -> dict[str, int]:
        """Return how often each kernel has been launched."""
        lines = self._launches().decode().splitlines()
        return {name: int(times) for times, name in (line.split(" ", 1) for line in lines)}

    def try_launch(self, name: str, out: Tensor) -> str:
        """Launch a kernel of faulty.cu on `out`, fp32 [64]; return what the device found, or
        nothing."""
        return self._try(name.encode(), ctypes.c_void_p(out.data_ptr())).decode()

    @pytest.fixture
    def emulated(self) -> EmulatedCuda:
        return self

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave the tests that run on each device, and the device's own."""
        others = [
            item
            for item in items
            if not {"device", "emulated"} & {*getattr(item, "fixturenames", ())}
        ]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        idle = sorted(name for name, times in self.launches().items() if not times)
        everything = "tests/kernels" in session.config.args and not session.config.getoption(
            "keyword"
        )
        if idle and everything and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print("\nemulated CUDA: no test launches", *idle, sep="\n  ")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(EmulatedCuda())
