"""What `from megalite import …` offers: it costs nothing until it is used, and means the same in
any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import assert_type

import pytest

import megalite
from megalite import Config, Generator, load_config, plan, train
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import ConfigError
from megalite.plan import Plan
from megalite.runtime.exit_codes import Exit

CONFIG = """
run: {{name: tiny, dir: {folder}/runs}}
model: {{preset: llama-1m, vocab_size: 300, num_layers: 1}}
data: {{train: [{{path: {folder}/corpus_text_document}}], seq_length: 16, tokenizer: {folder}/tokenizer}}
train: {{steps: 100, global_batch_size: 2, precision: fp32}}
optimizer: {{lr: 1.0e-3}}
"""
ORDERS = {
    "the modules first": "import megalite.train, megalite.plan; from megalite import train, plan",
    "the functions first": "from megalite import train, plan; import megalite.train, megalite.plan",
    "a name in the modules first": "from megalite.train import train_on, train; from megalite import train, plan",
}
SAME = """
import pickle, sys
import megalite
for name, function in (("train", train), ("plan", plan)):
    module = sys.modules[f"megalite.{name}"]
    assert function is module is getattr(megalite, name), name
    assert pickle.loads(pickle.dumps(function)) is function, name
    called = []
    setattr(module, name, lambda *given, **named: called.append((given, named)))
    function("config", ranks=2)
    assert called == [(("config",), {"ranks": 2})], called
assert megalite.train.run_steps and megalite.plan.make_plan
print("the same")
"""


def python(program: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_preset_to_an_answer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The first words of a text are the first that a model learns.\n" * 50)
    train_tokenizer([str(text)], tmp_path / "tokenizer", 300)
    preprocess([str(text)], tmp_path / "corpus", tmp_path / "tokenizer", append_eod=True)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))

    config = assert_type(
        load_config(tmp_path / "config.yaml", ["train.steps=2", "parallel.zero_stage=1"]), Config
    )
    assert (config.train.steps, config.model.num_layers) == (2, 1)
    planned = assert_type(plan(config, 2), Plan)
    assert (planned.data, planned.zero_stage, planned.tokens_per_step) == (2, 1, 32)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 2"):
        plan(config, 3)
    assert assert_type(train(config), Exit) == Exit.DONE
    generator = assert_type(Generator.open(str(config.run.folder)), Generator)
    (answer,) = generator.answer([generator.request("The first", 4)])
    assert answer.tokens


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_imported_first_changes_nothing(order: str) -> None:
    assert python(ORDERS[order] + SAME) == "the same\n"


def test_importing_it_imports_nothing() -> None:
    # Without site, whose hooks of editable installs have imports of their own.
    program = f"""
import sys
sys.path.append({str(Path(megalite.__file__).parents[1])!r})
before = {{*sys.modules}}
import megalite
print(sorted({{*sys.modules}} - before))
"""
    assert python(program, "-I", "-S") == "['__future__', 'megalite', 'types']\n"


def test_its_names() -> None:
    assert set(megalite.__all__) <= set(dir(megalite))
    assert all(getattr(megalite, name) for name in megalite.__all__)
    with pytest.raises(
        AttributeError,
        match=r"no attribute 'Trainer'; it has Config, Generator, finetune_config, load_config",
    ):
        megalite.Trainer  # noqa: B018


def test_type_checkers_read_its_annotations() -> None:
    assert (Path(megalite.__file__).parent / "py.typed").is_file()
