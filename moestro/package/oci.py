"""Packages as OCI image layouts, which registries and their tools carry; one uncompressed layer per file.

    to_oci(package, out) -> digest of the OCI manifest        from_oci(layout, out)

    out/oci-layout, index.json, blobs/sha256/...    media types and annotations of CNCF ModelPack (model-spec, v1)

Paths stand in annotations, so that any ModelPack client unpacks the package's folder again, manifest and signature
included. What comes from a layout is checked by its SHA-256 digests and by the rules for paths, then as a package.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, FormatError, IntegrityError, UnsafePath
from moestro.core.files import folder_aside
from moestro.package import canonical
from moestro.package.bulk import write_all
from moestro.package.fields import Fields
from moestro.package.folder import Package
from moestro.package.limits import MAX_FILE_BYTES, MAX_MANIFEST_BYTES, MAX_MANIFEST_FILES
from moestro.package.manifest import MANIFEST, SIGNATURE
from moestro.package.paths import check_paths, create_below, open_below, open_folder
from moestro.package.spans import Progress, ignore

Table = dict[str, Any]
PREFIX = "application/vnd.cncf.model."
READ_BYTES = 4 << 20
ARTIFACT = PREFIX + "manifest.v1+json"
CONFIG = PREFIX + "config.v1+json"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
FILEPATH = "org.cncf.model.filepath"
BLOBS = "blobs/sha256/"
KINDS = {".ptm": "weight.v1.raw", ".json": "weight.config.v1.raw", ".sig": "doc.v1.raw", ".bin": "doc.v1.raw"}


def to_oci(folder: Path, out: Path, progress: Progress = ignore) -> str:
    """Write a layout whose only manifest is the package; it is verified first."""
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another name")
    with Package.open(folder) as package, folder_aside(out) as aside:
        package.verify()
        paths = [entry.path for entry in package.manifest.files] + [MANIFEST]
        paths += [SIGNATURE] if package.envelope() is not None else []
        (aside / BLOBS).mkdir(parents=True)
        layers = [_layer(package, path, aside, progress) for path in sorted(paths)]
        config = _add(aside, CONFIG, canonical.dumps(_config(package, layers)))
        manifest: Table = {"schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "artifactType": ARTIFACT}
        release = package.manifest
        notes = {"org.opencontainers.image.version": str(release.sequence), "package_root": release.package_root}
        manifest |= {"config": config, "layers": layers, "annotations": notes}
        listed = _add(aside, IMAGE_MANIFEST, canonical.dumps(manifest)) | {"artifactType": ARTIFACT}
        listed["annotations"] = {"org.opencontainers.image.ref.name": f"{release.package_id}-{release.sequence}"}
        (aside / "index.json").write_bytes(canonical.dumps({"schemaVersion": 2, "manifests": [listed]}))
        (aside / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        return str(listed["digest"])


def _add(root: Path, media_type: str, content: bytes) -> Table:
    name = hashlib.sha256(content).hexdigest()
    (root / BLOBS / name).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(content)}


def _layer(package: Package, path: str, root: Path, progress: Progress) -> Table:
    aside = root / BLOBS / "aside"
    source, target = open_below(package.handle, path), os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        name, size = _copy(source, lambda data: write_all(target, data, aside), progress)
    finally:
        os.close(source)
        os.close(target)
    aside.replace(root / BLOBS / name)
    kind = "code.v1.raw" if path.startswith("Program/") else KINDS.get(Path(path).suffix, "doc.v1.raw")
    found: Table = {"mediaType": PREFIX + kind, "digest": f"sha256:{name}", "size": size}
    return found | {"annotations": {FILEPATH: path}}


def _copy(source: int, write: Callable[[bytes], None], progress: Progress) -> tuple[str, int]:
    """SHA-256 and bytes of what was read."""
    state, size = hashlib.sha256(), 0
    while data := os.read(source, READ_BYTES):
        state.update(data)
        write(data)
        size += len(data)
        progress(len(data))
    return state.hexdigest(), size


def _config(package: Package, layers: list[Table]) -> Table:
    """ModelPack's description, from those of the first model."""
    model = package.manifest.models[0]
    management = json.loads(package.content(f"Meta-info/{model.model_id}/managementinfo.json"))
    technical = json.loads(package.content(f"Meta-info/{model.model_id}/technicalinfo.json"))
    descriptor = {"name": management["model_name"], "version": management["model_version"]}
    descriptor |= {"createdAt": management["created_at"], "licenses": [management["license"]]}
    descriptor |= {key: management[key] for key in ("authors", "vendor", "family", "description") if key in management}
    config = {"format": "ptm", "paramSize": str(management["model_size"].get("parameters", "0"))}
    config["architecture"] = str(technical.get("PTM_info", {}).get("architecture", "other"))
    layer_ids = [layer["digest"] for layer in layers]
    return {"descriptor": descriptor, "config": config, "modelfs": {"type": "layers", "diffIds": layer_ids}}


