"""What is tried on each reader of outside files: valid files damaged, and files made to do harm.

    python tests/security/fuzz.py COUNT CASE READER …

Runs so many cases of each in this process, and ends with a line for each case that was not read or
refused in one line, or that took more than 10 s or 1 GB. The case being run is in the file CASE,
for those that end the process."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import yaml
import zstandard
from pyarrow import parquet
from safetensors.torch import save

from chats import CHATML, write_tokenizer
from megalite.checkpoint.folder import damage_of, read_manifest
from megalite.checkpoint.load import stored_config
from megalite.checkpoint.tensors import TensorFolder
from megalite.checkpoint.torch_file import StoredTensor, TorchFile, load_pickle
from megalite.checkpoint.train_state import read_train_state
from megalite.config_file import load_config
from megalite.corpus.charsets import LABELS, decode
from megalite.corpus.warc import read_warc
from megalite.data.chat import ChatTemplate
from megalite.data.contents import ContentEncoder
from megalite.data.documents import Reading, read_files
from megalite.data.formats import Settings
from megalite.data.indexed import IndexedDataset, read_note
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inputs import Report
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.infer.habits import read_habits
from megalite.infer.serving.guards import read_keys
from megalite.models import model_config, peft, weight_table
from megalite.planner.hardware import find_hardware

SECONDS, MEGABYTES = 10, 1000
LINES = [
    {"text": f"line {number} é", "n": number, "deep": [{"a": [1, None]}]} for number in range(20)
]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "tie_word_embeddings": True,
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "lora_dropout": 0.0,
    "bias": "none",
}
YAML = """run: {name: a, dir: runs}
model: &m {preset: llama-1m}
data: {train: [{path: x, weight: 0.5}, {path: y}], seq_length: 64}
train: {steps: 10, global_batch_size: 4}
optimizer: {lr: 1.0e-3, betas: [0.9, 0.95]}
"""
NASTY: list[Any] = [
    None, True, 0, -1, 1,
    10**7, 2**31, 2**63, 10**400, -(10**18), 0.0, 1e308, float("nan"), float("inf"), "", "x", "\0",
    "é" * 300,
    "../../etc/passwd", "/dev/zero", "pipe", "..", ".", [], {}, [[]], {"": None}, [None] * 100, {"a": {"b": [1]}},
    [2**40], "\ud800",
]  # fmt: skip


def flipped(data: bytes, draw: random.Random) -> bytes:
    """With a few bits changed, a part cut out, repeated or replaced, or the end missing."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, size = draw.randrange(len(found) + 1), draw.choice((1, 1, 4, 8, 40))
        match draw.randrange(6):
            case 0 | 1:
                for place in range(at, min(at + size, len(found))):
                    found[place] = draw.randrange(256)
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size] * draw.choice((1, 1, 500))
            case 4:
                found[at : at + 8] = struct.pack(
                    "<Q", draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
                )
            case _:
                del found[at:]
    return bytes(found)


