"""Every fused operator, forward and backward, against plain PyTorch eager and torch.compile of the
same.

Eager is what `kernels: {…: torch}` in a config chooses. The three take turns in one process. GB/s
count the bytes that the operation must move, read or write, however often an implementation does.
The ceiling is a large copy, or a large matrix product, measured before each run; the copy also
leaves the caches cold. "eager" and "compile" are how many times as long those take. All are
medians, of the turns' ratios where there are two things to compare.

    python tools/bench/ops.py --device cpu --threads 2
    python tools/bench/ops.py --device cuda --only norm
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ceilings import Copy, Product, event, seconds_between
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.activation import gelu, swiglu
from megalite.kernels.attention import self_attention
from megalite.kernels.linear import accumulate_weight_gradient
from megalite.kernels.loss import cross_entropy
from megalite.kernels.norm import add_rms_norm, layer_norm, rms_norm
from megalite.kernels.optimizer import adamw_, sum_of_squares
from megalite.kernels.rope import rotate
from megalite.runtime.host_memory import keep_freed_memory

OWN = KernelsConfig()
PLAIN = KernelsConfig(**dict.fromkeys(library.OPERATIONS, "torch"))
WARM_UP = 3  # runs that allocate and compile


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    length: int


SIZES = {
    "cpu": Sizes(2048, 512, 1408, 8192, 8, 4, 64, 512),
    "cuda": Sizes(8192, 4096, 14336, 128256, 32, 8, 128, 4096),
}


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    work: tuple[float, ...]
    """Bytes to move forward and backward, or floating-point operations; forward alone where there
    is no backward."""
    unit: str = "GB/s"
    plain: Callable[..., Any] | None = None
    """What eager is, where it is not `function`."""


class Cases:
    """Methods make the case of their name."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device):
        self.sizes, self.dtype, self.device, self.bytes = sizes, dtype, device, dtype.itemsize

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def _hidden(self) -> tuple[int, int]:
        return self.sizes.tokens, self.sizes.hidden

    def rms_norm(self) -> Case:
        x, weight = self.random(*self._hidden()), self.random(self.sizes.hidden)
        size = x.numel() * self.bytes
        return Case("rms_norm", partial(rms_norm, eps=1e-5), (x, weight), (2 * size, 3 * size))

    def add_rms_norm(self) -> Case:
        x, residual, weight = (
            self.random(*self._hidden()),
            self.random(*self._hidden()),
            self.random(self.sizes.hidden),
        )
        size = x.numel() * self.bytes
        return Case(
            "add_rms_norm",
            partial(add_rms_norm, eps=1e-5),
            (x, residual, weight),
            (4 * size, 4 * size),
        )

    def layer_norm(self) -> Case:
        x, weight, bias = (
            self.random(*self._hidden()),
            self.random(self.sizes.hidden),
            self.random(self.sizes.hidden),
        )
        size = x.numel() * self.bytes
        return Case(
            "layer_norm", partial(layer_norm, eps=1e-5), (x, weight, bias), (2 * size, 3 * size)
        )

    def _qkv(self) -> tuple[int, int, int]:
        s = self.sizes
        return s.tokens // s.length, s.length, (s.heads + 2 * s.kv_heads) * s.head_size

    def rotate(self) -> Case:
        s, qkv = self.sizes, self.random(*self._qkv())
        angle = torch.arange(s.length, device=self.device)[:, None] * torch.logspace(
            0, -4, s.head_size // 2
        ).to(self.device)
        cos, sin = angle.cos()[None], angle.sin()[None]
        turned = s.tokens * (s.heads + s.kv_heads) * s.head_size * self.bytes

        def function(qkv: Tensor) -> Tensor:
            return rotate(qkv, s.head_size, s.heads + s.kv_heads, cos, sin)

        return Case("rotate", function, (qkv,), (2 * turned, 2 * turned))

    def swiglu(self) -> Case:
        gate_up = self.random(self.sizes.tokens, 2 * self.sizes.inner)
        size = gate_up.numel() // 2 * self.bytes
        return Case("swiglu", swiglu, (gate_up,), (3 * size, 5 * size))

    def gelu(self) -> Case:
        x, bias = self.random(self.sizes.tokens, self.sizes.inner), self.random(self.sizes.inner)
        size = x.numel() * self.bytes
        return Case("gelu", gelu, (x, bias), (2 * size, 3 * size))

    def cross_entropy(self) -> Case:
        logits = self.random(self.sizes.tokens, self.sizes.vocabulary)
        labels = torch.randint(self.sizes.vocabulary, (self.sizes.tokens,), device=self.device)
        size = logits.numel() * self.bytes

        def plain(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), labels, reduction="none")

        # Its plain version is written for exactness; this is what one would use.
        return Case(
            "cross_entropy",
            partial(cross_entropy, labels=labels),
            (logits,),
            (size, 2 * size),
            plain=plain,
        )

    def causal_attention(self) -> Case:
        s, (batch, length, _) = self.sizes, self._qkv()
        qkv = self.random(batch, length, s.heads + 2 * s.kv_heads, s.head_size)
        # Of two, half of whose result is left out.
        product = batch * s.heads * length**2 * s.head_size
        function = partial(self_attention, num_heads=s.heads, num_kv_heads=s.kv_heads)
        return Case("causal_attention", function, (qkv,), (2 * product, 5 * product), "GFLOP/s")

    def accumulate_weight_gradient(self) -> Case:
        x, grad = self.random(*self._hidden()), self.random(self.sizes.tokens, 2 * self.sizes.inner)
        into = self.random(grad.shape[1], x.shape[1], dtype=torch.float32)
        function = partial(accumulate_weight_gradient, into, grad, x, add=True)
        return Case(
            "accumulate_weight_gradient", function, (), (2 * x.numel() * grad.shape[1],), "GFLOP/s"
        )

    def _weights(self) -> int:
        return 2 * self.sizes.inner * self.sizes.hidden

    def adamw_(self) -> Case:
        master, exp_avg, exp_avg_sq, grad = (
            self.random(self._weights(), dtype=torch.float32) for _ in range(4)
        )
        weights = None if self.dtype == torch.float32 else master.to(self.dtype)
        function = partial(
            adamw_, master, exp_avg, exp_avg_sq.abs_(), weights, grad, torch.ones(3, device=self.device),
            lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        )  # fmt: skip
        return Case("adamw_", function, (), (master.numel() * (28 if weights is None else 30),))

    def sum_of_squares(self) -> Case:
        x = self.random(self._weights(), dtype=torch.float32)
        return Case("sum_of_squares", partial(sum_of_squares, x), (), (4 * x.numel(),))


