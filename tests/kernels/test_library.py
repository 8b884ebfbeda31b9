"""Who computes: runs with and without megalite's kernels, and what is said where they are
missing."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from exactness import needs_kernels
from megalite import registry
from megalite.config import KernelsConfig
from megalite.errors import ConfigError
from megalite.kernels import library
from megalite.train import train
from small_runs import curve_of, make_config

ALL_TORCH = tuple(f"kernels.{operation}=torch" for operation in library.OPERATIONS)


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "megalite._ops", None)
    for function in (library.own, library._warn_once):
        function.cache_clear()
    yield
    monkeypatch.undo()
    library.own.cache_clear()


@pytest.fixture(autouse=True)
def wishes_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_wishes", KernelsConfig())


@needs_kernels
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_plain_torch_trains_the_same(tmp_path: Path, model: str) -> None:
    curves = []
    for name, kernels in (("own", ()), ("plain", ALL_TORCH)):
        config = make_config(tmp_path / name, model, *kernels)
        train(config)
        curves.append(curve_of(config))
    for own, plain in zip(*curves, strict=True):
        # fp32 sums in another order, a few steps on.
        assert own == pytest.approx(plain, rel=1e-4)


def test_where_nothing_is_built_torch_serves_with_one_warning(
    tmp_path: Path, not_built: None
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in ("first", "second"):
            train(make_config(tmp_path / name, "llama", "train.steps=1"))
    (warning,) = [w for w in told if "kernels" in str(w.message)]
    assert "install a C++ compiler" in str(warning.message)
    assert library.explain("norm", "cpu")[0] == "torch"


def test_asking_for_what_is_not_there_is_a_mistake(not_built: None) -> None:
    with pytest.raises(
        ConfigError, match=r"kernels\.rope is megalite, but megalite's kernels are not built"
    ):
        library.use(KernelsConfig(rope="megalite"))


def test_every_function_that_asks_for_a_plugin_is_listed() -> None:
    """A plugin is told by the list whether anything asks for what it has."""
    asked = [
        function
        for file in Path(library.__file__).parent.glob("*.py")
        for function in re.findall(r'added\.get\("(\w+)"\)', file.read_text(encoding="utf-8"))
    ]
    assert sorted(asked) == sorted(itertools.chain(*library.FUNCTIONS.values()))


@pytest.mark.parametrize(
    ("operation", "told"),
    [("activation", r"stand for: swiglu, gelu"), ("optimizer", "there are none")],
)
def test_a_plugin_without_a_function_of_the_operation_is_a_mistake(
    operation: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.kernels._found, f"{operation}.mine", object())
    with pytest.raises(ConfigError, match=rf"kernels\.{operation} is mine, .* {told}"):
        library.use(KernelsConfig.model_validate({operation: "mine"}))
