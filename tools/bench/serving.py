"""Answers of a server to clients that ask at the same time, beside transformers' `generate` on
batches of as many.

Both have the same random weights, prompts and lengths. Rounds take turns, and medians are told.
`equal`: all answers are as long; `mixed`: of 16 to `--tokens` tokens, as answers are, in the order
in which they come. A batch of transformers' takes as long as its longest answer."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-32m")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), arguments.preset, DTYPES[arguments.dtype])
        server, url = start_server(Path(folder), arguments)
        try:
            for kind in ("equal", "mixed"):
                measure(kind, model, url, arguments)
        finally:
            server.terminate()
            server.wait()


def write_model(folder: Path, preset: str, dtype: torch.dtype) -> Any:
    """A random model that never ends by itself, and a tokenizer that has a letter for each of its
    tokens."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from megalite.models import model_config
    from megalite.models.llama import to_hf

    config: Any = model_config({"preset": preset})
    values = {key: value for key, value in to_hf(config).items() if value is not None}
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**values, bos_token_id=None, eos_token_id=None, pad_token_id=0), dtype=dtype
    )
    model.save_pretrained(folder)
    letters = {chr(0x4E00 + token): token for token in range(config.vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="一")).save(
        str(folder / "tokenizer.json")
    )
    return model.eval()


def start_server(
    folder: Path, arguments: argparse.Namespace
) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "megalite", "serve", str(folder), "--name", "bench", "--port", str(port), "--ratings",
        str(folder / "ratings"), "--slots", str(arguments.concurrency), "--max-length", str(PROMPT + arguments.tokens),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    server = subprocess.Popen(command, env=os.environ | threads, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return server, f"http://127.0.0.1:{port}/v1/completions"
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def measure(kind: str, model: Any, url: str, arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        model.config.vocab_size, (arguments.requests, PROMPT), generator=generator
    ).tolist()
    lengths = [arguments.tokens] * len(prompts)
    if kind == "mixed":
        lengths = torch.randint(
            16, arguments.tokens + 1, (len(prompts),), generator=generator
        ).tolist()
    asyncio.run(by_server(prompts[:8], [4] * 8, url, arguments.concurrency))
    by_transformers(
        model, prompts[: arguments.concurrency], [4] * arguments.concurrency, arguments.concurrency
    )
    rows = []
    for _ in range(arguments.rounds):
        ours = asyncio.run(by_server(prompts, lengths, url, arguments.concurrency))
        theirs = by_transformers(model, prompts, lengths, arguments.concurrency)
        rows.append((sum(lengths) / ours, sum(lengths) / theirs, theirs / ours))
    ours, theirs, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [round(row[2], 2) for row in rows]
    print(json.dumps({
        "lengths": kind, "megalite_tokens_per_s": round(ours), "transformers_tokens_per_s": round(theirs),
        "ratio": round(ratio, 2), "ratios": ratios,
    }), flush=True)  # fmt: skip


async def by_server(
    prompts: list[list[int]], lengths: list[int], url: str, concurrency: int
) -> float:
    """Seconds until all are answered, over HTTP, so many asked for at a time."""
    import httpx

    turn = asyncio.Semaphore(concurrency)

    async def ask(client: Any, prompt: list[int], length: int) -> None:
        async with turn:
            body = {"prompt": prompt, "max_tokens": length, "temperature": 0}
            response = await client.post(url, json=body)
        assert response.json()["usage"]["completion_tokens"] == length

    async with httpx.AsyncClient(timeout=None) as client:
        began = time.perf_counter()
        await asyncio.gather(*(ask(client, *one) for one in zip(prompts, lengths, strict=True)))
        return time.perf_counter() - began


@torch.inference_mode()
def by_transformers(model: Any, prompts: list[list[int]], lengths: list[int], batch: int) -> float:
    """Seconds until all are answered, a batch after the other, each until its longest answer is
    done."""
    began = time.perf_counter()
    for start in range(0, len(prompts), batch):
        ids, most = (
            torch.tensor(prompts[start : start + batch]),
            max(lengths[start : start + batch]),
        )
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False
        )
        assert out.shape[1] == PROMPT + most
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
