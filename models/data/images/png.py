"""PNG chunks, and what Pillow neither reads nor writes of the format: 16-bit colour and its transparency."""

import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Chunk = tuple[bytes, bytes]  # name, body
# Chunks that change the samples that Pillow decodes; the rest is metadata, which is parsed here.
_DECODED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
_MAX_INFLATED = 64 << 20  # bytes of one compressed text or profile


def split(data: bytes) -> tuple[bytes, list[Chunk]]:
    """Separates a PNG file into a file with the chunks that its pixels need and a list of all other chunks.

    The first part of a damaged file ends with what follows the last whole chunk, so that a decoder can say what is
    wrong with it.
    """
    parts, others = [SIGNATURE], []
    for name, raw, body in _walk(data):
        if name in _DECODED or not name[:1].islower():
            parts.append(raw)
        else:
            others.append((name, body))
    return b"".join(parts), others


def _walk(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    at = len(SIGNATURE)
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at) if at + 8 <= len(data) else (len(data), b"")
        end = at + 12 + length
        if end > len(data):  # truncated
            yield b"", data[at:], b""
            return
        yield name, data[at:end], data[at + 8 : end - 4]
        at = end


def insert(data: bytes, chunks: Iterable[Chunk]) -> bytes:
    """Adds chunks to a PNG file, after its header."""
    after_header = len(SIGNATURE) + 25
    return data[:after_header] + b"".join(_chunk(*chunk) for chunk in chunks) + data[after_header:]


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def inflate(data: bytes) -> bytes | None:
    """Decompresses zlib data; None if it is damaged or larger than 64 MB."""
    try:
        stream = zlib.decompressobj()
        out = stream.decompress(data, _MAX_INFLATED)
    except zlib.error:
        return None
    return None if stream.unconsumed_tail else out


def text(chunk: Chunk) -> tuple[str, str | None] | None:
    """(keyword, text) of a tEXt, zTXt or iTXt chunk; the text is None if it is damaged or too large."""
    name, body = chunk
    value: bytes | None
    keyword, _, rest = body.partition(b"\0")
    if name == b"tEXt":
        value, encoding = rest, "latin-1"
    elif name == b"zTXt":
        value, encoding = inflate(rest[1:]), "latin-1"
    elif name == b"iTXt":
        value, encoding = rest[2:].split(b"\0", 2)[-1], "utf-8"
        value = inflate(value) if rest[:1] == b"\1" else value
    else:
        return None
    return keyword.decode("latin-1"), None if value is None else value.decode(encoding, "replace")


def encode_deep(samples: numpy.ndarray) -> bytes:
    """A 16-bit PNG file of samples [h, w, 1, 2, 3 or 4], uint16."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").reshape(height, -1).view(numpy.uint8)
    # Filter 1 stores each byte as its difference from the byte one pixel to the left, which compresses better.
    rows[:, 2 * channels :] -= rows[:, : -2 * channels].copy()
    rows = numpy.pad(rows, ((0, 0), (1, 0)), constant_values=1)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)