def changed(value: Any, draw: random.Random) -> Any:
    """JSON with one value in it replaced, at any depth."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = draw.choice(list(copy)) if isinstance(copy, dict) else draw.randrange(len(copy))
        if draw.random() < 0.1:
            del copy[key]
        else:
            copy[key] = changed(copy[key], draw)
        return copy
    return draw.choice(NASTY)


def json_of(value: Any, draw: random.Random) -> bytes:
    kind = draw.random()
    if kind < 0.75:
        return json.dumps(changed(value, draw)).encode()
    if kind < 0.95:
        return flipped(json.dumps(value).encode(), draw)
    return draw.choice(
        (
            b"[" * 10**6,
            b'{"a":' * 10**5,
            b"",
            b"\xff\xfe{",
            b"9" * 10**5,
            b'"' * 9,
            b"\0" * 100,
            b"[1" + b",1" * 10**6,
        )
    )


OPCODES = [bytes([code]) for code in range(256)]
LIKELY = b"()]}tRuseaob0112q\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94lNK\x80X2"


HARD_PICKLES = [
    b"\x80\x02}(" + b")" + b"\x85" * 200_000 + b"K\x01u.",  # nested tuples as a dictionary's key
    b"\x80\x04\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.",  # in a set
    b"\x80\x02ccollections\nOrderedDict\n]" + b")" + b"\x85" * 200_000 + b"K\x01\x86a\x85R.",
    b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
    b"\x80\x02Nr\xff\xff\xff\x02.",  # "remember this under the number 50,331,647"
]


def pickle_of(draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return draw.choice(HARD_PICKLES)
    match draw.randrange(4):
        case 0:  # a program of opcodes
            code = bytes(
                draw.choice(LIKELY) if draw.random() < 0.9 else draw.randrange(256)
                for _ in range(draw.randrange(200))
            )
            return b"\x80\x04" + code + b"."
        case 1:  # one part of a program, very often
            head = draw.choice(
                (b"}(", b"]", b"(", b")", b"\x8f(", b"ccollections\nOrderedDict\n(](")
            )
            body = draw.choice(
                (
                    b"\x85",
                    b"\x86",
                    b"2\x86",
                    b"]a",
                    b"}",
                    b"\x8f",
                    b")",
                    b"(",
                    b"\x91",
                    b"2",
                    b"q\x00h\x00\x86",
                )
            )
            tail = draw.choice((b"K\x01u.", b"s.", b"K\x01s.", b"e\x85R.", b"\x91.", b"."))
            return b"\x80\x04" + head + b")" + body * draw.choice((10, 1000, 20_000)) + tail
        case 2:  # what asks for much
            size = struct.pack("<Q", draw.choice((2**20, 2**31, 2**33, 2**40, 2**62)))
            code = draw.choice(
                (b"r", b"j", b"\x8d", b"\x8e", b"\x95", b"\x96", b"\x8b", b"B", b"X", b"T", b"\x84")
            )
            return (
                b"\x80\x05N"
                + code
                + (size if code in (b"\x8d", b"\x8e", b"\x95", b"\x96") else size[:4])
                + b"abc."
            )
        case _:
            shared: Any = [1]
            for _ in range(60):
                shared = [shared, shared]
            state = {
                "args": shared,
                "model": OrderedDict(a=torch.ones(2).shape, b={"c": (1, ("d",))}),
                "n": 2**70,
            }
            return flipped(pickle.dumps(state, draw.randrange(6)), draw)


@cache
def torch_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(100.0), "b": {"c": torch.ones(2, 3)}}, file)
    return file.getvalue()


@cache
def safe_bytes() -> bytes:
    weights = weight_table(model_config({"family": "llama", **_fields()}))
    return save(
        {
            name: torch.zeros(shape)
            for weight in weights
            for name, shape in weight.hf_shapes().items()
        }
    )


def _fields() -> dict[str, Any]:
    return {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_attention_heads": 4,
        "num_kv_heads": 2, "max_positions": 64, "tie_embeddings": True,
    }  # fmt: skip


def safetensors_of(draw: random.Random) -> bytes:
    data = safe_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if draw.random() < 0.6:
        name = draw.choice(list(header))
        if draw.random() < 0.5:
            header[name]["dtype"] = draw.choice(
                ("I32", "BOOL", "F8_E4M3", "F64", "U8", "X", "F16", "I64", 4)
            )
        else:
            header = changed(header, draw)
    text = json.dumps(header).encode()
    found = len(text).to_bytes(8, "little") + text + data[8 + size :]
    return flipped(found, draw) if draw.random() < 0.4 else found


def read_pickle(folder: Path, draw: random.Random) -> None:
    (folder / "a").write_bytes(pickle_of(draw))
    load_pickle(folder / "a")


def read_torch(folder: Path, draw: random.Random) -> None:
    (folder / "a.pt").write_bytes(flipped(torch_bytes(), draw))
    pending = [TorchFile(folder / "a.pt").load()]
    while pending:
        value = pending.pop()
        if isinstance(value, StoredTensor):
            value.read()
        pending += value.values() if isinstance(value, dict) else ()


def read_safetensors(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").write_bytes(safetensors_of(draw))
    weights = weight_table(model_config({"family": "llama", **_fields()}))
    found = TensorFolder(folder)
    found.check(weights)
    for name in found.files:
        found.fetch(name, (slice(0, 1),)).float().sum()


def read_index(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").write_bytes(safe_bytes())
    os.mkfifo(folder / "pipe")
    names = dict.fromkeys(
        json.loads(safe_bytes()[8 : 8 + int.from_bytes(safe_bytes()[:8], "little")]),
        "model.safetensors",
    )
    names.pop("__metadata__", None)
    (folder / "model.safetensors.index.json").write_bytes(
        json_of({"metadata": {}, "weight_map": names}, draw)
    )
    TensorFolder(folder).check(weight_table(model_config({"family": "llama", **_fields()})))


def read_config_json(folder: Path, draw: random.Random) -> None:
    (folder / "config.json").write_bytes(json_of(LLAMA, draw))
    weight_table(model_config({"hf": str(folder)}))


def read_adapter(folder: Path, draw: random.Random) -> None:
    (folder / "adapter_config.json").write_bytes(json_of(ADAPTER, draw))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_of(draw))
    peft.read_lora(folder)


def read_manifests(folder: Path, draw: random.Random) -> None:
    os.mkfifo(folder / "pipe")
    files = {"pipe": {"size": 0, "sha256": "x"}, "train_state.json": {"size": 5, "sha256": "y"}}
    (folder / "manifest.json").write_bytes(json_of({"files": files}, draw))
    found = read_manifest(folder)
    for name, entry in found.items() if isinstance(found, dict) else ():
        damage_of(folder / name, entry)
    state = {"step": 3, "data": {"samples": 12, "skipped": []}, "wandb_id": None}
    (folder / "train_state.json").write_bytes(json_of(state, draw))
    read_train_state(folder)


def read_yaml(folder: Path, draw: random.Random) -> None:
    kind, text = draw.random(), YAML.encode()
    if kind < 0.3:
        levels = draw.randrange(3, 26)
        merge = draw.random() < 0.5
        lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x]"]
        for n in range(1, levels):
            inner = ", ".join([f"*a{n - 1}"] * 9)
            lines.append(f"a{n}: &a{n} {{<<: [{inner}]}}" if merge else f"a{n}: &a{n} [{inner}]")
        text += "\n".join(lines).encode()
    elif kind < 0.4:
        text += draw.choice(
            (
                "[" * 9999,
                "- " * 9999,
                "{a: " * 3000,
                "a: &a [*a]",
                "a: 2001-13-45",
                "? [a]\n: b",
                f"a: {'9' * 5000}",
            )
        ).encode()
    elif kind < 0.7:
        text = json.dumps(changed(yaml.safe_load(YAML), draw)).encode()
    else:
        text = flipped(text, draw)
    (folder / "a.yaml").write_bytes(text)
    load_config(folder / "a.yaml")


def warc_bytes(draw: random.Random) -> bytes:
    page = f"<html><head><meta charset={draw.choice(list(LABELS))}></head><body>a page é 日本</body></html>".encode()
    coding = draw.choice(("gzip", "deflate", "br", "zstd", "identity", "x", "gzip, deflate"))
    body = {
        "gzip": gzip.compress,
        "deflate": zlib.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }.get(coding, bytes)(page)
    if draw.random() < 0.5:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: {coding}\r\n"
    answer = http.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body
    head = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.io/\r\nContent-Type: application/http\r\n"
    return f"{head}Content-Length: {len(answer)}\r\n\r\n".encode() + answer + b"\r\n\r\n"


def read_warcs(folder: Path, draw: random.Random) -> None:
    data = flipped(warc_bytes(draw) + warc_bytes(draw), draw)
    packed = draw.choice(("", ".gz"))
    (folder / f"a.warc{packed}").write_bytes(gzip.compress(data) if packed else data)
    list(read_warc(str(folder / f"a.warc{packed}"), Report()))
    decode(data, f"text/html; charset={draw.choice(list(LABELS))}", True, draw.random() < 0.5)


@cache
def tables() -> dict[str, bytes]:
    table = pyarrow.table({"text": [row["text"] for row in LINES], "n": list(range(20))})
    as_parquet, as_arrow = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, as_parquet)
    with pyarrow.ipc.new_stream(as_arrow, table.schema) as writer:
        writer.write_table(table)
    return {".parquet": as_parquet.getvalue(), ".arrow": as_arrow.getvalue()}


def read_tables(folder: Path, draw: random.Random) -> None:
    suffix = draw.choice(list(tables()))
    (folder / f"a{suffix}").write_bytes(flipped(tables()[suffix], draw))
    list(read_files([str(folder / f"a{suffix}")], Reading(metadata=True), Report()))


def read_texts(folder: Path, draw: random.Random) -> None:
    data = b"\n".join(
        json_of(row, draw) if draw.random() < 0.2 else json.dumps(row).encode() for row in LINES
    )
    data = draw.choice((data, data, json_of(LINES, draw)))
    name = draw.choice(("a.jsonl", "a.json", "a", "part-00000", "a.txt", "a.jsonl.gz", "a.zst"))
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(
        name.rpartition(".")[2], bytes
    )
    data = pack(data)
    (folder / name).write_bytes(flipped(data, draw) if draw.random() < 0.5 else data)
    list(
        read_files([str(folder / name)], Reading(metadata=True, mend=draw.random() < 0.5), Report())
    )


@cache
def tokenizer_json() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return json.loads((write_tokenizer(Path(folder)) / "tokenizer.json").read_text())


def read_tokenizers(folder: Path, draw: random.Random) -> None:
    """A folder as a model comes with, one of whose files is damaged."""
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    generation = {
        "eos_token_id": [0, 2],
        "top_k": 5,
        "temperature": 0.5,
        "max_new_tokens": 3,
        "stop_strings": ["a"],
    }
    (folder / "config.json").write_text(json.dumps(LLAMA))
    settings["chat_template"] = [{"name": "default", "template": CHATML}]
    name = draw.choice(
        (
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "keys",
        )
    )
    values = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": settings}.get(
        name, generation
    )
    data = (
        flipped(json.dumps(values).encode(), draw) if draw.random() < 0.4 else json_of(values, draw)
    )
    (folder / name).write_bytes(data)
    if name == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
    if name == "keys":
        read_keys(folder / name)
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode_prompt("hello <|im_end|> é"))
    read_habits(folder, tokenizer)
    with contextlib.suppress(ValueError):  # of a template that refuses the conversation
        ContentEncoder(tokenizer, ChatTemplate.of(folder, ())).encode(
            [{"role": "user", "content": "hi"}]
        )


@cache
def token_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(f"{folder}/a", np.dtype("u2"), np.dtype("u1")) as writer:
            for length in (3, 1, 7, 20):
                writer.add_documents(np.arange(length), [length], np.ones(length, np.int64))
        Path(f"{folder}/a.json").write_text(
            json.dumps({"vocab_size": 50, "eod_id": 3, "tokenizer_fingerprint": "x"})
        )
        return {path.suffix: path.read_bytes() for path in Path(folder).iterdir()}


def read_token_files(folder: Path, draw: random.Random) -> None:
    damaged = draw.choice(list(token_files()))
    for suffix, data in token_files().items():
        (folder / f"a{suffix}").write_bytes(flipped(data, draw) if suffix == damaged else data)
    if damaged == ".json":
        (folder / "a.json").write_bytes(json_of(json.loads(token_files()[".json"]), draw))
    read_note(str(folder / "a"))
    dataset = IndexedDataset(str(folder / "a"))
    dataset.check(2)
    for number in range(dataset.num_documents):
        dataset.read(*(dataset.document_start(n) for n in (number, number + 1))).sum()


def read_rows_of_chats(folder: Path, draw: random.Random) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a é"}]}
    ] * 3
    data = b"\n".join(json_of(row, draw) for row in rows)
    (folder / "a.jsonl").write_bytes(flipped(data, draw) if draw.random() < 0.3 else data)
    with tempfile.TemporaryDirectory() as other:
        settings = Settings("chat", str(write_tokenizer(Path(other))))
        preprocess_rows([str(folder / "a.jsonl")], folder / "out", settings)


def read_chips(folder: Path, draw: random.Random) -> None:
    chip = {"chip": "X", "name": "x", "bf16_tflops": 312, "memory_gb": 80, "memory_tb_s": 2.0, "link_gb_s": 300,
            "num_sms": 108, "source": "y", "matmul": 0.8, "matmul_source": "z"}  # fmt: skip
    data = json_of(chip, draw)
    (folder / "a.yaml").write_bytes(flipped(data, draw) if draw.random() < 0.3 else data)
    (folder / "config.yaml").write_bytes((folder / "a.yaml").read_bytes())
    stored_config(folder)
    find_hardware(str(folder / "a.yaml"))


READERS: dict[str, Callable[[Path, random.Random], None]] = {
    "pickle": read_pickle, "torch": read_torch, "safetensors": read_safetensors, "index": read_index,
    "config": read_config_json, "adapter": read_adapter, "manifest": read_manifests, "yaml": read_yaml,
    "warc": read_warcs, "tables": read_tables, "texts": read_texts, "tokenizer": read_tokenizers,
    "tokens": read_token_files, "rows": read_rows_of_chats, "chips": read_chips,
}  # fmt: skip


class TooLong(BaseException):
    """A case took more than it may."""


def _too_long(*_: object) -> None:
    raise TooLong(f"more than {SECONDS} s")


def run_case(name: str, seed: int) -> str:
    """What is wrong with how a case ended; empty for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            READERS[name](Path(folder), random.Random(f"{name} {seed}"))
        except (ConfigError, DataError, CheckpointError) as error:
            text = str(error)
            return "" if len(text) < 5000 else f"a message of {len(text)} characters: {text[:200]}"
        except BaseException as error:
            import traceback

            return "".join(traceback.format_exception(error))[-1500:]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return ""


def main(count: int, names: list[str], case: Path) -> int:
    signal.signal(signal.SIGPROF, _too_long)
    wrong = 0
    for name in names:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(count):
            case.write_text(f"{name} {seed}")
            with contextlib.redirect_stderr(io.StringIO()):
                why = run_case(name, seed)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown > MEGABYTES * 1024:
                why, before = f"{why}\n{grown / 1024:.0f} MB", before + grown
            if why:
                print(f"{name} {seed}: {why}")
                wrong += 1
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[3:] or list(READERS), Path(sys.argv[2])))
