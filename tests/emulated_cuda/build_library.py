"""Build csrc/ops/cuda and the wrappers of its kernels for the emulated CUDA device, and print the
library's path.

An object is compiled again only where the content of what it is made from has changed:
build/emulated-cuda keeps them. Paths are relative to the checkout, so that another one's objects
serve, too."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OPS = ROOT / "csrc" / "ops"
FAKE = HERE / "include"
CACHE = ROOT / "build" / "emulated-cuda"
COMPILER = os.environ.get("CXX", "g++")

# Vectorised code would tell the runtime of accesses that no single thread makes. The address of a
# tensor that is left out is computed, from null, but not read: hence no pointer-overflow.
KERNEL_FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC",
    "-fsanitize=thread,undefined", "-fno-sanitize=pointer-overflow,vptr", "-ftrivial-auto-var-init=pattern",
    "-fno-threadsafe-statics",
]  # fmt: skip
RUNTIME_FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC"]
WRAPPER_FLAGS = [
    "-std=c++20",
    "-O0",
    "-fPIC",
    "-fopenmp",
    "-DAT_PARALLEL_OPENMP=1",
    "-DMEGALITE_CUDA",
]


def translate(text: str) -> str:
    """Return CUDA's own syntax in `text` as calls of include/cuda_runtime.h, with every line where
    it was. What it does not know, such as two shared variables in one declaration, stays, and does
    not compile."""
    text = _launches(text)
    text = re.sub(
        r"(__global__\s+void\s+)__launch_bounds__\(([^)]*)\)(\s+\w+\([^)]*\)\s*\{)",
        r"\1\3 emulated::check_launch_bounds(EMULATED_FIRST(\2));",
        text,
    )
    text = re.sub(
        r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\[\];",
        r"\1* \2 = static_cast<\1*>(emulated::dynamic_shared());",
        text,
    )
    text = re.sub(
        r"__shared__\s+((?:[\w:\s]|<[^;>]*>)*?)(\w+)((?:\[[^\];]*\])*);",
        r"alignas(16) static \1\2\3; emulated::share(&\2, sizeof(\2));",
        text,
    )
    return text


def _launches(text: str) -> str:
    """Return `text` with kernel<<<sizes>>>(arguments) as
    emulated::launch<kernel>(sizes)(arguments)."""
    while (begin := text.find("<<<")) >= 0:
        name = _start_of_name(text, begin)
        end = text.index(">>>", begin)
        text = f"{text[:name]}emulated::launch<{text[name:begin]}>({text[begin + 3 : end]}){text[end + 3 :]}"
    return text


def _start_of_name(text: str, end: int) -> int:
    """Return where the name before `end` begins, which template arguments may follow."""
    depth, at = 0, end
    while depth > 0 or text[at - 1] == ">" or text[at - 1].isalnum() or text[at - 1] in "_:":
        at -= 1
        depth += (text[at] == ">") - (text[at] == "<")
    return at


def wrapper_sources() -> list[Path]:
    """Return the files that register operators for CUDA."""
    return [
        file
        for file in sorted(OPS.glob("*.cpp"))
        if "MEGALITE_REGISTER(" in file.read_text(encoding="utf-8")
    ]


def _torch_options() -> tuple[list[str], list[str]]:
    """Return what compiling and linking against the installed torch needs."""
    paths = subprocess.check_output([sys.executable, OPS / "torch_paths.py"], text=True)
    includes, libraries, cxx11_abi, _ = paths.split(";")
    folders = [*includes.split("|"), sysconfig.get_paths()["include"]]
    compiling = [
        *(f"-isystem{folder}" for folder in folders),
        f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi}",
    ]
    return compiling, [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"emulated CUDA: it does not compile: {' '.join(map(str, command))}\n{done.stderr}"
        )


def _key(options: Sequence[str | Path], files: Sequence[Path]) -> str:
    found = hashlib.sha256(repr([COMPILER, version("torch"), *map(str, options)]).encode())
    for file in files:
        found.update(repr((file.name, file.read_bytes())).encode())
    return found.hexdigest()[:16]


def _object_of(source: Path, options: Sequence[str | Path], made_from: Sequence[Path]) -> Path:
    """Return where the object of `source` is kept."""
    return CACHE / f"{source.name}-{_key(options, [source, *made_from])}.o"


def _compile(
    source: Path,
    options: Sequence[str | Path],
    made_from: Sequence[Path],
    headers: Future[Path] | None = None,
) -> Path:
    """Return the object of `source`, from the cache where nothing of `made_from` has changed.
    `headers` are those of `_precompile`."""
    object_file = _object_of(source, options, made_from)
    if not object_file.exists():
        found = [f"-I{headers.result()}"] if headers else []
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            written = Path(folder) / "object.o"
            _run([COMPILER, *found, *options, "-c", source, "-o", written])
            written.rename(object_file)
    return object_file


def _precompile(folder: Path, options: Sequence[str | Path]) -> Path:
    """Compile torch's headers into `folder`, which takes longer than all wrappers without them."""
    written = folder / "wrappers.h.gch"
    _run([COMPILER, *options, "-x", "c++-header", FAKE / "wrappers.h", "-o", written])
    return folder


