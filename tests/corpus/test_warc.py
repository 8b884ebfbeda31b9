"""Web pages as crawlers store them: each charset wherever it is declared, each packing, what is no
page."""

from __future__ import annotations

import codecs
import gzip
import itertools
import random
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from megalite.corpus import charsets
from megalite.corpus.charsets import codec_of, declared_in, decode
from megalite.corpus.warc import OTHER_TYPES, read_warc, unpacked
from megalite.data.documents import Document
from megalite.data.inputs import Report
from megalite.errors import DataError

WORDS = {
    "latin": "Château à la plage, œuvre où l’été « coûte » 5 € — naïve élève, ça va très bien, déjà vu, garçon",
    "cyrillic": "Капитан написал длинное письмо в сельский совет, а потом уехал домой через старый мост",
    "japanese": "船長は村の議会に長い手紙を書いた。それから古い橋を渡って家に帰りました。カタカナも。",
    "simplified": "船长给村议会写了一封长信，然后过了旧桥回家。他没有说什么。",
    "traditional": "船長給村議會寫了一封長信，然後過了舊橋回家。他沒有說什麼。",
    "korean": "선장은 마을 의회에 긴 편지를 썼다. 그리고 오래된 다리를 건너 집으로 돌아갔다.",
    "greek": "Ο καπετάνιος έγραψε ένα μακρύ γράμμα στο συμβούλιο του χωριού",
    "thai": "กัปตันเขียนจดหมายยาวถึงสภาหมู่บ้าน แล้วเดินกลับบ้าน",
}
# Label as pages spell it, Python's codec to write it with, and what can be written in it.
CHARSETS = [
    ("iso-8859-1", "cp1252", "latin"), ("Latin1", "cp1252", "latin"), ("us-ascii", "cp1252", "latin"),
    ("windows-1252", "cp1252", "latin"), ("iso-8859-15", "iso8859-15", "latin"), ("UTF-8", "utf-8", "japanese"),
    ("utf8", "utf-8", "latin"), ("windows-1251", "cp1251", "cyrillic"), ("KOI8-R", "koi8-r", "cyrillic"),
    ("iso-8859-5", "iso8859-5", "cyrillic"), ("ibm866", "cp866", "cyrillic"), ("Shift_JIS", "cp932", "japanese"),
    ("x-sjis", "cp932", "japanese"), ("EUC-JP", "euc_jp", "japanese"), ("ISO-2022-JP", "iso2022_jp", "japanese"),
    ("GB18030", "gb18030", "simplified"), ("gb2312", "gbk", "simplified"), ("gbk", "gbk", "simplified"),
    ("Big5", "big5hkscs", "traditional"), ("EUC-KR", "cp949", "korean"), ("ks_c_5601-1987", "cp949", "korean"),
    ("iso-8859-7", "iso8859-7", "greek"), ("windows-1253", "cp1253", "greek"), ("TIS-620", "cp874", "thai"),
]  # fmt: skip
UTF_16 = [
    ("utf-16le", "utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16be", "utf-16-be", codecs.BOM_UTF16_BE),
]
WHERE = {
    "header": ("text/html; charset={}", "<title>x</title>"),
    "quoted header": ('text/html;x=y; CHARSET="{}"', "<title>x</title>"),
    "meta": ("text/html", '<title>x</title><META charset="{}">'),
    "old meta": ("text/html", "<meta content='text/html; charset={}' http-equiv=Content-Type>"),
    "meta behind a comment": (
        "text/html",
        '<!-- <meta charset="utf-16"> --><meta name="a" content="b"><meta charset={}>',
    ),
    "header against meta": ("text/html; charset={}", '<meta charset="iso-8859-4">'),
}


def page_of(text: str, head: str) -> str:
    return f"<html><head>{head}</head><body><p>{text}</p></body></html>"


def record(
    body: bytes, http: str = "Content-Type: text/html\r\n", status: str = "200 OK", more: str = ""
) -> bytes:
    answer = f"HTTP/1.1 {status}\r\n{http}\r\n".encode() + body
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.io/\r\nWARC-Record-ID: <urn:a>\r\n{more}"
    head += f"Content-Type: application/http\r\nContent-Length: {len(answer)}\r\n\r\n"
    return head.encode() + answer + b"\r\n\r\n"


def read(tmp_path: Path, *records: bytes) -> tuple[list[Document], Report]:
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    report = Report()
    return list(read_warc(str(tmp_path / "a.warc"), report)), report


