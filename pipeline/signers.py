"""Which signer, and whose signature, the command line's options name."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.console import read_secret
from pipeline.errors import RecipeError
from pipeline.home import expanded
from registry import IdentityVerifier, KeylessSigner, KeySigner, KeyVerifier, Signer, Verifier


def signer_of(
    key: tuple[str, Path | None],
    keyless: tuple[str, bool],
    password_variable: str | None,
    token_variable: str | None,
    trust_config: Path | None,
) -> Signer | None:
    """A key or an identity; None where neither was asked for.

    Args:
        key, keyless: each option's name and its value.
    Raises:
        RecipeError: both were, or an option belongs to the other, or a variable is not set.
    """
    (key_option, path), (keyless_option, is_keyless) = key, keyless
    if path is not None and is_keyless:
        raise RecipeError(f"{key_option} signs with a key and {keyless_option} without one. Give one of the two.")
    _only_with(key_option, path is not None, {"--password-variable": password_variable})
    of_keyless = {"--identity-token-variable": token_variable, "--trust-config": trust_config}
    _only_with(keyless_option, is_keyless, of_keyless)
    if path is not None:
        return KeySigner(expanded(path), read_secret(password_variable, "the key's password"))
    if is_keyless:
        token = read_secret(token_variable, "the identity token")
        return KeylessSigner(token and token.strip(), _expanded(trust_config))
    return None


def verifier_of(
    public_key: Path | None, identity: str | None, issuer: str | None, trust_config: Path | None
) -> Verifier | None:
    """Whose signature is required; None where nobody's is.

    Raises:
        RecipeError: a key and an identity were given, or half an identity.
    """
    if public_key is not None and (identity is not None or issuer is not None):
        raise RecipeError("--public-key requires a signature of a key and --identity one without. Give one of the two.")
    if (identity is None) != (issuer is None):
        given, missing = ("--issuer", "--identity") if identity is None else ("--identity", "--issuer")
        raise RecipeError(
            f"{given} needs {missing} too: an identity counts only with the URL of the service that vouches for it, "
            "such as https://github.com/login/oauth or https://token.actions.githubusercontent.com."
        )
    _only_with("--identity", identity is not None, {"--trust-config": trust_config})
    if public_key is not None:
        return KeyVerifier(expanded(public_key))
    if identity is not None and issuer is not None:
        return IdentityVerifier(identity, issuer, _expanded(trust_config))
    return None


def _only_with(option: str, is_given: bool, others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if value is not None and not is_given:
            raise RecipeError(f"{name} belongs to {option}. Give both, or neither.")


def _expanded(path: Path | None) -> Path | None:
    return expanded(path) if path is not None else None
