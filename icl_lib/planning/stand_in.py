"""Stand-ins of the models and SAEs that a card names: same family, same file formats, small random weights.

They say nothing about the model. They go through the same code: the family's config and tensor names, its kind of
tokenizer with the special tokens of its template, and SAEs in the format, at the sites and under the folder names that
the card gives.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icl_lib.models import ModelConfig, Site, Transformer, run_with_cache, save_model
from icl_lib.planning.dictionaries import sites_of
from icl_lib.saes import SAE, save_suite
from icl_lib.saes.formats import dictionary_learning, gemma_scope, saex
from icl_lib.saes.formats.suites import has_layer, layers_of, with_layer
from icl_lib.tasks import Task, Template, make_prompts, stack_prompts

_D_SAE = 160
_FIRE = 0.9  # share of a latent's pre-activations that stay below its threshold
# the first cut of Qwen's and Llama's tokenizers
_MODERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Each family's special tokens: those with a name in its tokenizer's config, and the others.
_GEMMA = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}, ["<start_of_turn>", "<end_of_turn>"]
_SPECIAL = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "phi3": (
        {"unk": "<unk>", "bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        ["</s>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "gpt_neox": ({"bos": "<|endoftext|>", "eos": "<|endoftext|>"}, []),
    "qwen2": ({"eos": "<|endoftext|>", "pad": "<|endoftext|>"}, ["<|im_start|>", "<|im_end|>"]),
    "llama": ({"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}, []),
}


def small_tokenizer(family: str, lines: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind trained on `lines`: SentencePiece-like for Gemma and Phi, else byte-level."""
    named, others = _SPECIAL[family]
    special = list(dict.fromkeys([*named.values(), *others]))
    if family in ("gemma", "gemma2", "phi3"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        words = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), words])
        special = special + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer, cut = Tokenizer(models.BPE()), family != "gpt_neox"
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)
        split = [pre_tokenizers.Split(Regex(_MODERN), "isolated")] if cut else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, levels])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(lines, trainer)
    named = {f"{name}_token": token for name, token in named.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, additional_special_tokens=others)


def small_config(config: ModelConfig, n_layers: int, tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    """The same family with few narrow layers: shared and separate key heads, rotary part and windows in proportion."""
    n_heads = 4
    kv = {1: 1, config.n_heads: n_heads}.get(config.n_kv_heads, 2)
    # heads that are together wider or narrower than the residual stream are so here: SAEs of `z` see the difference
    d_head = 16 if config.n_heads * config.d_head == config.d_model else 24
    windows = None if config.windows is None else tuple(None if w is None else 48 for w in config.windows[:n_layers])
    token = lambda name, other: other if getattr(tokenizer, name) is None else int(getattr(tokenizer, name))
    return dataclasses.replace(
        config, d_model=64, n_layers=n_layers, n_heads=n_heads, n_kv_heads=kv, d_head=d_head, d_mlp=128,
        d_vocab=len(tokenizer), n_ctx=512,
        rotary_dim=None if config.rotary_dim is None else d_head * config.rotary_dim // config.d_head, windows=windows,
        attn_scale=None if config.attn_scale is None else d_head**-0.5, bos_id=token("bos_token_id", None),
        eos_id=token("eos_token_id", 0), more_eos=(), pad_id=token("pad_token_id", 0),
    )  # fmt: skip


def write_model(
    folder: Path, config: ModelConfig, n_layers: int, tasks: Mapping[str, Task], template: Template, seed: int
) -> Transformer:
    """A model folder as the hub has it: `config.json`, `model.safetensors`, `tokenizer.json`."""
    lines = [template.prefix, "X -> Y\n"] + [f"{x} -> {y}\n" for task in tasks.values() for x, y in task.pairs]
    tokenizer = small_tokenizer(config.family, lines)
    model = Transformer.init(small_config(config, n_layers, tokenizer), key=jax.random.key(seed))
    save_model(model, folder, dtype="float32")
    tokenizer.save_pretrained(folder)
    return model


def write_saes(
    card: Mapping[str, Any], root: Path, model: Transformer, tasks: Mapping[str, Task], tokenizer, template: Template
) -> None:
    """The SAEs of a card in the format of each of its names, below `root`; about a tenth of the latents fire."""
    # (input, output) -> name and layer
    named = [(pattern, layer) for pattern in card["saes"] for layer in layers_of(pattern, card["sae_layers"])]
    wanted = {sites: each for each in named for sites in sites_of(*each)}
    options = {"n_prompts": 4, "n_shots": 4, "seed": 0, "template": template}
    prompts = stack_prompts([make_prompts(task, tokenizer, **options) for task in tasks.values()])
    tokens = prompts.tokens.reshape(-1, prompts.tokens.shape[-1])
    real = np.asarray(prompts.roles).reshape(tokens.shape) > 0
    _, seen = run_with_cache(model, tokens, sorted({site for pair in wanted for site in pair}))
    own: dict[str, dict[Site, SAE]] = {}
    for i, (pair, (pattern, layer)) in enumerate(wanted.items()):
        x = np.asarray(seen[pair[0]], np.float32)[real]
        gated = "gemma-scope" not in pattern and "dictionar" not in pattern
        sae = random_sae(pair, x, seen[pair[1]].shape[-1], gated=gated, seed=i)
        # `canonical` is spelt out as on the hub, a star is some coefficient
        folder = root / gemma_scope.resolve(with_layer(pattern, layer)).replace("*", "3.0e-05")
        if "saex" in pattern:
            norm = None if "phi" in pattern else float(np.linalg.norm(x, axis=-1).mean())
            saex.write(sae, folder, mean_norm=norm)
        elif "gemma-scope" in pattern:
            gemma_scope.write(sae, folder)
        elif has_layer(pattern):
            plain = dataclasses.replace(sae, architecture="standard", b_enc=-sae.threshold, threshold=None)
            dictionary_learning.write(plain, folder, "AutoEncoder")
        else:
            own.setdefault(pattern, {})[pair[0]] = sae
    for pattern, suite in own.items():
        save_suite(suite, root / pattern)


def random_sae(
    pair: tuple[Site, Site], x: np.ndarray, d_out: int, *, gated: bool, seed: int, n_latents: int = _D_SAE
) -> SAE:
    """Random directions of length 1, read and written; a latent fires on a tenth of the tokens `x` (n, d_in)."""
    rng = np.random.default_rng(seed)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
    read = unit(rng.normal(size=(n_latents, x.shape[1])))
    write = read if pair[0] == pair[1] else unit(rng.normal(size=(n_latents, d_out)))
    height = np.maximum(np.quantile(x @ read.T, _FIRE, axis=0), 1e-3)
    as_array = lambda a: jnp.asarray(a, jnp.float32)
    weights = {
        "W_enc": as_array(read.T), "W_dec": as_array(write), "b_dec": jnp.zeros(d_out), "site_in": pair[0],
        "site_out": pair[1],
    }  # fmt: skip
    if gated:
        bias = as_array(-height)  # of gate and magnitude: the authors' two forms of their SAEs fire on the same tokens
        return SAE(**weights, b_enc=bias, r_mag=jnp.zeros(n_latents), b_mag=bias, architecture="gated")
    return SAE(**weights, b_enc=jnp.zeros(n_latents), threshold=as_array(height), architecture="jumprelu")
