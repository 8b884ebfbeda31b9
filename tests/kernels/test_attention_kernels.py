from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

import megalite.kernels.attention as attention_module
from exactness import DTYPES, check_against_float64, devices, needs_kernels
from exactness import device_with_amx as device  # noqa: F401, a fixture
from megalite.config import KernelsConfig
from megalite.kernels import attention_on_gpus, library
from megalite.kernels.attention import attention, eager_attention, self_attention
from megalite.kernels.attention_kinds import PLAIN, AttentionKind

# (B, T, H, G, K): a token, odd sizes, lengths and heads that fill no tile, several blocks of
# queries and of keys, one task a query head and one a key/value head, and nothing at all.
SHAPES = [
    (1, 1, 1, 1, 4),
    (2, 7, 4, 2, 5),
    (3, 65, 2, 2, 33),
    (1, 97, 4, 1, 64),
    (1, 193, 2, 1, 256),
    (2, 385, 6, 2, 80),
    (9, 40, 4, 2, 16),
    (1, 600, 2, 1, 1),
    (0, 8, 4, 2, 16),
    (2, 0, 4, 2, 16),
]
# Lengths of documents: cut at and between tiles, of one token, of several blocks.
DOCUMENTS = [(600,), (1,) * 40, (5, 1, 90, 96, 1, 200), (16, 48, 64, 192, 250), (399, 1)]


def plain_attention(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document: Tensor | None = None,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    return plain_parts(*qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2), document, kind)


