from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from exactness import BOUND, DTYPES, check_against_float64, device, error, needs_kernels  # noqa: F401, device: a fixture
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.rope import _rotate_plainly, rotate

# (qkv [B,T,N,K], batches of the angles, pairs R, heads that turn)
CASES = [
    ((2, 5, 6, 8), 1, 4, 4),
    ((2, 5, 6, 8), 2, 4, 6),
    ((1, 7, 3, 10), 1, 3, 2),  # partial: the last 4 of a head are left alone
    # Partial: packs of 16 bytes fit into the pairs, but not into the heads.
    (
        (1, 7, 3, 18),
        1,
        8,
        2,
    ),
    ((3, 9, 5, 128), 3, 64, 3),
    ((2, 33, 4, 64), 1, 32, 0),
    ((2, 3, 4, 6), 1, 0, 4),
    ((0, 3, 4, 6), 1, 3, 4),
    ((2, 0, 4, 6), 1, 3, 4),
    ((2, 130, 12, 96), 2, 48, 9),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(batch: int, seq: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = 7 * random(batch, seq, pairs, seed=5).float()
    return angle.cos(), angle.sin()


def by_complex_numbers(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    pairs = cos.shape[-1]
    turned = torch.complex(qkv[..., :num_heads, :pairs], qkv[..., :num_heads, pairs : 2 * pairs])
    turned = turned * torch.complex(cos, sin)[:, :, None]
    whole = torch.cat((turned.real, turned.imag, qkv[..., :num_heads, 2 * pairs :]), dim=-1)
    return torch.cat((whole, qkv[:, :, num_heads:]), dim=2)


def plainly(qkv: Tensor, head_size: int, num_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate_plainly(qkv.unflatten(-1, (-1, head_size)), num_heads, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [rotate, plainly])
@pytest.mark.parametrize(("shape", "batch", "pairs", "num_heads"), CASES)
def test_rotate(
    shape: tuple[int, ...],
    batch: int,
    pairs: int,
    num_heads: int,
    function: Callable[..., Tensor],
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    cos, sin = angles(batch, shape[1], pairs)
    check_against_float64(
        lambda qkv: function(
            qkv.flatten(2).clone(), shape[3], num_heads, cos.to(device), sin.to(device)
        ),
        lambda qkv: by_complex_numbers(qkv, cos.double(), sin.double(), num_heads),
        [random(*shape)],
        dtype,
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    # [3,5,4], strides 4, 0, 1.
    cos, sin = (x.expand(5, 3, 4).transpose(0, 1) for x in angles(1, 3, 4))
    check_against_float64(
        lambda qkv: rotate(qkv * 1, 8, 4, cos.to(device), sin.to(device)),
        lambda qkv: by_complex_numbers(qkv.unflatten(-1, (6, 8)), cos.double(), sin.double(), 4),
        [random(5, 3, 48).transpose(0, 1)],
        dtype,
        device,
    )


@needs_kernels
def test_in_place_forth_and_back(device: torch.device) -> None:  # noqa: F811
    """The result lies where `qkv` lay; so does the gradient, which the split of heads has just
    made."""
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    leaf = random(2, 5, 48).float().to(device).requires_grad_()
    seen: list[int] = []
    leaf.register_hook(lambda grad: seen.append(grad.data_ptr()))
    qkv = leaf + 1
    address = qkv.data_ptr()
    turned = rotate(qkv, 8, 4, cos, sin)
    assert turned.data_ptr() == address
    turned.register_hook(lambda grad: seen.append(grad.data_ptr()))
    q, k, v = turned.split((3, 1, 2), dim=2)
    (q.square().sum() + k.exp().sum() + v.sum()).backward()
    if hasattr(Tensor, "_use_count"):  # torch 2.10 cannot say whether another sees the gradient
        assert seen[0] == seen[1]


def used_once(turned: Tensor, other: Tensor) -> Tensor:
    q, k, v = turned.split((3, 1, 2), dim=2)
    return (q.square() + k * v[:, :, :1]).sum() + other.sum()


def used_twice(turned: Tensor, other: Tensor) -> Tensor:
    return used_once(turned, other) + (turned * other).square().sum()


def gradient_shared(turned: Tensor, other: Tensor) -> Tensor:
    """The sum hands one gradient to both of its terms."""
    return (turned + other).square().sum()


def view_of_gradient_shared(turned: Tensor, other: Tensor) -> Tensor:
    return (turned.flatten(1) + other.flatten(1)).square().sum()


def gradient_expanded(turned: Tensor, other: Tensor) -> Tensor:
    return (turned + other).sum()


USES = [used_once, used_twice, gradient_shared, view_of_gradient_shared, gradient_expanded]


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
@pytest.mark.parametrize("use", USES)
def test_gradients_of_all_that_is_near(
    use: Callable[[Tensor, Tensor], Tensor],
    how: str,
    device: torch.device,  # noqa: F811
) -> None:
    """No use of the result, and no neighbour in the graph, sees the memory change under it."""
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    leaves = [
        random(*shape, seed=i).float().to(device)
        for i, shape in enumerate([(2, 5, 10), (48, 10), (2, 5, 6, 8)])
    ]

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        x, weight, other = (leaf.clone().requires_grad_() for leaf in leaves)

        def loss(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
            before = other.mul(3)  # its backward runs after that of the rotation
            return use(function(x @ weight.t(), 8, 4, cos, sin), before)

        if how == "compiled":
            torch._dynamo.reset()
            library.tell_compiler()
            result = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight, other)
        elif how == "checkpointed":
            result = checkpoint(loss, x, weight, other, use_reentrant=False)
        else:
            result = loss(x, weight, other)
        result.backward()
        return [result, x.grad, weight.grad, other.grad]

    for a, b in zip(run(rotate), run(plainly), strict=True):
        assert error(a, b) <= BOUND[torch.float32]


def test_gradient_of_the_caller_is_left_alone(device: torch.device) -> None:  # noqa: F811
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    grad = random(2, 5, 6, 8).float().to(device)
    given = grad.clone()
    x = random(2, 5, 48, seed=1).float().to(device).requires_grad_()
    torch.autograd.grad(rotate(x * 1, 8, 4, cos, sin), x, given)
    assert torch.equal(given, grad)


@needs_kernels
def test_projection_used_later_is_the_turned_one(device: torch.device) -> None:  # noqa: F811
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    x = random(2, 5, 48).float().to(device).requires_grad_()
    qkv = x * 1
    rotate(qkv, 8, 4, cos, sin)
    (found,) = torch.autograd.grad(qkv.pow(3).sum(), x)
    (wanted,) = torch.autograd.grad(plainly(x, 8, 4, cos, sin).pow(3).sum(), x)
    assert error(found, wanted) <= BOUND[torch.float32]


@needs_kernels
def test_values_saved_before_are_refused(device: torch.device) -> None:  # noqa: F811
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    x = random(2, 5, 48).float().to(device).requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotate(x.exp(), 8, 4, cos, sin).sum().backward()


@needs_kernels
def test_compiled_by_inductor() -> None:
    cos, sin = angles(1, 5, 4)
    weight, x = random(48, 10).float().requires_grad_(), random(2, 5, 10).float()

    def loss(weight: Tensor, function: Callable[..., Tensor]) -> Tensor:
        return function(x @ weight.t(), 8, 4, cos, sin).square().cumsum(-1).sum()

    (wanted,) = torch.autograd.grad(loss(weight, plainly), weight)
    torch._dynamo.reset()
    library.tell_compiler()
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight, rotate), weight)
    assert error(found, wanted) <= BOUND[torch.float32]


def test_plain_torch_is_out_of_place() -> None:
    cos, sin = angles(1, 5, 4)
    qkv = random(2, 5, 48).float()
    try:
        library.use(KernelsConfig(rope="torch"))
        before = qkv.clone()
        rotate(qkv, 8, 4, cos, sin)
        assert torch.equal(qkv, before)
    finally:
        library.use(KernelsConfig())


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    rope_ = torch.ops.megalite.rope_
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    qkv = torch.zeros(2, 5, 6, 8, device=device)
    with pytest.raises(
        ValueError, match=r"rope_: qkv has strides .* must be contiguous: it is changed in place"
    ):
        rope_(qkv.transpose(0, 1), cos, sin, 4, False)
    with pytest.raises(
        ValueError, match=r"rope_: qkv has shape \[2, 5, 48\], but must be \[batch, seq, heads"
    ):
        rope_(qkv.flatten(2), cos, sin, 4, False)
    with pytest.raises(TypeError, match=r"rope_: qkv is .*Half.* must be float32 or bfloat16"):
        rope_(qkv.half(), cos, sin, 4, False)
    with pytest.raises(TypeError, match=r"rope_: cos is .*BFloat16.* must be .*Float"):
        rope_(qkv, cos.bfloat16(), sin, 4, False)
    for wrong in (cos[:, :4], cos.expand(3, 5, 4), cos.repeat(1, 1, 2), cos[0]):
        with pytest.raises(
            ValueError, match=r"rope_: cos has shape .* must have \[2 or 1, 5, at most 4\]"
        ):
            rope_(qkv, wrong, sin, 4, False)
    with pytest.raises(
        ValueError, match=r"rope_: sin has shape \[1, 5, 3\], but must have \[1, 5, 4\]"
    ):
        rope_(qkv, cos, sin[..., :3], 4, False)
    with pytest.raises(ValueError, match=r"rope_: num_heads is 7, but qkv has 6 heads"):
        rope_(qkv, cos, sin, 7, False)


@needs_kernels
def test_operator_is_well_formed(device: torch.device) -> None:  # noqa: F811
    """Schema and fake kernel agree, so that torch.compile may keep it whole."""
    cos, sin = (x.to(device) for x in angles(1, 5, 4))
    torch.library.opcheck(
        torch.ops.megalite.rope_, (torch.randn(2, 5, 6, 8, device=device), cos, sin, 4, False)
    )
