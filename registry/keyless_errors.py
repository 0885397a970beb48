"""What Sigstore's client raises, turned into one paragraph that says what to do.

The original is not chained: it carries the request, and the request carries the token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from registry.errors import RegistryError, SignatureError
from registry.hub_client import causes, is_for_now

# what is wrong with a token, by the name of the JWT library's error
_TOKEN_FAULTS = {
    "ExpiredSignatureError": "it has expired",
    "ImmatureSignatureError": "it is not valid yet; check the clock",
    "InvalidAudienceError": "it is for another audience than sigstore",
    "MissingRequiredClaimError": "it lacks one of the claims aud, sub, iat, exp and iss",
}
_NEW_TOKEN = "Get a new one, for the audience sigstore, and run the same command again."
_WITH_A_KEY = "with a key (--key, of `push` --sign-key)"


@contextmanager
def keyless_errors(what: str) -> Iterator[None]:
    """Raise a SignatureError for whatever the client raises inside; errors of the disk pass.

    Args:
        what: "made" or "verified", which the signature was to be.
    """
    from requests import RequestException

    try:
        yield
    except RegistryError:
        raise
    except Exception as error:  # the client wraps some errors of its libraries, and not the others
        if isinstance(error, OSError) and not isinstance(error, RequestException):
            raise
        raise SignatureError(f"No keyless signature was {what}: {_why(error)} Nothing was changed.") from None


def _why(error: Exception) -> str:
    from requests import ConnectionError as UnreachableError
    from requests import Timeout
    from sigstore.errors import NetworkError, TUFError
    from sigstore.oidc import ExpiredIdentity, IdentityError

    found = list(causes(error))
    if isinstance(error, TUFError):
        return (
            "the trust root of the public Sigstore cannot be fetched. It needs the network; where there is none, sign "
            f"{_WITH_A_KEY}, or give the trust configuration of an instance that can be reached (--trust-config)."
        )
    if isinstance(error, ExpiredIdentity):
        return f"the identity token cannot be used, since {_TOKEN_FAULTS['ExpiredSignatureError']}. {_NEW_TOKEN}"
    if isinstance(error, IdentityError):
        faults = [_TOKEN_FAULTS[name] for name in (type(each).__name__ for each in found) if name in _TOKEN_FAULTS]
        return f"the identity token cannot be used, since {faults[0] if faults else _said(error)}. {_NEW_TOKEN}"
    if isinstance(error, EOFError):
        return (
            "nobody is there to sign in with a browser. Give a token (--identity-token-variable), or run it where the "
            "CI gives its jobs one."
        )
    for cause in found:
        if (status := getattr(getattr(cause, "response", None), "status_code", None)) is not None:
            return _refused(status, _host(cause))
        if isinstance(cause, UnreachableError | Timeout | NetworkError) and _host(cause):
            return f"{_host(cause)} cannot be reached. Check the network and run the same command again."
    return f"the client of Sigstore gave up ({_said(error)}). Run the same command again, or sign {_WITH_A_KEY}."


def _refused(status: int, host: str) -> str:
    if status in (400, 401, 403):
        return (
            f"{host} refuses the identity token (HTTP {status}): it has expired, or is from an issuer that this "
            f"Sigstore does not know. {_NEW_TOKEN}"
        )
    again = "Wait a little and run" if is_for_now(status) else "Check its address and run"
    return f"{host} answers with HTTP {status}. {again} the same command again."


def _host(cause: Any) -> str:
    """Scheme, name and port, without a path: redirects may carry secrets."""
    url = getattr(getattr(cause, "request", None), "url", None) or ""
    return f"{urlsplit(url).scheme}://{urlsplit(url).netloc.rpartition('@')[2]}" if url else ""


def _said(error: Exception) -> str:
    """One line; what a server sent, which may repeat what it got, is left out."""
    return " ".join(str(error).partition(", body=")[0].split())[:200].rstrip(".") or type(error).__name__