def plain_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document: Tensor | None = None,
    kind: AttentionKind = PLAIN,
    source: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """By its definition, one matrix of probabilities a head."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads, (length, sources) = q.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (kind.scale or q.shape[-1] ** -0.5)
    if kind.softcap:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if bias is not None:
        scores = scores + bias
    if document is None:
        document, source = torch.zeros(1, length), torch.zeros(1, sources)
    source = document if source is None else source
    reached = document[:, None, :, None] == source[:, None, None, :]
    back = torch.arange(length)[:, None] - torch.arange(sources)
    if kind.causal:
        reached = reached & (back >= 0)
    if kind.window:
        reached = reached & (back.abs() < kind.window)
    nothing = ~reached.any(-1, keepdim=True)
    probabilities = (
        scores.masked_fill(~reached & ~nothing, -torch.inf).softmax(-1).masked_fill(nothing, 0.0)
    )
    return (probabilities @ v).transpose(1, 2).flatten(2)


def head_size() -> int:
    """One that fills no vector, or for AMX, which takes whole tiles, one that does."""
    module = library.own()
    return 64 if module is not None and module.isa() == "amx" else 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_self_attention(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    batch, length, heads, groups, size = shape
    qkv = random(batch, length, heads + 2 * groups, size)
    check_against_float64(
        lambda x: self_attention(x, heads, groups),
        lambda x: plain_attention(x, heads, groups),
        [qkv],
        dtype,
        device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_documents(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """Two rows with different documents, and numbers that do not begin at 0."""
    document = torch.stack((numbers(*lengths) + 3, 2 * numbers(*reversed(lengths))))
    qkv = random(2, document.shape[1], 8, head_size())
    check_against_float64(
        lambda x: self_attention(x, 4, 2, document.to(device)),
        lambda x: plain_attention(x, 4, 2, document),
        [qkv],
        dtype,
        device,
    )


KINDS = [
    AttentionKind(window=1),
    AttentionKind(window=7),
    AttentionKind(window=33, scale=0.5),
    AttentionKind(window=40),
    AttentionKind(softcap=2.0),
    AttentionKind(window=7, softcap=0.5, scale=1.0),
    AttentionKind(causal=False),
    AttentionKind(window=7, causal=False),
    AttentionKind(window=33, scale=0.5, causal=False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kinds(kind: AttentionKind, packed: bool, dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    document = torch.stack((numbers(3, 1, 36), numbers(20, 20))) if packed else None
    qkv = random(2, 40, 8, 12)
    check_against_float64(
        lambda x: self_attention(x, 4, 2, None if document is None else document.to(device), kind),
        lambda x: plain_attention(x, 4, 2, document, kind),
        [qkv],
        dtype,
        device,
    )


# (T, lengths of documents), several blocks of queries and of keys: borders within strips, tiles and
# blocks, and the last of them not full.
ROWS = [
    (65, None),
    (385, None),
    (600, (5, 1, 90, 96, 1, 200, 207)),
    (193, (70, 123)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "lengths"), ROWS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_encoders_rows(
    length: int,
    lengths: tuple[int, ...] | None,
    biased: bool,
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    """Of full rows and of windows, causal ones as well, with a bias for all rows or for each: results
    and gradients, that of the bias among them."""
    document = None
    if lengths is not None:
        document = torch.stack((numbers(*lengths) + 3, 2 * numbers(*reversed(lengths))))
    qkv = random(2, length, 8, head_size())
    for kind in (
        AttentionKind(causal=False, scale=0.3),
        AttentionKind(100, causal=False),
        AttentionKind(33, scale=0.3),
    ):
        biases = [random(1 + length % 2, 4, length, length, seed=2)] if biased else []

        def ours(x: Tensor, *bias: Tensor, kind: AttentionKind = kind) -> Tensor:
            there = None if document is None else document.to(device)
            # Asked of the kernel itself on the CPU, whatever the rule of speed says.
            if device.type == "cpu" and library.own():
                return torch.ops.megalite.attention_forward(
                    x, 4, 2, there, None, None, kind.causal, kind.window, kind.scale,
                    bias[0].float() if bias else None,
                )[0]  # fmt: skip
            return self_attention(x, 4, 2, there, kind, *bias)

        def plain(x: Tensor, *bias: Tensor, kind: AttentionKind = kind) -> Tensor:
            return plain_parts(*x.split((4, 2, 2), 2), document, kind, None, *bias)

        check_against_float64(ours, plain, [qkv, *biases], dtype, device)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "sources"),
    [((7, 1, 16), (3, 9, 5)), ((0, 24, 100), (130,)), ((30, 140, 30), (70, 0, 123)), ((9, 8), (0, 70))],
    ids=str,
)  # fmt: skip
def test_packed_documents_of_another_sequence(
    lengths: tuple[int, ...],
    sources: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    """Queries whose document has no key get 0 and give nothing; so do keys that no query reaches."""
    document, source = (torch.stack((numbers(*of), numbers(*of) + 1)) for of in (lengths, sources))
    free = AttentionKind(causal=False)
    parts = [
        random(2, len(document[0]), 4, head_size()),
        *(random(2, len(source[0]), 2, head_size(), seed=seed) for seed in (1, 2)),
    ]
    check_against_float64(
        lambda q, k, v: attention(q, k, v, document, free, source),
        lambda q, k, v: plain_parts(q, k, v, document, free, source),
        parts,
        dtype,
        device,
    )


BATCH, LENGTH, HEADS = 2, 24, 4
KINDS_OF_PARTS = [
    AttentionKind(window, softcap, scale, causal)
    for causal, window, softcap, scale in product(
        (True, False), (None, 5), (None, 1.5), (None, 0.5)
    )
]
# Of the queries; of keys of another sequence, where the second row's first document and the last
# have none.
PACKED = torch.stack((numbers(7, 1, 16), numbers(12, 12)))
SOURCES = {"one document": None, "packed": torch.stack((numbers(3, 9, 5), 1 + numbers(17)))}


# torch computes them, with the same instructions whatever megalite's kernels use.
@pytest.mark.parametrize("where", ["cpu", *({"cuda"} & {*devices()})])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cross", [False, True], ids=["own keys", "another sequence"])
@pytest.mark.parametrize("packed", list(SOURCES))
@pytest.mark.parametrize("sizes", [(12, 12), (24, 16), (8, 20)], ids=str)
def test_queries_keys_and_values_apart(
    sizes: tuple[int, int], packed: str, cross: bool, dtype: torch.dtype, where: str
) -> None:
    """Every kind, with as many key/value heads as heads and with fewer, with and without a bias."""
    document = PACKED if packed == "packed" else None
    source = SOURCES[packed] if cross else None
    keys = 17 if cross else LENGTH
    for kind, groups, biased in product(KINDS_OF_PARTS, (4, 2), (False, True)):
        if cross and (kind.causal or kind.window):
            continue
        q, k, v = (
            random(BATCH, length, heads, size, seed=seed)
            for seed, (length, heads, size) in enumerate(
                ((LENGTH, HEADS, sizes[0]), (keys, groups, sizes[0]), (keys, groups, sizes[1]))
            )
        )
        biases = [random(1, HEADS, LENGTH, keys, seed=3)] if biased else []

        def ours(
            q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, kind: AttentionKind = kind
        ) -> tuple[Tensor, Tensor]:
            there = [None if x is None else x.to(where) for x in (document, source)]
            rest = there[0], kind, there[1], bias[0] if bias else None
            return attention(q, k, v, *rest), eager_attention(q, k, v, *rest)

        def plain(
            q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, kind: AttentionKind = kind
        ) -> tuple[Tensor, Tensor]:
            wanted = plain_parts(q, k, v, document, kind, source, bias[0] if bias else None)
            return wanted, wanted

        # Eager attention rounds scores, probabilities and the gradients of both to bf16, 2⁻⁹ of
        # each.
        bound = 2.0**-6 if dtype == torch.bfloat16 else None
        check_against_float64(ours, plain, [q, k, v, *biases], dtype, torch.device(where), bound)


def test_parts_that_do_not_go_together_are_named() -> None:
    q, k, v = random(2, 6, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 5)
    with pytest.raises(
        ValueError, match=r"shapes \[2, 6, 4, 8\], \[2, 6, 3, 8\], \[2, 6, 3, 5\], which do not go"
    ):
        attention(q, random(2, 6, 3, 8), random(2, 6, 3, 5))
    with pytest.raises(ValueError, match="do not go together"):
        attention(q, k[..., :7], v)
    with pytest.raises(ValueError, match="neither causal nor windowed"):
        attention(q, k[:, :5], v[:, :5])
    free = AttentionKind(causal=False)
    with pytest.raises(ValueError, match="documents of queries and of keys, or of neither"):
        attention(q, k[:, :5], v[:, :5], numbers(2, 4).expand(2, -1), free)
    with pytest.raises(ValueError, match="neither causal nor windowed"):
        attention(
            q,
            k,
            v,
            numbers(2, 4).expand(2, -1),
            AttentionKind(3, causal=False),
            numbers(6).expand(2, -1),
        )


@needs_kernels
def test_a_window_that_takes_in_everything_costs_nothing() -> None:
    """megalite's own kernel takes it, as it takes no window."""
    qkv = random(2, 40, 8, 12).float()
    assert torch.equal(
        self_attention(qkv, 4, 2, kind=AttentionKind(window=40)), self_attention(qkv, 4, 2)
    )
    assert AttentionKind(window=40).within(40) == PLAIN
    assert AttentionKind(window=39).within(40) != PLAIN


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """Scores of 100 and more, whose e^score overflows, and next to which most others vanish."""
    qkv = random(1, 130, 3, 16)
    qkv[:, :, :2] *= 5
    check_against_float64(
        lambda x: self_attention(x, 1, 1), lambda x: plain_attention(x, 1, 1), [qkv], dtype, device
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    qkv = random(2, 8, 50, 12).transpose(1, 2)
    check_against_float64(
        lambda x: self_attention(x, 4, 2), lambda x: plain_attention(x, 4, 2), [qkv], dtype, device
    )


@needs_kernels
@pytest.mark.parametrize("batch", [2, 8])
def test_no_number_of_threads_changes_a_bit(batch: int) -> None:
    """Where each query head is a task, and where each key/value head is."""
    qkv, grad = random(batch, 150, 8, 64).bfloat16(), random(batch, 150, 256).bfloat16()

    def run() -> tuple[Tensor, ...]:
        out, lse = torch.ops.megalite.attention_forward(qkv, 4, 2, None)
        bias = random(1, 4, 150, 150, seed=3).float()
        rest = None, None, None, False, 40, 0.5, bias
        of_bias = torch.ops.megalite.attention_backward(grad, qkv, out, lse, 4, 2, *rest)
        return (
            out,
            lse,
            torch.ops.megalite.attention_backward(grad, qkv, out, lse, 4, 2, None)[0],
            *of_bias,
        )

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_log_sum_exp() -> None:
    qkv = random(2, 70, 4, 16).float()
    lse = torch.ops.megalite.attention_forward(qkv, 2, 1, None)[1]
    q, k = qkv[:, :, :2].double().transpose(1, 2), qkv[:, :, 2:3].double().transpose(1, 2)
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    wanted = (q @ k.transpose(-1, -2) / 4).masked_fill(hidden, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_bad_input_is_named() -> None:
    qkv, forward = torch.zeros(2, 6, 8, 4), torch.ops.megalite.attention_forward
    with pytest.raises(
        ValueError, match=r"attention_forward: qkv has shape \[6, 8, 4\], but must have \[batch"
    ):
        forward(qkv[0], 4, 2, None)
    with pytest.raises(
        ValueError, match=r"attention_forward: qkv has 8 heads, but must have 6 \+ 2 \* 2"
    ):
        forward(qkv, 6, 2, None)
    with pytest.raises(
        ValueError, match="num_heads 4 must be a positive multiple of num_kv_heads 3"
    ):
        forward(qkv, 4, 3, None)
    with pytest.raises(TypeError, match=r"qkv is .*Double.* must be float32 or bfloat16"):
        forward(qkv.double(), 4, 2, None)
    with pytest.raises(ValueError, match=r"document has shape \[6\], but must have \[2, 6\]"):
        forward(qkv, 4, 2, numbers(6))
    with pytest.raises(TypeError, match=r"document is .*Int, but must be int64"):
        forward(qkv, 4, 2, torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="document falls from 1 to 0 at token 3 of row 1"):
        forward(qkv, 4, 2, torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]))
    kv = torch.zeros(2, 5, 4, 4)
    with pytest.raises(
        ValueError, match=r"kv has shape \[2, 5, 3, 4\], but must have \[2, 5, 4, 4\]"
    ):
        forward(qkv[:, :, :4], 4, 2, None, kv[:, :, :3], None, False)
    with pytest.raises(ValueError, match="attention to kv must be neither causal nor windowed"):
        forward(qkv[:, :, :4], 4, 2, None, kv)
    with pytest.raises(ValueError, match="give document and source with kv, or neither"):
        forward(qkv[:, :, :4], 4, 2, numbers(2, 4).expand(2, -1), kv, None, False)
    with pytest.raises(ValueError, match="window is 0, but must be above 0"):
        forward(qkv, 4, 2, None, window=0)
    with pytest.raises(ValueError, match="scale is -1, but must be above 0"):
        forward(qkv, 4, 2, None, scale=-1.0)
    with pytest.raises(TypeError, match=r"bias is .*BFloat16, but must be float32"):
        forward(qkv, 4, 2, None, bias=torch.zeros(1, 4, 6, 6).bfloat16())
    with pytest.raises(
        ValueError, match=r"bias has shape \[1, 4, 6, 5\], but must have \[1, 4, 6, 6\]"
    ):
        forward(qkv, 4, 2, None, bias=torch.zeros(1, 4, 6, 5))
    out, lse = forward(qkv, 4, 2, None)
    with pytest.raises(
        ValueError,
        match=r"attention_backward: grad has shape \[2, 6, 8\], but must have \[2, 6, 16\]",
    ):
        torch.ops.megalite.attention_backward(out[..., :8], qkv, out, lse, 4, 2, None)
    with pytest.raises(
        TypeError, match=r"attention_backward: lse is .*BFloat16, but must be float32"
    ):
        torch.ops.megalite.attention_backward(out, qkv, out, lse.bfloat16(), 4, 2, None)


