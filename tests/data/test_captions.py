"""What is told of a caption by its text."""

import pytest

from hf_ecif.data.captions import plain, says_nothing


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A Cat,  sleeping.", "a cat sleeping", True),
        ("cat,dog", "cat dog", True),
        ("ＣＡＴ", "cat", True),
        ("a cat", "a cab", False),
        ("हिन्दी", "हन्द", False),  # vowel signs
        ("👍", "👎", False),
        ("?", "!", False),
        ("flag 1", "flag 2", False),
    ],
)
def test_plain_captions(one: str, other: str, same: bool) -> None:
    assert (plain(one) == plain(other)) == same


@pytest.mark.parametrize(
    "text",
    [
        "IMG_2041.JPG",
        "DSC00123",
        "holiday.webp",
        "https://example.com/pictures/1.png",
        "www.example.com",
        "20210407",
        "12:30",
        "image",
        "An image",
        "photo 12",
        "No description available.",
        "N/A",
        "untitled",
        "...",
        "Foto",
    ],
)
def test_captions_that_say_nothing(text: str) -> None:
    assert says_nothing(text)


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "an image of a cat",
        "a photo of the file cabinet, not empty",
        "7",
        "A",
        "a",
        "NG button",
        "👍",
        "★",
        "cat.jpg on a sofa",
        "猫",
        "no entry",
    ],
)
def test_captions_that_say_something(text: str) -> None:
    assert not says_nothing(text)
