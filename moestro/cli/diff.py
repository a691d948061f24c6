"""`moestro diff BASE... TARGET OUT`: an update, which says only what changed."""

from pathlib import Path

import typer

from moestro.cli.package_session import JSON, KEY, TO, keys_of, progress_bar, recipients_of, say, size_below


def diff(
    base: list[Path] = typer.Argument(help="The package that devices have; or a full one, then updates on it."),
    target: Path = typer.Argument(help="The package they shall get to."),
    out: Path = typer.Argument(help="The update to make."),
    quantize: float = typer.Option(
        None, help="Lossy: round changes, so many bits a weight in all: 1 (signs) or 1.5 to 7; 2.8 is hardly felt."
    ),
    to: list[str] = TO,
    key: list[Path] = KEY,
    as_json: bool = JSON,
) -> None:
    """Make the update from BASE to TARGET; exact unless --quantize is given, and only for that base."""
    from moestro.package.residual import diff as make_update

    with progress_bar("comparing", size_below(target)) as progress:
        report = make_update(
            base, target, out, bits=quantize, to=recipients_of(to), keys=keys_of(key), progress=progress
        )
    facts = {
        "out": str(out),
        "update_bytes": report.update_bytes,
        "full_bytes": report.full_bytes,
        "chain": report.chain,
        "tensors": dict(report.tensors),
        "stored_bytes": dict(report.stored),
        "lost_energy": report.loss.relative,
    }
    say(facts, [*report.lines(), f"apply it with: moestro apply {' '.join(map(str, base))} {out} NEW"], as_json)
