"""Tensor by tensor: what a checkpoint calls it, and which part of which of our parameters holds it.

    ModelSpec, Family -> pieces() -> Piece(name, shape, ours, place, turned) ...

Checkpoints keep experts one by one (`...experts.3.gate_proj.weight`), or, as transformers 5 has them in memory, stacked
(`...experts.gate_up_proj`); ours are stacked and turned: [experts, in, out] with gate and up side by side. Reading and
writing go through the same pieces, so what can be read can be written.

Dimension key:  D width   V vocabulary   E experts   F expert width   Q, KV width of all query or key heads
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moestro.core.specs import ModelSpec, MoESpec
from moestro.nn.families.family import Family

Place = tuple[slice | int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint and where it lives with us."""

    name: str
    """In the checkpoint."""
    shape: Shape
    """In the checkpoint."""
    ours: str
    """In `Decoder.state_dict()`."""
    place: Place = ()
    """The part of ours; empty for all of it."""
    turned: bool = False
    """True where our last two dimensions are the other way round."""

    def part(self, ours: Tensor) -> Tensor:
        """The view of our tensor that has the checkpoint's values in the checkpoint's shape."""
        part = ours[self.place] if self.place else ours
        return part.transpose(-1, -2) if self.turned else part


def pieces(spec: ModelSpec, family: Family, stacked: bool = False) -> Iterator[Piece]:
    """All tensors of a checkpoint of this model; `stacked` experts or one by one."""
    yield Piece("model.embed_tokens.weight", (spec.vocab_size, spec.width), "embedding.weight")
    for layer in range(spec.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield Piece(f"{theirs}.input_layernorm.weight", (spec.width,), f"{ours}.attention_norm.scale_D")
        yield Piece(f"{theirs}.post_attention_layernorm.weight", (spec.width,), f"{ours}.feed_forward_norm.scale_D")
        attention = _latent if spec.attention.kind == "mla" else _grouped
        yield from attention(spec, f"{theirs}.self_attn", f"{ours}.attention")
        if spec.moe is not None and layer in spec.moe_layers:
            yield from _sparse(spec, spec.moe, family, stacked, (theirs, f"{ours}.feed_forward"))
        else:
            yield from _dense(spec.width, spec.dense_width, f"{theirs}.mlp", f"{ours}.feed_forward")
    yield Piece("model.norm.weight", (spec.width,), "norm.scale_D")
    if not spec.tied_head:
        yield Piece("lm_head.weight", (spec.vocab_size, spec.width), "head.weight")


def _linear(theirs: str, ours: str, out_width: int, in_width: int, bias: bool = False) -> Iterator[Piece]:
    yield Piece(f"{theirs}.weight", (out_width, in_width), f"{ours}.weight")
    if bias:
        yield Piece(f"{theirs}.bias", (out_width,), f"{ours}.bias")


def _grouped(spec: ModelSpec, theirs: str, ours: str) -> Iterator[Piece]:
    attention, width = spec.attention, spec.width
    q_width, kv_width = attention.num_heads * spec.head_dim, attention.kv_heads * spec.head_dim
    for part, part_width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
        yield from _linear(f"{theirs}.{part}_proj", f"{ours}.{part}", part_width, width, attention.bias)
    yield from _linear(f"{theirs}.o_proj", f"{ours}.out", width, q_width, attention.bias)
    if attention.qk_norm != "none":
        rows = attention.qk_norm == "row"
        for part, part_width in (("q", q_width), ("k", kv_width)):
            size = part_width if rows else spec.head_dim
            yield Piece(f"{theirs}.{part}_norm.weight", (size,), f"{ours}.{part}_norm.scale_D")


def _latent(spec: ModelSpec, theirs: str, ours: str) -> Iterator[Piece]:
    attention, width, heads = spec.attention, spec.width, spec.attention.num_heads
    q_width = heads * (spec.head_dim + attention.rope_head_dim)
    value_dim = attention.value_head_dim or spec.head_dim
    if attention.q_rank:
        yield from _linear(f"{theirs}.q_a_proj", f"{ours}.q_down", attention.q_rank, width, attention.bias)
        yield Piece(f"{theirs}.q_a_layernorm.weight", (attention.q_rank,), f"{ours}.q_norm.scale_D")
        yield from _linear(f"{theirs}.q_b_proj", f"{ours}.q", q_width, attention.q_rank)
    else:
        yield from _linear(f"{theirs}.q_proj", f"{ours}.q", q_width, width)
    latent_width = attention.kv_rank + attention.rope_head_dim
    yield from _linear(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.kv_down", latent_width, width, attention.bias)
    yield Piece(f"{theirs}.kv_a_layernorm.weight", (attention.kv_rank,), f"{ours}.kv_norm.scale_D")
    kv_width = heads * (spec.head_dim + value_dim)
    yield from _linear(f"{theirs}.kv_b_proj", f"{ours}.kv_up", kv_width, attention.kv_rank)
    yield from _linear(f"{theirs}.o_proj", f"{ours}.out", width, heads * value_dim, attention.bias)


def _dense(width: int, hidden: int, theirs: str, ours: str) -> Iterator[Piece]:
    yield from _linear(f"{theirs}.gate_proj", f"{ours}.gate", hidden, width)
    yield from _linear(f"{theirs}.up_proj", f"{ours}.up", hidden, width)
    yield from _linear(f"{theirs}.down_proj", f"{ours}.down", width, hidden)


def _sparse(spec: ModelSpec, moe: MoESpec, family: Family, stacked: bool, layer: tuple[str, str]) -> Iterator[Piece]:
    theirs, ours = f"{layer[0]}.{'mlp' if stacked else family.moe}", layer[1]
    yield Piece(f"{theirs}.gate.weight", (moe.num_experts, spec.width), f"{ours}.router.weight_ED")
    if family.selection_bias:
        yield Piece(f"{theirs}.gate.e_score_correction_bias", (moe.num_experts,), f"{ours}.router.bias_E")
    if moe.shared_width:
        yield from _dense(spec.width, moe.shared_width, f"{theirs}.shared_experts", f"{ours}.shared")
    if stacked:
        wide, narrow = (
            (moe.num_experts, 2 * moe.expert_width, spec.width),
            (moe.num_experts, spec.width, moe.expert_width),
        )
        yield Piece(f"{theirs}.experts.gate_up_proj", wide, f"{ours}.experts.gate_up_EDF", turned=True)
        yield Piece(f"{theirs}.experts.down_proj", narrow, f"{ours}.experts.down_EFD", turned=True)
        return
    gate, up, down = family.parts
    for expert in range(moe.num_experts):
        name = f"{theirs}.experts.{expert}"
        yield half(f"{name}.{gate}.weight", spec.width, moe.expert_width, ours, (expert,), 0)
        yield half(f"{name}.{up}.weight", spec.width, moe.expert_width, ours, (expert,), 1)
        shape = (spec.width, moe.expert_width)
        yield Piece(f"{name}.{down}.weight", shape, f"{ours}.experts.down_EFD", (expert,), turned=True)


def half(name: str, width: int, hidden: int, ours: str, experts: Place, which: int) -> Piece:
    """The gate matrix (which = 0) or the up matrix (1) of some experts."""
    place = (*experts, slice(None), slice(which * hidden, (which + 1) * hidden))
    return Piece(name, (hidden, width), f"{ours}.experts.gate_up_EDF", place, turned=True)


def stacked_experts(names: Iterable[str]) -> bool:
    """True for a checkpoint that keeps experts as transformers 5 has them in memory."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def differences(expected: Sequence[Piece], found: Mapping[str, Shape]) -> list[str]:
    """What is missing, unknown or of another shape, one sentence each; empty where all fits."""
    wanted = {piece.name: piece.shape for piece in expected}
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} is {list(found[name])}, not {list(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if tuple(found[name]) != wanted[name]
        ),
    ]


def not_covered(expected: Sequence[Piece], state: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """Those of our tensors `names` that the pieces do not fill to the last number."""
    filled = dict.fromkeys(names, 0)
    for piece in expected:
        if piece.ours in filled:
            filled[piece.ours] += piece.part(state[piece.ours]).numel()
    return [name for name, numbers in filled.items() if numbers != state[name].numel()]
