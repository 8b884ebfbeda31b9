"""Images are built from what is pinned, run as nobody in particular, and let signals through; scripts of
the shell have no known traps. Nothing is built here: there is no engine and no base image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
DOCKERFILES = sorted(path for path in CONTAINERS.glob("Dockerfile.*") if "ignore" not in path.name)
DEFINITION = CONTAINERS / "megalite.def"
SCRIPTS = sorted(
    path
    for folder in ("tools", "slurm", "tests", ".ci", "containers")
    for path in (ROOT / folder).rglob("*")
    if path.suffix == ".sh" or path == ROOT / ".ci" / "run"
)


def run(program: str, *arguments: object) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not here; pip install 'megalite[dev]' brings it")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_of_images_has_no_remarks() -> None:
    run("hadolint", "--failure-threshold", "style", *DOCKERFILES)


def test_the_linter_of_scripts_has_no_warnings() -> None:
    assert len(SCRIPTS) > 10
    run("shellcheck", "--severity", "warning", *SCRIPTS)


def stages(text: str) -> dict[str, list[str]]:
    """The instructions of each stage of a Dockerfile, joined to a line each, by the stage's name;
    those before the first under ''."""
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    found: dict[str, list[str]] = {"": []}
    for line in filter(None, map(str.strip, text.splitlines())):
        if match := re.match(r"FROM (\S+) AS (\w+)$", line):
            found[match[2]] = [*found.get(match[1], []), line]
        else:
            found[list(found)[-1]].append(line)
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_runs_as_a_user(path: Path) -> None:
    found = stages(path.read_text())
    assert list(found) == ["", "build", "runtime", "serve", "train"]  # the last is the default
    bases = dict(line[4:].split("=", 1) for line in found[""])
    for name, base in bases.items():
        base = re.sub(r"\$\{(\w+)\}", lambda match: bases[match[1]], base)
        pinned = r"\S+:[\w.]*\d+\.\d+[\w.-]*" if "BASE" in name else r"\d+\.\d+\.\d+"
        assert re.fullmatch(pinned, base), base
    for stage in ("serve", "train"):
        lines = found[stage]
        # After USER nothing is run as root.
        after = lines[lines.index("USER 10001:10001") :]
        assert not [line for line in after if line.startswith(("RUN", "COPY", "ADD", "USER 0"))]
        assert 'ENTRYPOINT ["tini", "--", "megalite"]' in lines
        assert not any("constraint" in line or "-devel" in line for line in lines)
        assert any(line.startswith("HEALTHCHECK") for line in lines) == (stage == "serve")
    assert any("--require-hashes" in line for line in found["build"])


@pytest.mark.parametrize("path", [*DOCKERFILES, DEFINITION], ids=lambda path: path.name)
def test_what_is_copied_is_there_and_let_through(path: Path) -> None:
    text = path.read_text()
    copied = (
        re.findall(r"^    (\S+) /src/", text, re.M)
        if path == DEFINITION
        else [
            word
            for line in stages(text)["build"]
            if line.startswith("COPY")
            for word in line.split()[1:-1]
        ]
    )
    assert {"megalite", "csrc", "configs", "pyproject.toml", "LICENSE", "README.md"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    if path != DEFINITION:
        ignore = Path(f"{path}.dockerignore").read_text().splitlines()
        assert {line[1:] for line in ignore if line.startswith("!")} == set(copied)
        assert "*" in ignore


@pytest.mark.timeout(3600)
def test_the_steps_of_the_image_for_cpus_can_be_done(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The build stage, line by line, in a folder that stands for the image's root, and what it leaves to
    the runtime. apt is left out: this machine has a compiler."""
    if not request.config.getoption("--whole"):
        pytest.skip(
            "one of the cases of --whole: it installs every package and compiles the kernels"
        )
    source = tmp_path / "src"
    source.mkdir()
    environment = os.environ | {"TORCH_INDEX": ""}

    def here(text: str) -> str:
        return re.sub(r"/(opt/megalite|src)\b", rf"{tmp_path}/\1", text)

    def do(command: str) -> str:
        done = subprocess.run(
            ["sh", "-euc", here(command)],
            cwd=source,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    for line in stages((CONTAINERS / "Dockerfile.cpu").read_text())["build"]:
        instruction, _, rest = line.partition(" ")
        if instruction == "RUN" and "apt-get" not in rest:
            do(rest)
        elif instruction == "ENV":
            for name, value in (pair.split("=", 1) for pair in rest.split()):
                environment[name] = here(value).replace("$PATH", environment["PATH"])
        elif instruction == "COPY":
            *names, target = rest.split()
            for name in names:
                to = source / target / Path(name).name if target.endswith("/") else source / target
                to.parent.mkdir(exist_ok=True)
                if (ROOT / name).is_dir():  # without what .dockerignore keeps out
                    left_out = shutil.ignore_patterns("__pycache__", "*.so")
                    shutil.copytree(ROOT / name, to, ignore=left_out)
                else:
                    shutil.copy(ROOT / name, to)
    # The runtime has nothing of what was built from.
    shutil.rmtree(source)
    source.mkdir()
    assert do("megalite --version").startswith("megalite ")
    made = do("python -P -c 'import megalite._ops as ops, megalite._data; print(ops.__file__)'")
    assert made.startswith(str(tmp_path))
    assert "serve" in do("megalite --help")
    assert "--ratings" in do("megalite serve --help")
    assert "preset: llama-1m" in do("megalite config new --preset llama-1m")


def test_the_definition_does_what_the_dockerfile_does() -> None:
    """Apptainer's own is not in Debian: the two are held against each other."""
    build = " ".join(stages((CONTAINERS / "Dockerfile.cuda").read_text())["build"])
    text = DEFINITION.read_text()
    for line in text.partition("%post")[2].partition("Bootstrap")[0].splitlines():
        if "pip install" in line or "cuobjdump" in line:
            words = (
                line.strip().replace("$index", "$TORCH_INDEX").replace("${index", "${TORCH_INDEX")
            )
            assert words in build, words
    assert set(re.findall(r"CUDA=(\S+)", text)) == set(
        re.findall(r"CUDA=(\d\S+)", (CONTAINERS / "Dockerfile.cuda").read_text())
    )
