"""Extension points of megalite: a registry for each kind of part.

A config asks for a part by its name. megalite's own are listed here with the module that defines
them, and are imported on demand. Another package adds its own by an entry point:

    # pyproject.toml of the package            # my_parts.py
    [project.entry-points."megalite.plugins"]  from megalite.registry import schedules
    my_parts = "my_parts"                      @schedules.register("rsqrt")
                                               class InverseSquareRoot(ScheduleConfig): ...

The modules named by entry points are imported when a name is requested that megalite itself does
not have, so that users without plugins do not wait for it. `docs/extend/README.md` says how a
package is made, and the pages beside it have an example of each.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megalite.errors import ConfigError
from megalite.utils.spelling import did_you_mean

if TYPE_CHECKING:
    from megalite.config import HookConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig
    from megalite.data.tokenizer import Tokenizer
    from megalite.models import Family

PLUGINS = "megalite.plugins"
"""Group of entry points. Each names a module whose import registers parts."""

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Holds the parts of one kind by name."""

    def __init__(self, key: str, own: Mapping[str, str]):
        """Create a registry. `key` is the setting that chooses a part; `own` gives for each of
        megalite's own the place: "module" or "module:attribute"."""
        self.key, self.own, self._places = key, tuple(own), own
        self._found: dict[str, Part] = {}

    def register(self, name: str, part: Part | None = None) -> Any:
        """Add `part` under `name`; without `part`, return a decorator that adds what it decorates.

        Raise ConfigError if another part has this name."""
        if part is None:
            return functools.partial(self.register, name)
        if name in self.own or self._found.get(name, part) is not part:
            raise ConfigError(f"{self.key}: there are two parts of the name {name!r}")
        self._found[name] = part
        return part

    def get(self, name: str) -> Part:
        """Return the part called `name`, imported on demand. Raise ConfigError that lists the known
        names if there is none."""
        # A name may come straight from a file, and be a list: asked for like this, none is hashed.
        if name not in self:
            raise ConfigError(f"{self.key} = {name!r} is not known; {hint(name, self.names())}")
        if name not in self._found:
            self._found[name] = _import(self._places[name])
        return self._found[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, those of plugins last. Raise ConfigError if a plugin cannot be
        imported."""
        import_plugins()
        return (*self.own, *sorted(self._found.keys() - set(self.own)))

    def __contains__(self, name: object) -> bool:
        """Return whether there is a part of this name. Plugins are imported only if it is not
        megalite's own."""
        return name in self.own or name in self.names()


families: Registry[Family] = Registry(
    "model.family",
    {
        name: f"megalite.models.{name}"
        for name in (
            "bert", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite",
            "llama", "ministral", "mistral", "mixtral", "modernbert", "mt5", "olmo2", "olmo3", "olmoe", "phi", "phi3",
            "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "smollm3", "starcoder2", "t5",
        )
    },
)  # fmt: skip
"""Model families by Hugging Face's `model_type`. SmolLM 1 and 2, and others, call themselves
llama."""

optimizers: Registry[type[OptimizerConfig]] = Registry(
    "optimizer.name",
    {
        "adamw": "megalite.engine.optimizers.adamw:AdamWConfig",
        "muon": "megalite.engine.optimizers.muon:MuonConfig",
        "sgd": "megalite.engine.optimizers.sgd:SGDConfig",
        "adafactor": "megalite.engine.optimizers.adafactor:AdafactorConfig",
        "adagrad": "megalite.engine.optimizers.adagrad:AdagradConfig",
        "lion": "megalite.engine.optimizers.lion:LionConfig",
    },
)
schedules: Registry[type[ScheduleConfig]] = Registry(
    "optimizer.schedule.name",
    {
        "constant": "megalite.training.schedules:Constant",
        "linear": "megalite.training.schedules:Linear",
        "cosine": "megalite.training.schedules:Cosine",
        "polynomial": "megalite.training.schedules:Polynomial",
        "exponential": "megalite.training.schedules:Exponential",
        "inverse_sqrt": "megalite.training.schedules:InverseSquareRoot",
        "range_test": "megalite.training.schedules:RangeTest",
        "wsd": "megalite.training.schedules:WarmupStableDecay",
    },
)
objectives: Registry[type[ObjectiveConfig]] = Registry(
    "objective.name",
    {
        "next_token": "megalite.training.objectives:NextTokenConfig",
        "masked_lm": "megalite.training.masked_lm:MaskedLMConfig",
        "span_corruption": "megalite.training.seq2seq:SpanCorruptionConfig",
        "seq2seq": "megalite.training.seq2seq:Seq2SeqConfig",
        "dpo": "megalite.training.objectives:DPOConfig",
        "answers": "megalite.training.answers:AnswersConfig",
        "distill": "megalite.training.distill:DistillConfig",
        "contrastive": "megalite.training.contrastive:ContrastiveConfig",
    },
)


hooks: Registry[type[HookConfig]] = Registry("hooks", {})
tokenizer_readers: Registry[Callable[[Path], Tokenizer]] = Registry(
    "data.tokenizer",
    {
        "tokenizer.json": "megalite.data.tokenizer:HuggingFaceTokenizer",
        "tokenizer.model": "megalite.data.tokenizer:SentencePieceTokenizer",
    },
)
"""Readers of tokenizers by the names of their files."""
kernels: Registry[object] = Registry("kernels", {})
"""Kernels by operation and name, such as "activation.mine": a module, or another object, with
functions that replace those of the same names in `megalite.kernels`. Plain torch computes what it
does not have."""


@functools.cache
def import_plugins() -> None:
    """Import the modules that installed packages register. Raise ConfigError that names the package
    if that fails."""
    for entry in sorted(
        importlib.metadata.entry_points(group=PLUGINS), key=lambda entry: entry.name
    ):
        try:
            entry.load()
        except Exception as error:  # code of others can raise anything
            package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package"
            what = (
                str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            )
            raise ConfigError(
                f"the plugin {entry.name!r} of {package} cannot be imported: {what}"
            ) from error


def hint(name: object, known: Iterable[str]) -> str:
    """Return the end of an error message: the known name nearest to `name`, or all of them."""
    known = list(known)
    return did_you_mean(name, known, f"known: {', '.join(known)}")


def _import(place: str) -> Any:
    """Import and return the module or attribute at `place`."""
    module, _, attribute = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