@needs_kernels
def test_operators_are_well_formed() -> None:
    """Schema, autograd and fake kernels agree, so that torch.compile may keep them whole."""
    qkv = torch.randn(2, 9, 8, 4).requires_grad_()
    for document in (None, numbers(2, 7).expand(2, -1).contiguous()):
        torch.library.opcheck(torch.ops.megalite.attention_forward, (qkv, 4, 2, document))
        out, lse = torch.ops.megalite.attention_forward(qkv.detach(), 4, 2, document)
        torch.library.opcheck(
            torch.ops.megalite.attention_backward,
            (torch.randn_like(out), qkv.detach(), out, lse, 4, 2, document),
        )
    kv, source = torch.randn(2, 5, 4, 4).requires_grad_(), numbers(1, 4).expand(2, -1).contiguous()
    bias = torch.randn(1, 4, 9, 5).requires_grad_()
    rest = document, kv, source, False, None, 0.5, bias
    torch.library.opcheck(
        torch.ops.megalite.attention_forward, (torch.randn(2, 9, 4, 4), 4, 2, *rest)
    )


def kind_of(
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    deterministic: bool = False,
) -> AttentionKind:
    """What these arguments of the library mean; its defaults are none of it."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert window_size[1] in ((-1, 0) if causal else (window_size[0],))
    return AttentionKind(window_size[0] + 1 or None, softcap or None, softmax_scale, causal)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the library, asked for; returns what was called."""
    calls: list[str] = []
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        calls.append("flash_attn_func")
        return plain_parts(q, k, v, kind=kind_of(**asked)).view_as(q)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_ends: Tensor,
        k_ends: Tensor,
        q_most: int,
        k_most: int,
        **asked: Any,
    ) -> Tensor:
        assert q_ends.dtype == torch.int32
        assert q_ends is k_ends
        assert q_most == k_most >= int(q_ends.diff().max())
        calls.append(f"flash_attn_varlen_func of {q_ends.tolist()}")
        kind, pieces = (
            kind_of(**asked),
            ([p[None] for p in y.tensor_split(q_ends[1:-1].long())] for y in (q, k, v)),
        )
        return torch.cat(
            [plain_parts(*x, kind=kind) for x in zip(*pieces, strict=True)], dim=1
        ).view_as(q)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(library, "_wishes", KernelsConfig(attention="flash_attn"))
    return calls


