"""A private Sigstore instance on the loopback interface: an issuer of tokens, Fulcio, a CT log's key, and Rekor (v1).

Honest where the real one is: tokens are checked before a certificate is given out, the certificate carries a timestamp
of the CT log, an entry's signature is checked before it enters the log, and what Rekor answers holds an inclusion proof
of its Merkle tree (RFC 6962), a signed checkpoint and a signed entry timestamp. The client's own code checks all of it.
Left out: a timestamp authority, Rekor v2, witnesses.
"""

import base64
import hashlib
import json
import secrets
import struct
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

GITHUB = "https://token.actions.githubusercontent.com"
AUDIENCE = "sigstore"
JOB_SECRET = "what-github-gives-a-job"

_ISSUER, _ISSUER_V2 = "1.3.6.1.4.1.57264.1.1", "1.3.6.1.4.1.57264.1.8"
_TIMESTAMPS = "1.3.6.1.4.1.11129.2.4.2"
_SHA256 = ec.ECDSA(hashes.SHA256())


class RefusedError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SigstoreServer:
    """An instance that lives as long as the `with` block.

    Attributes:
        endpoint: http://127.0.0.1:port
        issuer, other_issuer: URLs that tokens come from; GITHUB is a third.
        requests: "METHOD /path" of every request, in order.
        bodies: of every request.
        faults: word in "METHOD /path", such as "signingCert" -> status to answer with.
        silent: a word in "METHOD /path" of requests that get no answer while the instance lives.
        leaves: the log; it has seen others before us.
        is_lying: entries are proven to be in another tree.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.faults: dict[str, int] = {}
        self.silent: str | None = None
        self.is_lying = False
        self.leaves = [f"somebody else's entry {number}".encode() for number in range(6)]
        self.codes: dict[str, dict[str, str]] = {}
        self.signs_in = "alice@example.com"
        self.lock = threading.Lock()
        self.is_over = threading.Event()
        self._token_key, self._ct_key, self._log_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self._ca = _Authority()
        handler = type("BoundHandler", (_Handler,), {"sigstore": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.issuer, self.other_issuer = f"{self.endpoint}/issuer", f"{self.endpoint}/other"

    def __enter__(self) -> "SigstoreServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.is_over.set()
        self._http.shutdown()
        self._http.server_close()

    def token(self, identity: str = "alice@example.com", *, lifetime_s: int = 300, **claims: object) -> str:
        """A JWT that the issuer signed; `claims` replace its own, None takes one away."""
        now = int(time.time())
        whole = {"iss": self.issuer, "aud": AUDIENCE, "sub": f"id-of-{identity}", "email": identity, "nonce": now}
        whole |= {"iat": now - 600, "exp": now + lifetime_s} | claims
        return jwt.encode({k: v for k, v in whole.items() if v is not None}, self._token_key, algorithm="ES256")

    def num_entries(self) -> int:
        """Of ours in the log."""
        return len(self.leaves) - 6

    def write_trust_config(self, path: Path) -> Path:
        """The file that tells a client whom to ask and whom to believe."""
        since = {"start": "2020-01-01T00:00:00Z"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict:
            details = {"rawBytes": _b64(_spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            log_id = {"keyId": _b64(_key_id(key))}
            return {"baseUrl": self.endpoint, "hashAlgorithm": "SHA2_256", "publicKey": details, "logId": log_id}

        def service(url: str) -> dict:
            return {"url": url, "majorApiVersion": 1, "validFor": since, "operator": "test"}

        chain = [{"rawBytes": _b64(each.public_bytes(serialization.Encoding.DER))} for each in self._ca.chain]
        authority = {
            "subject": {"organization": "test", "commonName": "test"},
            "uri": self.endpoint,
            "certChain": {"certificates": chain},
            "validFor": since,
        }
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self._log_key)],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self._ct_key)],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [service(self.endpoint)],
                "oidcUrls": [service(self.issuer)],
                "rekorTlogUrls": [service(self.endpoint)],
                "rekorTlogConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(config, indent=2))
        return path

    # Fulcio

    def certificate(self, authorization: str, body: bytes) -> dict:
        """For the identity of the token and the key of the request."""
        try:
            claims = jwt.decode(
                authorization.removeprefix("Bearer "),
                self._token_key.public_key(),
                algorithms=["ES256"],
                audience=AUDIENCE,
                issuer=[self.issuer, self.other_issuer, GITHUB],
            )
        except jwt.InvalidTokenError as error:
            raise RefusedError(401, f"There was an error processing {authorization}: {error}") from error
        request = x509.load_pem_x509_csr(base64.b64decode(json.loads(body)["certificateSigningRequest"]))
        if not request.is_signature_valid:
            raise RefusedError(400, "the request is not signed with its key")
        leaf = self._ca.issue(request.public_key(), claims, self._ct_key)
        chain = [each.public_bytes(serialization.Encoding.PEM).decode() for each in (leaf, *self._ca.chain)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    # Rekor

    def enter(self, body: bytes) -> dict:
        """Check the envelope's signature, add it to the log, and prove that it is there."""
        proposed = json.loads(body)
        if (proposed["kind"], proposed["apiVersion"]) != ("dsse", "0.0.1"):
            raise RefusedError(400, "expected an entry of kind dsse, 0.0.1")
        content = proposed["spec"]["proposedContent"]
        envelope, (verifier,) = json.loads(content["envelope"]), content["verifiers"]
        payload = base64.b64decode(envelope["payload"])
        (signature,) = envelope["signatures"]
        try:
            key = x509.load_pem_x509_certificate(base64.b64decode(verifier)).public_key()
            kind = envelope["payloadType"].encode()
            signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
            key.verify(base64.b64decode(signature["sig"]), signed, _SHA256)
        except InvalidSignature as error:
            raise RefusedError(400, "the envelope's signature does not hold") from error
        spec = {
            "envelopeHash": _sha256(content["envelope"].encode()),
            "payloadHash": _sha256(payload),
            "signatures": [{"signature": signature["sig"], "verifier": verifier}],
        }
        leaf = _canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        if leaf in self.leaves:
            raise RefusedError(409, "an equivalent entry already exists")
        self.leaves.append(leaf)
        return self._entry(leaf, len(self.leaves) - 1)

    def _entry(self, leaf: bytes, index: int) -> dict:
        root = _root(self.leaves if not self.is_lying else self.leaves[:-1])
        note = f"rekor.test - 1\n{len(self.leaves)}\n{_b64(root)}\n"
        note_signature = _b64(_key_id(self._log_key)[:4] + self._log_key.sign(note.encode(), _SHA256))
        entry = {
            "body": _b64(leaf),
            "integratedTime": int(time.time()),
            "logID": _key_id(self._log_key).hex(),
            "logIndex": index,
        }
        proof = {
            "checkpoint": f"{note}\n\u2014 rekor.test {note_signature}\n",
            "hashes": [each.hex() for each in _path(index, self.leaves)],
            "logIndex": index,
            "rootHash": root.hex(),
            "treeSize": len(self.leaves),
        }
        promise = _b64(self._log_key.sign(_canonical(entry), _SHA256))
        return {
            _leaf_hash(leaf).hex(): entry | {"verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}
        }

    # The issuer

    def authorize(self, query: Mapping[str, list[str]]) -> dict:
        """As if somebody had signed in: the code that a page would show."""
        code = secrets.token_urlsafe(8)
        self.codes[code] = {"challenge": query["code_challenge"][0], "redirect_uri": query["redirect_uri"][0]}
        return {"code": code}

    def exchange(self, body: bytes) -> dict:
        """The code, and the proof of who asked for it, for a token."""
        form = {key: value[0] for key, value in parse_qs(body.decode()).items()}
        known = self.codes.pop(form["code"], None)
        proof = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        if known != {"challenge": proof, "redirect_uri": form["redirect_uri"]}:
            raise RefusedError(400, "invalid_grant")
        return {"access_token": self.token(self.signs_in, lifetime_s=60)}

    def token_of_job(self, authorization: str | None) -> dict:
        """What GitHub gives a job that may ask for tokens."""
        if authorization != f"bearer {JOB_SECRET}":
            raise RefusedError(401, "no such job")
        workflow = "alice/models/.github/workflows/publish.yml@refs/heads/main"
        sub = "repo:alice/models:ref:refs/heads/main"
        return {"value": self.token(iss=GITHUB, sub=sub, job_workflow_ref=workflow, email=None)}


class _Authority:
    """A root, and the intermediate below it that writes certificates."""

    def __init__(self) -> None:
        root, self._key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        now = datetime.now(UTC)

        def certificate(name: str, key: ec.EllipticCurvePrivateKey, path_length: int) -> x509.Certificate:
            usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
            builder = _builder(_name(name), _name("root"), key.public_key(), now - timedelta(days=1), timedelta(days=9))
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
            builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
            return builder.add_extension(issuer, critical=False).sign(root, hashes.SHA256())

        self.chain = [certificate("intermediate", self._key, 0), certificate("root", root, 1)]

    def issue(
        self, key: ec.EllipticCurvePublicKey, claims: dict, ct_key: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        """Valid for ten minutes; signed twice, since the CT log's timestamp is over the certificate without it."""
        usage = dict.fromkeys(_USAGES, False) | {"digital_signature": True}
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        iss = claims["iss"]
        builder = _builder(x509.Name([]), _name("intermediate"), key, datetime.now(UTC), timedelta(minutes=10))
        builder = builder.add_extension(x509.SubjectAlternativeName([_subject(claims)]), critical=True)
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        builder = builder.add_extension(issuer, critical=False)
        for oid, value in ((_ISSUER, iss.encode()), (_ISSUER_V2, _der(0x0C, iss.encode()))):
            builder = builder.add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False
            )
        before = builder.sign(self._key, hashes.SHA256()).tbs_certificate_bytes
        stamp = _timestamp(before, hashlib.sha256(_spki(self._key)).digest(), ct_key)
        listed = struct.pack(">HH", len(stamp) + 2, len(stamp)) + stamp
        oid = x509.ObjectIdentifier(_TIMESTAMPS)
        with_stamp = builder.add_extension(x509.UnrecognizedExtension(oid, _der(0x04, listed)), critical=False)
        return with_stamp.sign(self._key, hashes.SHA256())


_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, span: timedelta
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    return builder.not_valid_before(start).not_valid_after(start + span)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _subject(claims: dict) -> x509.GeneralName:
    """A workflow of GitHub, a person, or a service."""
    if claims["iss"] == GITHUB:
        return x509.UniformResourceIdentifier(f"https://github.com/{claims['job_workflow_ref']}")
    return x509.RFC822Name(claims["email"]) if "email" in claims else x509.UniformResourceIdentifier(claims["sub"])


def _timestamp(before: bytes, issuer_id: bytes, ct_key: ec.EllipticCurvePrivateKey) -> bytes:
    """A SignedCertificateTimestamp over a precertificate (RFC 6962, 3.2)."""
    now_ms = int(time.time() * 1000)
    entry = issuer_id + len(before).to_bytes(3, "big") + before
    signature = ct_key.sign(struct.pack(">BBQH", 0, 0, now_ms, 1) + entry + b"\0\0", _SHA256)
    head = struct.pack(">B32sQH", 0, _key_id(ct_key), now_ms, 0)
    return head + struct.pack(">BBH", 4, 3, len(signature)) + signature  # SHA-256, ECDSA


def _der(tag: int, content: bytes) -> bytes:
    length = bytes([len(content)]) if len(content) < 128 else b"\x81" + bytes([len(content)])
    return bytes([tag]) + length + content


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


def _b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _sha256(content: bytes) -> dict:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


# The Merkle tree


def _leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\0" + leaf).digest()


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _root(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return _leaf_hash(leaves[0])
    left = _split(len(leaves))
    return hashlib.sha256(b"\1" + _root(leaves[:left]) + _root(leaves[left:])).digest()


def _path(index: int, leaves: list[bytes]) -> list[bytes]:
    """The hashes beside the way from a leaf to the root, from below."""
    if len(leaves) == 1:
        return []
    left = _split(len(leaves))
    if index < left:
        return [*_path(index, leaves[:left]), _root(leaves[left:])]
    return [*_path(index - left, leaves[left:]), _root(leaves[:left])]


class _Handler(BaseHTTPRequestHandler):
    sigstore: SigstoreServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, *_arguments: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line, sigstore = f"{self.command} {self.path}", self.sigstore
        with sigstore.lock:
            sigstore.requests.append(line)
            sigstore.bodies.append(body)
        if sigstore.silent and sigstore.silent in line:
            sigstore.is_over.wait()
            self.close_connection = True
            return
        try:
            for word, status in sigstore.faults.items():
                if word in line:
                    raise RefusedError(status, f"told to refuse {self.headers.get('Authorization')}")
            with sigstore.lock:
                self._answer(200 if self.command == "GET" else 201, self._work(body))
        except RefusedError as error:
            self._answer(error.status, {"code": error.status, "message": str(error)})

    def _work(self, body: bytes) -> dict:
        sigstore, url = self.sigstore, urlsplit(self.path)
        match self.command, url.path:
            case "POST", "/api/v2/signingCert":
                return sigstore.certificate(self.headers["Authorization"], body)
            case "POST", "/api/v1/log/entries":
                return sigstore.enter(body)
            case "GET", "/issuer/.well-known/openid-configuration":
                return {
                    "authorization_endpoint": f"{sigstore.issuer}/auth",
                    "token_endpoint": f"{sigstore.issuer}/token",
                }
            case "GET", "/issuer/auth":
                return sigstore.authorize(parse_qs(url.query))
            case "POST", "/issuer/token":
                return sigstore.exchange(body)
            case "GET", "/github":
                return sigstore.token_of_job(self.headers.get("Authorization"))
            case _:
                raise RefusedError(404, f"no such route {self.path}")

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
