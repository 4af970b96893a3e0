"""A review on disk: a file of its own that only ever grows, so that nothing decided is lost.

Each line is a *step* as JSON, written at once and in one piece:

    {"audit": KEY}                                            the first line: rows it belongs to
    {"id": ..., "tab": ..., "at": ..., "rows": [3, 4], "action": "remove"}
    {..., "rows": [5], "action": "recaption", "texts": ["a crow"]}
    {..., "rows": [3], "action": "clear"}                     no decision any more
    {..., "rows": [4], "note": "blurred"}
    {"id": ..., "undo": ID} and {"id": ..., "redo": ID}       of an earlier step
    {"id": ..., "threshold": 0.4, "own": 0.5}                 moved; ``own`` is the audit's

What holds is what the steps that are not undone say, the last one on a row first. A step has a name
that its maker gave it, so that one which is sent twice counts once: a browser that heard no answer
sends it again. Several servers may write to one file; each reads on before it writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_ecif.data.review import ACTIONS, MAX_NOTE, Decision, Review, check_row
from hf_ecif.errors import UserError

NAME = re.compile(r"[\w-]{6,64}")
FIELDS = {"id", "tab", "at", "rows", "action", "texts", "note", "undo", "redo", "threshold", "own"}
Step = dict[str, Any]


class ReviewLog:
    """The steps of a review, in memory and in a file.

    Args:
        path: the file, which need not be there yet.
        audit: key of the audit's rows. A file of other rows is set aside under another name.
        rows: how many those are.
        most_bytes: largest size of the file; none if None.
    """

    def __init__(self, path: Path, audit: str, rows: int, most_bytes: int | None = None) -> None:
        self.path, self._audit, self._rows, self._most = path, audit, rows, most_bytes
        self._lock = threading.Lock()
        self._forget()
        self._set_aside_others()
        with self._lock:
            self._read_on()

    def since(self, number: int) -> tuple[list[Step], int]:
        """Steps from a number on, also those of other servers, and the number of the next one."""
        with self._lock:
            self._read_on()
            return self._steps[max(number, 0) :], len(self._steps)

    def append(self, steps: Sequence[Step]) -> int:
        """Write steps that are not there yet; returns how many were new.

        Raises:
            UserError: a step is none, or the file would become too large. Nothing is written then.
        """
        for step in steps:
            check_step(step, self._rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            self._read_on()
            new = {step["id"]: step for step in steps if step["id"] not in self._by_id}
            text = "".join(_line(step) for step in new.values())
            if self._most is not None and self._offset + len(text.encode()) > self._most:
                raise UserError("There is no room for more decisions here. Export them.")
            start = "\n" if self._is_torn else ""
            if not file.tell():
                start = _line({"audit": self._audit})
            file.write((start + text).encode())  # in one piece: a crash leaves half a line at most
            os.fsync(file)
            self._read_on()
        return len(new)

    def review(self) -> Review:
        """What holds now."""
        with self._lock:
            self._read_on()
            told = [self._holds(row) for row in self._decided]
            log = sorted((one for one in told if one is not None), key=lambda one: one[0])
            notes = {row: self._noted(row) for row in self._notes}
            return Review(
                log=tuple(decision for _, decision in log),
                threshold=self._moved[0],
                notes={row: note for row, note in sorted(notes.items()) if note},
            )

    @property
    def own_threshold(self) -> float | None:
        """The audit's threshold when the one of the review was chosen."""
        return self._moved[1]

    def _forget(self) -> None:
        self._steps: list[Step] = []
        self._by_id: dict[str, int] = {}
        self._undone: set[str] = set()
        self._decided: defaultdict[int, list[int]] = defaultdict(list)
        self._notes: defaultdict[int, list[int]] = defaultdict(list)
        self._texts: dict[tuple[int, int], str] = {}
        self._moved: tuple[float | None, float | None] = (None, None)
        self._offset, self._is_torn = 0, False

    def _holds(self, row: int) -> tuple[int, Decision] | None:
        """The decision on a row, and the number of its step."""
        for number in reversed(self._decided[row]):
            step = self._steps[number]
            if step["id"] in self._undone:
                continue
            if step["action"] == "clear":
                return None
            return number, Decision(row, step["action"], self._texts.get((number, row)))
        return None

    def _noted(self, row: int) -> str | None:
        for number in reversed(self._notes[row]):
            if self._steps[number]["id"] not in self._undone:
                return self._steps[number]["note"]
        return None

    def _read_on(self) -> None:
        """Take in the complete lines that were written since the last time."""
        try:
            if self.path.stat().st_size < self._offset:  # the file was replaced
                self._forget()
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            self._forget()
            return
        end = content.rfind(b"\n") + 1
        self._offset += end
        self._is_torn = end < len(content)
        for line in content[:end].splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            step = json.loads(line)
            if "audit" in step:
                return
            check_step(step, self._rows)
        except (ValueError, TypeError, UserError):
            return  # half a line, after a crash
        if step["id"] in self._by_id:
            return
        number = self._by_id[step["id"]] = len(self._steps)
        self._steps.append(step)
        if "undo" in step:
            self._undone.add(step["undo"])
        elif "redo" in step:
            self._undone.discard(step["redo"])
        elif "threshold" in step:
            self._moved = step["threshold"], step.get("own")
        else:
            told = self._notes if "note" in step else self._decided
            for row in step["rows"]:
                told[row].append(number)
            for row, text in zip(step["rows"], step.get("texts") or (), strict=False):
                self._texts[number, row] = text

    def _set_aside_others(self) -> None:
        """Decisions on other rows, which were in this place before, keep under another name."""
        try:
            with self.path.open("rb") as file:
                other = json.loads(file.readline())["audit"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            other = "unknown"
        if other != self._audit:
            name = f"{self.path.stem}-{re.sub(r'[^a-z0-9]', '', str(other))[:16]}{self.path.suffix}"
            self.path.replace(self.path.with_name(name))


def check_step(step: Any, rows: int) -> None:
    """Check what a browser or a file says is a step.

    Args:
        step: a value from JSON.
        rows: number of the audit's rows.

    Raises:
        UserError: it is none.
    """
    if not isinstance(step, dict) or not NAME.fullmatch(str(step.get("id", ""))):
        raise UserError("A step of a review needs a name of its own, `id`.")
    if unknown := set(step) - FIELDS:
        raise UserError(f"A step of a review has no {', '.join(map(repr, sorted(unknown)))}.")
    kinds = [kind for kind in ("action", "note", "undo", "redo", "threshold") if kind in step]
    if len(kinds) != 1:
        raise UserError("A step decides, notes, undoes, redoes or moves the threshold: one of it.")
    if kinds[0] in ("undo", "redo"):
        _check_name(step[kinds[0]])
    elif kinds[0] == "threshold":
        _check_share(step["threshold"])
        _check_share(step.get("own"))
    else:
        _check_rows(step.get("rows"), rows)
    if kinds[0] == "note" and not (isinstance(step["note"], str) and len(step["note"]) <= MAX_NOTE):
        raise UserError(f"A note is text of {MAX_NOTE:,} characters at most.")
    if kinds[0] == "action":
        _check_action(step)


def _check_action(step: Step) -> None:
    texts = step.get("texts")
    if step["action"] == "recaption":
        if not isinstance(texts, list) or len(texts) != len(step["rows"]):
            raise UserError("New captions need a text for each of their rows.")
        for row, text in zip(step["rows"], texts, strict=True):
            if not isinstance(text, str):
                raise UserError("A new caption is text.")
            Decision(row, "recaption", text)
    elif step["action"] not in (*ACTIONS, "clear") or texts is not None:
        raise UserError(f"{step['action']!r}: must be one of {', '.join(ACTIONS)} or clear.")


def _check_rows(found: Any, rows: int) -> None:
    if not isinstance(found, list) or not found or len(set(map(repr, found))) != len(found):
        raise UserError("A decision needs rows, each of them once.")
    for row in found:
        check_row(row)
        if row >= rows:
            raise UserError(
                f"There is a decision on row {row:,}, but the audit has {rows:,} rows: these "
                "decisions belong to another audit."
            )


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError("What is undone is named by its `id`.")


def _check_share(value: Any) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UserError("A threshold is a probability.")


def steps_of(text: str, prefix: str) -> list[Step]:
    """Steps that say what a file of decisions does.

    Args:
        text: what `Review.to_json` gave, now or in version 0.1, or the lines of a `ReviewLog`.
        prefix: beginning of the names of steps that have none.

    Raises:
        UserError: the text is neither.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 or '"audit"' in text[:20]:
        try:
            steps = [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"These are no saved decisions: {error}.") from error
        return [step for step in steps if not (isinstance(step, dict) and "audit" in step)]
    return list(_steps_of_review(Review.from_json(text), prefix))


def _steps_of_review(review: Review, prefix: str) -> Iterable[Step]:
    for number, decision in enumerate(review.log):
        texts = {"texts": [decision.text]} if decision.text else {}
        step = {"rows": [decision.row], "action": decision.action} | texts
        yield {"id": f"{prefix}-{number}"} | step
    for row, note in review.notes.items():
        yield {"id": f"{prefix}-note-{row}", "rows": [row], "note": note}


def _line(step: Step) -> str:
    return json.dumps(step, ensure_ascii=False) + "\n"
