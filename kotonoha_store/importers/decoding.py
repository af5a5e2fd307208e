"""Bytes -> text: what encoding a file is in."""

import re
from contextlib import suppress
from typing import Final

from kotonoha_store.importers.document import PassedOver, Unreadable, clean

_BYTE_ORDER_MARKS: Final = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# What these names mean on the web (https://encoding.spec.whatwg.org): Python's codecs of that name know fewer letters.
_WIDER: Final = {
    "shift_jis": "cp932", "shift-jis": "cp932", "sjis": "cp932", "x-sjis": "cp932", "windows-31j": "cp932",
    "ms_kanji": "cp932", "iso-8859-1": "cp1252", "latin1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252",
    "gb2312": "gb18030", "gbk": "gb18030", "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "x-euc-jp": "euc_jp",
}  # fmt: skip
_CHARSET: Final = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
_KANA: Final = re.compile("[\u3041-\u30ff]")
_NOT_ASCII: Final = re.compile("[^\x00-\x7f]")
_CONTROL: Final = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_SAMPLE: Final = 100_000


def decode(data: bytes, encoding: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Return the text and what had to be left out of it.

    Raises:
        PassedOver: the bytes are no text.
        Unreadable: they are text, but it is not clear in which encoding; or the one that was given is unknown.
    """
    text, damaged = _decoded(data, encoding)
    sample = text[:_SAMPLE]
    if len(_CONTROL.findall(sample)) > len(sample) // 20:
        raise PassedOver("binary")
    notes = [f"{damaged} characters could not be decoded"] if damaged else []
    if nul := text.count("\x00"):
        notes.append(f"{nul} NUL characters were left out")
    return clean(text), tuple(notes)


def _decoded(data: bytes, encoding: str | None) -> tuple[str, int]:
    for mark, name in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _tolerantly(data, name)
    if encoding is not None:
        try:
            return _tolerantly(data, _WIDER.get(encoding.lower(), encoding))
        except LookupError:
            raise Unreadable(f"there is no encoding {encoding[:40]!r}") from None
    if b"\x1b$" in data and (text := _strictly(data, "iso2022_jp_ext")) is not None:
        return text, 0
    nul = data.count(b"\x00")
    if nul * 20 <= len(data) and (text := _strictly(data, "utf-8")) is not None:
        return text, 0
    if nul:
        for name in ("utf-16-le", "utf-16-be"):
            text = _strictly(data, name)
            if text is not None and _is_plausible(text):
                return text, 0
        raise PassedOver("binary")
    if declared := _CHARSET.search(data[:4096]):
        name = declared[1].decode().lower()
        with suppress(LookupError):
            return _tolerantly(data, _WIDER.get(name, name))
    text, damaged = _tolerantly(data, "utf-8")
    if damaged * 20 < len(_NOT_ASCII.findall(text)):
        return text, damaged
    return _guessed(data), 0


def _guessed(data: bytes) -> str:
    # Short texts are little to guess from, and the readers of this library write Japanese.
    japanese = [text for name in ("cp932", "euc_jp") if (text := _strictly(data, name)) is not None]
    best = max(japanese, key=lambda text: len(_KANA.findall(text[:_SAMPLE])), default="")[:_SAMPLE]
    if best and len(_KANA.findall(best)) * 10 >= len(_NOT_ASCII.findall(best)):
        return next(text for text in japanese if text.startswith(best))
    import charset_normalizer

    if charset_normalizer.is_binary(data[:_SAMPLE]):
        raise PassedOver("binary")
    found = charset_normalizer.from_bytes(data).best()
    if found is None:
        raise Unreadable("the encoding is unknown; name it by --encoding")
    return str(found)


def _strictly(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _tolerantly(data: bytes, encoding: str) -> tuple[str, int]:
    text = data.decode(encoding, "replace")
    if not isinstance(text, str):
        raise LookupError(encoding)
    # Those that were replacement characters already are no damage; too few to look for.
    return text, text.count("\N{REPLACEMENT CHARACTER}")


def _is_plausible(text: str) -> bool:
    """Whether this is what somebody wrote, and not two-byte numbers of something else."""
    sample = text[:_SAMPLE]
    if _CONTROL.search(sample):
        return False
    usual = len(re.findall(r"[\s!-~\u00a0-\u024f\u3000-\u30ff\uff01-\uff9f]", sample))
    return usual * 5 >= len(sample)
