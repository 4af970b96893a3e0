"""Words of captions in many scripts, and which of them an image contradicts."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns
from hf_ecif.detection import words as words_module
from hf_ecif.detection.captions import leave_out, split_words
from hf_ecif.detection.words import judge_words, wrong_words
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from tests.support import DEMO

ANIMALS = ("cat", "dog", "tiger", "whale", "owl", "snail", "horse", "bee")


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    return InfluenceModel.from_pretrained(DEMO / "model", InfluenceConfig())


@pytest.fixture(scope="module")
def rows(model: InfluenceModel) -> Rows:
    """Animals with their right captions, the name of each being its first word."""
    train = check_columns(load_rows(str(DEMO / "data"), "train"), "image", "text")
    kinds, texts = train["subcategory"][:], train["original_text"][:]
    chosen = [
        row
        for row, (kind, text) in enumerate(zip(kinds, texts, strict=True))
        if kind.startswith("animal") and " " not in text.split(",")[0] and "," in text
    ]
    return model.read(train.select(chosen), text_column="original_text")


@pytest.fixture(scope="module")
def image(model: InfluenceModel, rows: Rows) -> torch.Tensor:
    return model.embed_as_given(rows).image


class Tokenizer:
    """Cuts after every second character, and gives the third one two tokens."""

    is_fast = True

    def __call__(self, text: str, return_offsets_mapping: bool) -> dict[str, Any]:
        spans = [(place, place + 2) for place in range(0, len(text), 2)]
        return {"offset_mapping": [(0, 0), *spans, (2, 3), (2, 3)]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red-hot dog's bowl, 3.", ["A", "red-hot", "dog's", "bowl", "3"]),
        ("rød bil – «Ålesund»", ["rød", "bil", "Ålesund"]),
        ("लाल गाड़ी", ["लाल", "गाड़ी"]),  # vowel signs are marks, not letters
        ("붉은 자동차", ["붉은", "자동차"]),
        ("赤い車", ["赤", "い", "車"]),
        ("a 红色 car", ["a", "红", "色", "car"]),
        ("\U0001f6a9️ flag", ["flag"]),  # a sign and its variation selector
        ("- ' -", []),
        ("", []),
    ],
)
def test_words_of_many_scripts(text, words):
    assert [text[start:end] for start, end in split_words(text)] == words


def test_without_spaces_tokens_are_words():
    found = [("红色汽车"[start:end]) for start, end in split_words("红色汽车", Tokenizer())]
    assert found == ["红色", "汽车"]


def test_thai_is_cut_by_the_tokens_of_a_model(model):
    text = "รถสีแดง"
    spans = split_words(text, model.processor.tokenizer)
    assert "".join(text[start:end] for start, end in spans) == text


@given(
    st.lists(st.text("abcø", min_size=1, max_size=4), min_size=2, max_size=6, unique=True),
    st.sampled_from([", ", " ", "; ", ",", ": "]),
    st.data(),
)
def test_leaving_a_word_out_leaves_all_others(words, separator, data):
    text = separator.join(words)
    spans = split_words(text)
    assert [text[start:end] for start, end in spans] == words
    number = data.draw(st.integers(0, len(words) - 1))
    rest = leave_out(text, spans[number])
    assert [rest[a:b] for a, b in split_words(rest)] == words[:number] + words[number + 1 :]
    assert rest == rest.strip(" ,;:")
    assert separator.strip() * 2 not in rest or not separator.strip()


def test_conflict_by_the_model_itself(model, rows, image):
    caption = "cat, pet, orange"
    judged = {word.text: word for word in judge_words(model, [caption], image[:1])[0]}
    clip: Any = model.encoder.model
    texts = [caption, "cat", "pet, orange"]
    tokens = model.processor.tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        features = clip.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
    vectors = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)
    own, alone, rest = (float(model.encoder.scale) * vectors @ image[0]).tolist()
    assert judged["cat"].lack == pytest.approx(own - alone, abs=1e-3)
    assert judged["cat"].rise == pytest.approx(rest - own, abs=1e-3)
    assert (judged["cat"].start, judged["cat"].end) == (0, 3)


def test_an_exchanged_animal_is_the_worst_word(model, rows, image):
    """Three in ten words would be by chance."""
    captions = []
    for number, text in enumerate(rows.texts):
        other = next(a for a in ANIMALS[number % 4 :] if a not in text)
        captions.append(other + text[text.index(",") :])
    judged = judge_words(model, captions, image)
    first = [words[0].start == 0 for words in judged if words]
    assert len(first) > 60
    assert np.mean(first) > 0.5
    named = [[word.start for word in words if word.is_wrong] for words in judged]
    right = judge_words(model, rows.texts, image)
    assert np.mean([0 in starts for starts in named]) > 0.5
    assert np.mean([any(word.is_wrong for word in words) for words in right]) < 0.4


def test_a_single_word_has_no_rest(model, image):
    assert judge_words(model, ["cat", "", "!"], image[:3]) == [[], [], []]


def test_only_flagged_rows_are_looked_at_the_most_probable_first(model, rows, image, monkeypatch):
    monkeypatch.setattr(words_module, "MOST_ROWS", 2)
    probability = np.linspace(0.2, 0.9, len(rows))
    flag = np.arange(len(rows)) % 3 == 0
    found = wrong_words(model, rows, image, probability, flag)
    looked = [row for row, words in enumerate(found) if words is not None]
    assert looked == np.flatnonzero(flag)[-2:].tolist()
    none = wrong_words(model, rows, image, probability, np.zeros_like(flag))
    assert none == [None] * len(rows)
