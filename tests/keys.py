"""Keys of elliptic curves, as openssl writes them."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8


def write_keys(folder: Path, name: str, curve: ec.EllipticCurve, password: bytes | None = None) -> tuple[Path, Path]:
    """The private key, encrypted if there is a password, and the public one."""
    key = ec.generate_private_key(curve)
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public
