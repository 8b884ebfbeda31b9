"""Recognisable secrets, in the environment and in the config of a run that crashes, turn up in
nothing it writes."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.cli import main
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.utils.secrecy import hide_secrets, names_a_secret
from small_runs import make_config

SECRETS = {
    "WANDB_API_KEY": "hush-" + "0123456789abcdef" * 2 + "000",
    "HF_TOKEN": "hf_hush-token",
    "AWS_SECRET_ACCESS_KEY": "hush+/aws",
    "SLACK_BOT_PASSWORD": "hush-slack",
    "https_proxy": "http://someone:hush-proxy@proxy.example:3128",
}
CRASH = """
import os, sys, warnings
from megalite.cli import main
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.data.loader import Loader

real, steps = Loader.__next__, 0

def crash(self):
    global steps
    steps += 1
    if steps > 3:
        told = " ".join(os.environ[name] for name in sys.argv[2].split(","))
        raise ConnectionError(f"no answer: {told} https://host/a?X-Amz-Signature=hush-signed&x=1 ftp://me:hush-ftp@host")
    return real(self)

Loader.__next__ = crash
sys.exit(main(["train", sys.argv[1]]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found[str(path.relative_to(folder))] = (
                gzip.decompress(data) if path.suffix == ".gz" else data
            )
    return found


def test_a_run_that_crashes_writes_no_secret(tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    config = make_config(
        work, "llama", "train.steps=9", "checkpoint.every=2", "observe.eval_every=0", "observe.wandb.mode=offline",
        "observe.tensorboard=true", "profile.steps=[1, 2]", "health.hang_timeout_s=20",
    )  # fmt: skip
    (work / "c.yaml").write_text(config.to_yaml())
    before = {path.name for path in work.iterdir()}
    environment = (
        os.environ
        | SECRETS
        | {"HOME": str(home), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    )
    done = subprocess.run(
        [sys.executable, "-c", CRASH, "c.yaml", ",".join(SECRETS)],
        capture_output=True, text=True, timeout=120, env=environment, cwd=work, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert (
        "ConnectionError: no answer: <WANDB_API_KEY> <HF_TOKEN> <AWS_SECRET_ACCESS_KEY>"
        in done.stderr
    )
    assert "in crash" in done.stderr, "the rest of the traceback is there"
    written = contents(tmp_path) | {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    kinds = (
        "config.yaml",
        "metrics.jsonl",
        ".safetensors",
        "rank-00000.json",
        ".wandb",
        "tfevents",
        "trace",
        "error.",
    )
    for kind in kinds:
        assert any(kind in name for name in written), f"no {kind} was written"
    assert [name for name, data in written.items() if b"hush" in data] == []
    # All of it is in the run's folder.
    assert {path.name for path in work.iterdir()} == before | {"runs"}
    assert [path.name for path in (work / "runs").iterdir()] == ["test"]


@pytest.mark.parametrize(
    "override",
    [
        "observe.wandb.api_key=hush-hush",
        "observe.wandb.token=hush-hush",
        f"observe.wandb.tags=[a, {SECRETS['WANDB_API_KEY']}]",
        f"observe.wandb.project={SECRETS['HF_TOKEN']}",
        "data.tokenizer=https://me:hush-hush@host/tokenizer",
        "model.hf=https://host/model?X-Amz-Signature=hush-hush",
        "checkpoint.resume=s3://key:hush-hush@bucket/step-00000001",
        "data.train=[{path: 's3://key:hush-hush@bucket/a'}]",
        "run.dir=sftp://me:hush-hush@host/runs",
    ],
)
def test_a_secret_in_the_config_is_refused_and_not_repeated(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "c.yaml").write_text(make_config(tmp_path).to_yaml())
    assert main(["train", str(tmp_path / "c.yaml"), override]) == 2
    said = "".join(capfd.readouterr())
    assert override.split("=")[0].split(".")[0] in said
    assert "hush" not in said
    values = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert not Path(values["run"]["dir"]).exists()


LETTERS = "hushHUSH0123456789abcdefghijklmnopqrstuvwxyz"
TOKENS = [
    "hf_" + LETTERS[:34], "AKIA" + "HUSH0123456789AB", "ASIA" + "HUSH0123456789AB", "sk-" + LETTERS[:24],
    "sk-proj-" + LETTERS, "sk-ant-api03-" + LETTERS + "-" + LETTERS, "ghp_" + LETTERS[:36], "gho_" + LETTERS[:36],
    "github_pat_" + LETTERS[:22] + "_" + LETTERS, "glpat-" + LETTERS[:20], "xoxb-1234-1234-" + LETTERS[:24],
    "xoxp-1-" + LETTERS[:10], "AIza" + LETTERS[:35], "nvapi-" + LETTERS, "wandb_v1_" + LETTERS,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0." + LETTERS, "-----BEGIN RSA PRIVATE KEY-----\nhush",
]  # fmt: skip


def test_the_tokens_of_services_are_known_without_an_environment(tmp_path: Path) -> None:
    values = yaml.safe_load(make_config(tmp_path).to_yaml())
    for number, token in enumerate(TOKENS):
        for text in (token, f"a {token}.", f"https://host/{token}/x", f"x={token}"):
            assert token not in hide_secrets(text)
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("run.name", {"run": values["run"] | {"name": token}}),
            ("data.tokenizer", {"data": values["data"] | {"tokenizer": f"/models/{token}"}}),
            ("observe.wandb.tags.1", {"observe": {"wandb": {"tags": ["a", token]}}}),
            ("run.nonsense", {"run": values["run"] | {"nonsense": token}}),
            ("observe", {"observe": {token: 1}}),
        ]
        for key, section in wrong[number % len(wrong) :][:1]:
            with pytest.raises(ConfigError) as caught:
                parse_config(values | section)
            assert str(caught.value).startswith(
                f"config: {key} holds a key, a token or a password"
            ), token
            assert "hush" not in str(caught.value).lower()


def test_hiding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if names_a_secret(name):
            monkeypatch.delenv(name)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EMPTY_KEY", "")
    monkeypatch.setenv("SHORT_KEY", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert hide_secrets("a hush-slack, 1 and false") == "a <SLACK_BOT_PASSWORD>, 1 and false"
    assert (
        hide_secrets("via http://someone:hush-proxy@proxy") == "via http://someone:<password>@proxy"
    )
    assert hide_secrets("s3://key:other@bucket/x") == "s3://key:<password>@bucket/x"
    assert (
        hide_secrets("https://h/x?a=1&X-Amz-Signature=other&b=2")
        == "https://h/x?a=1&X-Amz-Signature=<hidden>&b=2"
    )
    plain = (
        "hf_bert_base_uncased task-sk-learn-experiments ghp_ AKIA xoxo-xoxo sk-8b runs/sk-2026-11-29 "
        + "ab12" * 10
    )
    assert hide_secrets(plain) == plain, "names of models and runs, sums of files"
    plain = "step 3, tokens=5, s3://bucket/a@b:c, 12:30 https://host:80/x, key=value"
    assert hide_secrets(plain) == plain
