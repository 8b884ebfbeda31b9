"""Finds the charset of a web page as browsers do: byte-order mark, HTTP header, the page's own
declaration, and only then a guess from its bytes.

Labels are those of the WHATWG Encoding Standard: `iso-8859-1` is windows-1252 there, `gb2312` is GB
18030, and an unknown label, such as `utf-7`, is ignored. Two charsets that browsers refuse for fear
of scripts in them are read: hz-gb-2312 and iso-2022-kr.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

PRESCANNED = 4096
"""Number of bytes in which a page may declare its charset. The standard asks for 1024; browsers
look further."""
MOST_REPLACED = 0.01
"""Largest share of characters that may fail to decode. With more, the declared charset is wrong."""

CODECS = {
    "big5hkscs": "big5 big5-hkscs cn-big5 csbig5 x-x-big5",
    "cp1250": "cp1250 windows-1250 x-cp1250",
    "cp1251": "cp1251 windows-1251 x-cp1251",
    "cp1252": (
        "ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100 iso8859-1 iso88591 "
        "iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252 x-user-defined"
    ),
    "cp1253": "cp1253 windows-1253 x-cp1253",
    "cp1254": (
        "cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 l5 latin5 "
        "windows-1254 x-cp1254"
    ),
    "cp1255": "cp1255 windows-1255 x-cp1255",
    "cp1256": "cp1256 windows-1256 x-cp1256",
    "cp1257": "cp1257 windows-1257 x-cp1257",
    "cp1258": "cp1258 windows-1258 x-cp1258",
    "cp874": "dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874",
    "cp932": "csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j x-sjis",
    "cp949": (
        "cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949"
    ),
    "euc_jp": "cseucpkdfmtjapanese euc-jp x-euc-jp",
    "gb18030": "chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk gb18030",
    "ibm866": "866 cp866 csibm866 ibm866",
    "iso2022_jp_ext": "csiso2022jp iso-2022-jp",
    "iso8859_8": "csiso88598i iso-8859-8-i logical",
    "iso_8859_10": "csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6",
    "iso_8859_13": "iso-8859-13 iso8859-13 iso885913",
    "iso_8859_14": "iso-8859-14 iso8859-14 iso885914",
    "iso_8859_15": "csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9",
    "iso_8859_16": "iso-8859-16",
    "iso_8859_2": (
        "csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2"
    ),
    "iso_8859_3": (
        "csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3"
    ),
    "iso_8859_4": (
        "csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4"
    ),
    "iso_8859_5": (
        "csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988"
    ),
    "iso_8859_6": (
        "arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e "
        "iso-8859-6-i iso-ir-127 iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987"
    ),
    "iso_8859_7": (
        "csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126 iso8859-7 iso88597 iso_8859-7 "
        "iso_8859-7:1987 sun_eu_greek"
    ),
    "iso_8859_8": (
        "csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 iso88598 "
        "iso_8859-8 iso_8859-8:1988 visual"
    ),
    "koi8_r": "cskoi8r koi koi8 koi8-r koi8_r",
    "koi8_u": "koi8-ru koi8-u",
    "mac_cyrillic": "x-mac-cyrillic x-mac-ukrainian",
    "mac_roman": "csmacintosh mac macintosh x-mac-roman",
    "utf_16_be": "unicodefffe utf-16be",
    "utf_16_le": "csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le",
    "utf_8": "unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8",
    "hz": "hz-gb-2312",
    "iso2022_kr": "csiso2022kr iso-2022-kr",
}
LABELS = {label: codec for codec, labels in CODECS.items() for label in labels.split()}

# Not UTF-32's, which begins as that of UTF-16 does: browsers do not know it either.
BOMS = {
    codecs.BOM_UTF8: "utf_8",
    codecs.BOM_UTF16_LE: "utf_16_le",
    codecs.BOM_UTF16_BE: "utf_16_be",
}
SKIPPED_OR_META = re.compile(rb"<!--.*?-->|<meta[\s/]([^>]*)>", re.I | re.S)
ATTRIBUTE = re.compile(rb"""([^\s=/>"']+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
IN_CONTENT = re.compile(r"""charset\s*=\s*["']?([^\s;"',]+)""", re.I)
XML_DECLARATION = re.compile(rb"""<\?xml\s[^>]*?encoding\s*=\s*["']([^"'>]+)["']""")

# For these codes Python follows Unicode's table of JIS; browsers and Windows follow another.
JIS_AS_WINDOWS = str.maketrans("〜−‖¢£¬", "～－∥￠￡￢")
JAPANESE = ("euc_jp", "iso2022_jp_ext")


class Decoded(NamedTuple):
    """Holds a page's text and how its charset was found."""

    text: str
    codec: str
    found_in: str
    """ "byte-order mark", "HTTP header", "page", or "bytes" for a guess."""


def decode(data: bytes, header: str, is_markup: bool, is_cut: bool = False) -> Decoded:
    """Decode a page's `data` with the first charset that fits.

    `header` is its Content-Type. `is_markup`: the page may declare its charset. `is_cut`: its end
    is missing, so that it may stop within a character."""
    fallback: Decoded | None = None
    for codec, found_in, skipped in _candidates(data, header, is_markup):
        text = _decoded(data[skipped:], codec, is_cut)
        replaced = text.count("\ufffd")
        # A byte-order mark is never a mistake; everything else may be.
        if found_in == "byte-order mark" or replaced <= MOST_REPLACED * len(text):
            return Decoded(text, codec, found_in)
        # If none fits, the most certain one is right after all, and the page is damaged.
        fallback = fallback or Decoded(text, codec, found_in)
    return fallback or Decoded(_decoded(data, "cp1252", is_cut), "cp1252", "bytes")


def codec_of(label: str) -> str | None:
    """Return Python's codec for a label, or None if it names no charset."""
    return LABELS.get(label.strip(" \t\n\f\r").lower())


def _candidates(data: bytes, header: str, is_markup: bool) -> Iterator[tuple[str, str, int]]:
    """Yield (codec, where it was found, bytes at the beginning that are not text), the most certain
    first."""
    for mark, codec in BOMS.items():
        if data.startswith(mark):
            yield codec, "byte-order mark", len(mark)
    # Before the page's own declaration: servers that recode a page leave what stands in it.
    if (said := IN_CONTENT.search(header)) and (named := codec_of(said[1])):
        yield named, "HTTP header", 0
    if is_markup and (declared := declared_in(data)):
        yield declared, "page", 0
    for guessed in _guesses(data):
        yield guessed, "bytes", 0


def declared_in(page: bytes) -> str | None:
    """Return the charset that a page declares in <meta> or in its XML declaration."""
    beginning = page[:PRESCANNED]
    for match in SKIPPED_OR_META.finditer(beginning):
        # A comment, which may hold a <meta> that does not count.
        if match[1] is None:
            continue
        found = {}
        for name, *value in ATTRIBUTE.findall(match[1]):
            # One of the three groups holds the value: in double quotes, in single ones, or without.
            found[name.lower()] = b"".join(value).decode("latin-1")
        label = found.get(b"charset")
        if label is None and found.get(b"http-equiv", "").lower() == "content-type":
            said = IN_CONTENT.search(found.get(b"content", ""))
            label = said and said[1]
        if label and (codec := codec_of(label)):
            # A page that could be read as ASCII up to here is not UTF-16, whatever it says.
            return "utf_8" if codec.startswith("utf_16") else codec
    if declared := XML_DECLARATION.match(beginning):
        codec = codec_of(declared[1].decode("latin-1"))
        return "utf_8" if codec and codec.startswith("utf_16") else codec
    return None


def _guesses(data: bytes) -> Iterator[str]:
    """Yield codecs to try for bytes that nothing is known about."""
    from trafilatura.utils import detect_encoding

    sample = data[:PRESCANNED]
    even_zeros = sample[::2].count(0)
    odd_zeros = sample[1::2].count(0)
    # Of Latin letters in UTF-16, every other byte is zero. Before UTF-8, to which a zero byte is a
    # character like any other.
    if max(even_zeros, odd_zeros) > len(sample) / 4:
        yield "utf_16_be" if even_zeros > odd_zeros else "utf_16_le"
    # UTF-8 is hardly ever met by chance: bytes that decode as such are.
    yield "utf_8"
    for guessed in detect_encoding(data):
        yield (
            codec_of(guessed.replace("_", "-")) or codec_of(guessed) or codecs.lookup(guessed).name
        )


def _decoded(data: bytes, codec: str, is_cut: bool) -> str:
    decoder = codecs.getincrementaldecoder(codec)("megalite_charset")
    text = decoder.decode(data, final=not is_cut)
    return text.translate(JIS_AS_WINDOWS) if codec in JAPANESE else text


def _as_browsers(error: UnicodeError) -> tuple[str, int]:
    """Decode what Python's codecs cannot, as browsers do (an error handler of `codecs`).

    Returns C1 controls in Windows' charsets and the characters of NEC and IBM in EUC-JP; otherwise
    the replacement character."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    data, start = error.object, error.start
    if error.encoding in ("cp1252", "cp1254", "charmap") and 0x80 <= data[start] < 0xA0:
        return chr(data[start]), start + 1
    pair = data[start : start + 2]
    if error.encoding == "euc_jp" and len(pair) == 2 and min(pair) >= 0xA1:
        # The same row and cell of JIS in Shift_JIS, whose codec (cp932) knows these characters.
        row = pair[0] - 0xA1
        cell = pair[1] - 0xA1
        lead = row // 2 + (0x81 if row < 62 else 0xC1)
        trail = cell + 0x9F if row % 2 else cell + 0x40 + (cell >= 63)
        text = bytes((lead, trail)).decode("cp932", "replace")
        if len(text) != 1:
            text = "\ufffd"
        return text, start + 2
    return "\ufffd", error.end


codecs.register_error("megalite_charset", _as_browsers)
