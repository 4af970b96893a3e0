"""What files hold, by their names, and captions in files: decoded, and found in JSON."""

from __future__ import annotations

import json

# Suffixes of pictures; what cannot be decoded is kept, and told of.
IMAGES = frozenset(
    "png jpg jpeg jpe jfif webp gif bmp tif tiff avif jp2 j2k ppm pgm pbm pnm heic svg".split()  # noqa: SIM905
)
FIELDS = ("caption", "text", "title", "prompt", "alt")  # of a JSON, the first that is there


def decode(content: bytes) -> str:
    """The text of a file: UTF-8 with or without a mark, or else Latin-1, in which every byte is."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def caption_in(content: bytes | None) -> str | None:
    """The caption among the fields of a JSON; None if there is none, or no JSON."""
    try:
        fields = json.loads(content or b"null")
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    found = (fields.get(name) for name in FIELDS)
    return next((text for text in found if isinstance(text, str)), None)
