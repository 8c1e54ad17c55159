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

A token costs 2 FLOPs for each weight of the blocks and of the output matrix, and 4 H d_head s for its scores; a gradient in the activations as much
again.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from icl_lib.models import ModelConfig, Site
from icl_lib.models.families import n_params
from icl_lib.runs.paths import resolve
from icl_lib.saes.formats.suites import has_layer, layers_of
from icl_lib.tasks.tasks import task_files

# Tokens of a pair with its arrow and newline, of the longest task of each source: prompts are padded to that.
PAIR_TOKENS = {"embedded": 6, "paper": 16, "function_vectors": 40}
_PREFIX_TOKENS = 12
N_TASKS = {"embedded": 28, "paper": 23, "function_vectors": 53}
_LATENTS = {"nev/gemma-2b-saex-test": 32768, "nev/phi-3-4k-saex-test": 98304}


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """One SAE that a card names: where it reads, and its widths."""

    kind: str  # resid, attn, mlp or transcoder
    layer: int
    d_in: int
    d_out: int
    d_sae: int

    @property
    def bytes(self) -> int:
        """In float32, the form in which SAEs are computed with."""
        return 4 * (self.d_sae * (self.d_in + self.d_out + 3) + self.d_out)


@dataclasses.dataclass(frozen=True)
class Step:
    """One computation: `times` calls of `rows` prompts of `seq` tokens. `temp` and `flops` are of one call, on one device of `split`."""

    notebook: str
    what: str
    rows: int
    seq: int
    times: float | int
    flops: float | int
    temp: int
    per_row: int  # bytes of `temp` that each further row adds
    function: Callable  # of (model, tokens): what is compiled where the devices are there
    depth: int  # layers through which the function runs
    extra: int  # the part of `temp` that the function leaves out: an SAE's latents, sites that are kept, further logits


def dictionaries(card: Mapping[str, Any], config: ModelConfig) -> list[Dictionary]:
    """The SAEs of a card, from their names (or, for a suite of our own, from its files; 16 times the width where there are none)."""
    found = []
    for pattern in card["saes"]:
        width = _latents(pattern, config)
        for kind in _kinds(pattern):
            d_in = config.width("z") if kind == "attn" and "gemma-scope" in pattern else config.d_model
            d_out = d_in if kind == "attn" else config.d_model
            found += [Dictionary(kind, layer, d_in, d_out, width) for layer in layers_of(pattern, card["sae_layers"])]
    return found


def n_tasks(source: str) -> int:
    """Tasks of a source or folder. Raises `ValueError` if it is neither."""
    if source in N_TASKS:
        return N_TASKS[source]
    if not (found := task_files(Path(resolve(source)))):
        raise ValueError(f"no task source {source!r}: there are {', '.join(N_TASKS)}, or a folder of .json or .tsv files")
    return len(found)


def _kinds(pattern: str) -> list[str]:
    if not has_layer(pattern):  # a suite in one folder: what train_suite makes
        return ["resid", "attn", "transcoder"]
    for kind, words in (("transcoder", ("transcoder",)), ("attn", ("att",)), ("mlp", ("mlp",)), ("resid", ())):
        if not words or any(word in pattern for word in words):
            return [kind]
    return []


