"""A transformer built by hand whose in-context learning is known, with a dictionary that names its parts.

Three tasks map the same six inputs to outputs of their own. All weights are zero but for these:

- layer 0, head 0: an arrow copies the word before it, direction `inp[i]` to `copy[i]`;
- layer 0, head 1: an arrow looks for outputs and turns their **detector** `det[t]` into the **executor** `exe[t]`;
- layer 1, MLP: neuron (t, i) fires on `exe[t]` times `copy[i]` and writes the output of task t for input i.

All other tokens look at BOS, which says nothing. Every direction is one coordinate of the residual stream and one
latent of the SAEs, whose decoder is the identity; `spare` latents are read by nobody and are distractors.
So a zero-shot prompt is ambiguous, adding `exe[t]` at its arrow (layer 1) or `det[t]` at the dummy output (layer 0)
picks task t, and nothing else does.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.models import ModelConfig, Site, Transformer
from icl_lib.models.transformer import MLP, Attention, Block, Norm
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Task, Template, make_prompts, stack_prompts

N_TASKS, N_INPUTS, D_MODEL, D_HEAD = 3, 6, 64, 8
PAD, EOS, BOS, ARROW, NEWLINE, X, Y, FILLER = range(8)
INPUT, OUTPUT = 8, 8 + N_INPUTS  # first token of each kind; output of (t, i) is OUTPUT + t * N_INPUTS + i
D_VOCAB = OUTPUT + N_TASKS * N_INPUTS
LOGIT = 8.0  # logit of a certain answer
THRESHOLD = 0.05  # of every latent


@dataclasses.dataclass(frozen=True)
class Directions:
    """Coordinates of the residual stream, which are also latent numbers."""

    const: int = 0  # the arrow itself
    bos: int = 1
    newline: int = 2
    dummy: tuple[int, ...] = (3, 4)
    inp: tuple[int, ...] = tuple(range(5, 11))
    copy: tuple[int, ...] = tuple(range(11, 17))
    out: tuple[int, ...] = tuple(range(17, 35))
    det: tuple[int, ...] = tuple(range(35, 38))
    exe: tuple[int, ...] = tuple(range(38, 41))
    filler: int = 41
    spare: tuple[int, ...] = tuple(range(42, D_MODEL))


AT = Directions()


def _embed() -> np.ndarray:
    """What each token puts into the residual stream; the model multiplies its embedding by sqrt(d_model)."""
    rows = np.zeros((D_VOCAB, D_MODEL), np.float32)
    for token, at in (
        (BOS, AT.bos),
        (ARROW, AT.const),
        (NEWLINE, AT.newline),
        (X, AT.dummy[0]),
        (Y, AT.dummy[1]),
        (FILLER, AT.filler),
    ):
        rows[token, at] = 1.0
    for i in range(N_INPUTS):
        rows[INPUT + i, AT.inp[i]] = 1.0
        for t in range(N_TASKS):
            rows[OUTPUT + t * N_INPUTS + i, [AT.out[t * N_INPUTS + i], AT.det[t]]] = LOGIT
    return rows / np.sqrt(D_MODEL)


def _attention() -> Attention:
    q, k, v = (np.zeros((2, D_HEAD, D_MODEL), np.float32) for _ in range(3))
    o = np.zeros((D_MODEL, 2, D_HEAD), np.float32)
    half, unit = D_HEAD // 2, 1 / np.sqrt(D_MODEL)  # a token alone has length sqrt(d_model) after RMSNorm
    # head 0 turns the query back by one radian, the step of the fastest rotary pair: the match is at distance 1
    q[0, [0, half], AT.const] = 3 * np.array([np.cos(1.0), -np.sin(1.0)])
    k[0, 0, list(AT.inp)] = 3.0
    # head 1 uses the slowest pair, which hardly knows positions
    q[1, half - 1, AT.const] = 3.0
    k[1, half - 1, list(AT.det)] = 3.0
    others = [AT.bos, AT.newline, AT.filler, *AT.dummy, *AT.inp, *AT.det]
    q[:, half - 2, others] = 3.0
    k[:, half - 2, AT.bos] = 3.0
    for i in range(N_INPUTS):
        v[0, i, AT.inp[i]] = unit
        o[AT.copy[i], 0, i] = 1.0
    for t in range(N_TASKS):
        v[1, t, AT.det[t]] = unit * np.sqrt(2)  # an output has half of its square length in the detector
        o[AT.exe[t], 1, t] = 1.0
    flat = lambda w: jnp.asarray(w.reshape(-1, D_MODEL))
    return Attention(flat(q), flat(k), flat(v), jnp.asarray(o.reshape(D_MODEL, -1)))


def _no_attention() -> Attention:
    zero = jnp.zeros((2 * D_HEAD, D_MODEL))
    return Attention(zero, zero, zero, zero.T)


def _mlp(active: bool) -> MLP:
    gate, up, down = (np.zeros((N_TASKS * N_INPUTS, D_MODEL), np.float32) for _ in range(3))
    for n in range(N_TASKS * N_INPUTS if active else 0):
        gate[n, AT.exe[n // N_INPUTS]] = 1.0
        up[n, AT.copy[n % N_INPUTS]] = 1.0
        down[n, AT.out[n]] = 1.0
    return MLP(jnp.asarray(gate), jnp.asarray(up), jnp.asarray(down.T))


def planted_model() -> Transformer:
    """The model; executors are read at resid_pre of layer 1, detectors at resid_pre of layer 0."""
    config = ModelConfig(
        family="gemma", d_model=D_MODEL, n_layers=2, n_heads=2, n_kv_heads=2, d_head=D_HEAD,
        d_mlp=N_TASKS * N_INPUTS, d_vocab=D_VOCAB, n_ctx=64,
    )  # fmt: skip
    norm = lambda: Norm.init(config)  # gain 1
    blocks = (Block(norm(), _attention(), norm(), _mlp(False)), Block(norm(), _no_attention(), norm(), _mlp(True)))
    return Transformer(jnp.asarray(_embed()), blocks, norm(), None, config)


def planted_sae(layer: int) -> SAE:
    """The true dictionary of resid_pre of `layer`: latent i is coordinate i."""
    eye, zero = jnp.eye(D_MODEL), jnp.zeros(D_MODEL)
    site = Site("resid_pre", layer)
    return SAE(
        W_enc=eye, b_enc=zero, W_dec=eye, b_dec=zero, site_in=site, site_out=site, architecture="jumprelu",
        threshold=jnp.full(D_MODEL, THRESHOLD),
    )  # fmt: skip


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the newline and the arrow are words."""
    words = ["<pad>", "<eos>", "<bos>", "->", "\n", "X", "Y", "w", *(f"x{i}" for i in range(N_INPUTS))]
    words += [f"y{t}_{i}" for t in range(N_TASKS) for i in range(N_INPUTS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    split = pre_tokenizers.Split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(" ", "removed"), split("\n", "isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def planted_task(t: int) -> Task:
    """Task t; input i is "x{i}" behind i mod 3 meaningless words, so that prompts differ in length."""
    pairs = tuple(("w " * (i % 3) + f"x{i}", f"y{t}_{i}") for i in range(N_INPUTS))
    return Task(name=f"planted_{t}", pairs=pairs, group="planted", source="tests/planted.py")


def planted_prompts(t: int, n_prompts: int, n_shots: int, *, seed: int = 0, dummy: bool = False, **options) -> Prompts:
    """Prompts of task t; `options` go to `make_prompts`."""
    template = Template(prefix="", dummy=("X", "Y") if dummy else None)
    return make_prompts(
        planted_task(t),
        planted_tokenizer(),
        n_prompts=n_prompts,
        n_shots=n_shots,
        seed=seed,
        template=template,
        **options,
    )


def planted_stack(n_prompts: int, n_shots: int, **options) -> Prompts:
    """`planted_prompts` of all tasks, stacked."""
    return stack_prompts([planted_prompts(t, n_prompts, n_shots, **options) for t in range(N_TASKS)])
