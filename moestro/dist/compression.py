"""Sum gradients over slow links in fewer bytes, and count the bytes.

    exact      all-reduce as it is
    bf16 fp16  two phases: every rank sums one part, received in 16 bits, and sends it on in 16 bits; sums are float32
    int8       as these, in blocks of 256 with a scale each (Dettmers 2015), with error feedback
    topk       the largest `density` of all numbers: positions and 16-bit values, with error feedback (Lin 2017)
    sign       one bit each, times the block's mean size, with error feedback (Seide 2014, Karimireddy 2019)
    powersgd   products of two thin matrices (Vogels 2019), torch's stock hook

Error feedback keeps what was not sent and adds it next time, so nothing is lost, only late. All ranks decode the same
bytes and get the same bits. `methods_by_tensor` is the layer-wise policy: routers, norms and biases stay exact.

Dimension key:  N numbers   P padded numbers   R ranks   B blocks   K numbers sent
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from moestro.dist.mesh import Axis
from moestro.dist.spec import DistSpec

BLOCK = 256
"""Numbers that share a scale."""
LARGE_SHARE = 0.8
"""layerwise: the largest tensors that together hold this share of all numbers are compressed most."""


class Compressor(Protocol):
    """Sums one bucket over an axis, step after step."""

    sent_bytes: float
    """Sent by this rank so far."""

    def sum(self, flat_N: Tensor, shapes: list[torch.Size]) -> Tensor:
        """The sum over the axis, as near as the method comes."""
        ...

    def take_unsent(self) -> Tensor | float:
        """What of our numbers has not been sent; the caller keeps it, the compressor forgets it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it must remember to go on exactly."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        ...


