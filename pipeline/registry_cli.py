"""`bitsmith registry ...`: look at versions, compare, check, name and clean up; each a thin call on the library."""

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from pipeline.budget import human_bytes
from pipeline.console import open_registry, print_json, progress_of, version_json
from pipeline.display import RESULTS
from pipeline.errors import RecipeError
from pipeline.home import expanded, home
from pipeline.options import (
    AsJson,
    Identity,
    Issuer,
    NameArgument,
    PasswordVariable,
    PublicKey,
    Quiet,
    TokenVariable,
    TrustConfig,
)
from pipeline.signers import signer_of, verifier_of
from pipeline.span import span_seconds
from pipeline.watch_cli import watch
from registry import AliasMove, RegistryError, export_version, import_version, sign_version, verify_signature

Reason = Annotated[str, typer.Option(help="why, for the log")]
AliasArgument = Annotated[str, typer.Argument(help="a word such as production; `latest` is always the highest number")]

registry_app = typer.Typer(help="What was made: names, versions, aliases, files.", no_args_is_help=True)
registry_app.command()(watch)


@registry_app.command("init")
def init(
    database: Annotated[
        str | None, typer.Option(help="postgresql://user@host/name; its password belongs into ~/.pgpass or PGPASSWORD")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="URL for the files, such as s3://bucket/prefix; its credentials belong into the environment"),
    ] = None,
) -> None:
    """Make the registry: its index in SQLite or PostgreSQL, its files beside it or at any URL that fsspec knows."""
    from registry.database import checked_url
    from registry.remote import RemoteBlobs
    from registry.settings import RegistrySettings

    if database is not None:
        checked_url(database)
    root, settings = home() / "registry", RegistrySettings(database, store)
    before = RegistrySettings.read(root)
    if (root / "index.sqlite").exists() and settings != before:
        raise RegistryError(
            f"The registry in {root} has its index already, in index.sqlite. Choose a new folder with BITSMITH_HOME, "
            "or leave index and files where they are."
        )
    if before != RegistrySettings() and settings != before:
        raise RegistryError(f"The registry in {root} has its index already, as {root / 'registry.toml'} says.")
    is_new_store = store is not None and RemoteBlobs(store).claim(settings.index_name(root))
    settings.write(root)
    try:
        num_versions = len(open_registry().versions())
    except RegistryError:
        before.write(root)
        if store is not None and is_new_store:
            RemoteBlobs(store).give_up()
        raise
    where = f"; its files are at {store}" if store else ""
    RESULTS.print(
        f"The registry in {root} is ready; it has {num_versions} versions{where}.", soft_wrap=True, highlight=False
    )


@registry_app.command("list")
def list_versions(as_json: AsJson = False) -> None:
    """All versions."""
    from pipeline.display_registry import show_versions

    store = open_registry()
    versions = store.versions()
    if as_json:
        print_json([version_json(version) for version in versions])
    else:
        show_versions(store, versions)


@registry_app.command()
def show(name: NameArgument, as_json: AsJson = False) -> None:
    """One version: files, recipe, report."""
    from pipeline.display_registry import show_version

    store = open_registry()
    version = store.version(name)
    artifact = store.get(version.digest)
    if as_json:
        print_json(version_json(version) | json.loads(artifact.to_json()))
    else:
        show_version(store, version)


@registry_app.command()
def lineage(name: NameArgument, as_json: AsJson = False) -> None:
    """What a version was made from: results of all steps, base model, calibration, seed, program."""
    from pipeline.display_registry import show_lineage

    store = open_registry()
    version = store.version(name)
    found = store.lineage(version.digest)
    if as_json:
        artifacts = [json.loads(artifact.to_json()) for artifact in found.artifacts]
        print_json(version_json(version) | {"artifacts": artifacts, "missing": list(found.missing)})
    else:
        show_lineage(version, found)


