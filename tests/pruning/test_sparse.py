"""Single weights set to 0: each method against a plain statement of it, the share and the pattern
that were asked for, and what each costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalite.cli import main
from megalite.pruning.sparse import Sparsity, magnitude, sparsegpt, wanda
from megalite.quantization.gptq import BLOCK, DAMPING
from megalite.quantization.layers import read_rows
from megalite.quantization.matrices import relative_error
from tiny_models import GPT2, GPT_OSS, LLAMA, MIXTRAL, save_model

HOW = {"0.6": (0.6, None), "2:4": (0.5, 4), "1:4": (0.75, 4)}


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Tensor]:
    """A matrix of more than one block of columns, and inputs of different size."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 192, generator=generator)
    mixed = torch.randn(192, 192, generator=generator)
    inputs = torch.randn(300, 192, generator=generator) @ mixed
    inputs *= torch.linspace(0.3, 3, 192)[torch.randperm(192, generator=generator)]
    inputs[:, 5] = 0.0
    return weight, inputs.double().T @ inputs.double()


def plain_mask(scores: Tensor, share: float, of: int | None) -> Tensor:
    """Remove the lowest of the whole, or of each `of` neighbours in a row, one by one."""
    removed = torch.zeros_like(scores, dtype=torch.bool)
    if of is None:
        flat = scores.flatten().tolist()
        lowest = sorted(range(len(flat)), key=flat.__getitem__)[: round(share * len(flat))]
        removed.view(-1)[lowest] = True
        return removed
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], of):
            group = scores[row, start : start + of].tolist()
            for place in sorted(range(of), key=group.__getitem__)[: round(share * of)]:
                removed[row, start + place] = True
    return removed


def plain_sparsegpt(weight: Tensor, hessian: Tensor, share: float, of: int | None) -> Tensor:
    """Column after column by the inverse of what is left of H, as Optimal Brain Surgeon says: no
    Cholesky factor, nothing put off to the end of a block."""
    hessian, rest = hessian.clone(), weight.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(len(hessian))]
    costs = torch.stack([inverse[0, 0] for inverse in inverses])
    removed, width = torch.zeros_like(weight, dtype=torch.bool), of or BLOCK
    for column, inverse in enumerate(inverses):
        if column % width == 0:
            here = slice(column, column + width)
            removed[:, here] = plain_mask(rest[:, here].square() / costs[here], share, of)
        error = torch.where(removed[:, column], rest[:, column], 0.0)
        rest[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return rest


@pytest.mark.parametrize("name", HOW)
def test_methods_are_their_plain_statements(name: str, case: tuple[Tensor, Tensor]) -> None:
    (weight, hessian), sparsity = case, Sparsity.parse(name)
    assert (sparsity.share, sparsity.of) == HOW[name]
    share, of = HOW[name]
    by_size = weight.masked_fill(plain_mask(weight.abs(), share, of), 0.0)
    assert torch.equal(magnitude(weight, sparsity), by_size)
    scores = weight.abs() * hessian.diagonal().sqrt().float()  # |W| · ‖x‖₂
    # Within each row: a row of its own is the whole, where there are no neighbours.
    rows = torch.cat([plain_mask(row[None], share, of) for row in scores])
    assert torch.equal(wanda(weight, hessian, sparsity), weight.masked_fill(rows, 0.0))
    found, wanted = (
        sparsegpt(weight, hessian, sparsity),
        plain_sparsegpt(weight, hessian, share, of),
    )
    # fp32 sums against fp64: where two costs are nearly equal the other weight may go, which moves
    # the rest of its row.
    alike = ((found == 0) == (wanted.abs() < 1e-12)).float().mean()
    assert alike > 0.995
    same = ((found == 0) == (wanted.abs() < 1e-12)).all(1)
    assert same.any()
    torch.testing.assert_close(found[same].double(), wanted[same], rtol=1e-3, atol=1e-3)
    errors = [
        relative_error(weight, x, hessian)
        for x in (by_size, wanda(weight, hessian, sparsity), found)
    ]
    assert errors[2] < errors[1] < errors[0], "what knows more about the inputs costs less"
    assert errors[2] == pytest.approx(relative_error(weight, wanted.float(), hessian), rel=0.02)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_model_has_the_pattern(
    method: str, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    source = save_model(tmp_path / "source", LLAMA, torch.bfloat16)
    given = ["--data", tokens, "--rows", "16", "--length", "32"]
    out = tmp_path / "out"
    asked = ["prune", str(source), str(out), "--sparsity", "2:4", "--method", method, *given]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "50% of 14 matrices is 0, mean error of their outputs" in said
    assert "perplexity of 4 rows held out" in said
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    for name, tensor in after.items():
        if "_proj" in name:
            zeros = (tensor.unflatten(1, (-1, 4)) == 0).sum(-1)
            assert (zeros == 2).all(), name
        else:
            assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == torch.bfloat16
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_each_expert_is_pruned_by_its_own_tokens(tokens: str, tmp_path: Path) -> None:
    """The first layer's experts, whose inputs are those of the model as it was."""
    transformers = pytest.importorskip("transformers")
    source = save_model(tmp_path / "source", MIXTRAL | {"num_local_experts": 24})
    given = ["--data", tokens, "--rows", "4", "--length", "4"]
    asked = ["prune", str(source), str(tmp_path / "out"), "--sparsity", "0.5", "--method", "wanda"]
    assert main([*asked, *given]) == 0
    model, seen = transformers.AutoModelForCausalLM.from_pretrained(source), []
    layer = model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(read_rows(tokens, 4, 4)[:3, :-1])
    x = seen[0].flatten(0, 1)
    chosen = layer.mlp.gate(x)[2]
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")
    )
    visited = 0
    for expert in range(24):
        rows = x[(chosen == expert).any(1)].double()
        visited += len(rows) > 0
        lengths = rows.norm(dim=0).float() if len(rows) else torch.ones(32)
        for part in ("w1", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            scores = before[name].abs() * lengths
            removed = torch.stack([plain_mask(row[None], 0.5, None)[0] for row in scores])
            assert torch.equal(after[name], before[name].masked_fill(removed, 0.0)), name
    assert 0 < visited < 24, "some experts have seen nothing"
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(after[gate], before[gate])


@pytest.mark.parametrize(
    ("values", "given", "words"),
    [
        (LLAMA, ["--sparsity", "1.5"], "between 0 and 1"),
        (LLAMA, ["--sparsity", "half"], "is no share such as 0.5"),
        (LLAMA, ["--sparsity", "2:3"], "must divide 128"),
        (LLAMA, ["--sparsity=-2:-4"], "must divide 128"),
        (LLAMA | {"intermediate_size": 54}, ["--sparsity", "2:4"], "has 54 columns"),
        (LLAMA, ["--sparsity", "0.5", "--method", "wanda"], "give --data"),
        (LLAMA, ["--method", "wanda"], "give --sparsity"),
        (LLAMA, ["--sparsity", "0.5", "--layers", "1"], "in a second command"),
        (LLAMA, [], "nothing to leave out"),
        (GPT2, ["--sparsity", "0.5"], "single weights of matrices stored as [in, out]"),
        (GPT_OSS, ["--sparsity", "0.5"], "all experts in one tensor, are not pruned"),
    ],
)
def test_what_is_refused(
    values: dict[str, object],
    given: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = save_model(tmp_path / "source", values)
    assert main(["prune", str(source), str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
