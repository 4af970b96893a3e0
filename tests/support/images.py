"""Images that a stranger might send."""

import zlib


def bomb(side: int) -> bytes:
    """A PNG of one colour: a few kilobytes that would be gigabytes of pixels."""
    row = b"\0" + bytes(side // 8)
    squeezed = zlib.compressobj()
    body = b"".join(squeezed.compress(row) for _ in range(side)) + squeezed.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + crc

    size = side.to_bytes(4, "big") * 2
    header = chunk(b"IHDR", size + b"\1\0\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
