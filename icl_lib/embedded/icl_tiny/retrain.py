"""`python -m icl_lib.commands.retrain`: make the embedded model, its tokenizer and its SAE suite again from nothing.

Writes `<folder>/{config.json, model.safetensors, tokenizer.json, icl_gate.json, ...}`, `<folder>/saes/` and
`<folder>/made.json`, which holds the command, the settings, the final losses and the SHA-256 of every file.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from icl_lib.embedded.icl_tiny.language import Language, build_tokenizer, corpus, save_tokenizer
from icl_lib.embedded.icl_tiny.pretrain import PretrainConfig, pretrain
from icl_lib.files.write import write_json
from icl_lib.models import Site, gate, load_model, load_tokenizer, save_model
from icl_lib.runs import devices
from icl_lib.saes.activations import harvest, needed_sites, suite_sites
from icl_lib.saes.formats import save_suite
from icl_lib.training.arrays import train_on

HELD_OUT_SEED = 1_000_003  # the corpus on which notebooks judge model and SAEs is drawn from this seed


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """Settings of the SAE suite. The defaults made the committed one.

    Lambda goes by kind, and for the residual by layer: the embedding is a list of 1,200 points and the last layers are
    the densest, so one value for all would leave them far apart in L0.
    """

    d_sae: int = 1024
    n_rows: int = 2500  # rows of fresh corpus whose activations the SAEs are trained on
    steps: int = 1000
    batch: int = 1024
    lr: float = 3e-3
    resid_pre: float | tuple[float, ...] = (0.2, 0.05, 0.05, 0.05, 0.055, 0.1)
    attn_out: float = 0.12
    mlp_in: float = 0.08
    seed: int = 1

    def sparsity(self, site: Site) -> float:
        value = getattr(self, site.name)
        return value[site.layer] if isinstance(value, tuple) else value


def make_model(config: PretrainConfig, folder: Path, progress: Callable[[str], None] = print) -> dict:
    """Train and save tokenizer and model; gives what the record says of them."""
    language = Language()
    tokenizer = build_tokenizer(language)
    tokens = corpus(
        language, tokenizer, n_rows=config.steps * config.batch, seq=config.seq, seed=config.seed,
        prompt_share=config.prompt_share,
    )  # fmt: skip
    model, losses = pretrain(config, tokens, tokenizer.get_vocab_size(), progress=progress)
    save_model(model, folder, dtype="float16")
    save_tokenizer(tokenizer, folder)
    gate.record(load_model(folder), load_tokenizer(folder), folder)
    np.savetxt(folder / "losses.csv", losses, fmt="%.4f", header="loss", comments="")
    return {"pretrain": dataclasses.asdict(config), "final_loss": round(float(losses[-50:].mean()), 4)}


def make_suite(config: SuiteConfig, folder: Path, progress: Callable = print) -> dict:
    """Train and save the SAEs of the model in `folder`; gives what the record says of them."""
    model = load_model(folder)
    sites = suite_sites(model.config.n_layers)
    acts = harvest(
        model, suite_corpus(model.config.n_ctx, config.n_rows, config.seed), needed_sites(sites), dtype="float16"
    )
    suite = train_on(
        acts, sites, d_sae=config.d_sae, sparsity={site: config.sparsity(site) for site in sites},
        key=jax.random.key(config.seed),
        n_steps=config.steps, batch_size=config.batch, learning_rate=config.lr, progress=progress,
        metadata={"model_name": "icl-tiny"},
    )  # fmt: skip
    save_suite(suite, folder / "saes", dtype="float16")
    return {"suite": dataclasses.asdict(config)}


def suite_corpus(seq: int, n_rows: int, seed: int) -> np.ndarray:
    """Rows of `seq` tokens of the language as the model was trained on, from another seed."""
    language = Language()
    return corpus(language, build_tokenizer(language), n_rows=n_rows, seq=seq, seed=seed)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the folder but the record itself."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "made.json")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def retrain(folder: Path, pretrain_config: PretrainConfig, suite_config: SuiteConfig, progress=print) -> dict:
    """Model, then suite, then the record `made.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    made = {"command": "python -m icl_lib.commands.retrain", "device": devices.describe()}
    made |= make_model(pretrain_config, folder, progress)
    made |= make_suite(suite_config, folder, progress)
    made |= {"minutes": round((time.perf_counter() - start) / 60, 1), "sha256": hashes(folder)}
    write_json(folder / "made.json", made)
    return made
