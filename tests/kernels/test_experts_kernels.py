"""Kernels of a mixture of experts against float64, and against the reference in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from exactness import BOUND, DTYPES, check_against_float64, error, needs_kernels
from exactness import device_with_amx as device  # noqa: F401, a fixture
from megalite.config import KernelsConfig
from megalite.kernels import experts, library
from megalite.kernels.experts import (
    RowCounts,
    accumulate_grouped_weight_gradient,
    count_rows,
    group_by_expert,
    grouped_input_gradient,
    grouped_linear,
    grouped_product,
    grouped_weight_gradient,
    permute,
    sort_by_expert,
    top_k,
    unpermute,
)

# (tokens, experts, experts of a token, in, out)
CASES = [
    (1, 2, 1, 1, 1),
    (7, 5, 2, 8, 6),
    (40, 4, 3, 33, 70),  # an odd depth, and columns that fill no tile
    (130, 16, 2, 64, 128),
    (0, 4, 2, 8, 8),
    (300, 3, 1, 130, 65),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visits(tokens: int, num_experts: int, k: int, seed: int = 3) -> Tensor:
    """Experts of each token, of which the last has none where there are enough others."""
    some = max(k, num_experts - 1)
    return random(tokens, some, seed=seed).argsort(-1)[:, :k].sort(-1).values


@pytest.fixture
def plain() -> Iterator[None]:
    library.use(KernelsConfig(experts="torch", weight_gradient="torch"))
    yield
    library.use(KernelsConfig())


@pytest.mark.parametrize("num_experts", [2, 5, 16, 40, 256])
def test_top_k_is_the_reference(num_experts: int, device: torch.device) -> None:  # noqa: F811
    scores = random(6, 50, num_experts).float()
    scores[0] = scores[0].round()  # many are equal
    scores[1, ::2] = -torch.inf
    scores[2] = torch.where(scores[2] > 0, 0.0, -0.0)
    scores[3, :, ::3] = torch.nan
    scores[4] = 0.5
    for k in {1, 2, min(8, num_experts), num_experts}:
        found = top_k(scores.to(device), k).cpu()
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        assert torch.equal(found, best.sort(dim=-1).values)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"), [case[:3] for case in CASES] + [(2000, 64, 6)]
)
def test_rows_are_sorted_by_expert_and_by_token(
    tokens: int,
    num_experts: int,
    k: int,
    device: torch.device,  # noqa: F811
) -> None:
    index = visits(tokens, num_experts, k).to(device)
    counts = count_rows(index, num_experts)
    token_N, row_TK = (x.cpu() for x in sort_by_expert(index, counts))
    order = index.cpu().flatten().argsort(stable=True)
    assert counts.tolist() == index.cpu().flatten().bincount(minlength=num_experts).tolist()
    assert torch.equal(token_N, order // k)
    assert row_TK.shape == index.shape
    assert torch.equal(row_TK.flatten()[order], torch.arange(tokens * k))


def summed(rows: Tensor, weight: Tensor | None, row_TK: Tensor) -> Tensor:
    parts = rows[row_TK]
    return (parts if weight is None else parts * weight[..., None]).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 130])
def test_permute_and_unpermute(size: int, dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    for tokens, num_experts, k in [(0, 4, 2), (1, 2, 1), (9, 5, 2), (130, 8, 3)]:
        index = visits(tokens, num_experts, k).to(device)
        groups, row_TK = (
            group_by_expert(index, num_experts),
            group_by_expert(index.cpu(), num_experts).row_TK,
        )
        token_N = groups.token_N.cpu()
        check_against_float64(
            lambda x, g=groups: permute(x, g),
            lambda x, t=token_N: x[t],
            [random(tokens, size)],
            dtype,
            device,
        )
        share = random(tokens, k, seed=2).float()
        check_against_float64(
            lambda rows, g=groups, s=share: unpermute(rows, s.to(device), g),
            lambda rows, s=share, r=row_TK: summed(rows, s.double(), r),
            [random(tokens * k, size)], dtype, device,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_experts_get_their_gradient(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    index = visits(50, 6, 3)
    groups = group_by_expert(index.to(device), 6)
    rows, share, grad = (
        random(150, 70).to(dtype),
        random(50, 3, seed=2).float(),
        random(50, 70, seed=4).to(dtype),
    )
    mine = share.to(device).requires_grad_()
    unpermute(rows.to(device), mine, groups).backward(grad.to(device))
    wanted = (rows[groups.row_TK.cpu()].double() * grad[:, None].double()).sum(-1)
    assert mine.grad is not None
    # Fp32 sums of 70 products, whatever the dtype of the rows.
    assert error(mine.grad, wanted) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "num_experts", "k", "size", "out"), CASES)
def test_grouped_linear(
    tokens: int,
    num_experts: int,
    k: int,
    size: int,
    out: int,
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    index = visits(tokens, num_experts, k)
    groups, expert_N = group_by_expert(index.to(device), num_experts), index.flatten().sort().values
    inputs = [random(tokens * k, size), random(num_experts, out, size, seed=1)]

    def each(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("ni,noi->no", rows, weight[expert_N])

    check_against_float64(
        lambda rows, weight: grouped_linear(rows, weight, groups), each, inputs, dtype, device
    )
    into = random(num_experts, out, size, seed=2).float()
    grad, rows = random(tokens * k, out, seed=3).to(dtype), inputs[0].to(dtype)
    for add in (False, True):
        found = into.clone().to(device)
        accumulate_grouped_weight_gradient(
            found, grad.to(device), rows.to(device), groups.counts, add
        )
        wanted = into.double() * add
        wanted.index_add_(0, expert_N, torch.einsum("no,ni->noi", grad.double(), rows.double()))
        # The result is fp32; one product, where torch rounds it, is bf16.
        assert error(found, wanted) <= (BOUND[dtype])


def test_the_reference_computes_the_same(plain: None) -> None:
    for dtype in DTYPES:
        test_grouped_linear(40, 4, 3, 33, 70, dtype, torch.device("cpu"))
        test_weights_of_experts_get_their_gradient(dtype, torch.device("cpu"))
        test_permute_and_unpermute(24, dtype, torch.device("cpu"))
        # oneDNN's bf16 products may go another way for few rows than for many.
        if dtype == torch.float32:
            test_a_row_does_not_depend_on_others(dtype, torch.device("cpu"))
    test_rows_are_sorted_by_expert_and_by_token(130, 16, 2, torch.device("cpu"))
    test_top_k_is_the_reference(16, torch.device("cpu"))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_grouped_product_is_called_as_it_wants(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs are asked for it; the CPU's takes the same operands."""
    index = visits(40, 4, 3)
    counts = group_by_expert(index, 4).counts
    rows, grad = random(120, 32).to(dtype), random(120, 48, seed=1).to(dtype)
    weight = random(4, 48, 32, seed=2).to(dtype)

    def all_of() -> list[Tensor]:
        of_rows = grouped_input_gradient(grad, weight, counts)
        return [
            grouped_product(rows, weight, counts),
            of_rows,
            grouped_weight_gradient(grad, rows, counts),
        ]

    wanted = all_of()
    asked: list[None] = []

    def yes(*operands: Tensor) -> bool:
        asked.append(None)
        return True

    monkeypatch.setattr(experts, "_torch_groups", yes)
    for found, ours in zip(all_of(), wanted, strict=True):
        assert error(found, ours) <= BOUND[dtype]
    assert len(asked) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """To the bit: experts on several ranks see other rows beside it."""
    weight = random(3, 130, 514, seed=1).to(device, dtype)
    rows = random(100, 514).to(device, dtype)
    grads = random(100, 130, seed=2).to(device, dtype)

    def of(some: slice, operation: object, x: Tensor) -> Tensor:
        counts = torch.tensor([0, len(x[some]), 0])
        return operation(x[some], weight, RowCounts(counts))  # type: ignore[operator]

    for operation, x in ((grouped_product, rows), (grouped_input_gradient, grads)):
        whole = of(slice(None), operation, x)
        for some in (slice(5, 6), slice(5, 9), slice(7, 60)):
            assert torch.equal(of(some, operation, x), whole[some])


