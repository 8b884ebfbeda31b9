"""The tensors of single steps: weights and gradients under Hugging Face names, a folder a step, for
`megalite parity`.

RUN/tensors/step-00000003/rank-00000.safetensors   weight/NAME: before the step; grad/NAME: of the global batch
                         /rank-00001.safetensors   a file of every rank that owns some
                         /step.json                loss, gradient norm, and the names in the model's order
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.errors import DataError
from megalite.utils.outside import read_json
from megalite.utils.tensor_files import save_file

KINDS = ("weight", "grad")


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of a step below `root`, which is a run's folder or one like it."""
    return root / "tensors" / f"step-{step:08d}"


def write_tensors(folder: Path, rank: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the tensors that a rank owns, by kind and Hugging Face name."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for kind, named in tensors.items():
        for name, tensor in named.items():
            # A file of safetensors holds no strides: what is a view must be laid out anew.
            flat[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()
    save_file(flat, folder / f"rank-{rank:05d}.safetensors")


def write_numbers(folder: Path, loss: float, grad_norm: float | None, names: Sequence[str]) -> None:
    """Write what stands beside the tensors, on one rank. `names` are those of the weights, in the
    model's order."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"loss": loss, "grad_norm": grad_norm, "names": list(names)}
    (folder / "step.json").write_text(json.dumps(numbers, indent=1))


def record_model(root: Path, step: int, model: nn.Module, loss: float) -> None:
    """Write the weights and gradients of any module, such as one of transformers, whose parameters
    have the names of its files, for a comparison with a run. Call it between `backward` and the
    optimizer's step."""
    parameters = dict(model.named_parameters())
    grads = {
        name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None
    }
    write_tensors(folder_of(root, step), 0, {"weight": parameters, "grad": grads})
    write_numbers(folder_of(root, step), loss, None, list(parameters))


@dataclass(frozen=True)
class RecordedStep:
    """The recorded tensors of a step."""

    step: int
    loss: float
    grad_norm: float | None
    names: tuple[str, ...]
    """Names of the weights, in the model's order."""
    files: Mapping[str, Path]
    """File of each tensor, by KIND/NAME."""

    def read(self, key: str) -> Tensor:
        """Return the tensor KIND/NAME."""
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)


def read_steps(root: Path) -> dict[int, RecordedStep]:
    """Return the recorded steps below `root`. Raises DataError where there is none, or one that
    cannot be read."""
    found = {}
    for folder in sorted((root / "tensors").glob("step-*")):
        try:
            numbers = read_json(folder / "step.json", DataError)
            # The headers alone: tensors are read when they are compared.
            files: dict[str, Path] = {}
            for file in sorted(folder.glob("rank-*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    files |= dict.fromkeys(opened.keys(), file)
            step = int(folder.name.partition("-")[2])
            found[step] = RecordedStep(
                step, float(numbers["loss"]), numbers["grad_norm"], tuple(numbers["names"]), files
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"{folder} is no recorded step: {type(error).__name__}: {error}"
            ) from None
    if not found:
        raise DataError(
            f"{root} has no recorded steps; `profile: {{tensors: [1, 3]}}` has a run record two of them"
        )

    return found
