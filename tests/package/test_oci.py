"""`package.oci`: a layout holds the very package, by ModelPack's media types, and hostile layouts are refused."""

import hashlib
import json
from pathlib import Path

import pytest
from package.samples import contents, save_signed

from moestro.core.errors import FormatError, IntegrityError, UnsafePath
from moestro.package.oci import BLOBS, FILEPATH, from_oci, to_oci


@pytest.fixture
def package(model: Path, tmp_path: Path) -> Path:
    return save_signed(model, tmp_path, "ed25519")


def test_x_7_a_package_goes_to_oci_and_back(package: Path, tmp_path: Path) -> None:
    digest = to_oci(package, tmp_path / "o")
    index = json.loads((tmp_path / "o/index.json").read_bytes())
    assert index["manifests"][0]["digest"] == digest
    manifest = json.loads((tmp_path / "o" / BLOBS / digest.removeprefix("sha256:")).read_bytes())
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert [layer["annotations"][FILEPATH] for layer in manifest["layers"]] == sorted(contents(package))
    config = json.loads((tmp_path / "o" / BLOBS / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes())
    assert set(config) == {"descriptor", "config", "modelfs"}
    for layer in [*manifest["layers"], manifest["config"]]:
        data = (tmp_path / "o" / BLOBS / layer["digest"].removeprefix("sha256:")).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (layer["digest"][7:], layer["size"])
    from_oci(tmp_path / "o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(package)


def relabelled(layout: Path, change: object) -> None:
    """Change the manifest and make all digests fit again."""
    index = json.loads((layout / "index.json").read_bytes())
    old = layout / BLOBS / index["manifests"][0]["digest"][7:]
    manifest = json.loads(old.read_bytes())
    change(manifest)  # type: ignore[operator]
    data = json.dumps(manifest).encode()
    name = hashlib.sha256(data).hexdigest()
    (layout / BLOBS / name).write_bytes(data)
    index["manifests"][0] |= {"digest": f"sha256:{name}", "size": len(data)}
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../b", "C:evil", "nul", "Model/x\x00"])
def test_r_8_3_2_1_paths_of_layers_cannot_lead_out(package: Path, tmp_path: Path, path: str) -> None:
    to_oci(package, tmp_path / "o")
    relabelled(tmp_path / "o", lambda m: m["layers"][0]["annotations"].update({FILEPATH: path}))
    with pytest.raises(UnsafePath):
        from_oci(tmp_path / "o", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_wrong_layouts_are_refused(package: Path, tmp_path: Path) -> None:
    to_oci(package, tmp_path / "o")
    layer = max((tmp_path / "o" / BLOBS).iterdir(), key=lambda path: path.stat().st_size)
    good = layer.read_bytes()
    layer.write_bytes(good[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="digest"):
        from_oci(tmp_path / "o", tmp_path / "back")
    layer.write_bytes(good)
    with pytest.raises(FormatError, match="no OCI layout"):
        from_oci(package, tmp_path / "back")
    for change in (
        lambda m: m.update(artifactType="image"),
        lambda m: m["layers"][0].pop("annotations"),
        lambda m: m["layers"][0].update(digest="md5:00"),
        lambda m: m.update(layers={}),
        lambda m: m["layers"].pop(),
    ):
        to_oci(package, tmp_path / "again")
        relabelled(tmp_path / "again", change)
        with pytest.raises((FormatError, IntegrityError)):
            from_oci(tmp_path / "again", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        (tmp_path / "again").rename(tmp_path / f"old-{len(list(tmp_path.iterdir()))}")