def _latents(pattern: str, config: ModelConfig) -> int:
    """Latents of the SAEs that a pattern names."""
    if scope := re.search(r"width_(\d+)(k|m)", pattern):
        return 2 ** (int(scope[1]) * (1000 if scope[2] == "k" else 1_000_000)).bit_length()  # 16k is 2^14, 65k 2^16, 1m 2^20
    if number := re.search(r"_(\d{4,})$", pattern):
        return int(number[1])
    for repo, width in _LATENTS.items():
        if pattern.startswith(repo):
            return width
    for file in sorted(Path(resolve(pattern)).glob("*/cfg.json")):
        if text := re.search(r'"d_sae": (\d+)', file.read_text()):
            return int(text[1])
    return 16 * config.d_model


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
        self.tasks = n_tasks(card["tasks"])
        self.pair = PAIR_TOKENS.get(card["tasks"], PAIR_TOKENS["paper"])  # of a folder's words nothing is known

    def seq(self, shots: int) -> int:
        return min((shots + 1) * self.pair + _PREFIX_TOKENS, self.config.n_ctx)

    def steps(self) -> list[Step]:
        card, c, tasks = self.card, self.config, self.tasks
        long = self.seq(card["n_shots"])
        n, layers, rest = card["n_prompts"], c.n_layers, c.n_layers - card["layer_executor"]
        sites, l1 = len(self.saes), len(card["tvc_l1"])
        circuit = self.seq(card["circuit_shots"])
        below = c.n_layers - min(card["circuit_layers"])
        keep = 4 * 6 + 2 * 20 + tasks + 2 * 6  # curves, two halvings, the matrix, mean ablation
        return [
            self.answers("00", "accuracy by shots", n, self.seq(card["max_shots"]), tasks),
            self.answers("00", "controls", n, self.seq(5), 15 * tasks),
            self.collect("01", "activations of all SAE sites", 16, self.seq(8), (card["rate_rows"] + 500) / 16, sites),
            self.answers("01", "quality with each SAE in place", 16, self.seq(8), (1 + 3 * sites) * card["quality_rows"] / 16, copies=3),
            self.means("02", "task vectors", n, long, 6 * tasks),
            self.suffix("02", "vectors inserted at every layer", n, 14 * layers * tasks, layers // 2),
            self.suffix("03", "cleaning", card["tvc_prompts"], tasks * (l1 + layers + 3) * card["tvc_steps"] / 2 / l1, rest, l1),
            self.suffix("04", "latents one by one", n, 8 * 150 * tasks, rest),
            self.encode("04", "activation mass", n, long, 4 * tasks),
            self.answers("04", "executors taken away", 4, long, 25 * tasks),
            self.gradient("05", "node effects", card["effect_prompts"], circuit, 2 * tasks, below),
            self.answers("05", "ablation", card["circuit_prompts"], circuit, keep * tasks, layers=below, wide=True),
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

    def answers(self, notebook, what, b, s, times, copies=2, layers=None, wide=False) -> Step:
        temp = lambda b: max(2 * self.logits(b, s), self.block(b, s))
        flops = b * s * token_flops(self.config, s, layers=layers)
        extra = (copies - 2) * self.logits(b, s) + (4 * b * s * self.latents() * 4 if wide else 0)
        return self.step(notebook, what, b, s, times, flops, temp, forward, layers, int(extra))

    def collect(self, notebook, what, b, s, times, sites) -> Step:
        return self.trunk(notebook, what, b, s, times, sites * b * s * self.config.d_model * self.size)

    def means(self, notebook, what, b, s, times) -> Step:
        return self.trunk(notebook, what, b, s, times)

    def encode(self, notebook, what, b, s, times) -> Step:
        return self.trunk(notebook, what, b, s, times, 2 * b * s * self.latents() * 4)

    def trunk(self, notebook, what, b, s, times, extra=0) -> Step:
        """Residuals alone, without logits."""
        flops = b * s * token_flops(self.config, s, logits=False)
        return self.step(notebook, what, b, s, times, flops, lambda b: self.block(b, s), residuals, extra=extra)

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
        return self.step(notebook, what, b, s, times, flops, lambda b: self.backward(b, s, depth), gradient, depth, extra)

    def backward(self, b: int, s: int, depth: int) -> float:
        """The logits thrice, and what each of `depth` layers keeps for its gradient."""
        c = self.config
        layer = b * s * (self.mlp() + 9 * c.d_model * 4) + 8 * b * c.n_heads * s * s / self.split
        return 3 * self.logits(b, s) + depth * layer

    def block(self, b: int, s: int) -> float:
        """What one block holds at a time: the MLP's activations or three copies of the scores, and four residuals."""
        c = self.config
        return max(b * s * self.mlp(), 12 * b * c.n_heads * s * s / self.split) + 4 * b * s * c.d_model * 4

    def step(self, notebook, what, b, s, times, flops, temp, function, depth=None, extra=0) -> Step:
        per_row = int(temp(b + 1) - temp(b) + extra / b)
        return Step(notebook, what, b, s, times, flops, int(temp(b)) + extra, per_row, function, depth or self.config.n_layers, extra)


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
