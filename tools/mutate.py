"""Plant bugs, one at a time, and name those that no test finds (mutation testing).

tests/mutations.yaml lists them: a piece of a file, what it becomes, and the tests that ought to
fail. Each bug is planted in a copy of the repository, never in the checkout itself; a bug in csrc/
is compiled there, one in a CUDA kernel for the emulated device of tests/emulated_cuda. A bug is
killed when its tests fail, crash or do not end; it survives when they pass.

    python tools/mutate.py                       # all of them: an hour on two cores
    python tools/mutate.py engine checkpoint     # those whose name or file contains one of these words
    python tools/mutate.py --check               # only whether every bug can still be planted"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.yaml"
EMULATED_CUDA = Path("build") / "emulated-cuda"
"""Objects of which a bug in a CUDA kernel compiles only its own again."""
TIME_LIMIT_S = 600.0
"""Seconds after which a test counts as hanging: the bug is found."""

# The copy's package must be imported instead of the editable install, also by the ranks that tests
# start.
SITECUSTOMIZE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


@dataclass(frozen=True)
class Mutation:
    """One bug: in `file`, the only occurrence of `find` becomes `put`."""

    name: str
    file: str
    find: str
    put: str
    tests: tuple[str, ...]
    """Arguments of pytest."""
    stays: str = field(default="")
    """Why no test is expected to find it, for the few that are allowed to survive."""

    def planted(self, text: str) -> str:
        """Return the file's text with the bug. Raises ValueError where it cannot be planted in
        exactly one place."""
        if (times := text.count(self.find)) != 1:
            raise ValueError(f"{self.name}: {self.file} has its `find` {times} times, not once")
        return text.replace(self.find, self.put)


@dataclass(frozen=True)
class Result:
    """What became of one bug."""

    mutation: Mutation
    outcome: str
    """killed, survived, or error where its tests could not be run."""
    seconds: float
    said: str
    """The last line of pytest's output."""


def read_mutations(path: Path = LIST) -> list[Mutation]:
    """Return the bugs of the list at `path`, with the names of suites replaced by the tests they
    stand for. Raises ValueError where two bugs have one name."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for entry in listed["mutations"]:
        tests = [
            argument for test in entry["tests"] for argument in listed["suites"].get(test, [test])
        ]
        found.append(Mutation(**{**entry, "tests": tuple(tests)}))
    if twice := [
        name for name, times in Counter(mutation.name for mutation in found).items() if times > 1
    ]:
        raise ValueError(f"{path}: two mutations are called {', '.join(twice)}")
    return found


def stale(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """Return what is wrong with bugs that cannot be planted in the files below `root`, or whose
    tests do not exist."""
    problems = []
    for mutation in mutations:
        try:
            mutation.planted((root / mutation.file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(str(error))
        named = [test for test in mutation.tests if test.startswith("tests/")]
        problems += [
            f"{mutation.name}: there is no {test}"
            for test in named or ["test"]
            if not _exists(test, root)
        ]
    return problems


def _exists(test: str, root: Path) -> bool:
    """Return whether a test's file exists, and in it the function. Only pytest knows its
    parameters."""
    file, _, function = test.partition("[")[0].partition("::")
    return (root / file).exists() and (
        not function or f"def {function}(" in (root / file).read_text(encoding="utf-8")
    )


class Copy:
    """A copy of the repository in which bugs are planted one after another."""

    def __init__(self, folder: Path):
        self.root, self._built = folder, False
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        # Torch's CPU build only.
        built = ["_dryrun"] if importlib.util.find_spec("megalite._dryrun") else []
        for library in ("_ops", "_data", *built):
            shutil.copy2(_built_library(library), folder / "megalite")
        if (ROOT / EMULATED_CUDA).exists():
            shutil.copytree(ROOT / EMULATED_CUDA, folder / EMULATED_CUDA)

    def run(self, mutation: Mutation) -> Result:
        """Plant a bug, run its tests, and take it out again."""
        began, file = time.monotonic(), self.root / mutation.file
        sound = file.read_text(encoding="utf-8")
        native = _is_native(mutation)
        try:
            if native and not self._built:
                self._build()  # everything once, so that a bug compiles its own file alone
                self._built = True
            file.write_text(mutation.planted(sound), encoding="utf-8")
            if native:
                self._build()
            outcome, said = self._test(mutation.tests)
        except (subprocess.CalledProcessError, ValueError) as error:
            outcome, said = "error", str(error)
        finally:
            file.write_text(sound, encoding="utf-8")
            # Python matches bytecode to a source by size and second only: that of a bug could pass
            # for another's.
            Path(cache_from_source(str(file))).unlink(missing_ok=True)
            if native:
                os.utime(file)
        return Result(mutation, outcome, time.monotonic() - began, said)

    def restore(self) -> None:
        """Compile the original sources again, after a bug in them."""
        if self._built:
            self._build()

    def _build(self) -> None:
        """Compile csrc/ in the copy. Raises ValueError where it does not compile."""
        build = self.root / "build-mutants"
        if not build.exists():
            pybind11 = subprocess.check_output(
                [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
            ).strip()
            options = [
                f"-Dpybind11_DIR={pybind11}",
                f"-DPython_EXECUTABLE={sys.executable}",
                "-DCMAKE_BUILD_TYPE=Release",
            ]
            _quietly(
                "cmake", "-G", "Ninja", "-S", str(self.root / "csrc"), "-B", str(build), *options
            )
        _quietly("cmake", "--build", str(build))
        for library in build.glob("_*.so"):
            shutil.copy2(library, self.root / "megalite")

    def _test(self, tests: Sequence[str]) -> tuple[str, str]:
        """Run tests on the planted bug; return the outcome, and a line of pytest's that explains
        it. Raises ValueError where they could not compile it."""
        own = {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
        ]
        with subprocess.Popen(
            [*command, *tests], cwd=self.root, env=os.environ | own, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            try:
                said = process.communicate(timeout=TIME_LIMIT_S)[0]
            except subprocess.TimeoutExpired:
                return "killed", "its tests did not end"
            finally:
                _end_group(process)
        if (uncompiled := "it does not compile: ") in said:
            raise ValueError(uncompiled + said.partition(uncompiled)[2][:1000])
        lines = [
            line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))
        ] or said.splitlines()[-1:]
        crashed = process.returncode < 0  # such as by memory that the bug has overwritten
        outcome = {0: "survived", 1: "killed"}.get(
            process.returncode, "killed" if crashed else "error"
        )
        return outcome, lines[0] if lines else ""


def _is_native(mutation: Mutation) -> bool:
    """Return whether its file is compiled into the package. CUDA kernels are compiled by the test
    that runs them."""
    return mutation.file.startswith("csrc/") and not mutation.file.startswith("csrc/ops/cuda/")


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill what the tests of a bug may have left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)


def _quietly(*command: str) -> None:
    """Run a command; raise ValueError with its error lines where it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise ValueError(
            "it does not compile: "
            + "; ".join(line for line in done.stdout.splitlines() if "error" in line)
        )


