"""What the program never does, read from its own source: load pickles, run a model's code, evaluate
text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("megalite", "tools") for path in (ROOT / folder).rglob("*.py"))
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
OBJECTS = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
"""Of torch.distributed: they pickle."""
ALLOWED = {
    # Its Unpickler finds no class and no function: tests/checkpoint/test_convert.py sets traps.
    "megalite/checkpoint/torch_file.py": ["imports pickle"],
    # What the harness has the ranks of one run tell each other is any object. Nothing of it comes
    # from elsewhere.
    "megalite/infer/harness.py": ["calls dist.all_gather_object"],
    # Ranks that quantise a model together tell each other its new tensors, whose number and shapes
    # the others do not know. Nothing of it comes from elsewhere.
    "megalite/quantization/matrices.py": ["calls dist.broadcast_object_list"],
}
REMOTE_CODE = ("from_pretrained", "from_config", "load_dataset", "pipeline")


def faults(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    loaders = {  # classes here that extend a safe loader of yaml's
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("SafeLoader") for base in node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                f"imports {alias.name}"
                for alias in node.names
                if alias.name.split(".")[0] in PICKLING
            )
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in PICKLING:
                yield f"imports {node.module}"
            for alias in node.names:
                if (node.module, alias.name) in {
                    ("torch", "load"),
                    ("numpy", "load"),
                    ("yaml", "load"),
                }:
                    yield f"imports {alias.name} of {node.module} under its bare name"
        elif isinstance(node, ast.Call):
            yield from _faults_of_call(node, loaders)


def _faults_of_call(node: ast.Call, loaders: set[str]) -> Iterator[str]:
    called = ast.unparse(node.func)
    last = called.split(".")[-1]
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called == "torch.load" or called.endswith(
        ("jit.load", "hub.load", "package.PackageImporter")
    ):
        yield f"calls {called}"
    if called in ("eval", "exec", "compile") or last in OBJECTS:
        yield f"calls {called}"
    if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        yield f"calls {called} without allow_pickle=False"
    if (
        called in ("np.fromfile", "numpy.fromfile")
        and "dtype" not in options
        and len(node.args) < 2
    ):
        yield f"calls {called} without a dtype"
    if called.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"):
        loader = ast.unparse(node.args[1]) if len(node.args) > 1 else options.get("Loader", "")
        if not loader.endswith("SafeLoader") and loader not in loaders:
            yield f"calls {called} with {loader or 'no loader'}"
    if options.get("trust_remote_code", "False") != "False":
        yield f"calls {called} with trust_remote_code"
    # Left out, transformers asks on a terminal.
    if (
        last in REMOTE_CODE
        and called.startswith(("Auto", "transformers.Auto"))
        and "trust_remote_code" not in options
    ):
        yield f"calls {called} without trust_remote_code=False"
    if options.get("shell") == "True":
        yield f"calls {called} with a shell"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_code(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"))) == ALLOWED.get(
        path.relative_to(ROOT).as_posix(), []
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "dist.all_gather_object(found, mine)",
        "AutoModelForCausalLM.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=trust)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_each_of_these_would_be_found(source: str) -> None:
    assert list(faults(source))


def test_what_is_safe_is_left_alone() -> None:
    source = (
        "model.eval()\nyaml.load(t, yaml.SafeLoader)\nnp.load(p, allow_pickle=False)\n"
        "re.compile(p)\nx = safe.load(p)"
    )
    assert list(faults(source)) == []
