"""What re-hashing every file of a version, and of its report, found; and re-reading what it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass

from registry.errors import IntegrityError
from registry.version import Version


@dataclass(frozen=True)
class Verification:
    """Result of `Registry.verify`.

    Attributes:
        missing: paths whose blob is gone; those of the report start with report/, those of records with records/.
        damaged: path -> the error that says what was expected and what is there.
        num_files, size_bytes: of the version itself, damaged or not.
        num_report_files: of its report.
        num_records: descriptions of the version, its report and all that they were made from, as far as known here.
    """

    version: Version
    missing: tuple[str, ...]
    damaged: Mapping[str, IntegrityError]
    num_files: int
    size_bytes: int
    num_report_files: int
    num_records: int

    @property
    def ok(self) -> bool:
        return not self.missing and not self.damaged

    def raise_if_damaged(self) -> None:
        """Raises IntegrityError naming every file that is missing or damaged."""
        if self.ok:
            return
        bad = [f"{path} (missing)" for path in self.missing] + [f"{path} (changed)" for path in self.damaged]
        first = next(iter(self.damaged.values()), None)
        raise IntegrityError(
            f"{self.version}: {', '.join(bad)}",
            first.expected if first else f"all {self.num_files} files",
            first.got if first else f"{self.num_files - len(self.missing)} of them",
            "Pull the version again, or run the command that made it again; `bitsmith registry doctor --repair` mends "
            "records.",
        )
