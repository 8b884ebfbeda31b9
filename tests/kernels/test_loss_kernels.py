from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import BOUND, DTYPES, device, error, needs_kernels  # noqa: F401, device is a fixture
from live_bytes import LiveBytes
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.loss import (
    IGNORE,
    LossTerms,
    cross_entropy,
    cross_entropy_backward_,
    cross_entropy_forward,
    linear_cross_entropy,
)

SHAPES = [(1, 1), (3, 7), (5, 64), (33, 1000), (4, 4097), (2, 20_001), (0, 16)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(*shape: int, vocab: int) -> Tensor:
    """A quarter of them ignored."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, vocab, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.25, IGNORE)


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view_as(labels)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    assert error(found, wanted) <= BOUND[dtype], f"{what}: {error(found, wanted):.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_of_some_columns(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """Columns 5.. of a vocabulary, of which the last third is padding that holds NaN."""
    (rows, size), first = shape, 5
    for valid in {size, size - size // 3, 0}:
        logits = (random(*shape) * 3).to(dtype)
        logits[:, valid:] = torch.nan
        labels = torch.randint(
            0, first + size + 5, (rows,), generator=torch.Generator().manual_seed(1)
        )
        grad = random(rows, seed=3).float()
        here = (labels >= first) & (labels < first + valid)
        hit = F.one_hot((labels - first).masked_fill(~here, 0), size).double() * here[:, None]

        exact = logits.double().nan_to_num(nan=-torch.inf)
        found = logits.to(device)
        lse, target = cross_entropy_forward(found, labels.to(device), first, valid)
        assert lse.dtype == target.dtype == torch.float32
        wanted = exact.logsumexp(1)
        if valid:
            close(lse, wanted, torch.float32, "lse")
        else:
            assert torch.equal(lse.cpu(), wanted.float())
        assert torch.equal(target.cpu(), (exact.nan_to_num(neginf=0.0) * hit).sum(1).float())

        whole = wanted.float().clamp(min=0.0) + 1.0  # other ranks have probability, too
        cross_entropy_backward_(
            found, labels.to(device), whole.to(device), grad.to(device), first, valid
        )
        close(
            found,
            ((exact - whole.double()[:, None]).exp() - hit) * grad.double()[:, None],
            dtype,
            "gradient",
        )
        assert (found[:, valid:] == 0).all()


def test_without_columns_or_rows(device: torch.device) -> None:  # noqa: F811
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    lse, target = cross_entropy_forward(torch.empty(0, 5, device=device), labels, 0, 5)
    assert lse.shape == target.shape == (0,)
    if library.own():
        labels = torch.zeros(3, dtype=torch.int64, device=device)
        lse, target = torch.ops.megalite.cross_entropy_forward(
            torch.empty(3, 0, device=device), labels, 0, 0
        )
        assert (lse == -torch.inf).all()
        assert (target == 0).all()


@pytest.mark.parametrize("size", [16, 10_000])
def test_far_out(size: int, device: torch.device) -> None:  # noqa: F811
    """Logits of any finite size, and -inf among them: where a mask is. What diverged shows."""
    inf, x = torch.inf, random(9, size)
    x[0] *= 1e4
    x[1] = 3e38
    x[2] = -3e38
    x[3, : size // 2] = -inf  # all of the first block
    x[4, size // 2 :] = -inf
    x[5] -= 200.0
    x[6] = -inf
    x[7] = torch.nan
    x[8, 3] = torch.nan
    labels = torch.full((9,), size // 2 - 1, device=device)
    lse, _ = cross_entropy_forward(x.float().to(device), labels, 0, size)
    wanted = x.float().double().logsumexp(1).float()
    assert torch.equal(lse[6:].cpu().isnan(), torch.tensor([False, True, True]))
    torch.testing.assert_close(lse[:7].cpu(), wanted[:7], rtol=1e-6, atol=0)
    # A gradient of 0 rules, whatever else is there; 1 shows what is not finite.
    grad = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 1], device=device)
    found = x.float().to(device)
    cross_entropy_backward_(found, labels, lse, grad, 0, size)
    assert (found[:8] == 0).all()
    assert found[8].isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    logits, labels = random(100, 3000).to(device, dtype), random_labels(100, vocab=3000).to(device)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        again = logits.clone()
        lse, target = cross_entropy_forward(again, labels, 0, 3000)
        cross_entropy_backward_(again, labels, lse, torch.ones_like(lse), 0, 3000)
        found.append((lse, target, again))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    ops, x = torch.ops.megalite, torch.zeros(2, 8, device=device)
    labels, lse = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, device=device)
    with pytest.raises(
        ValueError,
        match=r"cross_entropy_forward: logits has shape \[8\], but must have \[rows, col",
    ):
        ops.cross_entropy_forward(x[0], labels, 0, 8)
    with pytest.raises(
        ValueError, match=r"cross_entropy_forward: labels has shape \[1\], but must have \[2\]"
    ):
        ops.cross_entropy_forward(x, labels[:1], 0, 8)
    with pytest.raises(TypeError, match=r"cross_entropy_forward: labels is Int, but must be int64"):
        ops.cross_entropy_forward(x, labels.int(), 0, 8)
    with pytest.raises(
        ValueError, match=r"cross_entropy_forward: num_valid is 9, but must be from 0 to 8"
    ):
        ops.cross_entropy_forward(x, labels, 0, 9)
    with pytest.raises(
        TypeError, match=r"cross_entropy_forward: logits is Half, but must be float32 or bfloat16"
    ):
        ops.cross_entropy_forward(x.half(), labels, 0, 8)
    with pytest.raises(ValueError, match=r"cross_entropy_backward_: logits must be contiguous"):
        ops.cross_entropy_backward_(x[:, ::2], labels, lse, lse, 0, 4)
    with pytest.raises(
        TypeError, match=r"cross_entropy_backward_: grad is BFloat16, but must be float32"
    ):
        ops.cross_entropy_backward_(x, labels, lse, lse.bfloat16(), 0, 8)
    with pytest.raises(
        ValueError, match=r"cross_entropy_backward_: lse has shape \[1\], but must have \[2\]"
    ):
        ops.cross_entropy_backward_(x, labels, lse[:1], lse, 0, 8)


@needs_kernels
def test_operators_are_well_formed(device: torch.device) -> None:  # noqa: F811
    x, labels = torch.randn(3, 8, device=device), torch.tensor([1, 7, IGNORE], device=device)
    torch.library.opcheck(torch.ops.megalite.cross_entropy_forward, (x, labels, 0, 8))
    lse = x.logsumexp(1)
    torch.library.opcheck(
        torch.ops.megalite.cross_entropy_backward_, (x, labels, lse, torch.ones_like(lse), 0, 8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_cross_entropy(dtype: torch.dtype, scale: float, device: torch.device) -> None:  # noqa: F811
    given, labels = (random(3, 11, 777) * scale).to(dtype), random_labels(3, 11, vocab=777)
    grad = random(3, 11, seed=4).float()
    exact = given.double().requires_grad_()
    plain(exact, labels).backward(grad.double())
    logits = given.to(device).requires_grad_()
    losses = cross_entropy(logits.clone(), labels.to(device))
    losses.backward(grad.to(device))
    assert losses.dtype == torch.float32
    assert losses.shape == labels.shape
    assert (losses[(labels == IGNORE).to(device)] == 0).all()
    close(losses, plain(exact, labels), torch.float32, "losses")
    assert logits.grad is not None
    assert exact.grad is not None
    close(logits.grad, exact.grad, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "terms", [LossTerms(0.01, 0.0, 777), LossTerms(0.0, 0.2, 777), LossTerms(0.01, 0.2, 777)]
)
def test_terms_beside_it(terms: LossTerms, dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """Label smoothing and a z-loss, beside rows without a label that are not finite. The
    cross-entropy alone is told, and its own gradient counts for nothing."""
    given, labels = (random(3, 11, 777) * 3).to(dtype), random_labels(3, 11, vocab=777)
    given[labels == IGNORE] = torch.inf
    grad, has_label = random(3, 11, 2, seed=4).float(), labels != IGNORE
    exact = given.double().requires_grad_()
    found = exact[has_label]
    wanted = F.cross_entropy(
        found, labels[has_label], reduction="none", label_smoothing=terms.label_smoothing
    )
    wanted = wanted + terms.z_loss * found.logsumexp(1).square()
    wanted.backward(grad[has_label][:, 0].double())
    logits = given.to(device).requires_grad_()
    losses = cross_entropy(logits.clone(), labels.to(device), terms=terms)
    losses.backward(grad.to(device))
    assert (losses[~has_label.to(device)] == 0).all()
    close(losses[has_label.to(device)][:, 0], wanted, torch.float32, "losses")
    close(
        losses[..., 1],
        cross_entropy(given.to(device), labels.to(device)),
        torch.float32,
        "cross-entropy",
    )
    assert logits.grad is not None
    assert exact.grad is not None
    close(logits.grad, exact.grad, dtype, "gradient")


def test_gradient_lies_where_the_logits_were(device: torch.device) -> None:  # noqa: F811
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    labels = torch.zeros(2, 5, dtype=torch.int64, device=device)
    logits, of_logits = x * 2.0, []
    logits.register_hook(of_logits.append)
    losses = cross_entropy(logits, labels)
    losses.sum().backward(retain_graph=True)
    assert of_logits[0].data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_not_contiguous(device: torch.device) -> None:  # noqa: F811
    """Such logits are copied, so that what they are a part of stays."""
    given = random(6, 40).float().to(device)
    whole, labels = given.clone().requires_grad_(), torch.arange(6, device=device)
    cross_entropy(whole[:, ::2][:, None], labels[:, None]).sum().backward()
    wanted = given.double().requires_grad_()
    plain(wanted[:, ::2], labels).sum().backward()
    assert torch.equal(whole, given)
    assert whole.grad is not None
    assert wanted.grad is not None
    close(whole.grad, wanted.grad, torch.float32, "gradient")


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    for label in (8, -1):
        with pytest.raises(RuntimeError, match="a label is neither -100 nor from 0 to 7"):
            cross_entropy(torch.zeros(1, 1, 8), torch.tensor([[label]]))


def test_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_wishes", KernelsConfig())
    library.use(KernelsConfig(loss="torch"))
    assert library.explain("loss", "cpu") == ("torch", "kernels.loss asks for it")
    if library.own():
        monkeypatch.delattr(torch.ops.megalite, "cross_entropy_forward", raising=False)
        monkeypatch.setattr(torch.ops.megalite, "cross_entropy_forward", None)
        monkeypatch.setattr(torch.ops.megalite, "cross_entropy_backward_", None)
    for dtype in DTYPES:
        test_cross_entropy(dtype, 1.0, torch.device("cpu"))
        test_linear_cross_entropy(dtype, 3, torch.device("cpu"))
        for shape in SHAPES:
            test_of_some_columns(shape, dtype, torch.device("cpu"))
    test_far_out(16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 20, 64])
def test_linear_cross_entropy(
    dtype: torch.dtype,
    rows_per_chunk: int,
    device: torch.device,  # noqa: F811
) -> None:
    batch, length, hidden, vocab = 2, 10, 48, 333
    x, weight = (
        random(batch, length, hidden).to(dtype),
        (random(vocab, hidden, seed=1) / 4).to(dtype),
    )
    labels, grad = random_labels(batch, length, vocab=vocab), random(batch, length, seed=4).float()
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = plain(exact[0] @ exact[1].t(), labels)
    wanted.backward(grad.double())

    given = [x.to(device).requires_grad_(), weight.to(device).requires_grad_()]
    losses = linear_cross_entropy(*given, labels.to(device), rows_per_chunk)
    losses.backward(grad.to(device))
    assert losses.dtype == torch.float32
    close(losses, wanted, dtype, "losses")
    for name, a, b in zip(("x", "weight"), given, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == dtype
        close(a.grad, b.grad, dtype, f"gradient of {name}")

    total = torch.zeros(vocab, hidden, dtype=torch.float64)

    lasts: list[bool] = []

    def callback(parameter: Tensor, grad_rows: Tensor, x_rows: Tensor, last: bool) -> None:
        assert parameter is again[1]
        assert grad_rows.shape[0] <= rows_per_chunk
        total.add_((grad_rows.double().t() @ x_rows.double()).cpu())
        lasts.append(last)

    again = [a.detach().clone().requires_grad_() for a in given]
    losses = linear_cross_entropy(
        *again, labels.to(device), rows_per_chunk, wgrad_callback=callback
    )
    losses.backward(grad.to(device))
    assert lasts == [False] * (math.ceil(batch * length / rows_per_chunk) - 1) + [True]
    assert again[1].grad is None
    assert again[0].grad is not None
    assert given[0].grad is not None
    assert torch.equal(again[0].grad, given[0].grad)
    assert exact[1].grad is not None
    close(total, exact[1].grad, dtype, "delivered gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_ranks(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """Three ranks, the last of which holds nothing but padding."""
    x, weight, labels = (
        random(10, 16).to(dtype),
        random(90, 16, seed=1).to(dtype),
        random_labels(10, vocab=70),
    )
    grad = random(10, seed=4).float()
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = plain(exact[0] @ exact[1][:70].t(), labels)
    wanted.backward(grad.double())
    assert exact[0].grad is not None
    assert exact[1].grad is not None

    x, weight, labels = x.to(device), weight.to(device), labels.to(device)
    ranks = [(slice(0, 40), 40), (slice(40, 80), 30), (slice(80, 90), 0)]
    told = [
        cross_entropy_forward(x @ weight[cut].t(), labels, cut.start, valid) for cut, valid in ranks
    ]

    def combine(lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([one for one, _ in told]).logsumexp(0), torch.stack(
            [one for _, one in told]
        ).sum(0)

    for fused in (False, True):
        grad_x = torch.zeros_like(exact[0].grad)
        for cut, valid in ranks:
            mine = [x.clone().requires_grad_(), weight[cut].clone().requires_grad_()]
            if fused:
                losses = linear_cross_entropy(*mine, labels, 4, cut.start, valid, combine)
            else:
                losses = cross_entropy(mine[0] @ mine[1].t(), labels, cut.start, valid, combine)
            losses.backward(grad.to(device))
            assert mine[0].grad is not None
            assert mine[1].grad is not None
            close(losses, wanted, dtype, "losses")
            if valid:
                close(mine[1].grad, exact[1].grad[cut], dtype, "gradient of the weight")
            else:
                assert (mine[1].grad == 0).all()
            grad_x += mine[0].grad.double().cpu()
        close(grad_x, exact[0].grad, dtype, "gradient of x")


def test_linear_cross_entropy_of_nothing(device: torch.device) -> None:  # noqa: F811
    x = torch.zeros(2, 0, 8, device=device, requires_grad=True)
    weight = torch.ones(5, 8, device=device, requires_grad=True)
    losses = linear_cross_entropy(x, weight, torch.zeros(2, 0, dtype=torch.int64, device=device), 4)
    losses.sum().backward()
    assert losses.shape == (2, 0)
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_a_chunk_of_logits_is_ever_held(dtype: torch.dtype) -> None:
    tokens, hidden, vocab, rows = 512, 4, 4096, 64
    chunk = rows * vocab * dtype.itemsize
    x, weight = torch.randn(tokens, hidden, dtype=dtype), torch.randn(vocab, hidden, dtype=dtype)
    x, weight, labels = (
        x.requires_grad_(),
        weight.requires_grad_(),
        random_labels(tokens, vocab=vocab),
    )
    little = 64 * tokens + 2 * x.nbytes  # some numbers a token, and the gradient of x
    with LiveBytes() as live:
        for tensor in (x, weight, labels):
            live.count(tensor)
        start = live.now
        losses = linear_cross_entropy(x, weight, labels, rows)
        assert live.peak - start <= chunk + little
        assert live.now - start <= little
        live.reset_peak()
        losses.sum().backward()
        # The weight's gradient: its sum in fp32, a chunk's product, and the result.
        assert live.peak - start <= chunk + little + 3 * vocab * hidden * 4
    assert chunk > 2 * little + 3 * vocab * hidden * 4
