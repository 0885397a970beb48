"""Every exception of the package: one root, one class for each thing a caller would do differently.

A message is one paragraph that says what was wrong, what was expected and what to do. Each class also is
the builtin that a caller may already catch.
"""

import difflib
from collections.abc import Iterable


class RegistryError(Exception):
    """Root of the errors below; raised itself where the disk or the database refuses."""


class NotFoundError(RegistryError, LookupError):
    """No such name, version, artifact or blob."""

    @classmethod
    def among(cls, noun: str, wanted: str, known: Iterable[str], advice: str) -> "NotFoundError":
        """The error for `wanted`, naming the nearest of `known`."""
        known = sorted(set(known))
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
        if near:
            hint = f"Did you mean {' or '.join(near)}?"
        elif known:
            hint = f"There is {', '.join(known[:5])}{' and more' if len(known) > 5 else ''}."
        else:
            hint = "The registry has none yet."
        return cls(f"There is no {noun} {wanted!r}. {hint} {advice}".rstrip())


class AmbiguousDigestError(RegistryError, LookupError):
    """A shortened digest fits more than one artifact."""


class InvalidNameError(RegistryError, ValueError):
    """A model name, a version or a digest is not written as it should be."""


class InvalidDescriptionError(RegistryError, ValueError):
    """The description of an artifact was changed by hand, cut short, or written by a newer version."""


class UnsafePathError(RegistryError, ValueError):
    """A file name that would leave its folder, or that some system cannot hold."""


class UnsafeFileError(RegistryError, ValueError):
    """A file that a loader could execute: a pickle, or code."""


class PinError(RegistryError):
    """A lock file pins another version than the one that is asked for or found."""


class TargetExistsError(RegistryError, FileExistsError):
    """A file stands where one should be written; nothing was overwritten."""


class IndexLostError(RegistryError):
    """The database is gone, or is being made anew, while the records tell of versions; nothing was changed."""


class DiskFullError(RegistryError):
    """The disk of the registry holds no more."""


class SchemaError(RegistryError):
    """The database was written by a newer version of the program."""


class IntegrityError(RegistryError, ValueError):
    """Content is not what its hash says.

    Attributes:
        what: the file, by its path inside the artifact or on disk.
        expected, got: sha256 or size in words.
    """

    def __init__(self, what: str, expected: str, got: str, advice: str = "") -> None:
        self.what, self.expected, self.got = what, expected, got
        self._advice = advice
        super().__init__(f"{what} is damaged: expected {expected} but got {got}. {advice}".rstrip())

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.what, self.expected, self.got, self._advice)


class SignatureError(RegistryError):
    """A version has no signature of the key that was asked for, or the key cannot be used."""


class HubError(RegistryError):
    """Root of what can go wrong with a repository on the Hugging Face Hub."""


class HubAuthError(HubError, PermissionError):
    """401 or 403: no token, a wrong one, or one without the right."""


class HubNotFoundError(HubError, LookupError):
    """The repository, revision or file does not exist, or the token may not see it."""


class HubConflictError(HubError):
    """Someone else's commit, tag or repository is in the way; nothing of theirs was touched."""


class HubRaceError(HubConflictError):
    """Someone else's commit came between reading and writing: to read again and try again is right."""


class HubUnavailableError(HubError, ConnectionError):
    """The network or the server does not answer for now (429, 5xx): trying again later is right.

    Attributes:
        retry_after_seconds: what the server asked for, if it did.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class NotPublishedError(HubError, ValueError):
    """The repository exists but was not published by bitsmith."""
