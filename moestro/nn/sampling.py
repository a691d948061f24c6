"""Continue a text, token by token, with caches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moestro.nn.decoder import Decoder


def pick(logit_V: Tensor, temperature: float, top_k: int, generator: torch.Generator | None = None) -> int:
    """Draw a token; temperature 0 takes the best, top_k 0 considers all."""
    if temperature == 0:
        return int(logit_V.argmax())
    if top_k:
        best = logit_V.topk(min(top_k, len(logit_V)))
        logit_V = torch.full_like(logit_V, -torch.inf).scatter(0, best.indices, best.values)
    return int(torch.multinomial((logit_V.float() / temperature).softmax(-1), 1, generator=generator))


@torch.no_grad()
def continue_text(
    model: Decoder,
    prompt: list[int],
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Yield tokens that follow the prompt, without end, or until `stop` is drawn.

    prompt   at least one token id
    """
    device = model.embedding.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    caches, fresh = model.empty_caches(), prompt
    while True:
        logit_BSV = model(torch.tensor([fresh], device=device), caches).logit_BSV
        token = pick(logit_BSV[0, -1], temperature, top_k, generator)
        if token == stop:
            return
        yield token
        fresh = [token]
