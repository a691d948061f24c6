"""`moestro inspect PACKAGE`: what a package says it is; reads headers only."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moestro.cli.package_session import JSON, KEY, keys_of, say
from moestro.core.units import bytes_text, count_text

if TYPE_CHECKING:
    from moestro.package.folder import Package
    from moestro.package.manifest import ModelEntry


def inspect(
    package: Path = typer.Argument(help="A package folder."),
    tensors: bool = typer.Option(False, help="List every tensor."),
    key: list[Path] = KEY,
    as_json: bool = JSON,
) -> None:
    """Show models, sizes, codecs and signatures; checks headers, not the weights (moestro verify does)."""
    from moestro.package.folder import Package

    with Package.open(package, keys=keys_of(key)) as opened:
        manifest = opened.manifest
        models = [_model(opened, entry, tensors) for entry in manifest.models]
        facts = {
            "package_id": manifest.package_id,
            "sequence": manifest.sequence,
            "created_at": manifest.created_at,
            "expires_at": manifest.expires_at,
            "package_root": manifest.package_root,
            "bytes": manifest.size,
            "files": len(manifest.files),
            "claims_signatures_of": opened.claimed_signers(),
            "models": models,
        }
    say(facts, _lines(facts), as_json)


def _model(package: "Package", entry: "ModelEntry", tensors: bool) -> dict[str, Any]:
    stored = package.stored(entry.model_id)
    found = [tensor for part in stored for tensor in part.descriptor.tensors]
    facts: dict[str, Any] = entry.table() | {
        "encrypted": package.is_encrypted(entry.model_id),
        "readable": all(part.is_open for part in stored),
        "tensors": len(found),
        "decoded_bytes": sum(tensor.num_bytes for tensor in found),
        "stored_bytes": sum(tensor.length for tensor in found),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in found)),
        "codecs": dict(Counter(tensor.codec for tensor in found)),
    }
    return facts | ({"list": [tensor.table() for tensor in found]} if tensors else {})


def _lines(facts: dict[str, Any]) -> list[str]:
    signed = ", ".join(keyid[:16] for keyid in facts["claims_signatures_of"]) or "nobody"
    lines = [
        f"{facts['package_id']} release {facts['sequence']}, {bytes_text(facts['bytes'])} in {facts['files']} files",
        f"root {facts['package_root']}",
        f"says it is signed by {signed} (unchecked; moestro verify --trust checks)",
    ]
    for model in facts["models"]:
        lines.append(f"model {model['model_id']}: {_what(model)}")
        for tensor in model.get("list", ()):
            shape = "x".join(map(str, tensor["shape"])) or "scalar"
            lines.append(f"  {tensor['name']:60} {tensor['dtype']:10} {shape:20} {tensor['codec']}")
    return lines


def _what(model: dict[str, Any]) -> str:
    if not model["readable"]:
        return "encrypted; give --key to see more"
    codecs = ", ".join(f"{count} {name}" for name, count in model["codecs"].items())
    update = f"update of {model['update']['base'][:16]}, " if "update" in model else ""
    size = f"{bytes_text(model['stored_bytes'])} for {bytes_text(model['decoded_bytes'])}"
    return f"{update}{count_text(model['tensors'])} tensors ({codecs}), {size}"
