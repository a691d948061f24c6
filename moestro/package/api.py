"""All of packaging for Python; the commands of `moestro` call the same functions.

    pack(model, out) -> Packed                   unpack(package, out)           verify(package) -> Findings
    open_package(package) -> Package             package.weights().array("w")   one tensor, verified
    diff([base], target, out) -> Report          apply([base], update, out)
    merge([base], [update, ...], out, options)   the weighted mean of several updates of one base
    encrypt(package, out, [key.pub])             decrypt(package, out, keys)
    rewrap(package, out, keys, [other.pub])      to_model_signing(package, out, key)
    sign_package(package, key)                   Trust.load([key.pub])          Keys([load_receiving(key)])

A package is a folder; `Package.manifest` names every file with its size and digest, which is all that shipping needs.
"""

from moestro.package.build import Release
from moestro.package.encrypt import Kek, Keys, Password
from moestro.package.folder import Findings, Package
from moestro.package.intoto import to_model_signing
from moestro.package.keys import load_receiving, load_recipient, load_signing, new_key, save_pair
from moestro.package.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest, ModelEntry, Update
from moestro.package.merge import merge
from moestro.package.oci import from_oci, to_oci
from moestro.package.pack import Options, Packed, pack, sign_package, unpack, verify
from moestro.package.reseal import decrypt, encrypt, rewrap
from moestro.package.residual import Report, apply, diff
from moestro.package.sign import Trust
from moestro.package.weights import Weights

open_package = Package.open

__all__ = [
    "MANIFEST",
    "SIGNATURE",
    "FileEntry",
    "Findings",
    "Kek",
    "Keys",
    "Manifest",
    "ModelEntry",
    "Options",
    "Package",
    "Packed",
    "Password",
    "Release",
    "Report",
    "Trust",
    "Update",
    "Weights",
    "apply",
    "decrypt",
    "diff",
    "encrypt",
    "from_oci",
    "load_receiving",
    "load_recipient",
    "load_signing",
    "merge",
    "new_key",
    "open_package",
    "pack",
    "rewrap",
    "save_pair",
    "sign_package",
    "to_model_signing",
    "to_oci",
    "unpack",
    "verify",
]
