"""Tables of the `registry` commands."""

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.tree import Tree

from pipeline.budget import human_bytes
from pipeline.display import RESULTS, new_table
from pipeline.version_facts import FIGURES, settings_of

if TYPE_CHECKING:
    from pipeline.version_diff import VersionDiff
    from pipeline.watch import BaseModelChange
    from registry import AliasMove, Artifact, Collected, Lineage, Registry, Version


def show_versions(store: "Registry", versions: list["Version"]) -> None:
    """The answer of `registry list`."""
    if not versions:
        RESULTS.print("The registry is empty. `bitsmith compress` publishes what it makes.")
        return
    table = new_table("version", "aliases", "size", "bits", "model", "made", title="Registry")
    for column in table.columns:
        column.no_wrap = column.header in ("version", "size", "bits", "made")  # a model may be a long path
    aliases, described = store.all_aliases(), store.described(version.digest for version in versions)
    for version in versions:
        mine = aliases.get(version.name, {})
        named = ", ".join(alias for alias, number in mine.items() if number == version.number) or "-"
        if (artifact := described.get(version.digest)) is None:  # only a damage loses the description
            table.add_row(str(version), named, "damaged", "", "see `bitsmith registry doctor`", version.created_at[:10])
            continue
        bits = artifact.metadata.get("bits_per_param")
        table.add_row(
            str(version),
            named,
            human_bytes(artifact.size_bytes),
            f"{bits:.4f}" if isinstance(bits, float) else "",
            str(artifact.metadata.get("model", "")),
            version.created_at[:10],
        )
    RESULTS.print(table)


def show_version(store: "Registry", version: "Version") -> None:
    """The answer of `registry show`."""
    artifact = store.get(version.digest)
    facts = new_table(title=str(version))
    facts.add_row("digest", version.digest)
    facts.add_row("made", version.created_at)
    if named := [alias for alias, number in store.aliases(version.name).items() if number == version.number]:
        facts.add_row("aliases", ", ".join(named))
    for key, value in sorted(settings_of(artifact).items()):
        facts.add_row(key, _in_words(value))
    RESULTS.print(facts)
    files = new_table("file", "size", "sha256", title="Files")
    for path, entry in artifact.files.items():
        files.add_row(path, human_bytes(entry.size_bytes), entry.sha256[:16])
    RESULTS.print(files)
    if version.report_digest:
        report = store.get(version.report_digest)
        RESULTS.print(f"report: {store.path(report, 'index.html')}", soft_wrap=True)


def show_lineage(version: "Version", lineage: "Lineage") -> None:
    """The answer of `registry lineage`: each artifact below what was made from it, once."""
    known = {artifact.digest: artifact for artifact in lineage.artifacts}
    root = lineage.artifacts[0]
    tree, shown = Tree(f"{version}: {_one_line(root)}", highlight=False), {root.digest}

    def add(branch: Tree, artifact: "Artifact") -> None:
        for digest in dict.fromkeys(artifact.parents):
            parent = known.get(digest)
            if parent is None:
                branch.add(f"{digest[:12]} (not in this registry)")
            elif digest in shown:
                branch.add(f"{parent.kind} {digest[:12]}, see above")
            else:
                shown.add(digest)
                add(branch.add(_one_line(parent)), parent)

    add(tree, root)
    RESULTS.print(tree, soft_wrap=True)
    table = new_table(title="Base and making")
    settings = settings_of(root)
    for label, key in (
        ("base model", "model"),
        ("its commit", "model_commit"),
        ("sha256 of its config and weight files", "model_sha256"),
        ("sha256 of the calibration tokens", "calibration_sha256"),
        ("seed", "seed"),
        ("bitsmith", "bitsmith"),
    ):
        if settings.get(key) is not None:
            table.add_row(label, str(settings[key]))
    table.add_row("note", version.note or "-")
    RESULTS.print(table)


