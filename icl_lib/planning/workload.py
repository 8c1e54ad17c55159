r"""What a card asks of a machine: the arrays it loads, and the largest computations of its notebooks with their memory and FLOPs.

Each `Step` is one compiled call of a notebook in the abstract: a function of the library with shapes in the place of arrays, and the same
in arithmetic. The arithmetic, with b rows, s tokens, V words, D width, F MLP width, H heads, L layers and e bytes a number, and everything
that tensor parallelism divides divided by the m devices of the model's axis:

- forward with logits: 2 copies of the logits, 2 b s V 4
- gradient: 3 copies of the logits, and for every layer the MLP's activations 3 b s F e (2 without a gate), the residual's 9 b s D 4 and the scores 2 b H s^2 4
- one vector's gradient from the arrow on, for n vectors at once: n times that
- a block without a gradient: 3 b s F e or 3 copies of the scores, 12 b H s^2, whichever is more, and 4 b s D 4
- recording sites: b s D e each
- encoding with an SAE of N latents: 2 b s N 4
- a table of notebook 05, with a number for every task, role and latent of the circuit's SAEs: several are held at a time

A token costs 2 FLOPs for each weight of the blocks and of the output matrix, and 4 H d_head s for its scores; a gradient in the activations as much
again. An SAE that runs costs it 2 N D to encode and 2 N D to decode.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from icl_lib.files.paths import resolve
from icl_lib.models import ModelConfig, Site
from icl_lib.models.tensors import n_params
from icl_lib.planning.dictionaries import dictionaries
from icl_lib.tasks import Role
from icl_lib.tasks.tasks import task_files

# Tokens of a pair with its arrow and newline, of the longest task of each source: prompts are padded to that.
PAIR_TOKENS = {"embedded": 6, "paper": 16, "function_vectors": 40}
_PREFIX_TOKENS = 12
_TEXT_TOKENS = 128  # of a row on which notebook 01 judges SAEs (those of the embedded model's language are shorter)
N_TASKS = {"embedded": 28, "paper": 23, "function_vectors": 53}


@dataclasses.dataclass(frozen=True)
class Step:
    """One computation: `times` calls of `rows` prompts of `seq` tokens. `temp` is one call's on one device, `flops` on all of `split`."""

    notebook: str
    what: str
    rows: int
    seq: int
    times: float | int
    flops: float | int
    temp: int
    per_row: int  # bytes of `temp` that each further row adds
    function: (
        Callable | None
    )  # of (model, tokens): what is compiled where the devices are there; None if the model does not run
    depth: int  # layers through which the function runs
    extra: int = (
        0  # the part of `temp` that the function leaves out: an SAE's latents, sites that are kept, further logits
    )
    extra_flops: float | int = 0  # the part of `flops` that it leaves out: the SAEs
    fixed: int = 0  # the part of `temp` that is beside both and no matter of rows: tables of nodes


def n_tasks(source: str) -> int:
    """Tasks of a source or folder. Raises `ValueError` if it is neither."""
    if source in N_TASKS:
        return N_TASKS[source]
    if not (found := task_files(Path(resolve(source)))):
        raise ValueError(
            f"no task source {source!r}: there are {', '.join(N_TASKS)}, or a folder of .json or .tsv files"
        )
    return len(found)


@functools.lru_cache
def parameters(config: ModelConfig) -> int:
    """`n_params`, remembered: it makes the abstract model."""
    return n_params(config)


def token_flops(config: ModelConfig, seq: int, logits: bool = True, layers: float | int | None = None) -> float:
    """FLOPs of one token's forward pass through `layers` blocks (all by default) among `seq` tokens."""
    share = 1.0 if layers is None else layers / config.n_layers
    blocks = parameters(config) - config.d_vocab * config.d_model * (1 if config.tied else 2)
    scores = 4 * config.n_layers * config.n_heads * config.d_head * seq
    return 2 * share * blocks + share * scores + (2 * config.d_vocab * config.d_model if logits else 0)


def steps(card: Mapping[str, Any], config: ModelConfig, split: int = 1, dtype: str = "bfloat16") -> list[Step]:
    """The computations of all notebooks that decide memory or time, on `split` devices along the model's axis."""
    return _Costs(card, config, split, 4 if dtype == "float32" else 2).steps()


