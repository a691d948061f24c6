"""What a rank remembers beside its part of the model: of use to the same rank of the same mesh only.

    random       the state of its generator
    gradients.*  error-feedback residuals and PowerSGD's factors of summed gradients
    updates.*    the same of what travels between copies, and DiLoCo's outer momentum
    moment.*     the optimiser's moments in copies that learn apart, but for the first copy's, which all meshes read

Written whole into ranks-N.safetensors, with mesh.json beside it: a run that goes on under the same mesh takes it back
and goes on bit for bit, any other leaves it and says so. (DiLoCo's anchors are the weights wherever checkpoints are.)
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moestro.dist.layout import Layout
from moestro.dist.shard import local
from moestro.dist.spec import DistSpec
from moestro.train.shards import Part, Shards

KIND = "ranks"
MESH = "mesh.json"
DECISIVE = ("zero", "schedule", "stages_per_rank", "sync", "compression", "density", "powersgd_rank", "layerwise")
"""Keys of [dist] that decide what a rank remembers, beside the sizes of the mesh."""


class Rememberer(Protocol):
    """Has tensors that it needs to go on exactly."""

    def state(self) -> dict[str, Tensor]:
        """All of them, by name."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from these."""
        ...


def mesh_facts(layout: Layout, spec: DistSpec) -> dict[str, Any]:
    """What has to be equal for a rank's state to fit."""
    sizes = {name: size for name, size in asdict(layout).items() if name != "node"}
    return sizes | {name: getattr(spec, name) for name in DECISIVE}


def written_under(folder: Path) -> dict[str, Any]:
    """The mesh that wrote a checkpoint; empty for one rank."""
    path = folder / MESH
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def own_parts(
    rank: int, sources: Mapping[str, Rememberer | None], moments: Mapping[str, Tensor], device: torch.device
) -> Iterator[Part]:
    """Everything to write down for this rank.

    sources   who remembers something, by a prefix
    moments   by <kind>.<parameter>; empty where others write them
    """
    found = {"random": torch.get_rng_state()}
    if device.type == "cuda":
        found["random_cuda"] = torch.cuda.get_rng_state(device)
    for prefix, source in sources.items():
        found |= {f"{prefix}.{name}": value for name, value in (source.state() if source else {}).items()}
    found |= {f"moment.{name}": local(value) for name, value in moments.items()}
    for name, value in found.items():
        yield whole_part(f"{rank}.{name}", value)


def take_back(shards: Shards, rank: int, sources: Mapping[str, Rememberer | None], device: torch.device) -> None:
    """The inverse of `own_parts` but for moments."""
    torch.set_rng_state(shards.read(f"{rank}.random"))
    if device.type == "cuda" and f"{rank}.random_cuda" in shards.shapes:
        torch.cuda.set_rng_state(shards.read(f"{rank}.random_cuda"), device)
    for prefix, source in sources.items():
        start = f"{rank}.{prefix}."
        found = {name.removeprefix(start): name for name in shards.shapes if name.startswith(start)}
        if source is not None:
            source.load({name: shards.read(key).to(device) for name, key in found.items()})


@torch.no_grad()
def take_back_moments(shards: Shards, rank: int, parameters: Mapping[str, nn.Parameter], state: Any) -> None:
    """Put this copy's own moments in the place of the first copy's."""
    for name, parameter in parameters.items():
        for kind, value in state.get(parameter, {}).items():
            key = f"{rank}.moment.{kind}.{name}"
            if key in shards.shapes:
                local(value).copy_(shards.read(key))


def left_behind(shards: Shards, written: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """For people: what another mesh wrote that does not fit here; empty where that is random state alone."""
    kinds = {
        "gradients": "what compression of gradients owes",
        "updates": "what travels between copies",
        "moment": "moments of other copies",
    }
    seen = {name.split(".")[1] for name in shards.shapes}
    lost = [text for kind, text in kinds.items() if kind in seen]
    if not lost:
        return ""
    changed = [
        f"{name} was {written.get(name)}, is {value}" for name, value in facts.items() if written.get(name) != value
    ]
    return f"another mesh wrote this checkpoint ({'; '.join(changed)}): {' and '.join(lost)} began anew"


def whole_part(name: str, tensor: Tensor) -> Part:
    """A tensor that is all here."""
    return name, tuple(tensor.shape), tuple((0, size) for size in tensor.shape), tensor