def test_flash_attn(flash_attn: list[str]) -> None:
    qkv, document = random(2, 8, 8, 4), torch.stack((numbers(3, 5), numbers(1, 6, 1)))
    torch.testing.assert_close(self_attention(qkv, 4, 2), plain_attention(qkv, 4, 2))
    for _ in range(2):
        torch.testing.assert_close(
            self_attention(qkv, 4, 2, document), plain_attention(qkv, 4, 2, document)
        )
    assert flash_attn == [
        "flash_attn_func",
        *["flash_attn_varlen_func of [0, 3, 8, 9, 15, 16]"] * 2,
    ]


@pytest.mark.parametrize(
    "kind", [*KINDS[1:], *(k for k in KINDS_OF_PARTS if not k.causal)], ids=str
)
def test_flash_attn_is_told_the_kind(kind: AttentionKind, flash_attn: list[str]) -> None:
    qkv, document = random(2, 40, 8, 4), torch.stack((numbers(3, 37), numbers(20, 20)))
    for documents in (None, document):
        found = self_attention(qkv, 4, 2, documents, kind)
        torch.testing.assert_close(found, plain_attention(qkv, 4, 2, documents, kind))
    assert len(flash_attn) == 2


def test_flash_attn_is_told_to_be_deterministic(flash_attn: list[str]) -> None:
    qkv = random(2, 8, 8, 4)
    library.use(KernelsConfig(attention="flash_attn"), deterministic=True)
    try:
        torch.testing.assert_close(self_attention(qkv, 4, 2), plain_attention(qkv, 4, 2))
    finally:
        library.use(KernelsConfig())
    assert flash_attn == ["flash_attn_func"]