@pytest.mark.parametrize("where", WHERE)
def test_a_page_is_read_by_the_charset_it_declares(tmp_path: Path, where: str) -> None:
    header, head = WHERE[where]
    pages = [page_of(WORDS[words], head.format(label)) for label, _, words in CHARSETS]
    records = [
        record(page.encode(codec, "ignore"), f"Content-Type: {header.format(label)}\r\n")
        for page, (label, codec, _) in zip(pages, CHARSETS, strict=True)
    ]
    documents, _ = read(tmp_path, *records)
    for document, page, (label, codec, _) in zip(documents, pages, CHARSETS, strict=True):
        assert document.text == page.encode(codec, "ignore").decode(codec), label


def test_a_byte_order_mark_comes_before_all_else(tmp_path: Path) -> None:
    page = page_of(WORDS["japanese"], '<meta charset="shift_jis">')
    header = "Content-Type: text/html; charset=windows-1252\r\n"
    marked = [(codecs.BOM_UTF8, "utf-8"), *((mark, codec) for _, codec, mark in UTF_16)]
    documents, _ = read(
        tmp_path, *(record(mark + page.encode(codec), header) for mark, codec in marked)
    )
    assert [document.text for document in documents] == [page] * 3


def test_utf_16_by_header_or_by_its_zeros_but_not_by_meta(tmp_path: Path) -> None:
    page = page_of(
        "Plain English in two bytes each, as some editors save it.", '<meta charset="utf-16">'
    )
    records = [
        record(page.encode(codec), f"Content-Type: text/html; charset={label}\r\n")
        for label, codec, _ in UTF_16
    ]
    records += [record(page.encode(codec)) for _, codec, _ in UTF_16]
    records += [record(page.encode())]  # what says so in ASCII is UTF-8
    assert [document.text for document in read(tmp_path, *records)[0]] == [page] * 5


def test_a_charset_that_cannot_be_is_passed_over() -> None:
    latin, japanese = (page_of(WORDS[name] * 3, "") for name in ("latin", "japanese"))
    said = decode(latin.encode("cp1252"), "text/html; charset=utf-8", True)
    assert said.found_in == "bytes"
    declared = page_of(WORDS["japanese"], '<meta charset="euc-jp">')
    assert decode(declared.encode("euc_jp"), "text/html; charset=utf-8", True).text == declared
    for label in ("utf-7", "rot13", "unicode_escape", "idna", "base64", "x-none", ""):
        assert codec_of(label) is None, f"{label} is no charset of a page"
        assert decode(japanese.encode(), f"text/html; charset={label}", True).text == japanese
    broken = japanese.encode()[:50] + b"\xff" + japanese.encode()[50:]
    assert decode(broken * 20, "text/html; charset=utf-8", True).codec == "utf_8", (
        "a few bad bytes do not change it"
    )


def test_what_browsers_read_and_pythons_codecs_do_not() -> None:
    assert decode(b"\x80\x81\x9f", "a; charset=latin1", False).text == "€\x81Ÿ"
    assert decode(b"\xad\xa1\xa1\xc1\xa4\xa2", "a; charset=euc-jp", False).text == "①～あ"
    assert decode("한국".encode("cp949"), "a; charset=euc-kr", False).text == "한국"
    assert decode("㐀€".encode("gb18030"), "a; charset=gb2312", False).text == "㐀€"
    assert declared_in(b'<?xml version="1.0" encoding="koi8-r"?><html>') == "koi8_r"
    assert all(codecs.lookup(codec) for codec in charsets.CODECS)


def chunked(body: bytes) -> bytes:
    cuts = sorted({0, len(body), *random.Random(0).sample(range(len(body)), 3)})
    parts = [body[first:last] for first, last in itertools.pairwise(cuts)]
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def deflated(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


CODINGS = {
    "identity": bytes, "gzip": gzip.compress, "x-gzip": lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:]),
    "deflate": zlib.compress, "DEFLATE": deflated, "zstd": zstandard.ZstdCompressor().compress,
    "deflate, gzip": lambda body: gzip.compress(zlib.compress(body)),
}  # fmt: skip


