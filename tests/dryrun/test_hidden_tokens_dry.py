"""Models that learn what is hidden from them run dry: encoders, and encoder-decoders with both
stacks over stages."""

from __future__ import annotations

import pytest

from dry_runs import Case, Dry, built, run_dry

pytestmark = built

T5 = {"preset": "t5-base", "num_layers": 6, "encoder_layers": 3, "dropout": 0.1}
NOWHERE = ("data.seq_length=512", "data.tokenizer=models/nowhere")
CASES = {
    "masked": Case({"preset": "bert-base", "num_layers": 2}, 2, (*NOWHERE, "objective.name=masked_lm")),
    "spans": Case(
        T5, 4, (*NOWHERE, "objective.name=span_corruption", "parallel.pipeline=2", "parallel.tensor=2")
    ),
    "rows": Case(
        T5, 2,
        (*NOWHERE, "objective={name: seq2seq, target_length: 128}", "data.document_mask=true", "parallel.pipeline=2",
         "parallel.schedule=interleaved", "parallel.virtual=2"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dry]:
    return run_dry(CASES, tmp_path_factory.mktemp("hidden"))


@pytest.mark.parametrize("kind", CASES)
def test_it_trains_validates_and_saves(kind: str, dry: dict[str, Dry]) -> None:
    for record in dry[kind].records:
        assert {"training", "validating", "saving"} <= record.peaks.keys()
        assert not any(
            phase == "training" and reason == "a number is read"
            for phase, reason, *_ in record.waits
        )
