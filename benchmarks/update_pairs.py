"""Make real pairs of a model and its successor, for measuring updates.

    python benchmarks/update_pairs.py OUT [--small] [--text FILE] [--kinds full lora rl]

    base   a mixture-of-experts decoder of ours, trained on the sources of the Python standard library
    full   all weights fine-tuned on a new task (AdamW, lr 1e-4)
    lora   a rank-16 LoRA on every matrix of attention and experts, trained on the new task (lr 1e-3), merged
    rl     a few small policy-gradient steps from the base (AdamW, lr 1e-6)

Weights are trained in float32 from the bfloat16 base and stored in bfloat16, as practice has it. The new task is the
text of FILE, or tinyshakespeare where ../shared has it, else other files of the library. facts.json says steps and
held-out losses.
"""

import argparse
import json
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moestro.core.config import to_table
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec
from moestro.core.tokens import learn_bpe
from moestro.nn.decoder import Decoder

SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
SEQUENCES, LENGTH, RANK = 4, 128, 16
STEPS = {"base": 120, "full": 50, "lora": 50, "rl": 10}


def spec(small: bool) -> ModelSpec:
    """About 110 million parameters, or 4 million."""
    width, layers, experts = (192, 4, 4) if small else (512, 8, 16)
    router = RouterSpec(rule="topk", k=2)
    return ModelSpec(
        num_layers=layers,
        width=width,
        vocab_size=2048 if small else 8192,
        attention=AttentionSpec(num_heads=width // 64, qk_norm="head"),
        moe=MoESpec(num_experts=experts, expert_width=width, router=router),
        tied_head=True,
    )


def texts(new: Path) -> tuple[list[str], str]:
    """Files to train the base on, and the text of the new task."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = [path.read_text(errors="ignore") for path in files]
    if new.is_file():
        return sources, new.read_text()
    return sources[::2], "\n".join(sources[1::2])


class Task:
    """Tokens to train on and, from the end, tokens held out."""

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        cut = len(tokens) * 9 // 10
        self.train, self.heldout = torch.from_numpy(tokens[:cut]), torch.from_numpy(tokens[cut:])
        self.random = random.Random(seed)

    def batch(self) -> Tensor:
        """[sequences, length + 1] of training tokens."""
        starts = [self.random.randrange(len(self.train) - LENGTH - 1) for _ in range(SEQUENCES)]
        return torch.stack([self.train[at : at + LENGTH + 1] for at in starts])

    @torch.no_grad()
    def loss(self, model: Decoder, batches: int = 24) -> float:
        """Mean held-out loss in nats a token."""
        model.eval()
        step = (len(self.heldout) - LENGTH - 1) // (batches * SEQUENCES)
        total = 0.0
        for number in range(batches):
            starts = [(number * SEQUENCES + row) * step for row in range(SEQUENCES)]
            total += float(model.loss(torch.stack([self.heldout[at : at + LENGTH + 1] for at in starts]))[0])
        model.train()
        return total / batches


def optimise(model: Decoder, steps: int, lr: float, loss_of: Callable[[], Tensor], name: str) -> None:
    """AdamW with a short warm-up and a linear decay to a tenth."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 10)) * (1 - 0.9 * step / steps)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19:
            print(f"{name} {step + 1}/{steps} loss {float(loss):.3f} {time.perf_counter() - start:.0f} s", flush=True)


def language_loss(model: Decoder, task: Task) -> Callable[[], Tensor]:
    """Cross-entropy and the routers' losses on the next batch."""

    def loss() -> Tensor:
        value, records = model.loss(task.batch())
        return value + sum(record.loss for record in records)

    return loss


class LowRank(nn.Module):
    """W + P Q, for a matrix or a stack of them; P starts at zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        *batch, rows, columns = weight.shape
        self.p = nn.Parameter(torch.zeros(*batch, rows, RANK))
        self.q = nn.Parameter(torch.randn(*batch, RANK, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.p @ self.q


def adapted(model: Decoder) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of the matrices that get a low-rank update."""
    for name, module in model.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if "blocks" in name and weight.ndim >= 2 and "router" not in name:
                yield module, parameter


def lora(model: Decoder, task: Task, steps: int, lr: float) -> None:
    """Train factors only, then merge them."""
    places = list(adapted(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module, name in places:
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".p", ".q")))
    optimise(model, steps, lr, language_loss(model, task), "lora")
    for module, name in places:
        parametrize.remove_parametrizations(module, name)