def show_diff(diff: "VersionDiff") -> None:
    """The answer of `registry diff`."""
    names = str(diff.before.version), str(diff.after.version)
    figures = new_table("", *names, "change", title="Figures")
    for name, (before, after) in diff.figures.items():
        change = f"{after / before - 1:+.2%}" if before and after is not None else ""
        figures.add_row(FIGURES[name], _figure(name, before), _figure(name, after), change)
    RESULTS.print(figures)
    if diff.recipe:
        recipe = new_table("setting", *names, title="Recipe")
        for column in recipe.columns:
            column.no_wrap = False
        for setting, values in diff.recipe.items():
            recipe.add_row(setting, *map(_in_words, values))
        RESULTS.print(recipe)
    if diff.choices:
        moves = new_table(*names, "matrices", title=f"Choices of {len(diff.choices)} matrices that changed")
        for old, new, count in diff.moves:
            moves.add_row(old or "-", new or "-", str(count))
        RESULTS.print(moves)
    unchanged = [what for what, changed in (("recipe", diff.recipe), ("plan", diff.choices)) if not changed]
    if unchanged:
        RESULTS.print(f"The same in both: {' and '.join(unchanged)}.")
    RESULTS.print(
        f"{diff.num_shared_files} files with {human_bytes(diff.shared_bytes)} are in both, and stored once.",
        highlight=False,
    )


def show_aliases(name: str, aliases: dict[str, int], moves: Iterable["AliasMove"]) -> None:
    """The answer of `registry alias NAME`."""
    table = new_table("alias", "version", title=f"Aliases of {name}")
    for alias, number in aliases.items():
        table.add_row(alias, f"{name}:{number}")
    if aliases:
        RESULTS.print(table)
    else:
        none = f"{name} has no aliases. `bitsmith registry alias {name} production` makes one."
        RESULTS.print(none, soft_wrap=True, highlight=False)
    log = new_table("when", "who", "alias", "what", "from", "to", "why", title="Log")
    for move in moves:
        log.add_row(
            move.moved_at.replace("+00:00", "Z"),
            move.moved_by,
            move.alias,
            move.action,
            str(move.from_version or "-"),
            str(move.to_version or "-"),
            move.reason,
        )
    if log.row_count:
        for column in log.columns:
            column.no_wrap, column.justify = False, "left"
        RESULTS.print(log)


def show_collected(collected: "Collected", grace: timedelta, *, dry_run: bool) -> None:
    """The answer of `registry gc`."""
    if collected.artifacts or collected.folders:
        table = new_table("kind", "what", "size", title="Not needed" if dry_run else "Removed")
        for artifact in collected.artifacts:
            table.add_row(artifact.kind, artifact.digest[:16], human_bytes(artifact.size_bytes))
        for folder in collected.folders:
            table.add_row("unfinished work", folder.name[:16], "")
        RESULTS.print(table)
    verb = "would go" if dry_run else "removed"
    RESULTS.print(
        f"{len(collected.artifacts)} results, {collected.num_blobs} files and {len(collected.folders)} folders of "
        f"unfinished work {verb}, {human_bytes(collected.size_bytes)} in all. Kept: all that versions need "
        f"and that running processes use{f', and what was used within {_days(grace)}' if grace else ''}.",
        soft_wrap=True,
        highlight=False,
    )


def show_watched(changes: list["BaseModelChange"]) -> None:
    """The answer of `registry watch`."""
    if not changes:
        RESULTS.print("The registry is empty: there is no base to watch.")
        return
    for change in changes:
        line = f"{change.name}:{change.version}  {change.state}"
        if change.base:
            line += f"  {change.base} at {change.revision}"
        if change.is_changed:
            day = f", {change.modified_at[:10]}" if change.modified_at else ""
            line += f": {(change.commit_then or '-')[:12]} to {(change.commit_now or '-')[:12]}{day}"
        RESULTS.print(line, soft_wrap=True, highlight=False)
        if change.state == "gone":
            RESULTS.print(f"{change.name}: {change.problem}", soft_wrap=True, highlight=False)


def _days(span: timedelta) -> str:
    return f"{span.days} days" if span.days and not span.seconds else str(span)


def _one_line(artifact: "Artifact") -> str:
    return f"{artifact.kind} {artifact.digest[:12]}, {len(artifact.files)} files, {human_bytes(artifact.size_bytes)}"


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return human_bytes(value) if name == "size_bytes" else f"{value:.5g}"


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "-" if value is None else str(value)