@pytest.fixture
def amx() -> Iterator[None]:
    module = library.own()
    if module is not None:
        module.set_isa(3)
    if module is None or module.isa() != "amx":
        pytest.skip("this CPU has no AMX")
    yield
    module.set_isa(99)


@pytest.mark.parametrize("columns", [1, 40, 130])
@pytest.mark.parametrize("depth", [32, 160])
def test_products_on_tiles_of_amx(depth: int, columns: int, amx: None) -> None:
    """Of experts with no row, and with fewer and more than fill a tile of 16, or two."""
    counts = torch.tensor([0, 1, 15, 16, 17, 32, 33, 70])
    rows = random(int(counts.sum()), depth).bfloat16()
    for transpose in (False, True):
        shape = (depth, columns) if transpose else (columns, depth)
        weight = random(len(counts), *shape, seed=1).bfloat16()
        product = partial(torch.ops.megalite.grouped_product, transpose=transpose)
        found, first = product(rows, weight, counts), 0
        for expert, count in enumerate(counts.tolist()):
            own, first = rows[first : first + count], first + count
            matrix = weight[expert].double() if transpose else weight[expert].double().t()
            assert error(found[first - count : first], own.double() @ matrix) <= BOUND[own.dtype]
            # To the bit: one row alone, and from 9 of 33 on.
            for some in (slice(0, 1), slice(8, 33)):
                alone = torch.zeros_like(counts)
                alone[expert] = len(own[some])
                whole = found[first - count : first][some]
                assert torch.equal(product(own[some].contiguous(), weight, alone), whole)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 40), (96, 130)])
