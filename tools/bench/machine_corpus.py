"""Text found on this machine as raw input for tools/prepare_corpus.py, with cases planted that it
must find.

    python tools/bench/machine_corpus.py data/machine --mb 120
    python tools/prepare_corpus.py configs/corpus/machine.yaml
    python tools/bench/machine_corpus.py data/machine --check data/machine-clean

Python packages' sources, manual pages and /usr/share/doc, as JSON lines, WARC and plain text. The
same machine gives the same files. `--check` reads the output and says of every planted case what
became of it."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import zstandard

from megalite.data.documents import Reading, read_files
from megalite.data.inputs import Report, list_files

FILE_BYTES = 8_000_000
PLANTED = "planted"  # the folder, and the source in configs/corpus/machine.yaml
SHARES = {"code": 0.55, "manual": 0.25, "doc": 0.2}  # of the megabytes asked for
WORDS = {
    "adjective": "old young wooden quiet distant heavy narrow careful bright cold empty gentle honest broken foreign "
    "golden hungry little modern nervous patient rapid silent simple strange sudden tired useful warm "
    "wise yellow ancient brave",
    "noun": "bridge letter garden map winter harbour village teacher captain river window market doctor forest "
    "library neighbour painter kitchen mountain engine island journey lantern machine newspaper orchard "
    "passenger railway sailor shoulder station student summer theatre traveller valley workshop farmer "
    "hospital council",
    "verb": "discovered repaired remembered described measured followed painted answered borrowed carried crossed "
    "delivered examined feared greeted helped imagined joined lifted mentioned noticed opened praised "
    "reached searched touched visited watched welcomed admired",
    "place": "near above behind beyond under beside against towards across along",
    "end": "yesterday slowly again together tonight everywhere twice alone quickly almost",
}
VOCABULARY = {kind: words.split() for kind, words in WORDS.items()}


def prose(seed: int, num_sentences: int = 16) -> str:
    """English that every rule lets pass, and that has no words in a row with the prose of another
    seed."""
    draw = random.Random(seed)

    def pick(kind: str) -> str:
        return draw.choice(VOCABULARY[kind])

    sentences = [
        f"The {pick('adjective')} {pick('noun')} {pick('verb')} the {pick('noun')} {pick('place')} the "
        f"{pick('adjective')} {pick('noun')}, and with a {pick('noun')} that {pick('verb')} {pick('noun')} "
        f"{draw.randrange(100, 1000)} of {pick('noun')} to {pick('verb')} {pick('end')}."
        for _ in range(num_sentences)
    ]
    return "\n".join(" ".join(sentences[start : start + 4]) for start in range(0, num_sentences, 4))


GERMAN = (
    "Der alte Kapitän ging am frühen Morgen über die Brücke, weil er seinen Brief noch vor dem Regen abgeben "
    "wollte. Niemand hatte ihm gesagt, dass die Post an diesem Tag geschlossen war. Also setzte er sich auf eine "
    "Bank, sah den Schiffen zu und dachte an die Jahre, in denen er selbst zur See gefahren war. Am Abend kam "
    "seine Tochter und holte ihn nach Hause. "
)


def planted() -> dict[str, tuple[str, str]]:
    """Documents by id: what should become of each, and its text."""
    cases = {f"good-{seed}": ("kept", prose(seed)) for seed in range(40)}
    cases |= {
        "exact-copy": ("exact", prose(0)),
        "near-copy": (
            "near",
            prose(1).replace("yesterday", "today") + " One more sentence ends this copy.",
        ),
        "spaced-copy": ("near", prose(2).replace(" ", "  ")),
        "empty": ("read", ""),
        "blank": ("read", " \n\t "),
        "short": ("length", "Too short to be of use."),
        "giant": ("length", "\n".join(prose(seed) for seed in range(1000, 2000))),
        "german": ("language", GERMAN * 3),
        "repetitive": ("repetition", "Buy the best watches in the town here today. " * 40),
        "symbols": ("gopher", prose(50).replace(" the ", " #the #")),
        "mojibake": (
            "kept",
            prose(51).replace("The ", "Thé ").encode().decode("cp1252")
            + " It’s naïve.".encode().decode("cp1252"),
        ),
        "personal": (
            "kept",
            prose(52)
            + " Write to jane.doe@mail.acme.io or call 81.2.69.142 or 2a00:1450:4001:82a::200e.",
        ),
        "lorem": ("c4", prose(54) + "\nLorem ipsum dolor sit amet, the usual words."),
    }
    return cases


def plant(folder: Path) -> None:
    """The cases, and damaged files: truncated .gz and WARC, bad JSON, bytes that are not UTF-8, a
    binary file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": name, "text": text}) for name, (_, text) in planted().items()]
    (folder / "cases.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "bad.jsonl").write_bytes(
        b'{"id": "after-bad", "text": "cut\n["not an object"]\n{"id": "no-text"}\n'
        + json.dumps({"id": "latin", "text": prose(60)}).encode().replace(b"harbour", b"harb\xf6ur")
        + b"\n"
        + json.dumps({"id": "good-last", "text": prose(61)}).encode()
        + b"\n"
    )
    draw = random.Random(0)
    noise = "".join(
        json.dumps({"id": f"cut-{seed}", "text": prose(seed)}) + "\n" for seed in range(2000, 2200)
    )
    packed = gzip.compress(noise.encode(), mtime=0)
    (folder / "truncated.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "latin.txt").write_bytes(prose(62).replace("village", "pâtisserie").encode("latin-1"))
    (folder / "shift-jis.txt").write_bytes(
        "古い橋の近くで船長が手紙を書いた。".encode("shift-jis") * 50
    )
    (folder / "image.bin").write_bytes(draw.randbytes(5000))
    pages = list(
        chain.from_iterable(
            warc_record(f"page-{seed}", html(prose(seed))) for seed in range(70, 73)
        )
    )
    whole = b"".join(gzip.compress(record, mtime=0) for record in pages)
    (folder / "pages.warc.gz").write_bytes(whole)
    (folder / "truncated.warc.gz").write_bytes(whole[: len(whole) - 100])


def html(text: str) -> str:
    paragraphs = "".join(f"<p>{line}</p>" for line in text.splitlines())
    menu = (
        "<nav><ul>"
        + "".join(f"<li><a href='/{n}'>Menu entry {n}</a></li>" for n in range(8))
        + "</ul></nav>"
    )
    body = f"{menu}<main><article>{paragraphs}</article></main>"
    return f"<html><head><title>A page</title></head><body>{body}</body></html>"


def warc_record(name: str, page: str) -> Iterator[bytes]:
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page.encode()
    header = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:{name}>\r\nWARC-Target-URI: https://example.org/{name}\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    yield header.encode() + body + b"\r\n\r\n"


def texts_of_machine(kind: str) -> Iterator[tuple[str, str]]:
    """(where from, text) of everything found, in the order of the paths."""
    if kind == "code":
        roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
        wanted = {".py", ".pyi", ".md", ".rst", ".txt"}
        paths = [
            path for root in roots for path in sorted(root.rglob("*")) if path.suffix in wanted
        ]
    elif kind == "manual":
        paths = sorted(Path("/usr/share/man").rglob("*.gz"))
    else:
        paths = sorted(
            path
            for path in Path("/usr/share/doc").rglob("*")
            if path.suffix not in (".html", ".png", ".svg")
        )
    for path in paths:
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if b"\0" in data[:8192]:
            continue
        text = data.decode("utf-8", "replace")
        yield str(path), without_roff(text) if kind == "manual" else text


def without_roff(text: str) -> str:
    """The words of a manual page without its layout."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".SH", ".SS", ".TH")):
            lines += ["", line[3:].strip().strip('"').title(), ""]
        elif line.startswith((".B ", ".I ", ".BR ", ".IR ", ".RB ", ".RI ", ".BI ")):
            lines.append(line.partition(" ")[2].replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
        elif line.startswith((".PP", ".P", ".TP", ".IP", ".LP")):
            lines.append("")
    text = re.sub(r"\\f(?:\[\w*\]|.)|\\&|\\\^|\\\||\\c$", "", "\n".join(lines))
    return re.sub(
        r"\n{3,}", "\n\n", text.replace("\\-", "-").replace("\\e", "\\").replace("\\(aq", "'")
    )


def write_lines(folder: Path, documents: Iterable[tuple[str, str]], num_bytes: float) -> int:
    """Files of about FILE_BYTES of text, until so many bytes are reached. Returns how many were."""
    folder.mkdir(parents=True, exist_ok=True)
    written, number = 0, 0
    buffer = io.BytesIO()

    def flush() -> None:
        nonlocal number
        packed = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
        (folder / f"{number:03d}.jsonl.zst").write_bytes(packed)
        number += 1
        buffer.seek(0)
        buffer.truncate()

    for origin, text in documents:
        if written >= num_bytes:
            break
        buffer.write(
            json.dumps({"text": text, "file": origin}, ensure_ascii=False).encode(
                "utf-8", "replace"
            )
            + b"\n"
        )
        written += len(text.encode())
        if buffer.tell() >= FILE_BYTES:
            flush()
    if buffer.tell():
        flush()
    return written


def write_pages(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in Path("/usr/share/doc").rglob("*.html") if path.is_file())
    with open(folder / "doc.warc.gz", "wb") as file:
        for path in paths:
            for record in warc_record(
                str(path), path.read_text(encoding="utf-8", errors="replace")
            ):
                file.write(gzip.compress(record, mtime=0))
    return len(paths)


DAMAGED = (
    "bad.jsonl:1",
    "bad.jsonl:2",
    "bad.jsonl:3",
    "truncated.jsonl.gz",
    "truncated.warc.gz",
    "shift-jis.txt",
)
"""Files, and lines of such, that the report must name."""

COPIES = {"exact-copy": "good-0", "near-copy": "good-1", "spaced-copy": "good-2"}
"""Copies, and the documents that they are of. Either of the two may stay."""


def check(folder: Path, output: Path) -> int:
    """Prints every planted case that became of something else than it should. Returns how many."""
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    kept = _kept(output)
    text = "".join(kept.values())
    told = "\n".join(report["messages"])
    failures = [*_wrong_fates(folder, kept), *_wrong_text(text)]
    failures += [f"{name}: not reported" for name in DAMAGED if name not in told]
    found = f"all {len(planted())} planted cases and the damaged files were found"
    print("\n".join(failures) or found)
    return len(failures)


def _kept(output: Path) -> dict[str, str]:
    """Returns the texts of the planted documents that are in a split, by their ids."""
    kept = {}
    for split in ("train", "valid", "test"):
        if not (output / split).exists():
            continue
        files = list_files([str(output / split)], Report())
        for document in read_files(files, Reading(metadata=True), Report()):
            if document.metadata["source"] == PLANTED:
                kept[document.metadata["id"]] = document.text
    return kept


def _wrong_fates(folder: Path, kept: dict[str, str]) -> Iterator[str]:
    """Yields what is wrong about which documents were kept."""
    for name, (fate, _) in planted().items():
        # Of two near duplicates either may stay.
        if fate == "near" or name in COPIES.values():
            continue
        if (fate == "kept") != (name in kept):
            wanted = "kept" if fate == "kept" else f"dropped by {fate}"
            yield f"{name}: should be {wanted}"
    for copy, original in COPIES.items():
        if (copy in kept) == (original in kept):
            yield f"{copy} and {original}: one of the two should be kept"
    latin = str(folder / PLANTED / "latin.txt") + ":1"
    for name in ("latin", "good-last", "<urn:page-70>", latin, "cut-2000"):
        if name not in kept:
            yield f"{name}: should be kept"


def _wrong_text(text: str) -> Iterator[str]:
    """Yields what is still in the kept `text`, or no longer, against what should be."""
    for gone in ("jane.doe", "81.2.69.142", "2a00:1450", "Ã©", "Menu entry"):
        if gone in text:
            yield f"{gone} is still there"
    for mended in ("It’s naïve", "harböur", "pâtisserie"):
        if mended not in text:
            yield f"{mended} is not there"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--mb", type=float, default=120.0, help="megabytes of text in all (default: %(default)s)"
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="OUTPUT",
        help="collect nothing; look into this output instead",
    )
    args = parser.parse_args()
    if args.check:
        return min(check(args.folder, args.check), 1)
    for kind, share in SHARES.items():
        written = write_lines(args.folder / kind, texts_of_machine(kind), share * args.mb * 1e6)
        print(f"{kind}: {written / 1e6:.1f} MB")
    print(f"pages: {write_pages(args.folder / 'pages')} of HTML")
    plant(args.folder / PLANTED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
