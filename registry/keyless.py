"""Signatures of an identity, without a key: Sigstore.

A service that knows who somebody is (the issuer) gives out a token; Fulcio writes the token's identity into a
certificate of ten minutes, for a key that is thrown away; Rekor enters the signature into a public log, whose proof
goes into model.sig with the time. So signing needs the network, and whoever reads the log sees the identity. Verifying
needs the trust root alone: that of the public Sigstore is fetched, that of another instance is a file.
"""

import base64
import copy
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from registry.errors import SignatureError
from registry.keyless_errors import keyless_errors
from registry.signer import Verifier, model_signing
from registry.store import disk_errors

if TYPE_CHECKING:
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken

WAIT_SECONDS = 60.0

# claim -> what Fulcio writes into the certificate for it: people; services; workflows of GitHub and of GitLab
_NAMES = {"email": "{}", "sub": "{}", "job_workflow_ref": "https://github.com/{}", "ci_config_ref_uri": "https://{}"}


@dataclass(frozen=True)
class IdentityVerifier:
    """An identity and the service that vouches for it.

    Attributes:
        identity: an e-mail address, or the URI of a workflow or a service, exactly as the certificate has it.
        issuer: URL of the service that gave out the token, exactly too.
        trust_config: of a Sigstore instance, in JSON; None is the public one, whose trust root the network has.
    Raises:
        SignatureError: one of the two is empty, which would let anybody's signature hold.
    """

    identity: str
    issuer: str
    trust_config: Path | None = None

    is_keyless: ClassVar[bool] = True
    advice: ClassVar[str] = (
        "Ask them to sign it (`bitsmith registry sign --keyless`, or `bitsmith push --sign-keyless`), or give the "
        "right identity, issuer and trust configuration."
    )

    def __post_init__(self) -> None:
        if not self.identity or not self.issuer:
            what = "issuer" if self.identity else "identity"
            raise SignatureError(
                f"The {what} is empty, and anybody's signature would hold. Expected an e-mail address or a URI as the "
                "identity, and the URL of the service that vouches for it as the issuer."
            )

    def check(self) -> None:
        _ = self._config

    def verify(self, folder: Path, signature: Path) -> None:
        copy.copy(self._config).verify(folder, signature)  # it remembers how the first one was hashed

    def __str__(self) -> str:
        return f"{self.identity} (by {self.issuer})"

    @cached_property
    def _config(self):
        _, verifying = model_signing()
        if self.trust_config:
            read_trust(self.trust_config)
        with keyless_errors("verified"):
            return verifying.Config().use_sigstore_verifier(
                identity=self.identity, oidc_issuer=self.issuer, trust_config=self.trust_config
            )


@dataclass(frozen=True)
class KeylessSigner:
    """An identity that signs with a token.

    Attributes:
        token: a JWT for the audience "sigstore". None: the one that the CI has for its job, or else that of
            whoever signs in with a browser.
        trust_config: see `IdentityVerifier`.
    """

    token: str | None = field(default=None, repr=False)
    trust_config: Path | None = None

    is_keyless: ClassVar[bool] = True

    def check(self) -> None:
        model_signing()
        if self.token is not None:
            _identity_token(self.token)
        _ = self._config

    def sign(self, folder: Path, signature: Path) -> None:
        from sigstore.models import Bundle
        from sigstore.verify import Verifier as SigstoreVerifier

        with keyless_errors("made"):
            self._config.sign(folder, signature)
            verifier = SigstoreVerifier(trusted_root=self._trust().trusted_root)
            # the client itself does not check what the log answers
            verifier.verify_dsse(Bundle.from_json(signature.read_bytes()), _Anybody())

    def verifiers(self, scratch: Path) -> list[Verifier]:
        model_signing()
        with keyless_errors("made"):
            token = self._any_token()
            claims = _claims(str(token))
            names = [form.format(claims[claim]) for claim, form in _NAMES.items() if claims.get(claim)]
            return [IdentityVerifier(name, token.federated_issuer, self.trust_config) for name in names]

    @cached_property
    def _config(self):
        signing, _ = model_signing()
        if self.trust_config:
            read_trust(self.trust_config)
        with keyless_errors("made"):
            config = signing.Config().use_sigstore_signer(
                use_ambient_credentials=True, identity_token=self.token, trust_config=self.trust_config
            )
        _bound_waits(config)
        return config

    def _any_token(self) -> "IdentityToken":
        from sigstore.oidc import IdentityToken, Issuer, detect_credential

        if self.token is not None:
            return _identity_token(self.token)
        if ambient := detect_credential():
            return IdentityToken(ambient)
        return Issuer(self._trust().signing_config.get_oidc_url()).identity_token()

    def _trust(self) -> "ClientTrustConfig":
        from sigstore.models import ClientTrustConfig

        return read_trust(self.trust_config) if self.trust_config else ClientTrustConfig.production()


class _Anybody:
    """A policy of Sigstore's verifier that asks nothing of the identity."""

    def verify(self, cert: object) -> None:
        pass


def read_trust(path: Path) -> "ClientTrustConfig":
    """The trust configuration in a file.

    Raises:
        SignatureError: it is none.
    """
    model_signing()
    from sigstore.models import ClientTrustConfig
    from sigstore.verify import Verifier as SigstoreVerifier

    with disk_errors(path):
        content = path.read_bytes()
    try:
        found = ClientTrustConfig.from_json(content.decode())
        SigstoreVerifier(trusted_root=found.trusted_root)
        found.signing_config.get_oidc_url()
    except Exception as error:  # a damaged file makes the parsers raise whatever they meet
        raise SignatureError(
            f"{path} is not the trust configuration of a Sigstore instance ({' '.join(str(error).split())[:200]}). "
            "Expected its trusted root and signing configuration in JSON "
            "(application/vnd.dev.sigstore.clienttrustconfig.v0.1+json). Ask whoever runs the instance for it."
        ) from error
    return found


def _identity_token(token: str) -> "IdentityToken":
    from sigstore.oidc import IdentityToken

    with keyless_errors("made"):
        if not re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token, re.ASCII):
            raise SignatureError(
                "The identity token is no JWT: expected three words of letters, digits, '-' and '_', with dots between "
                "them. Let the environment variable hold the token alone."
            )
        return IdentityToken(token)


def _claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def _bound_waits(config: Any) -> None:
    """Let no dead server keep us: the client itself waits for an answer forever. As far as its version lets us."""
    from requests.adapters import HTTPAdapter

    class Bounded(HTTPAdapter):
        def send(self, *arguments: Any, **settings: Any):
            return super().send(*arguments, **(settings | {"timeout": WAIT_SECONDS}))

    with suppress(AttributeError):
        context = config._signer._signing_context
        for session in (context._fulcio.session, context._rekor._session):
            for scheme in ("http://", "https://"):
                session.mount(scheme, Bounded())