@registry_app.command()
def diff(before: NameArgument, after: NameArgument, as_json: AsJson = False) -> None:
    """What changed between two versions: quality, size, recipe, choices."""
    from pipeline.display_registry import show_diff
    from pipeline.version_diff import VersionDiff
    from pipeline.version_facts import VersionFacts

    store = open_registry()
    found = VersionDiff.of(*(VersionFacts.of(store, store.version(name)) for name in (before, after)))
    if as_json:
        print_json(found.to_json())
    else:
        show_diff(found)


@registry_app.command()
def sign(
    name: NameArgument,
    key: Annotated[Path | None, typer.Option(help="private key of an elliptic curve, in PEM")] = None,
    password_variable: PasswordVariable = None,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="sign as who you are, which a public log then shows; needs the network")
    ] = False,
    token_variable: TokenVariable = None,
    trust_config: TrustConfig = None,
    quiet: Quiet = False,
) -> None:
    """Sign all files of a version with a key of your own, or without one by Sigstore.

    `verify --public-key`, or `verify --identity --issuer`, checks it, here or elsewhere.
    """
    signer = signer_of(("--key", key), ("--keyless", keyless), password_variable, token_variable, trust_config)
    if signer is None:
        raise RecipeError("Who signs? Expected `--key FILE` for a key of your own, or `--keyless`.")
    store = open_registry()
    version = store.version(name)
    signature = sign_version(store, str(version), signer)
    if not quiet:
        RESULTS.print(f"{version} is signed ({signature.digest[:12]})", soft_wrap=True, highlight=False)