def policy_loss(model: Decoder, task: Task, new_tokens: int = 12) -> Callable[[], Tensor]:
    """REINFORCE with a group baseline; the reward is how many different tokens a continuation has."""

    def loss() -> Tensor:
        prompt = task.batch()[:2, :32].repeat_interleave(4, dim=0)
        token = prompt
        model.eval()
        with torch.no_grad():
            for _ in range(new_tokens):
                logit = model(token).logit_BSV[:, -1]
                token = torch.cat([token, torch.multinomial(logit.softmax(-1), 1)], dim=1)
        model.train()
        reward = torch.tensor([float(len(set(row[32:].tolist()))) for row in token]).view(-1, 4)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).view(-1)
        log_p = model(token[:, :-1]).logit_BSV[:, 31:].log_softmax(-1)
        chosen = log_p.gather(-1, token[:, 32:, None]).squeeze(-1).mean(1)
        return -(advantage * chosen).mean()

    return loss


def save(model: Decoder, folder: Path) -> None:
    """Weights in bfloat16, and what model this is."""
    folder.mkdir(parents=True)
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(to_table(model.spec), indent=1))


def load(model_spec: ModelSpec, file: Path) -> Decoder:
    """A model in float32 from stored bfloat16 weights."""
    model = Decoder(model_spec)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()}, strict=True)
    return model.train()


def tasks(folder: Path, model_spec: ModelSpec, text: Path = SHAKESPEARE) -> tuple[Task, Task]:
    """The base's task and the new one; tokens are kept in `folder`, so that measurements meet the same ones."""
    kept = [folder / "old.npy", folder / "new.npy"]
    if not kept[1].is_file():
        sources, new = texts(text)
        tokenizer = learn_bpe([*sources[::2], new], model_spec.vocab_size)
        old = np.concatenate([tokenizer.encode(source) for source in sources])
        folder.mkdir(parents=True, exist_ok=True)
        for path, tokens in zip(kept, (old, tokenizer.encode(new)), strict=True):
            np.save(path, tokens.astype(np.int64))
    old_task, new_task = (Task(np.load(path), seed) for seed, path in enumerate(kept))
    return old_task, new_task


def make(out: Path, small: bool, text: Path, wanted: list[str]) -> None:
    """The base and what is wanted of it; models that are there already are kept."""
    torch.manual_seed(0)
    model_spec = spec(small)
    old, new = tasks(out, model_spec, text)
    scale = 5 if small else 1
    kinds: dict[str, Callable[[Decoder], None]] = {
        "rl": lambda m: optimise(m, STEPS["rl"] * scale, 1e-6, policy_loss(m, old), "rl"),
        "full": lambda m: optimise(m, STEPS["full"] * scale, 1e-4, language_loss(m, new), "full"),
        "lora": lambda m: lora(m, new, STEPS["lora"] * scale, 1e-3),
    }
    if not (out / "base").exists():
        base = Decoder(model_spec).initialise()
        print(f"{sum(p.numel() for p in base.parameters()):,} parameters", flush=True)
        optimise(base, STEPS["base"] * scale, 1e-3, language_loss(base, old), "base")
        save(base, out / "base")
    for name, update in kinds.items():
        if name in wanted and not (out / name).exists():
            model = load(model_spec, out / "base" / "model.safetensors")
            update(model)
            save(model, out / name)
    losses = {
        name: {"old": old.loss(model), "new": new.loss(model)}
        for name in ("base", *wanted)
        for model in [load(model_spec, out / name / "model.safetensors")]
    }
    facts = {"steps": STEPS, "scale": scale, "sequences": SEQUENCES, "length": LENGTH, "rank": RANK, "heldout": losses}
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="4 million parameters, trained longer")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE, help="the new task")
    parser.add_argument("--kinds", nargs="+", default=["rl", "full", "lora"], help="which successors")
    arguments = parser.parse_args()
    make(arguments.out, arguments.small, arguments.text, arguments.kinds)
