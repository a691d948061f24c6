"""How well a model knows held-out text: bits per byte, and how many experts it spends on what.

    model, TokenFile -> evaluate -> Evaluation

Windows follow each other without overlap and every token but the first is predicted once. Bits per byte is the sum of
-log2 p over those tokens, divided by the UTF-8 bytes of the text: a number that compressors have too, whatever the
tokens. Thresholds and biases are frozen, so the result does not depend on how windows are batched.

Dimension key:  B sequences   S positions   L sparse layers   C token classes
"""

import gzip
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from moestro.core.tokens import Tokenizer
from moestro.dist.mesh import Axis, alone
from moestro.nn.attention import Cache
from moestro.nn.decoder import Decoder, Output
from moestro.train.data import TokenData, TokenFile, windows

CLASSES = ("line break", "space", "word", "number", "sign", "end or special")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found."""

    loss: float
    """Mean nats per token."""
    bits_per_byte: float
    tokens: int
    text_bytes: float
    """UTF-8 bytes those tokens stand for."""
    mean_experts: float
    """Experts per token and sparse layer; 0 for a dense model."""
    mean_experts_per_layer: list[float]
    busiest_over_mean: float
    """Load of the busiest expert over the mean, averaged over layers."""
    mean_experts_per_class: dict[str, float]
    """By kind of token, averaged over layers."""
    share_per_class: dict[str, float]
    """How much of the text is of that kind."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def token_classes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """class_V: the kind of every token of the vocabulary, an index into CLASSES."""
    return np.array([CLASSES.index(class_of(piece)) for piece in tokenizer.token_bytes()])


def class_of(piece: bytes) -> str:
    """What a token is mostly made of."""
    text = piece.decode(errors="replace")
    inner = text.strip()
    if not piece:
        return "end or special"
    if not inner:
        return "line break" if "\n" in text else "space"
    if any(letter.isalpha() or letter == "_" for letter in inner):
        return "word"
    return "number" if any(letter.isdigit() for letter in inner) else "sign"


@torch.no_grad()
def evaluate(
    model: Decoder,
    data: TokenData,
    *,
    length: int,
    sequences: int = 8,
    limit: int = 0,
    dtype: torch.dtype = torch.float32,
    split: Axis | None = None,
    forward: Callable[..., Output] | None = None,
) -> Evaluation:
    """Evaluate on the held-out tokens.

    length     tokens per window
    sequences  windows per batch
    limit      stop after this many windows, spread evenly over the text; 0 reads all of it
    dtype      of matrix products
    split      ranks that share the windows of a batch; all get the same result
    forward    the model's forward pass where its layers are on several ranks
    """
    was_training = model.training
    split = split or alone("dp")
    model.eval()
    sums = _Sums(model, data.tokenizer)
    for all_BS, caches in _batches(model, data.heldout, length, sequences * split.size, limit):
        own = slice(len(all_BS) * split.index // split.size, len(all_BS) * (split.index + 1) // split.size)
        token_BS = all_BS[own] if own.stop > own.start else all_BS[:1]  # all ranks work together in every batch
        with torch.autocast(token_BS.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = (forward or model)(token_BS[:, :-1], caches)
        losses_A = F.cross_entropy(output.logit_BSV.float().flatten(0, 1), token_BS[:, 1:].flatten(), reduction="none")
        if own.stop == own.start:
            continue
        sums.add(
            token_BS, losses_A, [record.experts_T for record in output.records], [r.count_E for r in output.records]
        )
    model.train(was_training)
    sums.share(split)
    return sums.result(data.heldout)


def _batches(
    model: Decoder, tokens: TokenFile, length: int, sequences: int, limit: int
) -> Iterator[tuple[Tensor, list[Cache] | None]]:
    """Batches of windows; a recurrent model reads the text in order, with its memory."""
    device = next(model.parameters()).device
    total = len(tokens.token_N)
    starts = list(range(0, max(total - 1, 1), length))
    if model.spec.attention.kind == "transformer_xl":
        caches = model.empty_caches()
        for start in starts[: limit or None]:
            yield _window_batch(tokens, [start], min(length, total - 1 - start)).to(device), caches
        return
    whole = [start for start in starts if start + length < total]
    if limit and limit < len(whole):
        whole = [whole[i * len(whole) // limit] for i in range(limit)]
    for first in range(0, len(whole), sequences):
        yield _window_batch(tokens, whole[first : first + sequences], length).to(device), None
    if not limit and starts and starts[-1] + length >= total > starts[-1] + 1:
        yield _window_batch(tokens, [starts[-1]], total - 1 - starts[-1]).to(device), None


def _window_batch(tokens: TokenFile, starts: list[int], length: int) -> Tensor:
    return windows(tokens, starts, length)


class _Sums:
    """Running totals over batches."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.class_V = torch.from_numpy(token_classes(tokenizer))
        self.bytes_V = torch.tensor([len(piece) for piece in tokenizer.token_bytes()], dtype=torch.float64)
        layers = len(model.spec.moe_layers)
        self.nats, self.tokens, self.text_bytes = 0.0, 0, 0.0
        self.experts_LC = torch.zeros(layers, len(CLASSES), dtype=torch.float64)
        self.tokens_C = torch.zeros(len(CLASSES), dtype=torch.float64)
        self.count_L: list[Tensor] = [torch.zeros(()) for _ in range(layers)]

    def add(self, token_BS: Tensor, losses_A: Tensor, experts_LT: list[Tensor], count_LE: list[Tensor]) -> None:
        inputs_A, targets_A = token_BS[:, :-1].flatten().cpu(), token_BS[:, 1:].flatten().cpu()
        self.nats += float(losses_A.double().sum())
        self.tokens += len(targets_A)
        self.text_bytes += float(self.bytes_V[targets_A].sum())
        class_A = self.class_V[inputs_A]
        self.tokens_C += torch.bincount(class_A, minlength=len(CLASSES))
        for layer, experts_T in enumerate(experts_LT):
            self.experts_LC[layer] += torch.bincount(class_A, weights=experts_T.cpu().double(), minlength=len(CLASSES))
            self.count_L[layer] = self.count_L[layer] + count_LE[layer].cpu()

    def share(self, split: Axis) -> None:
        """Make them the totals of all ranks."""
        scalars = torch.tensor([self.nats, self.tokens, self.text_bytes], dtype=torch.float64)
        tables = [scalars, self.tokens_C, self.experts_LC, *(count_E.double() for count_E in self.count_L)]
        flat = split.sum(torch.cat([table.flatten() for table in tables]))
        scalars, self.tokens_C, experts_A, *self.count_L = flat.split([table.numel() for table in tables])
        self.nats, self.tokens, self.text_bytes = float(scalars[0]), int(scalars[1]), float(scalars[2])
        self.experts_LC = experts_A.view_as(self.experts_LC)

    def result(self, tokens: TokenFile) -> Evaluation:
        per_layer = (self.experts_LC.sum(1) / self.tokens_C.sum()).tolist()
        per_class_C = self.experts_LC.mean(0) / self.tokens_C if len(per_layer) else torch.zeros(len(CLASSES))
        present = [i for i in range(len(CLASSES)) if self.tokens_C[i] > 0]
        busiest = [float(count_E.max() / count_E.mean()) for count_E in self.count_L]
        return Evaluation(
            loss=self.nats / self.tokens,
            bits_per_byte=self.nats / math.log(2) / max(self.text_bytes, 1.0),
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            mean_experts=sum(per_layer) / len(per_layer) if per_layer else 0.0,
            mean_experts_per_layer=per_layer,
            busiest_over_mean=sum(busiest) / len(busiest) if busiest else 0.0,
            mean_experts_per_class={CLASSES[i]: float(per_class_C[i]) for i in present if per_layer},
            share_per_class={CLASSES[i]: float(self.tokens_C[i] / self.tokens_C.sum()) for i in present},
        )


def compressors(data: TokenData) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e on the held-out documents, file by file, as a yardstick."""
    packed = {"gzip -9": 0, "xz -9e": 0}
    for name, start in zip(data.heldout.names, data.heldout.starts, strict=True):
        text = _document_bytes(data, name, start)
        packed["gzip -9"] += len(gzip.compress(text, 9))
        packed["xz -9e"] += len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return {name: 8 * size / max(data.heldout.text_bytes, 1) for name, size in packed.items()}


def _document_bytes(data: TokenData, name: str, start: int) -> bytes:
    later = [other for other in data.heldout.starts if other > start]
    stop = min(later, default=len(data.heldout.token_N))
    pieces = data.tokenizer.token_bytes()
    return b"".join(pieces[token] for token in data.heldout.token_N[start:stop])