def from_oci(layout: Path, out: Path, progress: Progress = ignore) -> None:
    """Write the package of a layout with one manifest; verified against its digests, then as a package."""
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another name")
    handle = open_folder(layout)
    try:
        index = _object(_small(handle, "index.json"), "index.json")
        manifests = _list(index, "manifests", "index.json")
        if len(manifests) != 1:
            raise FormatError(f"the layout holds {len(manifests)} manifests; exactly one is needed", where="index.json")
        manifest = _object(_blob(handle, manifests[0]), "OCI manifest")
        if manifest.get("artifactType") != ARTIFACT:
            raise FormatError(f"artifactType is {str(manifest.get('artifactType'))[:60]!r}, not {ARTIFACT}")
        layers = _list(manifest, "layers", "OCI manifest")
        paths = check_paths(_path(layer) for layer in layers)
        with folder_aside(out) as aside:
            for folder in ("Model", "Program", "Meta-info"):
                (aside / folder).mkdir()
            target = open_folder(aside)
            try:
                for path, layer in zip(paths, layers, strict=True):
                    _unpack(handle, layer, target, path, progress)
            finally:
                os.close(target)
            with Package.open(aside) as package:
                package.verify()
    finally:
        os.close(handle)


def _small(handle: int, path: str) -> bytes:
    try:
        with os.fdopen(open_below(handle, path), "rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except UnsafePath as error:
        raise FormatError(f"no OCI layout: {error}") from error


def _object(data: bytes, where: str) -> Mapping[str, Any]:
    found = canonical.loads_loosely(data, MAX_MANIFEST_BYTES, where)
    if not isinstance(found, dict):
        raise FormatError("not a JSON object", where=where)
    return found


def _list(table: Mapping[str, Any], key: str, where: str) -> list[Any]:
    return Fields(dict(table), where).items(key, MAX_MANIFEST_FILES)


def _named(descriptor: Any) -> tuple[str, int]:
    """Digest in hexadecimal, and bytes, of an OCI descriptor."""
    fields = Fields(descriptor, "an OCI descriptor")
    algorithm, _, name = fields.text("digest").partition(":")
    if algorithm != "sha256" or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise FormatError(f"an OCI descriptor has the digest {fields.text('digest')[:80]!r}; it must be sha256")
    return name, fields.whole("size", 0, MAX_FILE_BYTES)


def _blob(handle: int, descriptor: Any) -> bytes:
    name, size = _named(descriptor)
    data = _small(handle, BLOBS + name)
    if len(data) != size or hashlib.sha256(data).hexdigest() != name:
        raise IntegrityError(BLOBS + name, "its bytes are not those of its name")
    return data


def _path(layer: Any) -> Any:
    notes = layer.get("annotations") if isinstance(layer, dict) else None
    if not isinstance(notes, dict) or FILEPATH not in notes:
        raise FormatError(f"a layer lacks the annotation {FILEPATH}", where="OCI manifest")
    return notes[FILEPATH]


def _unpack(handle: int, layer: Any, target: int, path: str, progress: Progress) -> None:
    name, size = _named(layer)
    source, file = open_below(handle, BLOBS + name), create_below(target, path)
    try:
        found = _copy(source, lambda data: write_all(file, data, Path(path)), progress)
    finally:
        os.close(source)
        os.close(file)
    if found != (name, size):
        raise IntegrityError(path, "its layer does not have its digest")
