"""Who signs and whose signature is asked for: a key file (key_files.py), or an identity without one (keyless.py)."""

from pathlib import Path
from typing import ClassVar, Protocol

from registry.errors import RegistryError


class Verifier(Protocol):
    """Whose signature is asked for; its text names them in an error.

    Attributes:
        is_keyless: the signature has to be of an identity, not of a key.
        advice: what to do where there is no such signature.
    """

    is_keyless: ClassVar[bool]
    advice: ClassVar[str]

    def check(self) -> None:
        """Raises SignatureError if nothing could be verified with it, before any work is done."""
        ...

    def verify(self, folder: Path, signature: Path) -> None:
        """Raises an error of any kind unless `signature` is theirs and over exactly the files of `folder`."""
        ...


class Signer(Protocol):
    """Who signs.

    Attributes:
        is_keyless: as an identity, without a key.
    """

    is_keyless: ClassVar[bool]

    def check(self) -> None:
        """Raises SignatureError if it could not sign as things are, before any work is done."""
        ...

    def sign(self, folder: Path, signature: Path) -> None:
        """Write a signature over all files of `folder`. Raises SignatureError where that fails."""
        ...

    def verifiers(self, scratch: Path) -> list[Verifier]:
        """What a signature that it made before holds for, any of them; `scratch` is a folder to keep them in."""
        ...


def model_signing():
    """The modules `signing` and `verifying` of the OpenSSF's package, which is an optional extra."""
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise RegistryError(
            f"Signatures need {error.name}. Install it with `pip install 'bitsmith[signing]'`."
        ) from error
    return signing, verifying
