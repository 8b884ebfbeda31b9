"""Tell a file's format by its name, or by its beginning if the name does not say. What neither says
is not guessed."""

from __future__ import annotations

import re

PACKED = (".gz", ".zst")
"""Compressions that are undone while reading."""
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
PARQUET = (".parquet", ".pq")
# Read as text without a second look; others are opened first.
TEXT = frozenset(
    """
    .txt .text .md .markdown .rst .tex .html .htm .xhtml .xml .svg .css .js .mjs .ts .jsx .tsx .vue .py .pyi
    .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .java .kt .scala .go .rs .rb .php .pl .pm .lua .r .jl .m
    .swift .cs .fs .hs .ml .ex .exs .erl .clj .lisp .el .f .f90 .asm .s .sh .bash .zsh .ps1 .bat .sql .toml
    .ini .cfg .conf .yaml .yml .po .log .org .adoc .srt .vtt .bib .diff .patch .cmake .mk .proto .ipynb .1
    .3 .5 .7 .8
    """.split()  # noqa: SIM905
)
REFUSED = frozenset(
    """
    .csv .tsv .tab .psv .xls .xlsx .ods .avro .orc .feather .tfrecord .tfrecords .msgpack .pkl .pickle .npy
    .npz .pt .pth .safetensors .h5 .hdf5 .sqlite .tar .tgz .zip .bz2 .xz .lzma .7z
    .rar .lz4 .snappy .br .lzo .z .warc .wet .wat .arc .pdf .doc .docx .odt .epub .mobi .djvu
    """.split()  # noqa: SIM905
)
MAGIC = {
    b"\x1f\x8b": "gzip, although it is not called .gz", b"\x28\xb5\x2f\xfd": "zstd, although it is not called .zst",
    b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR", b"%PDF": "PDF",
    b"ARROW1": "Arrow's file format (its streams are read)", b"Obj\x01": "Avro", b"ORC": "ORC",
    b"\xff\x06\x00\x00sNaPpY": "snappy", b"\x04\x22\x4d\x18": "LZ4", b"WARC/": "WARC (see `megalite corpus`)",
}  # fmt: skip
PART = re.compile(r"(?:.*/)?part-[\w-]*\d[\w-]*")
"""Name that Spark and Hadoop give their output, whatever its format."""
KNOWN = (
    "known are JSON lines (.jsonl, .ndjson, .json), a JSON array of objects (.json), .parquet, .arrow and plain text, "
    "also as .gz or .zst"
)


def unpacked_name(path: str) -> str:
    """Return the lower-case name that a file has after decompression."""
    name = path.lower()
    while name.endswith(PACKED):
        name = name.rpartition(".")[0]
    return name


def suffix_of(path: str) -> str:
    """Return a file's suffix, compression aside; empty if there is none."""
    name = unpacked_name(path).rpartition("/")[2]
    return f".{name.rpartition('.')[2]}" if "." in name.lstrip(".") else ""


def is_packed(path: str) -> bool:
    """Return whether a file's name says that it is compressed."""
    return path.lower().endswith(PACKED)


def kind_by_name(path: str) -> str:
    """Return "lines", "parquet", "arrow", "text" or "refused"; "" if the name does not say."""
    suffix, name = suffix_of(path), unpacked_name(path)
    if suffix in JSON_LINES:
        return "lines"
    if suffix in (*PARQUET, ".arrow"):
        # Columns are packed inside of such a file.
        return "refused" if is_packed(path) else "arrow" if suffix == ".arrow" else "parquet"
    if suffix == ".snappy" and name.removesuffix(".snappy").endswith(PARQUET):
        return "parquet"
    if suffix in REFUSED:
        return "refused"
    return "text" if suffix in TEXT else ""


def kind_by_content(path: str, head: bytes, first_is_object: bool) -> str:
    """Return the kind of a file by its first bytes `head` and whether its first line is a JSON
    object. For a kind that is not read, return the reason after "not: "."""
    # What formats begin with comes first: anything may be text.
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "arrow"
    if magic := next((name for magic, name in MAGIC.items() if head.startswith(magic)), ""):
        return f"not: this is {magic}; {KNOWN}"
    if first_is_object:
        return "lines"
    if re.match(rb"\s*\[\s*(\{|\]\s*$)", head.removeprefix(b"\xef\xbb\xbf")):
        return "array"
    if PART.fullmatch(unpacked_name(path)):
        return f"not: neither its name nor its first line says what it is; {KNOWN}"
    return "text"
