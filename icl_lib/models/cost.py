r"""What a pass of a model costs in bytes and FLOPs: the home of these formulas, for the library's turns and preflight.

With b rows, s tokens, V words, D width, F MLP width, H heads and e bytes a number; what tensor parallelism divides is
divided by the m devices of the model's axis:

- logits: b s V 4 a copy; a forward pass has two of them, a gradient three
- a block without a gradient: 3 b s F e (2 without a gate) or three copies of the scores, 12 b H s^2, whichever is more,
and 4 b s D 4
- a layer that keeps what its gradient needs: 3 b s F e (2 without a gate), 9 b s D 4 and two copies of the scores, 8 b
H s^2

A token costs 2 FLOPs for each weight of the blocks and of the output matrix, and 4 H d_head s for its scores; a
gradient by the activations costs as much again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from icl_lib.models.config import ModelConfig
from icl_lib.models.sites import Site, activations_at
from icl_lib.models.tensors import n_params

# Work arrays of one compiled step stay below this many bytes; more lanes are done in turns.
BUDGET = 2**28


@dataclasses.dataclass(frozen=True)
class Part:
    """What one device holds: `size` bytes a number, of a model that is divided among `split` devices."""

    size: int = 4
    split: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a library function costs, which runs a program on `rows` prompts of `seq` tokens `passes` times.

    `model_flops` are those of the model in one pass, on all devices together; `model_row` are the bytes of its work
    arrays that a row adds on one device. `program(model)` gives a function of the library and the abstract arguments
    that follow the model, so that a compiler can be asked in the place of these two; it is None where the model does
    not run. What that function leaves out is counted beside it: `other_flops` of a call and `other_row` bytes, of SAEs
    and of what is kept, and `fixed` bytes whatever the rows.
    """

    rows: int
    seq: int
    depth: int  # layers through which the model runs
    model_flops: float | int
    model_row: float | int
    program: Callable[[Any], tuple] | None = None
    other_flops: float | int = 0
    other_row: float | int = 0
    fixed: float | int = 0
    passes: float | int = 1

    @property
    def flops(self) -> float | int:
        """FLOPs of one call."""
        return self.passes * self.model_flops + self.other_flops

    @property
    def per_row(self) -> int:
        """Bytes that one more row adds."""
        return max(1, int(self.model_row + self.other_row))

    @property
    def temp(self) -> int:
        """Bytes of work arrays on one device."""
        return int(self.rows * (self.model_row + self.other_row) + self.fixed)


_count = functools.lru_cache(n_params)  # it makes the abstract model, which takes a while


def token_flops(config: ModelConfig, seq: int, logits: bool = True, layers: int | None = None) -> float | int:
    """FLOPs of one token's forward pass through `layers` blocks (all by default) among `seq` tokens."""
    share = 1.0 if layers is None else layers / config.n_layers
    blocks = _count(config) - config.d_vocab * config.d_model * (1 if config.tied else 2)
    scores = 4 * config.n_layers * config.n_heads * config.d_head * seq
    return share * (2 * blocks + scores) + (2 * config.d_vocab * config.d_model if logits else 0)


def logits_bytes(config: ModelConfig, seq: int, part: Part = Part()) -> float | int:
    """Bytes of one copy of one row's logits; they are divided only where the words divide."""
    return 4 * seq * config.d_vocab / (part.split if config.d_vocab % part.split == 0 else 1)


def _mlp(config: ModelConfig, part: Part) -> float | int:
    """Bytes a token of an MLP's activations: before and after the nonlinearity, and the gated product."""
    return (3 if config.gated else 2) * config.d_mlp * part.size / part.split


def block_bytes(config: ModelConfig, seq: int, part: Part = Part()) -> float | int:
    """Bytes that one block holds at a time for one row when no gradient is asked for."""
    scores = 12 * config.n_heads * seq * seq / part.split
    return max(seq * _mlp(config, part), scores) + 16 * seq * config.d_model


def forward_bytes(config: ModelConfig, seq: int, part: Part = Part()) -> float | int:
    """Bytes of one row's forward pass to the logits."""
    return max(2 * logits_bytes(config, seq, part), block_bytes(config, seq, part))


def backward_bytes(config: ModelConfig, seq: int, layers: int, part: Part = Part()) -> float | int:
    """Bytes of one row's gradient: the logits thrice, and what each of `layers` blocks keeps."""
    layer = seq * (_mlp(config, part) + 36 * config.d_model) + 8 * config.n_heads * seq * seq / part.split
    return 3 * logits_bytes(config, seq, part) + layers * layer


def past_bytes(config: ModelConfig, tokens: int, part: Part = Part()) -> float | int:
    """Bytes of the keys and values of `tokens` tokens at all layers."""
    split = part.split if config.n_kv_heads % part.split == 0 else 1
    return 2 * tokens * config.n_layers * config.n_kv_heads * config.d_head * part.size / split


def lane_bytes(config: ModelConfig, batch: int, seq: int) -> int:
    """Bytes of one vector's pass over the last `seq` tokens of `batch` prompts, by logits and MLP activations."""
    return 4 * batch * seq * (3 * config.d_vocab + 4 * config.d_mlp + 8 * config.d_model)


def fitting(each: float | int, n: int | None = None, budget: float | int = BUDGET) -> int:
    """How many lanes of `each` bytes fit into the budget: at least one, and at most `n`."""
    most = max(1, int(budget // each))
    return most if n is None else max(1, min(n, most))


def turn(
    config: ModelConfig, batch: int, suffix: int, n_tasks: int, n_vectors: int, budget: int = BUDGET
) -> tuple[int, int]:
    """How many tasks and vectors, each a pass over `suffix` tokens of `batch` prompts, go into one compiled step."""
    lane = lane_bytes(config, batch, suffix)
    vectors = fitting(lane, n_vectors, budget)
    tasks = fitting(lane * vectors, n_tasks, budget)
    # equal turns: a smaller last one would be compiled a second time
    even = lambda n, most: -(-n // -(-n // most))
    return even(n_tasks, tasks), even(n_vectors, vectors)


def abstract_array(shape: tuple[int, ...], dtype="int32") -> jax.ShapeDtypeStruct:
    """A shape in the place of an array: what a program is compiled on."""
    return jax.ShapeDtypeStruct(shape, dtype)


def forward_cost(
    config: ModelConfig, batch: int, seq: int, part: Part = Part(), *, layers: int | None = None, logits: bool = True,
    program: Callable | None = None, other_flops: float | int = 0, other_row: float | int = 0, fixed: float | int = 0,
) -> Cost:  # fmt: skip
    """A pass of whole prompts through `layers` blocks (all by default), to the logits (as `program` computes them) or
    without. `other_flops` are of each token; `other_row` and `fixed` are as in `Cost`."""
    flops = batch * seq * token_flops(config, seq, logits, layers)
    row = forward_bytes(config, seq, part) if logits else block_bytes(config, seq, part)
    depth = config.n_layers if layers is None else layers
    if not logits:
        last = lambda model, tokens: activations_at(model, tokens, [Site("resid_post", model.config.n_layers - 1)])
        program = lambda model: (last, abstract_array((batch, seq)))
    return Cost(batch, seq, depth, flops, row, program, batch * seq * other_flops, other_row, fixed)
