"""Header blocks of HTTP/2 (RFC 7541), as far as a caller of gRPC needs them.

A caller that announces a table of size 0 keeps no state between blocks, so a block can be written once and sent with
every call, and an answer's block can be left unread.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.report import BenchmarkError

_STATIC_NAMES = """
:authority :method :method :path :path :scheme :scheme :status :status :status :status :status :status :status
accept-charset accept-encoding accept-language accept-ranges accept access-control-allow-origin age allow authorization
cache-control content-disposition content-encoding content-language content-length content-location content-range
content-type cookie date etag expect expires from host if-match if-modified-since if-none-match if-range
if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization range referer
refresh retry-after server set-cookie strict-transport-security transfer-encoding user-agent vary via www-authenticate
""".split()  # noqa: SIM905 - a list would take a line for each word
_STATIC_VALUES = {2: "GET", 3: "POST", 4: "/", 5: "/index.html", 6: "http", 7: "https", 16: "gzip, deflate"}
_STATIC_VALUES |= dict(zip(range(8, 15), ("200", "204", "206", "304", "400", "404", "500"), strict=True))

# Lengths in bits of the codes of the 256 bytes; the code is canonical, so the lengths alone determine it.
_LENGTHS = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b0806060605050506"
    "06060606060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e060f05060506050606"
    "060507070606060506070605050607070707070f0b0e0d1c14161414161616171617171717171817181816171817171717151617"
    "1617171816151416161717151716161815161717151516151716171714161616171616171a1a1413161716191a1a1a1b1b1a1819"
    "13151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a"
)


class HeaderError(BenchmarkError):
    """A header block breaks the rules of RFC 7541."""


def encode(headers: Iterable[tuple[str, str]]) -> bytes:
    """Returns headers as literals that no table keeps, so the block is the same for every stream."""
    block = bytearray()
    for name, value in headers:
        block.append(0)
        for text in (name.encode(), value.encode()):
            block += _integer(len(text), 7) + text
    return bytes(block)


def decode(block: bytes) -> dict[str, str]:
    """Returns the headers of a block that was written with a table of size 0; of several with one name, the last.

    Raises:
        HeaderError: The block is cut off, or refers to a table that was never agreed on.
    """
    headers, at = {}, 0
    while at < len(block):
        first = block[at]
        if first & 0xE0 == 0x20:  # a new size of the table, which stays empty
            _, at = _read_integer(block, at, 5)
            continue
        index, at = _read_integer(block, at, 7 if first & 0x80 else 6 if first & 0x40 else 4)
        name = _static_name(index) if index else ""
        if first & 0x80:
            headers[name] = _STATIC_VALUES.get(index, "")
            continue
        if not index:
            name, at = _read_text(block, at)
        headers[name], at = _read_text(block, at)
    return headers


def _static_name(index: int) -> str:
    if not 1 <= index <= len(_STATIC_NAMES):
        raise HeaderError(f"header {index} is in no table: the server keeps a table though none was agreed on")
    return _STATIC_NAMES[index - 1]


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    digits, value = bytearray([most]), value - most
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _read_integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value, at, shift = block[at] & most, at + 1, 0
    if value < most:
        return value, at
    while True:
        if at >= len(block) or shift > 28:
            raise HeaderError("a number of a header block has no end")
        value += (block[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not block[at - 1] & 128:
            return value, at


def _read_text(block: bytes, at: int) -> tuple[str, int]:
    if at >= len(block):
        raise HeaderError("a header block ends before a text")
    is_coded = bool(block[at] & 0x80)
    length, at = _read_integer(block, at, 7)
    text = block[at : at + length]
    if len(text) < length:
        raise HeaderError("a header block ends within a text")
    return (_decoded(text) if is_coded else text).decode("utf-8", "replace"), at + length


def _decoded(text: bytes) -> bytes:
    """Returns a text without its Huffman code; what is left of the last byte is padding."""
    out, code, length = bytearray(), 0, 0
    for byte in text:
        for shift in range(7, -1, -1):
            code, length = code << 1 | byte >> shift & 1, length + 1
            symbol = _SYMBOLS.get((length, code))
            if symbol is not None:
                out.append(symbol)
                code = length = 0
    if length > 7 or code != (1 << length) - 1:
        raise HeaderError("a coded text of a header block ends within a letter")
    return bytes(out)


def _canonical() -> dict[tuple[int, int], int]:
    """Returns the symbol of each (length, code)."""
    symbols, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(_LENGTHS)):
        code <<= length - before
        symbols[length, code] = symbol
        code, before = code + 1, length
    return symbols


_SYMBOLS = _canonical()