@pytest.mark.parametrize("coding", CODINGS)
def test_bodies_are_unpacked_as_their_headers_say_or_as_they_are(
    tmp_path: Path, coding: str
) -> None:
    page = page_of(WORDS["latin"] * 5, '<meta charset="latin1">').encode("cp1252")
    packed = CODINGS[coding](page)
    header = f"Content-Type: text/html\r\nContent-Encoding: {coding}\r\n"
    both = header + "Transfer-Encoding: chunked\r\n"
    # Crawlers store bodies without chunks, or without any packing, under the headers that came.
    bodies = [
        (header, packed),
        (both, chunked(packed)),
        (both, packed),
        (header, page),
        (both, page),
    ]
    documents, report = read(tmp_path, *(record(body, http) for http, body in bodies))
    assert [document.text.encode("cp1252") for document in documents] == [page] * 5, report.messages


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_body_that_lacks_its_end_is_what_there_is(tmp_path: Path, coding: str) -> None:
    noise = "".join(random.Random(1).choices("abcdefghij ", k=600_000))
    page = page_of(noise + WORDS["japanese"], '<meta charset="utf-8">')
    packed = CODINGS[coding](page.encode())
    header = (
        f"Content-Type: text/html\r\nContent-Encoding: {coding}\r\nTransfer-Encoding: chunked\r\n"
    )
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    records = [
        record(body, header)
        for body in (packed[: len(packed) // 2], chunked(packed)[:-60], bytes(damaged))
    ]
    records += [
        record(page.encode()[:-60], more="WARC-Truncated: length\r\n"),
        record(page.encode()),
    ]
    documents, report = read(tmp_path, *records)
    assert documents[-1].text == page
    for document in (documents[0], documents[1], documents[3]):
        assert len(document.text) > 1000
        assert page.startswith(document.text), "a character that was cut is left out"
    assert len(documents) + report.num_bad == 5


def test_a_small_page_that_unpacks_to_a_large_one_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalite.corpus.warc.LONGEST_PAGE", 100_000)
    bomb = b"<html>" + bytes(10_000_000)
    records = [
        record(CODINGS[coding](bomb), f"Content-Type: text/html\r\nContent-Encoding: {coding}\r\n")
        for coding in ("gzip", "deflate", "zstd", "deflate, gzip")
    ]
    documents, report = read(
        tmp_path, *records, record(b"<html>" + b"a" * 100_000), record(b"<html>good")
    )
    assert [document.text for document in documents] == ["<html>good"]
    assert report.num_bad == 5
    assert all("longer than 100,000 bytes" in message for message in report.messages)


def test_what_is_no_page_is_counted_by_name(tmp_path: Path) -> None:
    page = b"<html><body>An error, or the way to somewhere else</body></html>"
    statuses = [
        "200 OK",
        "203 Other",
        "301 Moved",
        "302 Found",
        "404 Not Found",
        "410 Gone",
        "500 Error",
        "503 Busy",
        "101 X",
    ]
    records = [record(page, status=status) for status in statuses]
    records += [
        record(page, f"Content-Type: {kind}\r\n")
        for kind in ("image/png", "application/pdf", "text/css")
    ]
    records += [record(page, "Server: x\r\n"), record(b"\x89PNG", "Server: x\r\n")]
    records.append(record(page).replace(b"WARC-Type: response", b"WARC-Type: revisit"))
    documents, report = read(tmp_path, *records)
    assert len(documents) == 3, "two of success, and one without a type that begins as HTML does"
    assert report.left_out == {
        "redirects (HTTP 3xx)": 2,
        "error pages (HTTP 4xx)": 2,
        "error pages (HTTP 5xx)": 2,
        "responses without a status of success": 1,
        OTHER_TYPES: 4,
        "revisits: the page was seen before": 1,
    }
    assert "left out: 2 error pages (HTTP 4xx)" in str(report)


def test_brotli_without_its_package_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    headers = {"Content-Encoding": "br"}
    with pytest.raises(DataError, match="brotli"):
        unpacked(
            b"\x0b\x02\x80hello\x03",
            type("Http", (), {"get_header": lambda self, name: headers.get(name)})(),
        )
    documents, report = read(
        tmp_path,
        *(
            record(body, "Content-Type: text/html\r\nContent-Encoding: br\r\n")
            for body in (b"\x0b\x02", b"<html>x")
        ),
    )
    assert [document.text for document in documents] == ["<html>x"]
    assert report.num_bad == 1


def test_brotli_is_unpacked(tmp_path: Path) -> None:
    """Also of a page that is cut; and one that lies about being packed is read as it is."""
    brotli = pytest.importorskip("brotli")
    page = (
        b"<html><body>"
        + b"".join(b"<p>line %d of the page</p>" % line for line in range(3000))
        + b"</body></html>"
    )
    packed = brotli.compress(page)
    bodies = (packed, packed[: len(packed) // 2], page)
    coded = "Content-Type: text/html\r\nContent-Encoding: br\r\n"
    documents, report = read(tmp_path, *(record(body, coded) for body in bodies))
    texts = [document.text.encode() for document in documents]
    assert (texts[0], texts[2], report.num_bad) == (page, page, 0)
    assert page.startswith(texts[1])
    assert len(texts[1]) > 1000
