"""One training step to be predicted: model, layout, machine and software; or many, as columns.

Everything that follows from these by counting alone, before any rate: rows of a product, bytes of a message.
"""

from dataclasses import dataclass

import numpy as np

from moestro.plan.columns import Number
from moestro.plan.layout import Layout
from moestro.plan.machine import Machine, Precision
from moestro.plan.shape import ModelShape
from moestro.plan.stacks import Traits


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a step is made of."""

    shape: ModelShape
    layout: Layout
    machine: Machine
    precision: Precision
    traits: Traits
    length: Number
    """Tokens of a sequence."""
    imbalance: Number = 0.0
    """Busiest over mean load of expert ranks, from a load trace; 0 takes the profile's."""
    effect: Number = 0.0
    """Logarithm of what the profile knows about this software on this device, beyond its habits."""

    @property
    def tokens(self) -> Number:
        """Of one micro-batch on one context-parallel rank."""
        return self.layout.micro_batch * self.length / self.layout.cp

    @property
    def stream_bytes(self) -> Number:
        """The residual stream of one micro-batch on one context-parallel rank, whole width."""
        return (2 + 2 * self.precision.single) * self.tokens * self.shape.width

    @property
    def stream_cut(self) -> Number:
        """Ranks over which sequence parallelism cuts the stream."""
        return np.where(np.asarray(self.traits.sequence_parallel) > 0, self.layout.tp, 1.0)

    @property
    def routed_rows(self) -> Number:
        """Rows that a rank sends into routed experts, and gets back as many when routing is even."""
        return self.tokens * self.shape.experts_per_token * self.layout.etp / self.layout.tp

    @property
    def experts_here(self) -> Number:
        """Experts on one rank."""
        return self.shape.experts / self.layout.ep

    @property
    def seen_tokens(self) -> Number:
        """Tokens a token sees on average: half the sequence under a causal mask, less with windows (flash kernels)."""
        full = self.length / 2
        window = np.minimum(self.shape.window, self.length)
        windowed = window - window * window / (2 * self.length)
        return (1 - self.shape.windowed_share) * full + self.shape.windowed_share * windowed
