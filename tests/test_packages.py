"""What is handed out: an sdist with all that is built from, for CUDA as well; a wheel that a clean
environment runs the quickstart from; and versions that are written down once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==([\w.+]+)", re.M)


def plain(name: str) -> str:
    """A package's name as the index compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "tools" / name).read_text()
    return {plain(package): version for package, version in PIN.findall(text)}


def test_the_lock_file_is_of_the_constraints() -> None:
    lock, constraints = pins("requirements.lock"), pins("constraints.txt")
    assert {
        name: version for name, version in lock.items() if constraints.get(name) != version
    } == {}
    text = (ROOT / "tools" / "requirements.lock").read_text()
    assert "://" not in text  # where a package is from is the installer's business
    for entry in re.split(r"\n(?=\S)", text)[1:]:
        assert PIN.match(entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    # What [all] asks for by name; torch is installed before.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    names = everything.partition("[")[2].rstrip("]").split(",")
    wanted = [*project["dependencies"], *(each for name in names for each in extras[name])]
    named = {plain(re.match(r"[\w.-]+", each)[0]) for each in wanted}  # type: ignore[index]
    assert named - set(lock) == {"torch", "megalite"}
    tools = {plain(re.match(r"[\w.-]+", each)[0]) for each in (*extras["dev"], *extras["docs"])}  # type: ignore[index]
    assert tools - set(constraints) == {"megalite"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    build = pytest.importorskip("scikit_build_core.build")
    folder = tmp_path_factory.mktemp("sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        archive = folder / build.build_sdist(str(folder))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_has_all_that_is_built_from_and_nothing_that_was_built(sdist: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "configs", "megalite", "tools"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("this is no checkout")
    names = [name for name in tracked.stdout.split() if (ROOT / name).exists()]
    assert len(names) > 300
    assert [name for name in names if not (sdist / name).exists()] == []
    assert [path for path in sdist.rglob("*") if path.suffix in (".so", ".pyc", ".bin")] == []


# A torch that says it is of CUDA 13; its headers are not asked for before anything is compiled.
STAND_IN = {
    "torch/__init__.py": "class _C: _GLIBCXX_USE_CXX11_ABI = True\nclass version: cuda = '{cuda}'\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "def include_paths(): return ['/nowhere/include']\n"
    "def library_paths(): return ['/nowhere/lib']\n",
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")
@pytest.mark.parametrize("fits", [True, False])
def test_the_sdist_builds_for_cuda_where_nvcc_fits_torch(
    sdist: Path, tmp_path: Path, request: pytest.FixtureRequest, fits: bool
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("one of the cases of --whole: CMake tries both compilers first")
    report = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", report)
    assert found is not None
    for name, text in STAND_IN.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{cuda}", f"{int(found[1]) + (not fits)}.0"))
    import pybind11

    configure = [
        "cmake",
        "-S",
        sdist / "csrc",
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    path = {
        "PYTHONPATH": str(tmp_path / "site"),
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    }
    done = subprocess.run(configure, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ninja = ["ninja", "-C", tmp_path / "build", "-t", "commands", "_ops"]
    commands = subprocess.run(ninja, env=path, capture_output=True, text=True).stdout
    kernels = {path.name for path in (sdist / "csrc" / "ops" / "cuda").glob("*.cu")}
    by_nvcc = [line for line in commands.splitlines() if "nvcc" in line]
    compiled = {name for name in kernels if any(f"/{name}" in line for line in by_nvcc)}
    warned = "GPUs will run the reference of every operator" in " ".join(done.stderr.split())
    assert compiled == (kernels if fits else set())
    assert warned != fits


def test_the_wheel_alone_runs_the_quickstart(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("a build and a quickstart, many minutes: one of the cases of --whole")
    run = subprocess.run(
        ["bash", "tools/build_wheel.sh", tmp_path / "dist"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert run.returncode == 0
    (wheel,) = (tmp_path / "dist").glob("*-manylinux_2_*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        ROOT / "tools" / "constraints.txt",
        wheel,
    ]
    subprocess.run(install, check=True)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for arguments in (["ops"], ["quickstart", "--dir", tmp_path / "first"]):
        done = subprocess.run(
            [python.parent / "megalite", *arguments],
            env=clean,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if arguments == ["ops"]:
            assert "built, runs with" in done.stdout
    assert (tmp_path / "first/runs/quickstart/exported/model.safetensors").exists()
