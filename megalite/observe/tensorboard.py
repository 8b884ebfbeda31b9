"""Writes TensorBoard event files to the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class TensorboardSink:
    """Sink that writes `train/*`, `valid/*` and `tasks/*` scalars, and samples as texts. Raises
    ImportError without tensorboard."""

    name = "TensorBoard"

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what the run wrote after the checkpoint it is resumed from.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def step(self, record: dict[str, float]) -> None:
        self._write("train", record)

    def evaluation(self, record: dict[str, float]) -> None:
        self._write("valid", record)
        self._writer.flush()  # rare, and what a person waits for

    def tasks(self, record: dict[str, float]) -> None:
        named = {key.removeprefix("tasks/"): value for key, value in record.items()}
        self._write("tasks", named)
        self._writer.flush()

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # Indented, the text is no Markdown.
            text = "".join(f"    {line}\n" for line in (prompt + answer).split("\n"))
            self._writer.add_text(f"samples/{number}", text, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()

    def _write(self, group: str, record: dict[str, float]) -> None:
        for key, value in record.items():
            # Of `valid_loss` the group says the first half already.
            if key != "step":
                name = f"{group}/{key.removeprefix('valid_')}"
                self._writer.add_scalar(name, value, int(record["step"]))