def test_flash_attention_3_is_taken_on_hopper(
    flash_attn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = ModuleType("flash_attn_interface")
    newer.__spec__ = ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", newer)
    for capability, wanted in (
        ((9, 0), newer),
        ((8, 0), sys.modules["flash_attn"]),
        ((10, 0), sys.modules["flash_attn"]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert attention_on_gpus._flash_package(torch.device("cuda")) is wanted
    assert attention_on_gpus._first((qkv := random(2, 3), None)) is qkv


@pytest.mark.parametrize(
    ("capability", "deterministic", "cudnn"),
    [
        ((8, 0), False, False),
        ((9, 0), False, True),
        ((9, 0), True, False),
        ((10, 3), False, True),
        ((12, 0), False, False),
    ],
)
def test_attention_of_a_gpu_follows_one_rule(
    capability: tuple[int, int], deterministic: bool, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    before = torch._C._get_sdp_priority_order()
    with attention_on_gpus.sdpa_backends(torch.device("cuda")):
        order, backends = torch._C._get_sdp_priority_order(), torch.nn.attention.SDPBackend
        wanted = backends.CUDNN_ATTENTION if cudnn else backends.FLASH_ATTENTION
        assert order[0] == int(wanted)
        assert torch._C._get_cudnn_sdp_enabled() == cudnn
    assert torch._C._get_sdp_priority_order() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = library.explain("attention", "cuda")[1]
    assert told.startswith("cuDNN's" if capability[0] in (9, 10) else "FlashAttention 2")


def test_what_flash_attn_does_not_take_goes_to_torch(flash_attn: list[str]) -> None:
    free, q, k, v = (
        AttentionKind(causal=False),
        random(2, 8, 4, 6),
        random(2, 8, 2, 6),
        random(2, 8, 2, 6),
    )
    bias = random(1, 4, 8, 8)
    for parts, rest in (
        ((q, k, v[..., :4]), (None, free)),
        ((q, k[:, :5], v[:, :5]), (None, free)),
        ((q, k, v), (PACKED[:, :8], free, PACKED[:, :8])),
        ((q, k, v), (None, free, None, bias)),
    ):
        torch.testing.assert_close(attention(*parts, *rest), plain_parts(*parts, *rest))  # type: ignore[arg-type]
    assert not flash_attn


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for torch's variable-length attention, which is for GPUs; returns how many
    sequences it was given."""
    calls: list[int] = []

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int, *,
        scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert q_ends.dtype == torch.int32
        assert q_ends is k_ends
        assert q_most == k_most >= int(q_ends.diff().max())
        assert enable_gqa == (q.shape[1] != k.shape[1])
        calls.append(len(q_ends) - 1)
        kind = kind_of(window_size[1] == 0, window_size, softmax_scale=scale, deterministic=False)
        pieces = ([p[None] for p in y.tensor_split(q_ends[1:-1].long())] for y in (q, k, v))
        return torch.cat(
            [plain_parts(*x, kind=kind) for x in zip(*pieces, strict=True)], dim=1
        ).view_as(q)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_module, "takes_varlen", lambda *parts: True)
    monkeypatch.setattr(library, "_wishes", KernelsConfig(attention="torch"))
    return calls


def test_documents_and_windows_on_gpus_are_sequences_of_their_own(varlen: list[int]) -> None:
    qkv, document = random(2, 40, 8, 4), torch.stack((numbers(3, 37), numbers(20, 11, 9)))
    window, both = AttentionKind(window=7), AttentionKind(window=7, scale=0.3, causal=False)
    for kind, documents in (
        (PLAIN, document),
        (window, None),
        (window, document),
        (both, None),
        (both, document),
    ):
        found = self_attention(qkv, 4, 2, documents, kind)
        torch.testing.assert_close(found, plain_attention(qkv, 4, 2, documents, kind))
    assert varlen == [5, 2, 5, 2, 5]
    # Nothing but causal: torch's flash attention leaves out by itself what lies behind.
    self_attention(qkv, 4, 2)
    assert len(varlen) == 5


def test_cuda_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    built = ModuleType("_ops")
    built.has_cuda, built.isa = 1, lambda: "avx2"  # type: ignore[attr-defined]
    monkeypatch.setattr(library, "own", lambda: built)
    assert library.explain("attention", "cuda") == (
        "torch",
        "megalite's own attention is for the CPU",
    )
    assert library.explain("attention", "cpu") == ("megalite", "built, runs with avx2")
    assert library.explain("norm", "cuda")[0] == "megalite"
