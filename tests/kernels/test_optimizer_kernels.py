from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from exactness import BOUND, device, error, needs_kernels  # noqa: F401, device is a fixture
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.optimizer import (
    adamw_,
    adamw_factors,
    decayed_step_,
    momentum_,
    sum_of_squares,
)

SIZES = [0, 1, 5, 64, 1023, 3 * 16384, 100_003]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def factors_of(step: int, divisor: Tensor) -> Tensor:
    return adamw_factors(
        divisor, torch.tensor(float(step), dtype=torch.float64, device=divisor.device), (0.9, 0.95)
    )


def gradients(size: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) * 10.0 ** -(step % 4) for step in range(steps)]


def run(
    size: int, steps: int, where: torch.device, dtype: torch.dtype, copies: bool, offset: int = 0
) -> list[Tensor]:
    """Master weights, both moments and, where there are `copies`, the weights after some steps.
    `offset` elements lie before each tensor in its memory, which moves it off the alignment of
    vectors."""

    def make(value: Tensor) -> Tensor:
        return torch.cat((torch.zeros(offset, dtype=value.dtype), value)).to(where)[offset:]

    state = [
        make(x.to(dtype))
        for x in (torch.linspace(-1, 1, size), torch.zeros(size), torch.zeros(size))
    ]
    weights = make(torch.zeros(size, dtype=torch.bfloat16)) if copies else None
    for step, grad in enumerate(gradients(size, steps), start=1):
        divisor = torch.tensor(1.0 + step / 3, dtype=dtype, device=where)
        adamw_(*state, weights, make(grad.to(dtype)), factors_of(step, divisor), **OPTIONS)
    return state if weights is None else [*state, weights]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("copies", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_adamw_against_float64(size: int, copies: bool, offset: int, device: torch.device) -> None:  # noqa: F811
    # Float64 is the reference's alone.
    wanted = run(size, 5, torch.device("cpu"), torch.float64, False)
    found = run(size, 5, device, torch.float32, copies, offset)
    for a, b in zip(found, wanted, strict=False):
        assert error(a, b) <= BOUND[torch.float32]
    if copies:
        assert torch.equal(found[3], found[0].bfloat16())  # rounded as torch rounds, to the bit


def test_reference_of_adamw_writes_the_weights_too() -> None:
    library.use(KernelsConfig(optimizer="torch"))
    try:
        plain = run(1023, 3, torch.device("cpu"), torch.float32, True)
    finally:
        library.use(KernelsConfig())
    assert torch.equal(plain[3], plain[0].bfloat16())
    assert error(plain[0], run(1023, 3, torch.device("cpu"), torch.float32, True)[0]) < 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_steps_are_torchs_own(decay: float, device: torch.device) -> None:  # noqa: F811
    """Of each element, not of the largest only. 1e-6 is 8 roundings of fp32, for 20 steps that
    round a few times."""
    start = 0.5 + torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(start.to(device))
    options = OPTIONS | {"weight_decay": decay}
    optimizer: Any = torch.optim.AdamW([parameter], fused=True, **options)
    optimizer.grad_scale = torch.tensor(1.7, device=device)
    state = [start.to(device).clone(), *torch.zeros(2, 10_000, device=device)]
    for step, grad in enumerate(gradients(10_000, 20), start=1):
        lr = 1e-3 * step
        adamw_(
            *state,
            None,
            grad.to(device),
            factors_of(step, optimizer.grad_scale),
            **(options | {"lr": lr}),
        )
        optimizer.param_groups[0]["lr"], parameter.grad = lr, grad.to(device)
        optimizer.step()
    torch.testing.assert_close(state[0], parameter.detach(), rtol=1e-6, atol=0)
    theirs = optimizer.state[parameter]
    assert error(state[1], theirs["exp_avg"]) < 1e-6
    torch.testing.assert_close(state[2], theirs["exp_avg_sq"], rtol=1e-6, atol=0)


def test_gradients_that_are_not_finite_stay_visible(device: torch.device) -> None:  # noqa: F811
    state = list(torch.zeros(3, 40, device=device))
    weights = torch.zeros(40, dtype=torch.bfloat16, device=device)
    grad = torch.ones(40, device=device)
    grad[3], grad[33] = torch.nan, torch.inf
    adamw_(*state, weights, grad, factors_of(1, torch.ones((), device=device)), **OPTIONS)
    for x in (state[0], weights):
        assert not x[[3, 33]].isfinite().any()
        assert x.isfinite().sum() == 38


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("divisor", [0.0, -1.0])
def test_a_divisor_not_above_0_leaves_everything_as_it_is(
    divisor: float,
    kernels: Literal["auto", "torch"],
    device: torch.device,  # noqa: F811
) -> None:
    """Also where a gradient is not finite, and before the first update."""
    generator = torch.Generator().manual_seed(3)
    state = [torch.randn(40_001, generator=generator).abs().to(device) for _ in range(3)]
    weights = torch.randn(40_001, generator=generator).bfloat16().to(device)
    grad = torch.randn(40_001, generator=generator).to(device)
    grad[7], grad[30_000] = torch.nan, torch.inf
    before = [x.clone() for x in (*state, weights)]
    library.use(KernelsConfig(optimizer=kernels))
    try:
        adamw_(
            *state, weights, grad, factors_of(1, torch.tensor(divisor, device=device)), **OPTIONS
        )
    finally:
        library.use(KernelsConfig())
    assert all(map(torch.equal, (*state, weights), before))


@pytest.mark.parametrize(
    "sizes", [[0], *[[size] for size in SIZES[1:]], [5, 0, 16384, 3_000_001], [1] * 40], ids=str
)
def test_sum_of_squares(sizes: list[int], device: torch.device) -> None:  # noqa: F811
    """Squares summed in fp32 over 512 elements at most: torch's norm of 3 million is off by
    1e-4."""
    generator = torch.Generator().manual_seed(0)
    flats = [
        torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()
        for n in sizes
    ]
    found = sum_of_squares(*[flat.to(device) for flat in flats])
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(
        sum(flat.double().square().sum().item() for flat in flats), rel=5e-7
    )


def test_sum_of_squares_of_what_is_not_contiguous_or_aligned(device: torch.device) -> None:  # noqa: F811
    x = torch.randn(1001, device=device)
    assert sum_of_squares(x[::2]).item() == pytest.approx(
        x[::2].double().square().sum().item(), rel=5e-7
    )
    assert sum_of_squares(x[1:]).item() == pytest.approx(
        x[1:].double().square().sum().item(), rel=5e-7
    )
    x[17] = torch.nan
    assert sum_of_squares(x).isnan()


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads(device: torch.device) -> None:  # noqa: F811
    x = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(device)

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [*run(100_003, 2, device, torch.float32, True), sum_of_squares(x, x[:70_001])]

    threads = torch.get_num_threads()
    try:
        for many in (2, 3):
            assert all(map(torch.equal, results(many), results(1)))
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    x, ones = torch.zeros(8, device=device), torch.ones(3, device=device)

    def step(**other: Any) -> None:
        tensors = {
            "master": x,
            "exp_avg": x.clone(),
            "exp_avg_sq": x.clone(),
            "weights": None,
            "grad": x.clone(),
        }
        adamw_(**(tensors | {"factors": ones, **OPTIONS} | other))

    with pytest.raises(TypeError, match=r"adamw_: master is .*BFloat16.* must be float32"):
        torch.ops.megalite.adamw_(x.bfloat16(), x, x, None, x, ones, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    with pytest.raises(ValueError, match=r"adamw_: exp_avg has shape \[7\], but must have \[8\]"):
        step(exp_avg=x[:7])
    with pytest.raises(
        ValueError, match="adamw_: exp_avg_sq is updated in place, and must be contiguous"
    ):
        step(exp_avg_sq=torch.zeros(16, device=device)[::2])
    with pytest.raises(TypeError, match=r"adamw_: weights is .*Float.* must be bfloat16"):
        step(weights=x.clone())
    with pytest.raises(TypeError, match=r"adamw_: grad is .*BFloat16.* must be .*Float"):
        step(grad=x.bfloat16())
    with pytest.raises(ValueError, match=r"adamw_: factors has shape \[8\], but must have \[3\]"):
        step(factors=x)
    with pytest.raises(TypeError, match=r"sum_of_squares: a tensor is .*Double.* must be float32"):
        torch.ops.megalite.sum_of_squares([x, x.double()])


@needs_kernels
def test_operators_are_well_formed(device: torch.device) -> None:  # noqa: F811
    """Schema and fake kernels agree, so that torch.compile may keep them whole."""
    x = torch.randn(40, device=device)
    weights = torch.zeros(40, dtype=torch.bfloat16, device=device)
    tensors = (x, x.clone(), x.square(), weights, x.clone(), torch.ones(3, device=device))
    torch.library.opcheck(torch.ops.megalite.adamw_, (*tensors, 1e-2, 0.9, 0.95, 1e-8, 0.1))
    torch.library.opcheck(torch.ops.megalite.sum_of_squares, ([x, x[:3]],))


def run_momentum(
    size: int,
    where: torch.device,
    dtype: torch.dtype,
    nesterov: bool,
    copies: bool,
    offset: int = 0,
) -> list[Tensor]:
    """Master weights, momentum and, where there are `copies`, the weights after five steps, of
    which one is refused."""

    def make(value: Tensor) -> Tensor:
        return torch.cat((torch.zeros(offset, dtype=value.dtype), value)).to(where)[offset:]

    master, buffer = (
        make(torch.linspace(-1, 1, size).to(dtype)),
        make(torch.zeros(size, dtype=dtype)),
    )
    weights = make(torch.zeros(size, dtype=torch.bfloat16)) if copies else None
    for step, grad in enumerate(gradients(size, 5), start=1):
        divisor = torch.tensor(0.0 if step == 3 else 1.0 + step / 3, dtype=dtype, device=where)
        grad = make(torch.full_like(grad, torch.nan) if step == 3 else grad).to(dtype)
        found = momentum_(buffer, grad, divisor, 0.9, nesterov, dtype)
        assert step != 3 or not found.any(), "a refused step takes nothing"
        decayed_step_(master, weights, make(found), divisor, 1e-2, 0.1)
    return [master, buffer] if weights is None else [master, buffer, weights]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("nesterov", "copies"), [(True, False), (False, True)])
@pytest.mark.parametrize("size", SIZES)
def test_momentum_against_float64(
    size: int,
    nesterov: bool,
    copies: bool,
    offset: int,
    device: torch.device,  # noqa: F811
) -> None:
    wanted = run_momentum(size, torch.device("cpu"), torch.float64, nesterov, False)
    found = run_momentum(size, device, torch.float32, nesterov, copies, offset)
    for a, b in zip(found, wanted, strict=False):
        assert error(a, b) <= BOUND[torch.float32]
    if copies:
        assert torch.equal(found[2], found[0].bfloat16())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_in_bf16_is_the_rounded_one(size: int, offset: int, device: torch.device) -> None:  # noqa: F811
    def make(value: Tensor) -> Tensor:
        return torch.cat((torch.zeros(offset, dtype=value.dtype), value)).to(device)[offset:]

    grad, divisor = make(gradients(size, 1)[0]), torch.full((), 1.5, device=device)
    found, masters = [], []
    for dtype in (torch.float32, torch.bfloat16):
        buffer, master = make(torch.linspace(2, -2, size)), make(torch.linspace(-1, 1, size))
        out = momentum_(buffer, grad, divisor, 0.9, True, dtype)
        assert out.dtype == dtype
        decayed_step_(master, None, make(out.bfloat16().to(dtype)), divisor, 1e-2, 0.1)
        found.append(out.bfloat16())
        masters.append(master)
    assert torch.equal(*found)
    assert torch.equal(*masters)


def test_weights_may_lie_off_the_alignment_of_their_master(device: torch.device) -> None:  # noqa: F811
    master, exp_avg, exp_avg_sq = (torch.linspace(0, 1, 64, device=device) for _ in range(3))
    weights = torch.zeros(65, dtype=torch.bfloat16, device=device)[1:]
    divisor = torch.ones((), device=device)
    adamw_(master, exp_avg, exp_avg_sq, weights, master.clone(), factors_of(1, divisor), **OPTIONS)
    assert torch.equal(weights, master.bfloat16())
    decayed_step_(master, weights, master.clone(), divisor, 1e-2, 0.1)
    assert torch.equal(weights, master.bfloat16())
