"""`moestro pack MODEL OUT`: a model becomes a package."""

from pathlib import Path

import typer

from moestro.cli.package_session import JSON, TO, progress_bar, recipients_of, say, size_below
from moestro.core.errors import ConfigError
from moestro.core.units import bytes_text


def pack(
    model: list[Path] = typer.Argument(
        help="A safetensors file, a Hugging Face folder, a checkpoint or run of moestro; several become one package."
    ),
    out: Path = typer.Argument(help="The package folder to make; an existing one is never overwritten."),
    compact: bool = typer.Option(False, help="Compress without loss; bfloat16 weights shrink to about two thirds."),
    to: list[str] = TO,
    program: Path = typer.Option(None, help="A folder that becomes Program/; copied, never run."),
    leave_out: list[str] = typer.Option(None, help="Pattern of files that stay behind; may be given often."),
    settings: list[str] = typer.Option(
        None,
        "--set",
        help="KEY=VALUE, may be given often. id (name of the releases; default: of OUT), sequence (number of the "
        "release), created_at, expires_at, hash, shard_bytes; any other key goes to managementinfo.json, as license.",
    ),
    as_json: bool = JSON,
) -> None:
    """Pack models; the same input gives the same bytes, and what is packed comes out again bit for bit."""
    from moestro.package.build import Release, release_time
    from moestro.package.pack import SHARD_BYTES, Options
    from moestro.package.pack import pack as pack_models

    given = dict(_pair(word) for word in settings or ())
    release = Release(
        package_id=given.pop("id", out.name),
        sequence=_whole("sequence", given.pop("sequence", "1")),
        created_at=given.pop("created_at", release_time()),
        expires_at=given.pop("expires_at", None),
        hash=given.pop("hash", "sha256"),
    )
    options = Options(
        release=release,
        compact=compact,
        to=recipients_of(to),
        program=program,
        leave_out=leave_out or (),
        shard_bytes=_whole("shard_bytes", given.pop("shard_bytes", str(SHARD_BYTES))),
        info=given,
    )
    models = model[0] if len(model) == 1 else {path.stem: path for path in model}
    if not isinstance(models, Path) and len(models) != len(model):
        raise ConfigError("two models have the same name; rename a folder, since names become model ids")
    with progress_bar("packing", size_below(*model)) as progress:
        packed = pack_models(models, out, options, progress)
    manifest = packed.manifest
    facts = {
        "package_id": manifest.package_id,
        "sequence": manifest.sequence,
        "package_root": manifest.package_root,
        "bytes": manifest.size,
        "models": [found.table() for found in manifest.models],
        "left_out": packed.left_out,
    }
    lines = [f"package: {out}, {bytes_text(manifest.size)}, root {manifest.package_root[:16]}"]
    lines += [f"left out: {', '.join(packed.left_out)}"] if packed.left_out else []
    say(facts, [*lines, f"check it with: moestro verify {out}"], as_json)


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"--set {word} is not KEY=VALUE, for example --set license=MIT")
    return key, value


def _whole(key: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 16:
        raise ConfigError(f"--set {key}={text[:40]}: it must be a whole number below 2^53")
    return int(text)
