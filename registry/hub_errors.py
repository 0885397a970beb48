"""What the Hub's client raises, turned into the few errors that a user can act on.

The original is not chained: it carries the request, and the request carries the token.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from registry.errors import (
    HubAuthError,
    HubError,
    HubNotFoundError,
    HubRaceError,
    HubUnavailableError,
    RegistryError,
)
from registry.hub_client import is_for_now
from registry.store import disk_error

_TRY_AGAIN = "Nothing is half-done there: check the network, wait a little, run the same command again."


@contextmanager
def hub_errors(repo_id: str, right: str, token: str | None, folder: Path) -> Iterator[None]:
    """Raise a RegistryError, mostly a HubError, for whatever the client raises inside.

    Args:
        right: "read" or "write", what the token must allow.
        token: blotted out should a server send it back in a message.
        folder: where the client reads and writes, for errors of the disk.
    """
    from huggingface_hub import errors as hf

    try:
        yield
    except RegistryError:
        raise
    except (hf.HTTPError, _invalid_url(), OSError, ValueError, RuntimeError) as error:
        raise _translated(error, repo_id, right, token, folder) from None


def _invalid_url() -> type[Exception]:
    """Of the HTTP library that the client uses: httpx in its version 1, httpx2 in 2."""
    from huggingface_hub import errors as hf

    return importlib.import_module(hf.HTTPError.__module__.partition(".")[0]).InvalidURL


def _translated(error: Exception, repo_id: str, right: str, token: str | None, folder: Path) -> RegistryError:
    from huggingface_hub import errors as hf

    for cause in _raised_from(error):
        if isinstance(cause, hf.HfHubHTTPError):
            said = _blotted(cause.server_message or str(cause), token)
            return _refused(cause, cause.response.status_code, said, repo_id, right, has_token=token is not None)
    text = _blotted(str(error), token)
    if isinstance(error, hf.LocalTokenNotFoundError):
        return HubAuthError(f"No token was found to {right} {repo_id}. {_log_in(repo_id, right)}")
    if isinstance(error, hf.HFValidationError):
        return HubError(f"{repo_id!r} is not a repository on the Hub ({text}). Write it as user/name.")
    if "xet-write-token" in text:
        return HubError(
            f"The server of {repo_id} does not speak Xet ({text}). Set HF_HUB_DISABLE_XET=1 and run it again."
        )
    if isinstance(error, hf.OfflineModeIsEnabled):
        return HubError(f"{repo_id} was not asked: HF_HUB_OFFLINE is set. Unset it to reach the Hub.")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return disk_error(error, folder)
    if isinstance(error, hf.HTTPError | OSError):
        return HubUnavailableError(f"The server of {repo_id} cannot be reached ({text}). {_TRY_AGAIN}")
    return HubError(f"The Hub's client refused to {right} {repo_id}: {text}. Mend what it names and try again.")


def _refused(cause: Exception, status: int, said: str, repo_id: str, right: str, *, has_token: bool) -> HubError:
    """The error for an answer with an HTTP status that is no success."""
    from huggingface_hub import errors as hf

    if isinstance(cause, hf.GatedRepoError):
        return HubAuthError(f"{repo_id} is gated ({said}). Accept its terms on its page. {_log_in(repo_id, right)}")
    if isinstance(cause, hf.RepositoryNotFoundError):
        unseen = "your token may not see it" if has_token else "it is private, and no token was given"
        return HubNotFoundError(
            f"{repo_id} does not exist, or {unseen} ({said}). Check the spelling. {_log_in(repo_id, right)}"
        )
    if isinstance(cause, hf.RevisionNotFoundError):
        return HubNotFoundError(f"{repo_id} has no such revision ({said}). Its page lists branches and tags.")
    if status == 401 and not has_token:
        return HubAuthError(f"No token was given, and {repo_id} wants one (401: {said}). {_log_in(repo_id, right)}")
    if status == 401:
        return HubAuthError(f"The Hub does not know the token (401: {said}). {_log_in(repo_id, right)}")
    if status == 403:
        return HubAuthError(f"The token may not {right} {repo_id} (403: {said}). {_log_in(repo_id, right)}")
    if status == 404:
        return HubNotFoundError(f"{repo_id} lacks what was asked for (404: {said}).")
    if status in (409, 412):
        return HubRaceError(
            f"Someone else changed {repo_id} at the same moment ({status}: {said}). Nothing of theirs was "
            "overwritten. Look at what they did, then run the same command again."
        )
    if status == 413:
        return HubError(
            f"The Hub finds a file too large for {repo_id} (413: {said}). Nothing was published. Make a smaller "
            "version, or ask the server's owner for its limits."
        )
    if is_for_now(status):
        answer = f"The Hub did not do it for now ({status}: {said}). {_TRY_AGAIN}"
        return HubUnavailableError(answer, _retry_after_seconds(cause))
    return HubError(f"The Hub refused to {right} {repo_id} ({status}: {said}). Mend what it names and try again.")


def _retry_after_seconds(cause: Exception) -> float | None:
    """What the answer asks for, in either of the Hub's ways."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    headers = cause.response.headers  # type: ignore[attr-defined]
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "")
    if asked.isdecimal():
        return float(asked)
    then, now = _moment(asked), _moment(headers.get("Date", "")) or datetime.now(UTC)
    return max((then - now).total_seconds(), 0.0) if then else None


def _moment(text: str) -> datetime | None:
    """A date as HTTP writes it; None for anything else."""
    try:
        return parsedate_to_datetime(text).replace(tzinfo=UTC)  # always GMT
    except ValueError:
        return None


def _log_in(repo_id: str, right: str) -> str:
    return f"Log in with `hf auth login`, or set HF_TOKEN to a token with the right to {right} {repo_id}."


def _raised_from(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, but not what was handled meanwhile: the client asks for what may not be there."""
    while error is not None:
        yield error
        error = error.__cause__


def _blotted(text: str, token: str | None) -> str:
    """One line of `text`, without the token."""
    for secret in (token, repr(token)[1:-1], (token or "").strip()) if token else ():
        text = text.replace(secret, "***")
    return " ".join(text.split())[:400]