def _translated(folder: Path) -> Path:
    """Write kernels and their headers, translated, into `folder`, beside links to what they
    include."""
    cuda = folder / "cuda"
    cuda.mkdir()
    for header in OPS.glob("*.h"):
        (folder / header.name).symlink_to(header)
    (folder / "cpu").symlink_to(OPS / "cpu")
    for file in [*(OPS / "cuda").iterdir(), HERE / "faulty.cu"]:
        name = f"{file.name}.cpp" if file.suffix == ".cu" else file.name
        translated = translate(file.read_text(encoding="utf-8"))
        (cuda / name).write_text(
            f'#line 1 "{file.relative_to(ROOT)}"\n{translated}', encoding="utf-8"
        )
    return cuda


def build() -> Path:
    """Return the library, built where it is not in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    own = sorted(HERE.rglob("*.h"))
    fake, headers = sorted(FAKE.glob("*.h")), sorted([*OPS.glob("*.h"), *OPS.glob("cpu/isa.h")])
    include = f"-I{FAKE.relative_to(ROOT)}"
    compiling, linking = _torch_options()
    torch_options = [
        *WRAPPER_FLAGS,
        f"-I{OPS.relative_to(ROOT)}",
        *compiling,
        include,
    ]
    wrapper_options, made_from = [*torch_options, "-include", "wrappers.h"], [*fake, *headers]
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        cuda = _translated(Path(folder))
        kernels = [*fake, *headers, *sorted(cuda.glob("*.cuh"))]
        wrappers = wrapper_sources()
        are_kept = all(_object_of(file, wrapper_options, made_from).exists() for file in wrappers)
        # First: the wrappers wait for it.
        precompiled = None if are_kept else pool.submit(_precompile, Path(folder), torch_options)
        jobs = [
            *(
                pool.submit(_compile, file, [*RUNTIME_FLAGS, include], own)
                for file in sorted(HERE.glob("*.cpp"))
            ),
            *(
                pool.submit(_compile, file, [*KERNEL_FLAGS, include], kernels)
                for file in sorted(cuda.glob("*.cpp"))
            ),
            *(
                pool.submit(_compile, file, wrapper_options, made_from, precompiled)
                for file in wrappers
            ),
        ]
        objects = [job.result() for job in jobs]
    library = CACHE / f"library-{_key([*linking], objects)}.so"
    if not library.exists():
        _run(
            [
                COMPILER,
                "-shared",
                "-Wl,-Bsymbolic",
                *objects,
                *linking,
                "-o",
                f"{library}.{os.getpid()}",
            ]
        )
        os.rename(f"{library}.{os.getpid()}", library)
    return library


if __name__ == "__main__":
    print(build())
