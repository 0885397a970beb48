"""`bitsmith push` and `bitsmith pull`: versions to the Hugging Face Hub and from there."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import open_registry, print_json, progress_of, quiet_hub, version_json
from pipeline.display import RESULTS
from pipeline.errors import RecipeError
from pipeline.home import expanded, output_path
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
from pipeline.release import Layout, push_version
from pipeline.signers import signer_of, verifier_of


def push(
    name: NameArgument,
    repo: Annotated[str, typer.Argument(help="user/repo on the Hub; made if it does not exist")],
    private: Annotated[bool, typer.Option(help="make a new repository private")] = False,
    layout: Annotated[
        Layout, typer.Option(help="repo: a repository for each budget; branches: one, with a branch for each")
    ] = Layout.REPO,
    tag: Annotated[
        str | None, typer.Option(help="v<number> by default, with branches <budget>-v<number>; never moved")
    ] = None,
    collection: Annotated[
        str | None, typer.Option(help="also list the repository in the owner's collection of this title")
    ] = None,
    sign_key: Annotated[
        Path | None, typer.Option(help="sign all that is published with this private key, in PEM")
    ] = None,
    password_variable: PasswordVariable = None,
    sign_keyless: Annotated[
        bool,
        typer.Option("--sign-keyless", help="sign it as who you are, which a public log then shows; needs the network"),
    ] = False,
    token_variable: TokenVariable = None,
    trust_config: TrustConfig = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish a version on the Hub: one commit, every hash checked, then the tag.

    Run again after a failure, it sends only what is missing. Main and the tags stay as they were until all is there.
    """

    signer = signer_of(
        ("--sign-key", sign_key), ("--sign-keyless", sign_keyless), password_variable, token_variable, trust_config
    )
    quiet_hub(quiet or as_json)
    released = push_version(
        open_registry(),
        name,
        repo,
        private=private,
        layout=layout,
        tag=tag,
        collection=collection,
        signer=signer,
        progress=progress_of(quiet),
    )
    pushed, page = released.pushed, released.collection
    if as_json:
        print_json(asdict(pushed) | {"collection": page})
    elif not quiet:
        signed = ", signed" if pushed.is_all_signed else ""
        RESULTS.print(
            f"{pushed.url} (tag {pushed.tag}, commit {pushed.commit[:12]}{signed}): {pushed.num_uploaded} files sent, "
            f"{pushed.num_unchanged} were there" + (f"; in {page}" if page else ""),
            soft_wrap=True,
        )
        if pushed.is_signed and not pushed.is_all_signed:
            RESULTS.print(
                "Signed: the checkpoint's files; not the card, the report and the lineage. Push with --sign-key (or "
                "--sign-keyless) and another --tag for that.",
                soft_wrap=True,
                highlight=False,
            )


def pull(
    repo: Annotated[str, typer.Argument(help="user/repo on the Hub, or user/repo@tag (or @branch, or @commit)")],
    name: Annotated[str | None, typer.Option(help="name in the registry; the repository's by default")] = None,
    public_key: PublicKey = None,
    identity: Identity = None,
    issuer: Issuer = None,
    trust_config: TrustConfig = None,
    lock: Annotated[
        Path | None,
        typer.Option(help="lock file: pull exactly what it pins, or pin what is pulled if it does not have it yet"),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="ask nobody: find what was pulled from there before, and check it")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="also write the files into this folder")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a version from the Hub into the registry; nothing shows before every hash and the signature are checked.

    Run again after a failure, it goes on where it stopped.
    """
    from registry import IdentityVerifier
    from registry import pull as registry_pull

    repo_id, at, revision = repo.partition("@")
    if at and not revision:
        raise RecipeError(f"{repo!r} ends in @. Write user/repo@tag, or leave the @ out for the head of main.")
    verifier = verifier_of(public_key, identity, issuer, trust_config)
    if offline and isinstance(verifier, IdentityVerifier) and verifier.trust_config is None:
        raise RecipeError(
            "--offline asks nobody, and the trust root of the public Sigstore comes from the network. Give a trust "
            "configuration (--trust-config), or leave --offline out."
        )
    quiet_hub(quiet or as_json)
    store = open_registry()
    pulled = registry_pull(
        repo_id,
        store,
        name=name,
        revision=revision or None,
        offline=offline,
        verifier=verifier,
        lock_file=expanded(lock) if lock else None,
        progress=progress_of(quiet),
    )
    version = pulled.version
    if output is not None:
        store.materialize(store.get(version.digest), output_path(output))
    if as_json:
        rest = {key: value for key, value in asdict(pulled).items() if key != "version"}
        print_json(version_json(version) | rest)
    elif not quiet:
        checked = f"signature of {verifier} holds" if verifier else "signature not checked (--public-key, --identity)"
        signed = f", {checked}" if pulled.is_signed else ""
        RESULTS.print(
            f"{version} ({version.digest[:12]}) from {repo_id} at {pulled.commit[:12]}: {pulled.num_fetched} files "
            f"fetched, {pulled.num_here} were here{signed}{f'; in {output}' if output else ''}",
            soft_wrap=True,
            highlight=False,
        )
        if pulled.is_report_left_out:
            RESULTS.print(
                "Report and lineage are not taken over: the signature does not cover them.",
                soft_wrap=True,
                highlight=False,
            )
