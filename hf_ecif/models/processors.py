"""The processor of a model: found beside it, named by the user, or put together from its halves."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.vision_text_dual_encoder.processing_vision_text_dual_encoder import (
    VisionTextDualEncoderProcessor,
)

from hf_ecif.errors import UserError
from hf_ecif.models.place import Place, locate
from hf_ecif.utils.hub_errors import TransportError, explain_hub_error

_log = logging.getLogger(__name__)
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, TransportError)
_SAFELY = {"trust_remote_code": False}
# One of these holds the words of a tokenizer; without any, transformers makes one of no words.
_WORDS = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def load_processor(place: Place, named: str | None = None) -> Any:
    """Processor of the model at a place.

    Args:
        place: the place of the model.
        named: folder or Hub id of another processor, which goes before what is beside the model.

    Raises:
        UserError: there is none, or it is not for images and texts.
    """
    if named is not None:
        found = locate(named, argument="processor")
        if found.folder and not found.folder.is_dir():
            raise found.refuse("no such folder.")
        processor = _load(found)
        if not _is_whole(processor):
            raise UserError(
                f"`processor={named!r}` has no processor for images and texts"
                f"{_but(processor)}. Give the Hub id or the folder of the model that this one was "
                "trained from."
            )
        return processor
    processor = _load(place)
    if _is_whole(processor):
        return processor
    beside = _load_of_training(place)
    if beside is not None:
        return beside
    raise place.refuse(
        f"there is no processor for images and texts beside it{_but(processor)}. Name one with "
        "`processor`: the Hub id or the folder of the model that this one was trained from, such "
        "as openai/clip-vit-base-patch32."
    )


def load_tokenizer(place: Place) -> Any:
    """Tokenizer beside a model; None where there is none."""
    return _load_half(AutoTokenizer, place) if _has_words(place) else None


def check_processor(processor: Any, whose: str) -> None:
    """Check that images and texts can be prepared.

    Raises:
        UserError: one of the two cannot.
    """
    if not _is_whole(processor):
        raise UserError(
            f"{whose} is no processor for images and texts, but {type(processor).__name__}. It "
            "must be what AutoProcessor.from_pretrained loads for the model, or saved beside it: "
            "processor.save_pretrained(folder)."
        )


def _is_whole(processor: Any) -> bool:
    return hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")


def _but(processor: Any) -> str:
    return "" if processor is None else f", only {type(processor).__name__}"


def _load(place: Place) -> Any:
    """What is there of a processor: all of it, one half, or None."""
    if place.on_hub and place.listed is None:
        _require_answer(place)
    try:
        processor = AutoProcessor.from_pretrained(place.path, **place.options, **_SAFELY)
    except LOAD_ERRORS as error:
        if _has_words(place) and "sentencepiece" in str(error):
            raise place.refuse(
                "its tokenizer is read by the package sentencepiece: pip install sentencepiece."
            ) from error
        processor = None
    if _is_whole(processor) and _has_words(place):
        return processor
    halves = _load_half(AutoImageProcessor, place), load_tokenizer(place)
    if all(half is not None for half in halves):
        return VisionTextDualEncoderProcessor(*halves)
    return next((half for half in halves if half is not None), None)


def _has_words(place: Place) -> bool:
    return any(place.has(file) for file in _WORDS)


def _load_half(kind: Any, place: Place) -> Any:
    try:
        return kind.from_pretrained(place.path, **place.options, **_SAFELY)
    except LOAD_ERRORS:
        return None


def _load_of_training(place: Place) -> Any:
    """Processor in the folder above a checkpoint of a training, where a Trainer may put it."""
    folder = place.folder
    if folder is None or not folder.resolve().name.startswith("checkpoint"):
        return None
    above = folder.resolve().parent
    processor = _load(Place(place.name, str(above)))
    if not _is_whole(processor):
        return None
    _log.warning("%s has no processor: taking that of the folder above it.", place.name)
    return processor


def _require_answer(place: Place) -> None:
    """Say why the Hub does not give a processor, where that is not that it has none."""
    try:
        AutoProcessor.from_pretrained(place.path, **place.options, **_SAFELY)
    except LOAD_ERRORS as error:
        explained = explain_hub_error(error)
        raise place.refuse(
            f"no such folder, and the Hub does not give it. {explained or _first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