@registry_app.command()
def verify(
    name: NameArgument,
    public_key: PublicKey = None,
    identity: Identity = None,
    issuer: Issuer = None,
    trust_config: TrustConfig = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Re-hash every file of a version and its report, and compare tensors and plan; exits with 1 if anything differs.

    A version that is no checkpoint may have no plan, which is said. A checkpoint without one is not sound.
    """
    verifier = verifier_of(public_key, identity, issuer, trust_config)
    if verifier is not None:
        verifier.check()  # a large version takes minutes to read
    store = open_registry()
    found = store.verify(name, progress=progress_of(quiet))
    num_matrices: int | None = 0
    if found.ok:  # before a word of "ok" is printed
        from pipeline.planned_tensors import check_planned

        if verifier is not None:
            verify_signature(store, str(found.version), verifier)
        num_matrices = check_planned(store, found.version)
    if as_json:
        damage = {path: str(error) for path, error in found.damaged.items()}
        print_json(version_json(found.version) | {"ok": found.ok, "missing": list(found.missing), "damaged": damage})
    found.raise_if_damaged()
    if not quiet and not as_json:
        by = verifier and (f"by {verifier}" if verifier.is_keyless else f"with the key of {verifier}")
        signed = f", signed {by}" if by else ""
        planned = "no plan to compare with" if num_matrices is None else f"{num_matrices} matrices as planned"
        report = f"{found.num_report_files} files of its report and " if found.num_report_files else ""
        RESULTS.print(
            f"{found.version}: {found.num_files} files, {human_bytes(found.size_bytes)}, all sound, and so are {report}"
            f"{found.num_records} records of what it was made from; {planned}{signed}",
            soft_wrap=True,
            highlight=False,
        )


@registry_app.command()
def alias(
    name: NameArgument,
    alias: Annotated[str | None, typer.Argument(help="a word such as production; without it, show all")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="let the alias name nothing any more")] = False,
    reason: Reason = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let NAME@ALIAS name a version, or show a model's aliases and the log of their moves."""
    from pipeline.display_registry import show_aliases

    store = open_registry()
    if alias is not None:
        if remove:
            move = store.remove_alias(store.version(name).name, alias, reason=reason)
        else:
            move = store.alias(name, alias, reason=reason)
        _show_move(move, as_json, quiet)
        return
    if remove:
        raise RecipeError("Which alias is to be removed? Expected `bitsmith registry alias NAME ALIAS --remove`.")
    model = store.version(name).name
    aliases, moves = store.aliases(model), store.alias_moves(model)
    if as_json:
        print_json({"name": model, "aliases": aliases, "log": [asdict(move) for move in moves]})
    else:
        show_aliases(model, aliases, moves)


@registry_app.command()
def promote(
    name: NameArgument,
    alias: AliasArgument,
    require: Annotated[
        list[str],
        typer.Option(help="a gate such as 'kld<=0.05', 'top1>=90' or 'size_bytes<=200e6'; repeat for several"),
    ],
    reason: Reason = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let NAME@ALIAS name a version if it meets all gates; else exit with 1 and say by how much it fails."""
    from pipeline import release
    from pipeline.gate import Requirement

    requirements = [Requirement.parse(text) for text in require]
    _show_move(release.promote(open_registry(), name, alias, requirements, reason), as_json, quiet)


@registry_app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="NAME")],
    alias: AliasArgument,
    reason: Reason = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let NAME@ALIAS name again what it named before its last move; once more, what it named before that."""
    _show_move(open_registry().rollback(name, alias, reason=reason), as_json, quiet)


@registry_app.command()
def gc(
    grace: Annotated[str, typer.Option(help="what was used within this time stays: 14d, 12h, 30m or 0s")] = "14d",
    dry_run: Annotated[bool, typer.Option(help="only say what would go")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove results and files that no version, no running process and nobody within the grace needs."""
    from pipeline.display_registry import show_collected

    seconds = span_seconds(grace)
    collected = open_registry().collect_garbage(grace_seconds=seconds, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "artifacts": [{"kind": a.kind, "digest": a.digest} for a in collected.artifacts],
                "num_blobs": collected.num_blobs,
                "folders": [str(folder) for folder in collected.folders],
                "size_bytes": collected.size_bytes,
            }
        )
    elif not quiet:
        show_collected(collected, timedelta(seconds=seconds), dry_run=dry_run)


@registry_app.command("export")
def export(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(help="file to write, such as model.tar; must not exist")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a version into one file: its files, its report, and the descriptions of all that it was made from."""
    exported = export_version(open_registry(), name, expanded(file), progress=progress_of(quiet))
    if as_json:
        print_json(version_json(exported.version) | {"file": str(file), "size_bytes": exported.size_bytes})
    elif not quiet:
        RESULTS.print(
            f"{file}: {exported.version}, {exported.num_files} files, {human_bytes(exported.size_bytes)}",
            soft_wrap=True,
            highlight=False,
        )


@registry_app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="file that `registry export` wrote")],
    name: Annotated[str | None, typer.Option(help="name to publish it under; the exported one by default")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Take in an exported version, every byte checked, and publish it under the next number."""
    version = import_version(open_registry(), expanded(file), name=name, progress=progress_of(quiet))
    if as_json:
        print_json(version_json(version))
    elif not quiet:
        RESULTS.print(f"{version} ({version.digest[:12]})", soft_wrap=True, highlight=False)


@registry_app.command()
def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="mend what can be mended")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read the whole registry, and name every damage; exits with 1 if one is left."""
    from registry import Registry

    found = Registry.examine(home() / "registry", repair=repair, progress=progress_of(quiet))
    if as_json:
        print_json([asdict(finding) for finding in found])
    elif not quiet:
        for finding in found:
            RESULTS.print(str(finding), soft_wrap=True, highlight=False)
        if not found:
            RESULTS.print("The registry is sound.")
    if left := [finding for finding in found if not finding.is_repaired]:
        raise RegistryError(
            f"{len(left)} of {len(found)} damages are left: {', '.join(each.what for each in left[:5])}."
        )


def _show_move(move: AliasMove, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(asdict(move))
    elif not quiet:
        to, before = (f"version {number}" if number else "nothing" for number in (move.to_version, move.from_version))
        RESULTS.print(f"{move.name}@{move.alias} names {to} (before: {before})", soft_wrap=True, highlight=False)