def test_weight_gradients_on_tiles_of_amx(rows: int, columns: int, amx: None) -> None:
    """Of experts, and of more tokens than are packed at a time; they are not rounded to bf16."""
    counts = torch.tensor([0, 1, 31, 32, 33, 2101])
    tokens, first = int(counts.sum()), 0
    grad = random(tokens, rows).bfloat16()
    x = random(tokens, 2 * columns, seed=1).bfloat16()[:, columns:]  # rows that lie apart
    into = random(len(counts), rows, columns, seed=2).float()
    for add in (False, True):
        found = into.clone()
        torch.ops.megalite.grouped_weight_gradient_(found, grad, x, counts, add)
        for expert, part in enumerate(x.double().split(counts.tolist())):
            of_rows = grad[first : first + len(part)].double()
            first = (first + len(part)) % tokens
            wanted = of_rows.t() @ part + into[expert].double() * add
            assert error(found[expert], wanted) <= 1e-5


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    index = visits(300, 8, 2).to(device)
    groups, share = group_by_expert(index, 8), random(300, 2).float().to(device)
    rows, weight = random(600, 200).to(device, dtype), random(8, 100, 200, seed=1).to(device, dtype)
    grad = random(300, 200, seed=3).to(device, dtype)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        back = torch.ops.megalite.sum_rows_backward(grad, rows, groups.row_TK, share)
        found.append(
            (unpermute(rows, share, groups), *back, grouped_product(rows, weight, groups.counts))
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [0, 40, 200])
def test_threads_share_experts_of_any_size(most: int, dtype: torch.dtype) -> None:
    """`most` rows are of one expert: with 200 of 300, more than two threads' shares are."""
    index = visits(300, 8, 1)
    index[:most] = 2
    groups = group_by_expert(index, 8)
    rows, grad = random(300, 150).to(dtype), random(300, 200, seed=1).to(dtype)
    weight = random(8, 200, 150, seed=2).to(dtype)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        into = torch.full((8, 200, 150), torch.nan)
        accumulate_grouped_weight_gradient(into, grad, rows, groups.counts, add=False)
        found.append(
            (
                into,
                grouped_product(rows, weight, groups.counts),
                grouped_input_gradient(grad, weight, groups.counts),
            )
        )
    torch.set_num_threads(threads)
    for some in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], some, strict=True))
    wanted = grouped_weight_gradient(grad.double(), rows.double(), groups.counts)
    assert error(found[0][0], wanted) <= BOUND[dtype]


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    ops, scores = torch.ops.megalite, torch.zeros(3, 4, device=device)
    index = torch.tensor([[0, 1], [2, 3], [0, 3]], device=device)
    counts = count_rows(index, 4)
    rows, share = torch.zeros(6, 8, device=device), torch.zeros(3, 2, device=device)
    row = sort_by_expert(index, counts)[1]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k: k is {k}, but must be from 1 to 4"):
            ops.top_k(scores, k)
    with pytest.raises(TypeError, match=r"top_k: scores is .*Half"):
        ops.top_k(scores.half(), 2)
    with pytest.raises(TypeError, match=r"sort_by_expert: index is Float, but must be Long"):
        ops.sort_by_expert(scores, counts)
    with pytest.raises(
        ValueError, match=r"gather_rows: x has shape \[8\], but must have two dimensions"
    ):
        ops.gather_rows(rows[0], index.flatten())
    with pytest.raises(
        TypeError, match=r"gather_rows: x is .*Double.* must be float32 or bfloat16"
    ):
        ops.gather_rows(rows.double(), index.flatten())
    with pytest.raises(
        ValueError, match=r"sum_rows: weight has shape \[2\], but must have \[3, 2\]"
    ):
        ops.sum_rows(rows, row, share[0])
    with pytest.raises(
        ValueError, match=r"sum_rows_backward: grad has shape \[6, 8\], but must have \[3, 8\]"
    ):
        ops.sum_rows_backward(rows, rows, row, share)
    with pytest.raises(
        ValueError, match=r"sum_rows_backward: row has 4 elements, but must have one for each of 6"
    ):
        ops.sum_rows_backward(rows[:2], rows, row[:2], share[:2])


