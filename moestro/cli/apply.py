"""`moestro apply BASE... UPDATE OUT`: the full package that an update leads to."""

from pathlib import Path

import typer

from moestro.cli.package_session import JSON, KEY, TO, TRUST, keys_of, progress_bar, recipients_of, say, trust_of
from moestro.core.units import bytes_text


def apply(
    base: list[Path] = typer.Argument(help="The full package; then, where UPDATE rests on them, earlier updates."),
    update: Path = typer.Argument(help="The update."),
    out: Path = typer.Argument(help="The package to make; base and update stay as they are."),
    trust: list[Path] = TRUST,
    key: list[Path] = KEY,
    to: list[str] = TO,
    as_json: bool = JSON,
) -> None:
    """Put an update on its base; refuses any other base, and verifies every tensor before the result appears."""
    from moestro.package.residual import apply as apply_update

    with progress_bar("applying", 0) as progress:
        manifest = apply_update(
            base, update, out, trust=trust_of(trust), keys=keys_of(key), to=recipients_of(to), progress=progress
        )
    facts = {"out": str(out), "package_root": manifest.package_root, "bytes": manifest.size}
    line = f"package: {out}, release {manifest.sequence}, {bytes_text(manifest.size)}"
    say(facts, [line], as_json)
