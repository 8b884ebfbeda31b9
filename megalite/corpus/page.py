"""Renders the report as one self-contained HTML page: what came, what was dropped, where and why,
with samples."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import yaml

ABOUT = {
    "read": "Lines and files that could be read.",
    "extract": "The text of HTML pages, without menus and boilerplate.",
    "encoding": "Text that was decoded wrongly is mended; Unicode is normalised.",
    "length": "Neither snippets nor dumps.",
    "language": "By fastText's lid.176, from the beginning of the text.",
    "repetition": "Gopher's rules on repeated lines, paragraphs and n-grams.",
    "gopher": "Gopher's rules of quality.",
    "c4": "C4's rules, which also take single lines out.",
    "fineweb": "FineWeb's rules.",
    "personal": "Email and public IP addresses are replaced.",
    "words": "Listed words are marked; mentions of groups of people are counted.",
    "exact": "Documents with the very text of one before.",
    "near": "Documents with nearly the text of another, by MinHash.",
}
MOST_REASONS = 12
MOST_LANGUAGES = 15
FEWEST_OF_A_GROUP = 30
"""Lower bound of the documents that mention a group before their share of listed words is shown:
fewer are chance."""

STYLE = """
:root { --ink: #1d2530; --soft: #667085; --line: #e4e7ec; --paper: #fff; --shade: #f7f8fa;
  --kept: #2f7d6d; --dropped: #d9705a; --edited: #e0b04c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #2c3440; --paper: #14181f; --shade: #1b212a;
    --kept: #4fae9a; --dropped: #e08a76; --edited: #d9a441; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 27px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 52px 0 4px; }
h3 { font-size: 16px; margin: 34px 0 2px; }
p { margin: 2px 0 12px; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
pre { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.45 "DejaVu Sans Mono", ui-monospace, monospace; }
figure { margin: 10px 0; padding: 8px 12px; background: var(--shade);
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
details { margin: 4px 0 2px; }
summary { cursor: pointer; color: var(--soft); font-size: 13.5px; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.tile { background: var(--shade); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 600; letter-spacing: -.01em; white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
table { width: 100%; margin: 8px 0 4px; border-collapse: collapse; table-layout: fixed;
  font-variant-numeric: tabular-nums; }
th { padding: 4px 10px; text-align: right; font-weight: 500; font-size: 12.5px; color: var(--soft);
  border-bottom: 1px solid var(--line); }
td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
.first { width: 24%; }
.wide { width: 30%; }
.bar { display: flex; height: 10px; border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 14px; }
.key:first-child { margin-left: 0; }
.kept { background: var(--kept); }
.dropped { background: var(--dropped); }
.edited { background: var(--edited); }
"""


def page_of(report: dict[str, Any]) -> str:
    """Return the page of a report, as report.json holds it."""
    stages = report["stages"]
    sources = escape(", ".join(report["sources"]))
    output = escape(report["config"]["output"])
    parts = [
        "<h1>What became of the corpus</h1>",
        f'<p class="soft">{sources} → {output}</p>',
        _tiles(report),
        "<h2>Stage by stage</h2>",
        _legend(),
        _funnel(stages),
        "<h2>Sources</h2>",
        _sources(report["sources"]),
        "<h2>What was dropped, and why</h2>",
        *(_stage(stage) for stage in stages),
        _messages(report),
        _languages(report["languages"]),
        _groups(report["groups"]),
        "<h2>Config</h2>",
        f"<details><summary>every setting</summary><pre>{escape(_yaml(report['config']))}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Corpus report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _tiles(report: dict[str, Any]) -> str:
    """Render the figures at the top."""
    came = report["stages"][0][
        "kept"
    ]  # the first stage is reading: what it kept came to the others
    splits = report["splits"]
    documents = sum(count["documents"] for count in splits.values())
    num_bytes = sum(count["num_bytes"] for count in splits.values())
    repeated = 0
    for stage in report["stages"]:
        if stage["name"] in ("exact", "near"):
            repeated += sum(reason["documents"] for reason in stage["dropped"].values())
    share = _share(documents, came["documents"])
    share_of_bytes = _share(num_bytes, came["num_bytes"])
    sizes = " · ".join(f"{count['documents']:,}" for count in splits.values())
    tiles = [
        (f"{documents:,}", f"of {came['documents']:,} documents kept, {share}"),
        (_size(num_bytes), f"of {_size(came['num_bytes'])} of text kept, {share_of_bytes}"),
        (f"{repeated:,}", "duplicates dropped"),
        (sizes, "documents in " + " · ".join(splits)),
    ]
    inner = "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles)
    return f'<div class="tiles">{inner}</div>'


def _legend() -> str:
    return (
        '<p class="soft"><span class="key kept"></span>kept<span class="key edited"></span>taken out of documents that '
        'were kept<span class="key dropped"></span>in documents that were dropped. Bytes are of text in UTF-8.</p>'
    )


def _funnel(stages: list[dict[str, Any]]) -> str:
    """Render what each stage kept, as one row a stage."""
    # All bars are shares of what came to the first stage, so that they can be compared.
    whole = max(stages[0]["came"]["num_bytes"], 1)
    rows = []
    for stage in stages:
        came, kept = stage["came"], stage["kept"]
        taken = max(stage["removed_bytes"], 0)  # negative where edits made texts longer
        dropped = sum(reason["num_bytes"] for reason in stage["dropped"].values())
        num_dropped = came["documents"] - kept["documents"]
        bar = [
            ("kept", kept["num_bytes"] / whole),
            ("edited", taken / whole),
            ("dropped", dropped / whole),
        ]
        row = [
            f'<a href="#{stage["name"]}">{stage["name"]}</a>',
            _bar(bar),
            f"{kept['documents']:,}",
            _minus(num_dropped),
            _share(num_dropped, came["documents"], zero=""),
            _size(kept["num_bytes"]),
            f"{stage['edited']:,}" if stage["edited"] else "",
        ]
        rows.append(row)
    return _table(["stage", "", "documents kept", "dropped", "", "bytes kept", "edited"], rows)


def _stage(stage: dict[str, Any]) -> str:
    """Render why a stage dropped documents, with samples."""
    name = stage["name"]
    came = stage["came"]
    most = max([reason["documents"] for reason in stage["dropped"].values()], default=1)
    reasons = list(stage["dropped"].items())
    rows, samples = [], []
    for reason, dropped in reasons[:MOST_REASONS]:
        row = [
            escape(reason),
            _bar([("dropped", dropped["documents"] / most)]),
            f"{dropped['documents']:,}",
            _share(dropped["documents"], came["documents"]),
            _size(dropped["num_bytes"]) if dropped["num_bytes"] else "",
        ]
        rows.append(row)
        samples += [_sample(reason, sample) for sample in dropped["samples"][:2]]
    # Anchors, which the table of stages links to.
    parts = [f'<h3 id="{name}">{name}</h3><p class="soft">{ABOUT[name]} {_edited(stage)}</p>']
    if rows:
        parts.append(_table(["dropped for", "", "documents", "of those that came", "bytes"], rows))
    if more := reasons[MOST_REASONS:]:
        count = sum(dropped["documents"] for _, dropped in more)
        parts.append(
            f'<p class="soft">… and {len(more)} rarer reasons with {count:,} documents, in report.json</p>'
        )
    if samples:
        parts.append(
            f"<details><summary>samples of what was dropped</summary>{''.join(samples)}</details>"
        )
    return "".join(parts)


def _edited(stage: dict[str, Any]) -> str:
    """Say in sentences what a stage edited and counted."""
    told = []
    if stage["edited"]:
        size = stage["removed_bytes"]
        change = "as long as before"
        if size:
            direction = "shorter" if size > 0 else "longer"
            change = f"{_size(abs(size))} {direction} in all"
        told.append(f"{stage['edited']:,} of the documents kept were edited, {change}.")
    if stage["name"] in ("read", "personal"):
        told += [f"{count:,} {escape(what)}." for what, count in stage["notes"].items()]
    if stage["name"] == "words":
        listed = stage["notes"].get("listed", 0)
        told.append(
            f'{listed:,} documents hold listed words; <a href="#groups">groups</a> are below.'
        )
    if told:
        return " ".join(told)
    return "" if stage["dropped"] else "It found nothing."


def _sample(reason: str, sample: dict[str, str]) -> str:
    return (
        f"<figure><figcaption><b>{escape(reason)}</b> — {escape(sample['id'])}</figcaption>"
        f"<pre>{escape(sample['text'])}</pre></figure>"
    )


def _sources(sources: dict[str, Any]) -> str:
    """Render what was read and kept of each source."""
    rows = []
    for name, counts in sources.items():
        splits = [count for side, count in counts.items() if side != "read"]
        kept = sum(count["num_bytes"] for count in splits)
        read = counts["read"]["num_bytes"]
        share = kept / max(read, 1)
        row = [
            escape(name),
            _bar([("kept", share), ("dropped", max(1 - share, 0))]),
            f"{counts['read']['documents']:,}",
            _size(read),
            *(f"{count['documents']:,}" for count in splits),
            _size(kept),
        ]
        rows.append(row)
    return _table(["source", "", "read", "", "train", "valid", "test", "kept"], rows)


def _messages(report: dict[str, Any]) -> str:
    """Render the messages about files that could not be read."""
    if not report["messages"]:
        return ""
    more = ""
    if report["more_messages"]:
        more = f'<p class="soft">… and {report["more_messages"]:,} more</p>'
    lines = escape("\n".join(report["messages"]))
    return f"<h3>Where reading failed</h3><figure><pre>{lines}</pre></figure>{more}"


def _languages(languages: dict[str, int]) -> str:
    """Render the most frequent languages."""
    if not languages:
        return ""
    total = sum(languages.values())
    found = list(languages.items())  # the most frequent first
    _, most = found[0]
    rows = []
    for code, count in found[:MOST_LANGUAGES]:
        bar = _bar([("kept", count / most)])
        rows.append([escape(code), bar, f"{count:,}", _share(count, total)])
    more = ""
    if len(found) > MOST_LANGUAGES:
        more = f'<p class="soft">… and {len(found) - MOST_LANGUAGES} more</p>'
    intro = '<p class="soft">Of the documents that came to the language stage.</p>'
    return "<h2>Languages</h2>" + intro + _table(["code", "", "documents", ""], rows) + more


def _groups(groups: dict[str, Any]) -> str:
    """Render how often groups of people are mentioned, and beside listed words."""
    if not groups.get("documents"):
        return ""
    listed = groups["listed"] / groups["documents"]
    most = max((counts["documents"] for counts in groups["groups"].values()), default=1)
    rows = []
    for name, counts in groups["groups"].items():
        share = counts["listed"] / counts["documents"]
        against_all = "–"
        if listed and counts["documents"] >= FEWEST_OF_A_GROUP:
            against_all = f"{share / listed:.1f}×"
        row = [
            escape(name.replace("/", ": ").replace("_", " ")),
            _bar([("kept", counts["documents"] / most)]),
            f"{counts['documents']:,}",
            _share(counts["documents"], groups["documents"]),
            _share(counts["listed"], counts["documents"], zero="–"),
            against_all,
        ]
        rows.append(row)
    share_of_all = _share(groups["listed"], groups["documents"])
    holding = f"{groups['listed']:,} ({share_of_all}) hold listed words"
    intro = (
        f'<p class="soft">Of {groups["documents"]:,} documents, {holding}. The last column says how much oftener than '
        f"all those do that speak of a group, from {FEWEST_OF_A_GROUP} documents on. Words are counted, not meanings."
        "</p>"
    )
    header = ["group", "", "documents that mention it", "", "with listed words", "against all"]
    return '<h2 id="groups">Groups of people</h2>' + intro + _table(header, rows)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Render a table of cells that are HTML. The first column holds names, the second one bars."""
    classes = {0: ' class="first"', 1: ' class="wide"'}
    head = body = ""
    for number, cell in enumerate(header):
        head += f"<th{classes.get(number, '')}>{cell}</th>"
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bar(parts: list[tuple[str, float]]) -> str:
    """Render a bar of (class, share of the width)."""
    inner = ""
    for kind, share in parts:
        if share > 0:
            width = 100 * min(share, 1)
            inner += f'<i class="{kind}" style="width:{width:.2f}%"></i>'
    return f'<div class="bar">{inner}</div>'


def _minus(count: int) -> str:
    return f"−{count:,}" if count else ""


def _share(part: int, whole: int, zero: str = "0%") -> str:
    if not part or not whole:
        return zero
    share = 100 * part / whole
    if share >= 10:
        return f"{share:.0f}%"
    return f"{share:.1f}%" if share >= 0.1 else "<0.1%"


def _size(num_bytes: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            digits = 0 if value >= 100 else 1
            return f"{value:,.{digits}f} {unit}"
    return f"{num_bytes:,} B"


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
