"""Errors of the Hub in plain words, and whether another try may succeed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:  # from version 2 on, the Hub's client goes by a transport of its own
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
except ImportError:
    import httpx  # type: ignore[no-redef]

LOG_IN = "Log in with 'hf auth login', or set HF_TOKEN."
TransportError: type[Exception] = httpx.TransportError
_TRANSIENT = (408, 412, 429)  # and all of 5xx; 412 is a commit on a parent that has moved on
_MEANINGS: tuple[tuple[type[BaseException], str], ...] = (
    (
        GatedRepoError,
        f"The repository is gated: ask for access on its page on the Hub. {LOG_IN}",
    ),
    (
        RepositoryNotFoundError,
        "The Hub has no such repository, or it is private and not yours to see. Check the "
        f"spelling. {LOG_IN}",
    ),
    (RevisionNotFoundError, "The repository has no such revision: name a branch, tag or commit."),
    (DisabledRepoError, "The Hub has disabled this repository."),
    (
        OfflineModeIsEnabled,
        "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it to use the network.",
    ),
    (LocalTokenNotFoundError, f"You are not logged in. {LOG_IN}"),
    (HFValidationError, "That is not the name of a repository: it must look like owner/name."),
)
_STATUSES = {
    401: f"The Hub does not accept the token. {LOG_IN}",
    403: "The token does not allow this: it can only read, or the repository is not yours. "
    "Use a token with write access from the settings of your account on the Hub.",
    429: "The Hub limits the number of requests. Wait some minutes and try again.",
}


def explain_hub_error(error: BaseException) -> str | None:
    """What is wrong and what to do about it, without any address, header or token.

    Args:
        error: what a client of the Hub raised; its causes are searched, too.

    Returns:
        Whole sentences; None if no part of the error comes from the Hub or the network.
    """
    causes = list(_causes(error))
    for cause in causes:
        for kind, meaning in _MEANINGS:
            if isinstance(cause, kind):
                return meaning
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause)
    if is_unreachable(error):
        return "The Hub cannot be reached. Check the network, and try again."
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        return "The repository has no such file."
    return None


def find_answer(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's refusal, found among an error and its causes."""
    return next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def is_unreachable(error: BaseException) -> bool:
    """Whether the network failed, so that the Hub did not answer at all."""
    kinds = (TransportError, ConnectionError, TimeoutError)
    return find_answer(error) is None and any(isinstance(cause, kinds) for cause in _causes(error))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return False
    answer = find_answer(error)
    if answer is not None:
        status = answer.response.status_code
        return status in _TRANSIENT or status >= 500
    # An error page where JSON was expected; and what hf_xet raises where its connection broke.
    return is_unreachable(error) or isinstance(error, json.JSONDecodeError | RuntimeError)


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait; None if it does not say."""
    answer = find_answer(error)
    value = None if answer is None else answer.response.headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _explain_answer(answer: HfHubHTTPError) -> str:
    status = answer.response.status_code
    if isinstance(answer, EntryNotFoundError):
        return "The repository has no such file."
    said = " ".join((answer.server_message or "").split())
    said = f" It says: {said[:300].rstrip('.')}." if said else ""
    if status in _STATUSES:
        return _STATUSES[status] + said
    if status >= 500:
        return f"The Hub has a problem of its own (status {status}). Try again later.{said}"
    return f"The Hub refuses the request (status {status}).{said}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then its causes and contexts."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        hidden = cause.__cause__ is None and cause.__suppress_context__
        cause = None if hidden else cause.__cause__ or cause.__context__