@needs_kernels
def test_numbers_out_of_range_are_found_on_the_cpu() -> None:
    ops, rows, weight = torch.ops.megalite, torch.zeros(6, 8), torch.zeros(4, 5, 8)
    index = torch.tensor([[0, 1], [2, 3], [0, 4]])
    with pytest.raises(IndexError, match="count_rows: index has 4, but must be from 0 to 3"):
        ops.count_rows(index, 4)
    with pytest.raises(ValueError, match="sort_by_expert: counts are not those of index"):
        ops.sort_by_expert(index, torch.tensor([2, 2, 1, 1, 0]))
    with pytest.raises(IndexError, match="gather_rows: token has -1, but must be from 0 to 5"):
        ops.gather_rows(rows, torch.tensor([0, -1]))
    with pytest.raises(IndexError, match="sum_rows: row has 6, but must be from 0 to 5"):
        ops.sum_rows(rows, torch.tensor([[0, 6]]), None)
    for counts in ([6, 0, 0, 1], [7, -1, 0, 0]):
        with pytest.raises(ValueError, match="grouped_product: counts"):
            ops.grouped_product(rows, weight, torch.tensor(counts), False)
    with pytest.raises(
        ValueError, match=r"grouped_product: x has shape \[6, 8\], but must have \[6, 5\]"
    ):
        ops.grouped_product(rows, weight, torch.tensor([6, 0, 0, 0]), True)
    with pytest.raises(
        ValueError, match=r"grouped_weight_gradient_: into has shape .* must have \[4, 8, 8\]"
    ):
        ops.grouped_weight_gradient_(weight, rows, rows, torch.tensor([6, 0, 0, 0]), True)


@needs_kernels
def test_operators_are_well_formed(device: torch.device) -> None:  # noqa: F811
    ops, check = torch.ops.megalite, torch.library.opcheck
    index = torch.tensor([[0, 1], [2, 3], [0, 3]], device=device)
    counts = count_rows(index, 4)
    token, row = sort_by_expert(index, counts)
    x, rows, share = (torch.randn(*shape, device=device) for shape in ((3, 8), (6, 8), (3, 2)))
    check(ops.top_k, (x, 3))
    check(ops.count_rows, (index, 4))
    check(ops.sort_by_expert, (index, counts))
    check(ops.gather_rows, (x, token))
    check(ops.sum_rows, (rows, row, share))
    check(ops.sum_rows_backward, (x, rows, row, share))
