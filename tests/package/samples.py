"""Small models on disk for the tests of packages."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moestro.package.api import Options, Release, new_key, pack, save_pair, sign_package

Tensors = dict[str, np.ndarray]


def tensors(seed: int = 0) -> Tensors:
    """Weights of many types, one above a chunk, one empty, one of rank 0."""
    rng = np.random.default_rng(seed)
    return {
        "experts.w": rng.normal(0, 0.02, (3, 300, 500)).astype(np.float32),
        "embed": rng.normal(0, 0.02, (64, 50)).astype(np.float16),
        "count": np.arange(5),
        "scale": np.array(3.5),
        "empty": np.zeros((0, 3), np.float32),
        "mask": np.array([True, False, True]),
    }


def save_model(folder: Path, weights: Tensors, text: str = "hello") -> Path:
    """A Hugging Face folder with weights, a configuration, a tokenizer and a file below a folder."""
    (folder / "extra").mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 50, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n" + text)
    (folder / "extra" / "notes.txt").write_text(text)
    return folder


def save_signed(model: Path, folder: Path, kind: str) -> Path:
    """The package folder/p of a model, signed with folder/key of this kind."""
    pack(model, folder / "p", Options(release=Release(package_id="demo")))
    save_pair(new_key(kind), folder / "key")
    sign_package(folder / "p", folder / "key")
    return folder / "p"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
