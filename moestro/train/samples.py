"""Text from a trained model."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from moestro.core.errors import ConfigError
from moestro.core.tokens import Tokenizer
from moestro.nn.decoder import Decoder
from moestro.nn.sampling import continue_text
from moestro.train.checkpoint import find_checkpoint, load_model
from moestro.train.device import pick_device


@dataclass(frozen=True, slots=True)
class Sampler:
    """A model and its tokens."""

    model: Decoder
    tokenizer: Tokenizer

    def stream(self, prompt: str, tokens: int, *, temperature: float, top_k: int, seed: int) -> Iterator[str]:
        """Yield text as it is drawn, at most `tokens` tokens, whole characters only."""
        ids = self.tokenizer.encode(prompt).tolist()
        if not ids:
            if self.tokenizer.end_id is None:
                raise ConfigError(
                    "the prompt is empty and this tokenizer has no end token to begin with; give a prompt"
                )
            ids = [self.tokenizer.end_id]
        pieces, decode = self.tokenizer.token_bytes(), codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        drawn = continue_text(
            self.model, ids, temperature=temperature, top_k=top_k, seed=seed, stop=self.tokenizer.end_id
        )
        for token in islice(drawn, tokens):
            yield decode(pieces[token] if token < len(pieces) else b"")
        yield decode(b"", final=True)


def open_sampler(run: Path, device: str = "auto") -> Sampler:
    """Load the newest checkpoint of a run, or a model folder."""
    model, tokenizer = load_model(find_checkpoint(run))
    return Sampler(model.to(pick_device(device)), tokenizer)
