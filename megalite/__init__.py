"""megalite: train large language models with tensor, sequence and ZeRO data parallelism, from raw
text to a Hugging Face checkpoint. Start reading at `train.py`.

The public interface is what `__all__` names; every other name may move between versions.

    from megalite import Config, Generator, finetune_config, load_config, plan, train

    config = load_config("configs/my.yaml", ["train.steps=100"])
    print(plan(config, 8).describe())
    train(config)
    generator = Generator.open(config.run.folder)
"""

from __future__ import annotations

import sys
from types import ModuleType

# True to type checkers. The module typing, and importlib below, take longer to import than all of
# this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from megalite.commands.finetune import finetune_config
    from megalite.config import Config
    from megalite.config_file import load_config
    from megalite.infer.generate import Generator
    from megalite.plan import plan
    from megalite.train import train

__version__ = "0.1.0"
__all__ = ["Config", "Generator", "finetune_config", "load_config", "plan", "train"]

_MODULES = {
    "Config": "megalite.config",
    "Generator": "megalite.infer.generate",
    "finetune_config": "megalite.commands.finetune",
    "load_config": "megalite.config_file",
}


class CallableModule(ModuleType):
    """A module that can be called: a call goes to the function in it that has the module's own
    name.

    `train` and `plan` name a module and a function. Importing a module binds its name in this
    package, so `megalite.train` would be the function or the module, depending on what was imported
    first. It is always the module, and `megalite.train(config)` calls
    `megalite.train.train(config)`."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*arguments, **named)

    def __reduce__(self) -> Any:
        import importlib

        # A spawned process takes its target as a pickle.
        return importlib.import_module, (self.__name__,)


def make_callable(name: str) -> None:
    """Let the module of this name, while it is imported, be called as the function in it that has
    its name."""
    sys.modules[name].__class__ = CallableModule


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing torch takes a second, which `megalite
    --help` has not."""
    if name not in __all__:
        raise AttributeError(
            f"module 'megalite' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    import importlib

    found: Any = importlib.import_module(_MODULES.get(name, f"megalite.{name}"))
    if name in _MODULES:
        found = getattr(found, name)
        globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