def _built_library(name: str) -> Path:
    """Return the compiled extension that this environment uses."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for folder in (ROOT / "megalite", Path(sysconfig.get_path("platlib")) / "megalite"):
        if (path := folder / f"{name}{suffix}").exists():
            return path
    raise SystemExit(
        f"mutate.py: megalite.{name} is not built here; run `bash tools/quickstart.sh` or `bash tools/test.sh`"
    )


def run_all(mutations: Sequence[Mutation], jobs: int, folder: Path) -> list[Result]:
    """Plant the `mutations` in `jobs` copies below `folder` at a time, and print the outcome of
    each."""
    copies: SimpleQueue[Copy] = SimpleQueue()
    for number in range(jobs):
        copies.put(Copy(folder / str(number)))
    done, printing = 0, threading.Lock()

    def run(mutation: Mutation) -> Result:
        nonlocal done
        copy = copies.get()
        try:
            result = copy.run(mutation)
            if _is_native(mutation):
                copy.restore()
        finally:
            copies.put(copy)
        with printing:
            done += 1
            line = f"{done:4}/{len(mutations)} {result.outcome:8} {result.seconds:5.0f} s  {mutation.name}"
            print(f"{line}\n{'':10}{result.said[:200]}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, mutations))


def report(results: Sequence[Result]) -> str:
    """Return the score and the survivors, by name."""
    killed = sum(result.outcome == "killed" for result in results)
    lines = [f"{killed} of {len(results)} bugs were found ({killed / max(len(results), 1):.1%})"]
    for result in results:
        if result.outcome != "killed":
            why = f": {result.mutation.stays}" if result.mutation.stays else ""
            lines.append(
                f"  {result.outcome}: {result.mutation.name} ({result.mutation.file}){why}"
            )
    return "\n".join(lines)


def main() -> None:
    """Try the bugs that the command line asks for; exit with 1 where one survives unexpectedly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="only bugs whose name or file contains one of these"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="bugs tried side by side (default 1)"
    )
    parser.add_argument(
        "--check", action="store_true", help="only look whether every bug can be planted"
    )
    arguments = parser.parse_args()
    mutations = read_mutations()
    if problems := stale(mutations):
        raise SystemExit(
            "mutate.py: tests/mutations.yaml is out of date:\n  " + "\n  ".join(problems)
        )
    if arguments.words:
        mutations = [
            m for m in mutations if any(word in f"{m.name} {m.file}" for word in arguments.words)
        ]
    if arguments.check or not mutations:
        print(f"{len(mutations)} bugs can be planted")
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        results = run_all(mutations, arguments.jobs, Path(folder))
    print(report(results))
    unexpected = [
        r
        for r in results
        if r.outcome == "error" or (r.outcome == "survived" and not r.mutation.stays)
    ]
    raise SystemExit(bool(unexpected))


if __name__ == "__main__":
    main()