class Exact:
    """One all-reduce."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.sent_bytes = axis, 0.0

    def sum(self, flat_N: Tensor, shapes: list[torch.Size]) -> Tensor:
        """See `Compressor`."""
        self.sent_bytes += ring_bytes(flat_N.numel() * flat_N.element_size(), self.axis.size)
        return self.axis.sum(flat_N)

    def take_unsent(self) -> float:
        """Nothing."""
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


def ring_bytes(payload_bytes: float, ranks: int) -> float:
    """What one rank sends in an all-reduce around a ring: its share once to sum up, once to spread (Patarasuk 2009)."""
    return 2 * (ranks - 1) / ranks * payload_bytes


class Feedback:
    """Keeps what was not sent."""

    def __init__(self) -> None:
        self.residual_N: Tensor | None = None

    def add(self, flat_N: Tensor) -> Tensor:
        """The numbers and what is owed."""
        if self.residual_N is None:
            self.residual_N = torch.zeros_like(flat_N)
        return flat_N + self.residual_N

    def keep(self, wanted_N: Tensor, sent_N: Tensor) -> None:
        """Remember the difference."""
        assert self.residual_N is not None
        torch.sub(wanted_N, sent_N, out=self.residual_N)

    def take(self) -> Tensor | float:
        """The residual, from now on the caller's."""
        unsent, self.residual_N = self.residual_N, None
        return 0.0 if unsent is None else unsent

    def state(self) -> dict[str, Tensor]:
        """The residual."""
        return {} if self.residual_N is None else {"residual": self.residual_N}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Compressor`."""
        self.residual_N = tensors.get("residual")


Encode = Callable[[Tensor], list[Tensor]]
Decode = Callable[[list[Tensor]], Tensor]


class TwoPhase:
    """Every rank sums one part of the numbers and spreads the result; both ways encoded row by row."""

    def __init__(self, axis: Axis, encode: Encode, decode: Decode, feedback: bool) -> None:
        self.axis, self.encode, self.decode, self.sent_bytes = axis, encode, decode, 0.0
        self.feedback = Feedback() if feedback else None

    def sum(self, flat_N: Tensor, shapes: list[torch.Size]) -> Tensor:
        """See `Compressor`."""
        wanted_N = self.feedback.add(flat_N) if self.feedback else flat_N
        ranks, each = self.axis.size, -(-flat_N.numel() // (self.axis.size * BLOCK)) * BLOCK
        padded_RP = flat_N.new_zeros(ranks * each)
        padded_RP[: flat_N.numel()] = wanted_N
        codes = self.encode(padded_RP.view(ranks, each))
        if self.feedback:
            self.feedback.keep(wanted_N, self.decode(codes).flatten()[: flat_N.numel()])
        came = [self.axis.swap_even(code) for code in codes]
        mine = self.encode(self.decode(came).sum(0, keepdim=True))
        everyones = [self.axis.gather_even(code) for code in mine]
        payload = sum(code.numel() * code.element_size() for code in codes)
        self.sent_bytes += ring_bytes(payload, ranks)
        return self.decode(everyones).flatten()[: flat_N.numel()]

    def take_unsent(self) -> Tensor | float:
        """See `Compressor`."""
        return self.feedback.take() if self.feedback else 0.0

    def state(self) -> dict[str, Tensor]:
        """See `Compressor`."""
        return self.feedback.state() if self.feedback else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Compressor`."""
        if self.feedback:
            self.feedback.load(tensors)


def cast(dtype: torch.dtype) -> tuple[Encode, Decode]:
    """16-bit floats."""
    return lambda x_RP: [x_RP.to(dtype)], lambda codes: codes[0].float()


def encode_int8(x_RP: Tensor) -> list[Tensor]:
    """Bytes, and float32 scales of their blocks."""
    block_RBX = x_RP.unflatten(1, (-1, BLOCK))
    scale_RB1 = block_RBX.abs().amax(-1, keepdim=True) / 127
    code_RBX = (block_RBX / scale_RB1.clamp(min=1e-30)).round().to(torch.int8)
    return [code_RBX.flatten(1), scale_RB1.flatten(1)]


def decode_int8(codes: list[Tensor]) -> Tensor:
    """See `encode_int8`."""
    return (codes[0].unflatten(1, (-1, BLOCK)).float() * codes[1][..., None]).flatten(1)


def encode_sign(x_RP: Tensor) -> list[Tensor]:
    """Eight signs a byte, and the mean size of every block."""
    block_RBX = x_RP.unflatten(1, (-1, BLOCK))
    bit = 1 << torch.arange(8, device=x_RP.device)
    packed = ((x_RP >= 0).unflatten(1, (-1, 8)) * bit).sum(-1).to(torch.uint8)
    return [packed, block_RBX.abs().mean(-1)]


def decode_sign(codes: list[Tensor]) -> Tensor:
    """See `encode_sign`."""
    bit = 1 << torch.arange(8, device=codes[0].device)
    sign_RP = ((codes[0][..., None].long() & bit) > 0).float().flatten(1) * 2 - 1
    return (sign_RP.unflatten(1, (-1, BLOCK)) * codes[1][..., None]).flatten(1)


class Gathered:
    """All ranks' codes go to all ranks, who decode and add up; with error feedback."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.sent_bytes, self.feedback = axis, 0.0, Feedback()

    def sum(self, flat_N: Tensor, shapes: list[torch.Size]) -> Tensor:
        """See `Compressor`."""
        wanted_N = self.feedback.add(flat_N)
        codes = self.encode(wanted_N, shapes)
        self.feedback.keep(wanted_N, self.decode(codes, flat_N.numel()))
        self.sent_bytes += (self.axis.size - 1) * sum(code.numel() * code.element_size() for code in codes)
        everyones = [self.axis.gather_even(code[None]) for code in codes]
        parts = [self.decode([code[rank] for code in everyones], flat_N.numel()) for rank in range(self.axis.size)]
        return torch.stack(parts).sum(0)

    def take_unsent(self) -> Tensor | float:
        """See `Compressor`."""
        return self.feedback.take()

    def encode(self, flat_N: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """What is sent."""
        raise NotImplementedError

    def decode(self, codes: list[Tensor], numbers: int) -> Tensor:
        """What it stands for."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """See `Compressor`."""
        return self.feedback.state()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Compressor`."""
        self.feedback.load(tensors)


class TopK(Gathered):
    """The largest numbers of every tensor only: one with small numbers throughout must not wait for the others."""

    def __init__(self, axis: Axis, density: float) -> None:
        super().__init__(axis)
        self.density = density

    def encode(self, flat_N: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """Positions as int32 and values as bfloat16, which has float32's range."""
        sizes, start, places = [shape.numel() for shape in shapes], 0, []
        for part, size in zip(flat_N.abs().split(sizes), sizes, strict=True):
            places.append(part.topk(max(1, round(self.density * size))).indices + start)
            start += size
        place_K = torch.cat(places)
        return [place_K.to(torch.int32), flat_N[place_K].bfloat16()]

    def decode(self, codes: list[Tensor], numbers: int) -> Tensor:
        """Zeros elsewhere."""
        return torch.zeros(numbers, device=codes[0].device).index_put((codes[0].long(),), codes[1].float())


class Sign(Gathered):
    """One bit a number."""

    def encode(self, flat_N: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """See `encode_sign`."""
        padded = flat_N.new_zeros(-(-flat_N.numel() // BLOCK) * BLOCK)
        padded[: flat_N.numel()] = flat_N
        return [code[0] for code in encode_sign(padded[None])]

    def decode(self, codes: list[Tensor], numbers: int) -> Tensor:
        """See `decode_sign`."""
        return decode_sign([code[None] for code in codes]).flatten()[:numbers]


class PowerSGD:
    """torch's hook on a bucket of our own; one bucket at a time, as its callbacks need gloo's threads."""

    def __init__(self, axis: Axis, rank: int) -> None:
        self.axis, self.rank, self.sent_bytes = axis, rank, 0.0
        self.hook = powerSGD_hook.PowerSGDState(
            axis.group, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=1, random_seed=0
        )

    def sum(self, flat_N: Tensor, shapes: list[torch.Size]) -> Tensor:
        """See `Compressor`; the hook returns the mean."""
        shapes = [_matrix(shape) for shape in shapes]
        warm = self.hook.iter >= self.hook.start_powerSGD_iter
        sizes = [_low_rank_numbers(shape, self.rank) if warm else shape.numel() for shape in shapes]
        self.sent_bytes += ring_bytes(4 * sum(sizes), self.axis.size)
        with self.axis.message(flat_N):
            mean_N: Tensor = powerSGD_hook.powerSGD_hook(self.hook, _Bucket(flat_N.clone(), shapes)).wait()
        return mean_N * self.axis.size

    def take_unsent(self) -> float:
        """The hook keeps it."""
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """Steps so far, and of its one bucket: what is owed, and the thin factors it starts the next step from."""
        memories = {"error": self.hook.error_dict, "p": self.hook.p_memory_dict, "q": self.hook.q_memory_dict}
        known = {name: memory[0] for name, memory in memories.items() if 0 in memory}
        return known | {"iter": torch.tensor(self.hook.iter)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Compressor`."""
        memories = {"error": self.hook.error_dict, "p": self.hook.p_memory_dict, "q": self.hook.q_memory_dict}
        for name, memory in memories.items():
            if name in tensors:
                memory[0] = tensors[name].clone()
        self.hook.iter = int(tensors["iter"])


def _matrix(shape: torch.Size) -> torch.Size:
    """Experts' matrices one below the other: the hook would take each expert for a row."""
    return shape if len(shape) < 3 else torch.Size([shape[:-1].numel(), shape[-1]])


def _low_rank_numbers(shape: torch.Size, rank: int) -> int:
    """Numbers sent for a tensor: two thin factors of its matrix, or all of it where these are not fewer."""
    rows, columns = shape[0] if shape else 1, shape.numel() // (shape[0] if shape else 1)
    thin = (rows + columns) * min(rank, rows, columns)
    return thin if len(shape) > 1 and thin < shape.numel() else shape.numel()


class _Bucket:
    """What the stock hook asks of DDP's bucket."""

    def __init__(self, flat_N: Tensor, shapes: list[torch.Size]) -> None:
        self._flat_N, self._shapes = flat_N, shapes

    def buffer(self) -> Tensor:
        return self._flat_N

    def gradients(self) -> list[Tensor]:
        parts = self._flat_N.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


def below(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors called <name>.<key>, by key."""
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def make(method: str, spec: DistSpec, axis: Axis) -> Compressor:
    """A compressor for one bucket."""
    made: dict[str, Callable[[], Any]] = {
        "none": lambda: Exact(axis),
        "bf16": lambda: TwoPhase(axis, *cast(torch.bfloat16), feedback=False),
        "fp16": lambda: TwoPhase(axis, *cast(torch.float16), feedback=False),
        "int8": lambda: TwoPhase(axis, encode_int8, decode_int8, feedback=True),
        "topk": lambda: TopK(axis, spec.density),
        "sign": lambda: Sign(axis),
        "powersgd": lambda: PowerSGD(axis, spec.powersgd_rank),
    }
    compressor: Compressor = made[method]()
    return compressor


def methods_by_tensor(sizes: dict[str, int], spec: DistSpec, also_exact: Collection[str] = ()) -> dict[str, str]:
    """Which method each parameter gets, by its name and size.

    Routers, norms and biases are exact. With `layerwise` only the largest tensors get the method asked for, smaller ones
    int8: few bytes are saved there, and they hold what all tokens pass through.
    """
    exact = {name for name in sizes if name in also_exact or ".router." in name or "norm" in name or name.endswith("bias")}
    free = sorted((name for name in sizes if name not in exact), key=lambda name: (-sizes[name], name))
    methods = dict.fromkeys(exact, "none") | dict.fromkeys(free, spec.compression)
    if spec.layerwise and spec.compression != "none":
        total, seen = sum(sizes[name] for name in free), 0
        for name in free:
            if seen >= LARGE_SHARE * total:
                methods[name] = "int8"
            seen += sizes[name]
    return methods