class _Costs:
    """The arithmetic for one card on one device of a mesh."""

    def __init__(self, card, config: ModelConfig, split: int, size: int):
        self.card, self.config, self.split, self.size = card, config, split, size
        self.saes = dictionaries(card, config)
        self.circuit = [d for d in self.saes if d.layer in card.get("circuit_layers", ())]
        self.tasks = n_tasks(card["tasks"])
        self.pair = PAIR_TOKENS.get(card["tasks"], PAIR_TOKENS["paper"])  # of a folder's words nothing is known

    def seq(self, shots: int) -> int:
        return min((shots + 1) * self.pair + _PREFIX_TOKENS, self.config.n_ctx)

    def steps(self) -> list[Step]:
        card, c, tasks = self.card, self.config, self.tasks
        long = self.seq(card["n_shots"])
        n, layers, rest = card["n_prompts"], c.n_layers, c.n_layers - card["layer_executor"]
        sites, l1 = len(self.saes), len(card["tvc_l1"])
        circuit, text = self.seq(card["circuit_shots"]), _TEXT_TOKENS
        below = c.n_layers - min(card["circuit_layers"])
        # passes with all latents: curves of what is kept, both ends of three settings; the others take out a thousand at most
        whole = 2 * 6 + 3 * 2
        ablated = whole + 2 * 6 + 2 * 20 + tasks + 2 * 6  # curves, two halvings, the matrix, mean ablation
        quality = 1 + 3 * sites  # passes a batch, of which each SAE is in one; all are measured beside them
        return [
            self.answers("00", "accuracy by shots", n, self.seq(card["max_shots"]), tasks),
            self.answers("00", "controls", n, self.seq(5), 15 * tasks),
            self.trunk("01", "activations of all SAE sites", 16, text, (card["rate_rows"] + 500) / 16, sites),
            *self.rates("01", "firing rates", card["rate_rows"], text),
            self.answers("01", "quality with each SAE in place", 16, text, quality * card["quality_rows"] / 16, copies=3,
                         saes=2 / quality * sum(d.flops for d in self.saes)),
            self.trunk("02", "task vectors", n, long, 6 * tasks),
            self.suffix("02", "vectors inserted at every layer", n, 14 * layers * tasks, layers // 2),
            self.suffix("03", "cleaning", card["tvc_prompts"], tasks * (l1 + layers + 3) * card["tvc_steps"] / 2 / l1, rest, l1),
            self.suffix("04", "latents one by one", n, 8 * 150 * tasks, rest),
            self.trunk("04", "activation mass", n, long, 4 * tasks, encode=self.saes[:1]),
            self.answers("04", "executors taken away", 4, long, 25 * tasks),
            self.gradient("05", "node effects", card["effect_prompts"], circuit, 2 * tasks, below),
            self.answers("05", "ablation", card["circuit_prompts"], circuit, ablated * tasks, layers=below, wide=True,
                         saes=whole / ablated * sum(d.flops for d in self.circuit)),
        ]  # fmt: skip

    def logits(self, b: int, s: int) -> float:
        return b * s * self.config.d_vocab * 4 / self.divisor(self.config.d_vocab)

    def mlp(self) -> float:
        """Bytes a token of an MLP's activations: before and after the nonlinearity, and the gated product."""
        return (3 if self.config.gated else 2) * self.config.d_mlp * self.size / self.split

    def divisor(self, size: int) -> int:
        return self.split if size % self.split == 0 else 1

    def latents(self) -> int:
        return max((d.d_sae for d in self.saes), default=0)

    def tables(self, count: int) -> int:
        """Bytes of `count` tables of all nodes. They are whole on the first device."""
        return 4 * count * self.tasks * len(Role) * sum(d.d_sae for d in self.circuit)

    def answers(self, notebook, what, b, s, times, copies=2, layers=None, wide=False, saes=0) -> Step:
        """To the logits. `saes`: FLOPs a token of the SAEs in place; `wide`: they are spliced in to take latents away."""
        temp = lambda b: max(2 * self.logits(b, s), self.block(b, s))
        flops = b * s * token_flops(self.config, s, layers=layers)
        extra = (copies - 2) * self.logits(b, s) + (4 * b * s * self.latents() * 4 if wide else 0)
        # effects by two metrics (2 each) and means over all tasks, a ranking, eight random ones, and one of a setting
        fixed = self.tables(15) if wide else 0
        return self.step(notebook, what, b, s, times, flops, temp, forward, layers, int(extra), b * s * saes, fixed)

    def trunk(self, notebook, what, b, s, times, sites=0, encode=()) -> Step:
        """Residuals alone, without logits: the number of `sites` is kept, and SAEs encode one each."""
        flops = b * s * token_flops(self.config, s, logits=False)
        extra = sites * b * s * self.config.d_model * self.size + (2 * b * s * self.latents() * 4 if encode else 0)
        saes = b * s * sum(d.encode_flops for d in encode)
        return self.step(
            notebook, what, b, s, times, flops, lambda b: self.block(b, s), residuals, extra=extra, saes=saes
        )

    def rates(self, notebook, what, rows, s) -> list[Step]:
        """Each SAE alone encodes the activations of all rows at once."""
        if not self.saes:
            return []
        flops = rows * s * sum(d.encode_flops for d in self.saes) / len(self.saes)
        per_row = max(4 * s * (d.d_in + d.d_sae) for d in self.saes)
        return [
            Step(notebook, what, rows, s, len(self.saes), flops, rows * per_row, per_row, None, 0, extra_flops=flops)
        ]

    def suffix(self, notebook, what, b, times, depth, lanes=0) -> Step:
        """From an arrow to the answer through the last `depth` layers; with `lanes`, that many gradients at once."""
        s = self.pair
        flops = (2 * lanes or 1) * b * s * token_flops(self.config, s, layers=depth)
        temp = lambda b: lanes * self.backward(b, s, depth) if lanes else max(2 * self.logits(b, s), self.block(b, s))
        return self.step(notebook, what, b, s, times, flops, temp, gradients(lanes) if lanes else loss, depth)

    def gradient(self, notebook, what, b, s, times, depth) -> Step:
        """Backwards through the last `depth` layers only: below the first SAE no gradient is asked for."""
        flops = b * s * (token_flops(self.config, s) + token_flops(self.config, s, layers=depth))
        extra = 2 * b * s * self.latents() * 4
        saes = b * s * sum(d.flops + d.decode_flops for d in self.circuit)
        # the tables of this metric and of another, two each, and a ranking
        return self.step(
            notebook, what, b, s, times, flops, lambda b: self.backward(b, s, depth), gradient, depth, extra, saes, self.tables(5)
        )  # fmt: skip

    def backward(self, b: int, s: int, depth: int) -> float:
        """The logits thrice, and what each of `depth` layers keeps for its gradient."""
        c = self.config
        layer = b * s * (self.mlp() + 9 * c.d_model * 4) + 8 * b * c.n_heads * s * s / self.split
        return 3 * self.logits(b, s) + depth * layer

    def block(self, b: int, s: int) -> float:
        """What one block holds at a time: the MLP's activations or three copies of the scores, and four residuals."""
        c = self.config
        return max(b * s * self.mlp(), 12 * b * c.n_heads * s * s / self.split) + 4 * b * s * c.d_model * 4

    def step(self, notebook, what, b, s, times, flops, temp, function, depth=None, extra=0, saes=0, fixed=0) -> Step:
        per_row, temp = int(temp(b + 1) - temp(b) + extra / b), int(temp(b)) + extra + fixed
        depth = depth or self.config.n_layers
        return Step(notebook, what, b, s, times, flops + saes, temp, per_row, function, depth, extra, saes, fixed)


def forward(model, tokens):
    """Log-probabilities and hits of every token: what notebook 00 reads from the logits."""
    import jax.numpy as jnp

    from icl_lib.tasks import token_logprobs

    logits = model(tokens)
    return token_logprobs(logits, tokens), jnp.argmax(logits[:, :-1], axis=-1) == tokens[:, 1:]


def residuals(model, tokens):
    """The output of the last block: task vectors, activations and latents are read from such sites."""
    from icl_lib.models import record

    cache = {}
    model(tokens, tap=record([Site("resid_post", model.config.n_layers - 1)], cache))
    return cache


def loss(model, tokens, vector=0.0):
    """Each prompt's loss with a vector in its residual, through the blocks behind it."""
    from icl_lib.tasks import token_logprobs

    return -token_logprobs(model.run_from(0, model.embedding(tokens) + vector), tokens).sum(axis=1)


def gradients(lanes: int) -> Callable:
    """The loss and its gradient by a vector, for `lanes` vectors at once: cleaning with all its penalties."""
    import jax
    import jax.numpy as jnp

    def function(model, tokens):
        one = jax.value_and_grad(lambda vector: loss(model, tokens, vector).mean())
        return jax.vmap(one)(jnp.zeros((lanes, 1, 1, model.config.d_model), model.embed.dtype))

    return function


def gradient(model, tokens):
    """The gradient at every residual of the mean log-probability: the backward pass of notebook 05."""
    import jax
    import jax.numpy as jnp

    from icl_lib.models import perturb
    from icl_lib.tasks import token_logprobs

    sites = [Site("resid_pre", layer) for layer in range(model.config.n_layers)]
    zeros = {site: jnp.zeros((*tokens.shape, model.config.d_model)) for site in sites}
    return jax.grad(lambda deltas: token_logprobs(model(tokens, tap=perturb(deltas)), tokens).mean())(zeros)