NAMES = [name for name in vars(Cases) if not name.startswith("_") and name != "random"]


class Contender(NamedTuple):
    name: str
    function: Callable[..., Any]
    kernels: KernelsConfig


def contenders(case: Case, compiled: bool) -> list[Contender]:
    plain = case.plain or case.function
    found = [Contender("megalite", case.function, OWN), Contender("eager", plain, PLAIN)]
    if compiled:
        torch.compiler.reset()
        found.append(Contender("compile", torch.compile(plain, dynamic=False), PLAIN))
    return found


class Run(NamedTuple):
    seconds: float
    ceiling: float
    """Bytes or operations per second of what bounds it, just before."""


class Bench:
    def __init__(self, device: torch.device, dtype: torch.dtype, repeats: int):
        self.device, self.repeats = device, repeats
        self.copy = Copy(device)
        self.ceilings: dict[str, Copy | Product] = {
            "GB/s": self.copy,
            "GFLOP/s": Product(device, dtype),
        }

    def run(self, case: Case, contender: Contender, backward: bool) -> Run:
        library.use(contender.kernels)
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        inputs = [x.clone() for x in leaves]  # which may be overwritten
        timed: Callable[[], Any] = partial(contender.function, *inputs)
        if backward:
            results = timed()
            results = results if isinstance(results, tuple) else (results,)
            timed = partial(
                torch.autograd.grad, results, leaves, [torch.ones_like(x) for x in results]
            )
        # A GPU still copies while the host hands over what comes next, so that the host's own time
        # does not count.
        ceiling = self.ceilings[case.unit]
        marks = [event(self.device)]
        for run in (ceiling, self.copy, timed):
            run()
            marks.append(event(self.device))
        return Run(seconds_between(*marks[2:]), ceiling.work / seconds_between(*marks[:2]))

    def measure(self, case: Case, among: list[Contender], backward: bool) -> dict[str, list[Run]]:
        """Runs of each. A contender that cannot be compiled is taken out."""
        for contender in list(among):
            try:
                for _ in range(WARM_UP):
                    self.run(case, contender, backward)
            except Exception as error:  # a compiler can fail in many ways
                if contender.name != "compile":
                    raise
                print(f"{case.name}: torch.compile failed: {str(error).strip().splitlines()[0]}")
                among.remove(contender)
        found: dict[str, list[Run]] = {contender.name: [] for contender in among}
        for number in range(self.repeats):
            turn = number % len(among)
            for contender in among[turn:] + among[:turn]:
                found[contender.name].append(self.run(case, contender, backward))
        return found


def row(case: Case, pass_name: str, work: float, runs: dict[str, list[Run]]) -> str:
    own = runs["megalite"]
    seconds = median(run.seconds for run in own)
    share = median(work / run.seconds / run.ceiling for run in own)
    columns = f"{seconds * 1e3:10.3f}{work / seconds / 1e9:12,.0f} {case.unit:8}{share:12.0%}"
    for name in ("eager", "compile"):
        ratios = [
            other.seconds / run.seconds for run, other in zip(own, runs.get(name, []), strict=False)
        ]
        columns += f"{median(ratios):9.2f}×" if ratios else f"{'-':>10}"
    return f"{case.name:28}{pass_name:10}{columns}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--no-compile", action="store_true", help="compiling takes most of the time"
    )
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `megalite train` does; here it serves all alike
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    given = {
        size.name: getattr(arguments, size.name) or getattr(SIZES[device.type], size.name)
        for size in fields(Sizes)
    }
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(
        f"{arguments.dtype}, {machine}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores\n" + ", ".join(f"{name} {size}" for name, size in given.items())
    )
    print(
        f"\n{'':38}{'ms':>10}{'rate':>13}{'of ceiling':>20}{'eager':>10}{'compile':>10}", flush=True
    )
    bench, cases = Bench(device, dtype, arguments.repeats), Cases(Sizes(**given), dtype, device)
    for name in NAMES:
        if arguments.only in name:
            case = getattr(cases, name)()
            among = contenders(case, not arguments.no_compile)
            for pass_name, work in zip(("forward", "backward"), case.work, strict=False):
                runs = bench.measure(case, among, pass_name == "backward")
                print(row(case, pass_name, work, runs), flush=True)


if __name__ == "__main__":
    main()
