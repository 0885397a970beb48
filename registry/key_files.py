"""Signatures with elliptic-curve keys in PEM (P-256, P-384 or P-521): offline."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from registry.errors import SignatureError
from registry.signer import Verifier, model_signing
from registry.store import disk_errors


@dataclass(frozen=True)
class KeyVerifier:
    """The public half of a key, in PEM."""

    public_key: Path

    is_keyless: ClassVar[bool] = False
    advice: ClassVar[str] = (
        "Ask the one who has the private key to sign it (`bitsmith registry sign`, or `bitsmith push --sign-key`), or "
        "give the right public key."
    )

    def check(self) -> None:
        self._config()

    def verify(self, folder: Path, signature: Path) -> None:
        self._config().verify(folder, signature)

    def __str__(self) -> str:
        return str(self.public_key)

    def _config(self):
        _, verifying = model_signing()
        with disk_errors(self.public_key):
            self.public_key.read_bytes()
        try:
            return verifying.Config().use_elliptic_key_verifier(public_key=self.public_key)
        except (ValueError, TypeError, AttributeError) as error:
            raise SignatureError(
                f"{self.public_key} is not a public key in PEM of an elliptic curve ({error})."
            ) from error


@dataclass(frozen=True)
class KeySigner:
    """A private key in PEM, and the password of its file."""

    private_key: Path
    password: str | None = field(default=None, repr=False)

    is_keyless: ClassVar[bool] = False

    def check(self) -> None:
        self._config()

    def sign(self, folder: Path, signature: Path) -> None:
        self._config().sign(folder, signature)

    def verifiers(self, scratch: Path) -> list[Verifier]:
        from cryptography.hazmat.primitives import serialization

        self.check()
        key = serialization.load_pem_private_key(self.private_key.read_bytes(), self._secret)
        public_key = scratch / "public.pem"
        public_key.write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        return [KeyVerifier(public_key)]

    @property
    def _secret(self) -> bytes | None:
        return self.password.encode() if self.password else None

    def _config(self):
        from cryptography.exceptions import UnsupportedAlgorithm

        signing, _ = model_signing()
        try:
            with disk_errors(self.private_key):
                self.private_key.read_bytes()
            # the password is annotated as text, and used as bytes
            return signing.Config().use_elliptic_key_signer(private_key=self.private_key, password=self._secret)
        except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
            raise SignatureError(
                f"{self.private_key} is not a private key that can sign ({error}). Expected an elliptic-curve key in "
                "PEM, such as `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` writes, and its password "
                "if it has one."
            ) from error
