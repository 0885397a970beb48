"""Files and facts: a content-addressed store, immutable versions, and the Hugging Face Hub as their mirror.

Knows nothing of tensors. Importing it is cheap; the database and the Hub's client load when first used.
"""

from registry.alias import AliasMove
from registry.artifact import Artifact, FileEntry, canonical_json, sha256_of
from registry.collected import Collected
from registry.errors import (
    AmbiguousDigestError,
    DiskFullError,
    HubAuthError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubRaceError,
    HubUnavailableError,
    IndexLostError,
    IntegrityError,
    InvalidDescriptionError,
    InvalidNameError,
    NotFoundError,
    NotPublishedError,
    PinError,
    RegistryError,
    SchemaError,
    SignatureError,
    TargetExistsError,
    UnsafeFileError,
    UnsafePathError,
)
from registry.hub_collection import add_to_collection
from registry.hub_overview import Overview
from registry.hub_pull import PullResult, pull
from registry.hub_push import PushResult, push
from registry.key_files import KeySigner, KeyVerifier
from registry.keyless import IdentityVerifier, KeylessSigner
from registry.patience import Patience
from registry.registry import Lineage, Registry
from registry.signer import Signer, Verifier
from registry.signing import sign_version, signatures, verify_signature
from registry.store import Store
from registry.transfer import Exported, export_version, import_version
from registry.verification import Verification
from registry.version import Version, VersionReference, checked_name

__all__ = [
    "AliasMove",
    "AmbiguousDigestError",
    "Artifact",
    "Collected",
    "DiskFullError",
    "Exported",
    "FileEntry",
    "HubAuthError",
    "HubConflictError",
    "HubError",
    "HubNotFoundError",
    "HubRaceError",
    "HubUnavailableError",
    "IdentityVerifier",
    "IndexLostError",
    "IntegrityError",
    "InvalidDescriptionError",
    "InvalidNameError",
    "KeySigner",
    "KeyVerifier",
    "KeylessSigner",
    "Lineage",
    "NotFoundError",
    "NotPublishedError",
    "Overview",
    "Patience",
    "PinError",
    "PullResult",
    "PushResult",
    "Registry",
    "RegistryError",
    "SchemaError",
    "SignatureError",
    "Signer",
    "Store",
    "TargetExistsError",
    "UnsafeFileError",
    "UnsafePathError",
    "Verification",
    "Verifier",
    "Version",
    "VersionReference",
    "add_to_collection",
    "canonical_json",
    "checked_name",
    "export_version",
    "import_version",
    "pull",
    "push",
    "sha256_of",
    "sign_version",
    "signatures",
    "verify_signature",
]
