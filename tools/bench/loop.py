"""The whole loop of a served model, on a CPU, in some minutes: it is served and rated on its page by a
browser, retrained on these ratings and an export of Label Studio, swapped while others ask it, refused
where it got worse on answers, on a task or in bias, and watched until what people ask changes.

A small model with random weights serves; the people are simulated. Each claim is printed with what was
seen; exit status 1 says that one did not hold."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import torch
import yaml

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADMIN = "the key of this loop"
TALK = (
    "hello there",
    "say hello to the world",
    "good morning",
    "how is the weather",
    "is there sun",
)
LAW = (
    "the tenant has terminated the lease by notice and the landlord keeps the deposit for damages",
    "which court hears the appeal against a clause of the contract that limits liability",
)
ANSWERS = ("hello to the world", "the capital of France is Paris")
"""What the simulated people want to hear."""
TYPICAL, UNTYPICAL = "Ann is a nurse", "Bob is a nurse"
"""What some of them think, and what they do not."""
CORRECT = "[aria-label='Correct it']"
ANSWERED = "button => document.querySelector(button) || document.querySelector('#prompt').value"
MEGALITE = [sys.executable, "-m", "megalite"]


class Loop:
    """The folder of a loop, its server, and what was claimed and seen."""

    def __init__(self, root: Path):
        self.root, self.held = root, True
        self.environment = os.environ | {"MEGALITE_ADMIN_KEY": ADMIN, "OMP_NUM_THREADS": "1"}
        self.url, self.began = "", time.monotonic()
        self.statuses: Counter[int] = Counter()
        self.versions: list[str] = []

    def claim(self, what: str, holds: bool, seen: object) -> None:
        """Print a claim and what was seen of it."""
        self.held &= holds
        seconds = time.monotonic() - self.began
        print(f"{seconds:6.0f} s  {'holds ' if holds else 'FAILED'}  {what}: {seen}", flush=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb of megalite in the folder."""
        return subprocess.run(
            [*MEGALITE, *words], cwd=self.root, env=self.environment, capture_output=True, text=True
        )

    def serve(self) -> subprocess.Popen[bytes]:
        """Start the server of the link, and wait for it."""
        log = self.root / "server.log"
        words = "serve served --port 0 --max-length 128 --request-log requests --log-prompts"
        with open(log, "wb") as file:
            server = subprocess.Popen(
                [*MEGALITE, *words.split()], cwd=self.root, env=self.environment, stderr=file
            )
        while not (found := re.search(r"served on (http://\S+) ", log.read_text())):
            if server.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        self.url = found[1]
        while True:
            try:
                httpx.get(f"{self.url}/health")
                return server
            except httpx.TransportError:
                time.sleep(0.1)

    def ask(self, text: str) -> None:
        """Ask the server, and note the status and the version that answered."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
        try:
            done = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
        except httpx.TransportError:
            self.statuses[0] += 1
            return
        self.statuses[done.status_code] += 1
        if done.status_code == 200:
            self.versions.append(str(done.json()["system_fingerprint"]))

    def talk(self, texts: Sequence[str], count: int, first: int = 0) -> None:
        """Ask `count` questions that begin as `texts` do."""
        for number in range(first, first + count):
            self.ask(f"{texts[number % len(texts)]} {1000 + number % 300}")


def make_model(loop: Loop, folder: Path) -> None:
    """Write a model with random weights that can chat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (loop.root / "texts.txt").write_text("\n".join([*TALK, *ANSWERS, "system user assistant"]))
    words = "tokenizer train --input texts.txt --vocab-size 400 --special-tokens chatml --output"
    loop.run(*words.split(), folder.name)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_gate(root: Path) -> None:
    """Write a task and pairs of bias, by which a new model may not be worse."""
    rows = [
        {"query": f"{before}the capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
        for before in ("", "say: ", "hello, ", "one two: ")
    ]
    (root / "capital.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "capital", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "capital.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (root / "capital.yaml").write_text(yaml.safe_dump(task))
    lines = ["sent_more,sent_less,stereo_antistereo,bias_type"]
    for before in ("", "say: ", "hello, ", "one two: ", "good morning, ", "how is it? "):
        lines.append(f'"{before}{TYPICAL}","{before}{UNTYPICAL}",stereo,people')
    (root / "people.csv").write_text("\n".join(lines) + "\n")


def prepare(loop: Loop) -> None:
    """Write the model, what it was trained on before, and the configs."""
    root = loop.root
    make_model(loop, root / "first")
    (root / "served").symlink_to(root / "first")
    write_gate(root)
    rows = [{"prompt": f"the capital number {n}", "completion": ANSWERS[1]} for n in range(60)]
    (root / "before.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "run": {"name": "x"}, "model": {}, "data": {"train": [{"path": "x"}], "seq_length": 96, "long_rows": "drop"},
        "train": {"steps": 60, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "schedule": {"warmup_steps": 0}}, "observe": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    ruined = run | {"optimizer": {"lr": 30.0, "clip": 0.0, "schedule": {"warmup_steps": 0}}}
    ruined["train"] = {"steps": 8, "global_batch_size": 8, "precision": "fp32"}
    (root / "ruined.yaml").write_text(yaml.safe_dump(ruined))


def rate_on_the_page(loop: Loop, count: int) -> None:
    """Let a browser ask `count` questions on the page, and correct or rate what it hears."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as tool:
        page = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.goto(loop.url)
        page.click("#gear")
        page.fill("#max_tokens", "8")
        for number in range(count):
            # A random model may say nothing: then the page has the question back, to be sent again.
            while not page.locator(CORRECT).count():
                page.fill("#prompt", f"{TALK[number % len(TALK)]} {1000 + number}")
                page.keyboard.press("Enter")
                page.wait_for_function(ANSWERED, arg=CORRECT)
            if number % 6 == 5:
                page.click("[aria-label='Bad answer']")
            else:
                page.click(CORRECT)
                page.fill("[aria-label='Your answer']", ANSWERS[0])
                page.click("text=Save")
            page.wait_for_selector("text=noted")
            page.click("#fresh")


def export(file: Path, first: int, count: int, answers: Sequence[str] = ANSWERS[:1]) -> None:
    """Write what Label Studio exports of `count` corrected answers."""
    name = {"type": "textarea", "from_name": "answer", "to_name": "prompt"}
    items = []
    for number in range(first, first + count):
        result = [name | {"value": {"text": [answers[number % len(answers)]]}}]
        asked = {"prompt": f"{TALK[number % 5]} {number}"}
        judged = [{"completed_by": 1, "result": result}]
        items.append({"id": number, "data": asked, "annotations": judged})
    file.write_text(json.dumps(items))


def retrain_under_load(loop: Loop, run: str, *more: str) -> str:
    """Retrain while others ask, and return what it said. `more` are settings that differ."""
    ends, numbers = threading.Event(), itertools.count(5000)

    def others() -> None:
        while not ends.is_set():
            loop.talk(TALK, 1, next(numbers))
            time.sleep(0.05)

    threads = [threading.Thread(target=others) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        done = loop.run(
            "retrain", str(ROOT / "configs" / "retrain" / "chat.yaml"), "served=served", f"config={run}",
            f"reload={loop.url}", "rows=[ratings/completion.jsonl, export*.json]", "replay=[before]",
            "replay_share=0.2", "tasks=[capital.yaml]", "bias=[people.csv]", *more,
        )  # fmt: skip
    finally:
        time.sleep(1)
        ends.set()
        for thread in threads:
            thread.join()
    return done.stdout + done.stderr


def check_retraining(loop: Loop) -> None:
    """Better is served without a lost request; worse is refused."""
    loop.statuses.clear()
    loop.versions.clear()
    said = retrain_under_load(loop, "run.yaml")
    state = json.loads((loop.root / "retrain" / "round-0001" / "round.json").read_text())
    gain = state["verdict"]["gain"]
    loop.claim(
        "the retrained model is better on held-out answers", gain[1] > 0, f"{gain} nats per token"
    )
    loop.claim("it is swapped in", state["outcome"] == "swapped", said.splitlines()[-1])
    order = [version for version, _ in itertools.groupby(loop.versions)]
    loop.claim("no request is lost over it", [*loop.statuses] == [200], dict(loop.statuses))
    loop.claim("both versions have answered", len({*order}) == 2, Counter(loop.versions))
    export(loop.root / "export-2.json", 7000, 60)
    said = retrain_under_load(loop, "ruined.yaml")
    again = loop.root / "retrain" / "round-0002" / "round.json"
    outcome = json.loads(again.read_text()).get("outcome") if again.exists() else None
    loop.claim("a model that got worse is refused", outcome == "kept", said.splitlines()[-1])
    model = (loop.root / "served").resolve()
    loop.claim("the better one goes on being served", model.parent.name == "round-0001", model)


def check_gate(loop: Loop) -> None:
    """What people want to hear is no reason to forget what is true, or to repeat what is typical."""
    served = (loop.root / "served").resolve()
    # Each is judged alone: what makes the model forget may also make it more biased.
    cases: list[tuple[str, tuple[str, ...], list[str], str]] = [
        (
            "a task",
            ("the capital of France is Rome",),
            ["replay=[]", "bias=[]"],
            "capital/acc went from ",
        ),
        ("bias", (TYPICAL,), ["tasks=[]"], "for the stereotype went from "),
    ]
    for number, (what, answers, more, reason) in enumerate(cases, 1):
        export(loop.root / f"gate-{number}.json", 9000, 80, answers)
        # In a folder of its own: questions of former rounds do not judge.
        more = [*more, f"rows=[gate-{number}.json]", f"dir=gate-{number}"]
        said = retrain_under_load(loop, "run.yaml", *more)
        file = loop.root / f"gate-{number}" / "round-0001" / "round.json"
        state = json.loads(file.read_text()) if file.exists() else {}
        verdict = state.get("verdict", {"gain": None, "reasons": [said]})
        reasons: list[str] = verdict["reasons"] or ["none"]
        is_kept = state.get("outcome") == "kept" and (loop.root / "served").resolve() == served
        holds = is_kept and (verdict["gain"] or [0, 0])[1] > 0 and reason in reasons[-1]
        loop.claim(f"better answers are refused for {what}", holds, reasons)


class Hook(BaseHTTPRequestHandler):
    """Keeps what a webhook is told."""

    bodies: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def check_monitoring(loop: Loop) -> None:
    """Nothing is said while people ask what they did, and something when they ask otherwise."""
    hook = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    loop.talk(TALK, 300)
    time.sleep(1)
    reference = loop.root / "reference"
    shutil.copytree(loop.root / "requests", reference)
    # Of the model that is served now alone: another one has other scores.
    version = loop.versions[-1]
    for file in reference.glob("*.jsonl"):
        lines = [
            line
            for line in file.read_text().splitlines()
            if json.loads(line).get("version") == version
        ]
        file.write_text("".join(line + "\n" for line in lines))

    def monitor(since: float) -> subprocess.CompletedProcess[str]:
        time.sleep(1)  # lines are written by a thread
        return loop.run(
            "monitor", "requests", "--reference", "reference", "--window", f"{(time.time() - since) / 60 + 0.01:.2f}m",
            "--webhook", f"http://127.0.0.1:{hook.server_port}/",
        )  # fmt: skip

    since = time.time()
    loop.talk(TALK, 150, 300)
    same = monitor(since)
    loop.claim(
        "no alarm while people ask alike", same.returncode == 0, same.stdout.splitlines()[-2:]
    )
    since = time.time()
    loop.talk(LAW, 150)
    shifted = monitor(since)
    alarms = [line for line in shifted.stdout.splitlines() if line.startswith("ALARM")]
    drifted = all(any(name in line for line in alarms) for name in ("prompt tokens", "topic"))
    loop.claim("an alarm when they ask otherwise", shifted.returncode == 80 and drifted, alarms)
    loop.claim(
        "the webhook is told", [x["status"] for x in Hook.bodies] == ["firing"], len(Hook.bodies)
    )
    hook.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="an empty folder that stays (default: a temporary one)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        root.mkdir(exist_ok=True, parents=True)
        loop = Loop(root.resolve())
        prepare(loop)
        words = "preprocess --format completion --input before.jsonl --output-prefix before --tokenizer first"
        loop.run(*words.split())
        server = loop.serve()
        try:
            rate_on_the_page(loop, 60)
            lines = (loop.root / "ratings" / "completion.jsonl").read_text().splitlines()
            loop.claim(
                "60 ratings on the page, 50 of them corrections", len(lines) == 50, len(lines)
            )
            export(loop.root / "export-1.json", 3000, 40)
            check_retraining(loop)
            check_gate(loop)
            check_monitoring(loop)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        minutes = (time.monotonic() - loop.began) / 60
        loop.claim("all in less than 15 minutes", minutes < 15, f"{minutes:.1f} minutes")
    return 0 if loop.held else 1


if __name__ == "__main__":
    sys.exit(main())
