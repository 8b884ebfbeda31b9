"""The steps of the quickstart of finetuning: a base model learns to answer, to prefer short answers by
an adapter that is merged, and to tell classes; what was learned is measured and served."""

from __future__ import annotations

import shutil
from pathlib import Path

from megalite.errors import ConfigError
from megalite.quickstart.run import MODELS, Stopped, make_tokens, run_verb, say, shortest_of
from megalite.utils.resources import configs_dir

BASE_STEPS = 200
"""Steps of the quickstart's run that make a base model, where it has not trained further."""
ROWS = Path("data", "quickstart-rows")
BASE, MERGED = Path("models", "quickstart-base"), Path("models", "quickstart-merged")
SMALL = ("train.global_batch_size=8", "train.micro_batch_size=8", "train.recompute=none")
"""Settings for a model this small, which takes many rows at a time."""
ADAPTER = ("lora.rank=16", "lora.alpha=32", "lora.targets=all-linear")
LINES = ("import json", "return self.name", "def read(self, size):")


def finetune(folder: Path) -> int:
    """Do all steps in a folder, and return the exit status of the first that fails. A step that is
    done is left out. Raises ConfigError where the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--dir {folder}: {error.strerror}") from None
    try:
        make_tokens(MODELS["decoder"], folder)
        _make_base(folder)
        _train(folder)
        return _measure_and_serve(folder)
    except Stopped as stopped:
        return stopped.status


def _make_base(folder: Path) -> None:
    """Pretrain a base model, unless the quickstart has, and give it a chat template."""
    say(f"4. a base model: the quickstart's run, or its first {BASE_STEPS} steps")
    run = Path("runs", "quickstart")
    # A longer run of the quickstart is as good a base, and is there already.
    if not [*(folder / run / "checkpoints").glob("step-*")]:
        config = str(shortest_of(configs_dir() / "quickstart.yaml", folder))
        settings = ("parallel.tensor=1", "train.micro_batch_size=4", f"train.stop_at={BASE_STEPS}")
        run_verb(folder, "launch", "--ranks", "2", config, "observe.wandb.mode=disabled", *settings)
    if not (folder / BASE).exists():
        run_verb(folder, "convert", str(run), str(BASE))
    # A model that was only pretrained has none.
    shutil.copy(configs_dir() / "chat_template.jinja", folder / BASE)


def _train(folder: Path) -> None:
    """Finetune on chats, on preferences and on classes; merge the adapter."""
    from megalite.quickstart.rows import write_rows

    say("5. rows: chats, preferences and classes of lines of Python")
    print(write_rows(folder / ROWS))
    say("6. supervised finetuning on chats")
    rows = {name: str(ROWS / f"{name}.jsonl") for name in ("chats", "preferences", "classes")}
    lr = ("optimizer.lr=2e-3", "optimizer.schedule.min_lr=0", "train.epochs=4")
    name = "run.name=quickstart-"
    run_verb(folder, "finetune", str(BASE), "--data", rows["chats"], f"{name}sft", *SMALL, *lr)
    say("7. an adapter comes to prefer short answers (DPO with LoRA), and is merged")
    # A tenth of the other rate: DPO leaves the reference's ways soon.
    given = (f"{name}dpo", *ADAPTER, *SMALL, "optimizer.lr=2e-4", "train.epochs=1")
    run_verb(folder, "finetune", "runs/quickstart-sft", "--data", rows["preferences"], *given)
    if not (folder / MERGED).exists():
        run_verb(folder, "convert", "runs/quickstart-dpo", str(MERGED))
    say("8. a model that tells classes")
    run_verb(
        folder, "finetune", str(BASE), "--data", rows["classes"], f"{name}classes", *SMALL, *lr
    )
    run_verb(folder, "classify", "runs/quickstart-classes", *LINES)


def _measure_and_serve(folder: Path) -> int:
    """Ask held-out questions, and serve the model; return the exit status."""
    from megalite.quickstart.ask import serve_and_ask

    say("9. held-out questions, before and after the preferences")
    # Held-out rows: both models know the others by heart.
    for model in ("runs/quickstart-sft", str(MERGED)):
        run_verb(folder, "eval", model, "--data", str(ROWS / "held-out.jsonl"), "--chat")
    asked = ("--chat", "--prompt", "What is this line?\nimport os", "--temperature", "0")
    run_verb(folder, "generate", str(MERGED), *asked)
    say("10. served: OpenAI's API answers")
    return serve_and_ask(folder / MERGED)
