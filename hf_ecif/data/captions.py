"""What can be told of a caption by its text alone: whether two are equal, and whether one says
anything at all."""

from __future__ import annotations

import re
import unicodedata

# What people and programs write where they have nothing to say, also in several words: "an image",
# "no description", "photo 12". Articles and numbers say nothing beside them, but "a" alone may be
# the name of a class.
EMPTY_WORDS = frozenset(
    """
    n/a na nan nil none null void empty unknown undefined untitled unnamed available applicable
    image images img photo photos photograph picture pictures pic pics screenshot thumbnail file
    caption captions description alt text title default placeholder
    bild foto imagen imagem immagine изображение фото картинка 图片 图像 照片 写真 画像 이미지 사진
    """.split()  # noqa: SIM905 - one word a line would be a page
)
LITTLE_WORDS = frozenset(("a", "an", "the", "of", "no", "not", "n"))
SHORT_NUMBER = 2  # digits that can be the name of a class, such as "7"; longer ones are serial
_ADDRESS = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_FILE = re.compile(
    r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|pdf|mp4)"
    r"|(img|dsc[nf]?|dcim|pxl|p|image|photo|screenshot)[_-]?\d{3,}[\w-]*",
    re.IGNORECASE,
)


class _Spaced(dict[int, int | str]):
    """A table for `str.translate` that puts a space for punctuation, filled as it is used.

    By Unicode category: a pattern of letters would take the vowel signs out of Indian scripts.
    """

    def __missing__(self, code: int) -> int | str:
        is_punctuation = unicodedata.category(chr(code)).startswith("P")
        return self.setdefault(code, " " if is_punctuation else code)


_SPACED = _Spaced()


def plain(text: str) -> str:
    """A caption without what makes no difference: case, spacing and punctuation.

    >>> plain("A  Cat, sleeping.") == plain("a cat sleeping")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_SPACED).split()) or text


def says_nothing(text: str) -> bool:
    """Whether a caption could stand under any image: an address, a file name, a number, "image".

    >>> [says_nothing(text) for text in ("IMG_2041.JPG", "20210407", "no image", "7", "cat.")]
    [True, True, True, False, False]
    """
    stripped = text.strip()
    if _ADDRESS.fullmatch(stripped) or _FILE.fullmatch(stripped):
        return True
    words = plain(stripped).split()
    if all(word.isdigit() for word in words):
        return sum(map(len, words)) > SHORT_NUMBER
    if not any(unicodedata.category(c)[0] in "LNS" for c in stripped):
        return True
    others = [word for word in words if not word.isdigit() and word not in LITTLE_WORDS]
    if stripped.casefold() in EMPTY_WORDS:
        return True
    return bool(others) and EMPTY_WORDS.issuperset(others)
