"""Is this the model that was meant? A fixed prompt's logits, kept beside the weights, and compared after loading."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from icl_lib.files.processes import to_host
from icl_lib.files.write import write_json
from icl_lib.models.transformer import Transformer
from icl_lib.models.weights import GATE as FILE

PROMPT = "Follow the pattern:\nhot -> cold\nbig -> small\nup ->"
N_TOP = 10
# In standard deviations of the logits: several times what another device, order of summation or precision changes.
_TOLERANCE = {"float32": 0.02}
_LOW_PRECISION = 0.1


class GateError(ValueError):
    """The loaded model is not the recorded one; the message says which of tokenizer, dtype and weights differs."""


def _share(dtype: str) -> float:
    """The tolerance of a dtype, in standard deviations of the logits."""
    return _TOLERANCE.get(dtype, _LOW_PRECISION)


def _measure(model: Transformer, ids: list[int]) -> tuple[np.ndarray, str]:
    """Logits after the last token, in float32, and the dtype of the weights."""
    model.config.check_length(len(ids), "the gate's prompt")
    logits = eqx.filter_jit(lambda model, tokens: model(tokens)[0, -1])(model, jnp.asarray([ids], jnp.int32))
    return to_host(logits).astype(np.float32), str(model.embed.dtype)


def record(model: Transformer, tokenizer, folder: str | Path, prompt: str = PROMPT) -> Path:
    """Write `icl_gate.json` into the model's folder: the prompt, its token ids, and the ten largest logits after it.

    The tolerance it states is absolute: 0.02 standard deviations of the logits in float32, 0.1 in lower precision.
    Raises `FloatingPointError` if a logit is not finite, and `ValueError` if the prompt has no token.
    """
    ids = [int(i) for i in tokenizer(prompt)["input_ids"]]
    if not ids:
        raise ValueError(f"the tokenizer makes no token of {prompt!r}: give another prompt")
    logits, dtype = _measure(model, ids)
    if not np.isfinite(logits).all():
        bad = f"{(~np.isfinite(logits)).sum()} of {len(logits)} logits are not finite"
        raise FloatingPointError(f"{bad}: this model cannot be a reference")
    top = np.argsort(-logits, kind="stable")[:N_TOP]
    content = {
        "prompt": prompt, "tokens": ids, "dtype": dtype, "d_vocab": len(logits), "device": jax.devices()[0].device_kind,
        "top_ids": top.tolist(), "top_logits": [round(float(x), 5) for x in logits[top]],
        "tolerance": float(f"{_share(dtype) * float(logits.std()):.3g}"),
    }  # fmt: skip
    path = Path(folder) / FILE
    write_json(path, content)
    return path


def check(model: Transformer, tokenizer, folder: str | Path) -> float | None:
    """The largest difference of the recorded logits; None if the folder carries no `icl_gate.json`.

    Between two dtypes the tolerance is that of the lower precision. Raises `GateError` if the tokenizer cuts the prompt
    into other tokens, the vocabulary has another size, or a logit differs by more than the tolerance; `ValueError` if
    the file cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    kept = _read(path)
    ids = [int(i) for i in tokenizer(kept["prompt"])["input_ids"]]
    if ids != kept["tokens"]:
        theirs = kept["tokens"]
        both = zip(ids, theirs, strict=False)
        at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(ids), len(theirs)))
        first = f"token {at} is {ids[at : at + 1]}, recorded {theirs[at : at + 1]}"
        what = f"of the prompt {kept['prompt']!r} {first} ({len(ids)} tokens, recorded {len(theirs)})"
        todo = "load tokenizer and model from the same folder"
        raise GateError(f"this tokenizer is not the one recorded in {path}: {what}; {todo}")
    if model.config.d_vocab != kept["d_vocab"]:
        here = model.config.d_vocab
        raise GateError(f"{path} was recorded with {kept['d_vocab']} logits, this model has {here}: it is another")
    logits, dtype = _measure(model, ids)
    tolerance = kept["tolerance"] * max(1.0, _share(dtype) / _share(kept["dtype"]))
    differ = np.abs(logits[kept["top_ids"]] - np.asarray(kept["top_logits"], np.float32))
    worst = int(differ.argmax())
    token = kept["top_ids"][worst]
    if not differ[worst] <= tolerance:  # NaN fails too
        here = f"the logit of token {token} after the prompt {kept['prompt']!r} is {logits[token]:.4f}"
        there = f"recorded {kept['top_logits'][worst]:.4f} on {kept['device']}, tolerance {tolerance:.3g}"
        todo = "check revision and files, or record the gate again if the weights are right"
        raise GateError(f"these are not the weights recorded in {path}: {here}, {there}; {todo}")
    return float(differ[worst])


def _read(path: Path) -> dict:
    """The recorded values. Raises `ValueError` where the file is not what `record` writes."""
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it, or record the gate again") from error
    fields = ("prompt", "tokens", "dtype", "d_vocab", "device", "top_ids", "top_logits", "tolerance")
    missing = [name for name in fields if not isinstance(kept, dict) or name not in kept]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: delete it, or record the gate again (gate.record)")
    return kept
