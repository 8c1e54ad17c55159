"""Does a card fit on a machine, and what would it take? Said before anything is downloaded or paid for.

    python -m icl_lib.commands.preflight params/gemma-2-9b.yaml --devices 8xv5e

Prints parameters, bytes per device, disk, FLOPs and a time estimate per notebook, and the largest batch that fits; exit
status 1 and one message if the card cannot fit. It needs no network: the sizes of the cards' models are part of the
package, those of any other are read from its folder. Where the named devices are there, the largest computations are
compiled for them (at two depths, from which the full one follows: memory and FLOPs are linear in the number of layers)
and the compiler's figures take the place of the arithmetic; host memory and disk are then this machine's, and have to
suffice as well.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import constants, try_to_load_from_cache

import icl_lib.models.families as families
import icl_lib.models.tensors as tensors
from icl_lib.cards.card import LOCAL
from icl_lib.cards.checks import check_against_model, config_of
from icl_lib.files.names import located
from icl_lib.models import ModelConfig
from icl_lib.models.cost import Cost, Part
from icl_lib.models.sharding import largest_split, make_mesh, shardings
from icl_lib.planning.dictionaries import dictionaries
from icl_lib.planning.hardware import Devices, efficiency, host_memory, present, with_own_memory
from icl_lib.planning.workload import TEXT_TOKENS, Step, steps
from icl_lib.saes.cost import Dictionary

_DEPTHS = (2, 4)  # layers of the models that are compiled; even, for families whose layers alternate


class PreflightError(ValueError):
    """A card that cannot run on the machine named; one message, with what would help."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Everything that `show` prints. Bytes are of one device unless they are called total."""

    card: Mapping[str, Any]
    config: ModelConfig
    devices: Devices
    split: int  # devices along the model's axis
    n_params: int
    weights: int  # bytes
    saes: list[Dictionary]
    steps: list[Step]
    disk: int  # bytes that are still to be downloaded
    host: int  # bytes of activations that notebook 01 keeps in host memory
    here: bool  # the devices are this machine's, and the figures of every step in which the model runs the compiler's

    def host_bytes(self, step: Step) -> int:
        """Host memory while a step runs: the activations that notebook 01 keeps, and on a CPU all else too."""
        kept = self.host if step.notebook == "01" else 0
        return kept + (self.peak(step) * self.devices.count if self.devices.kind == "cpu" else 0)

    def sae_bytes(self, notebook: str) -> int:
        """SAEs that a notebook holds: none in 00, residual ones in 02 to 04, all in the others."""
        held = [d for d in self.saes if notebook not in ("02", "03", "04", "05") or d.kind == "residual"]
        return sum(d.bytes for d in held if notebook != "00") // self.split

    def peak(self, step: Step) -> int:
        """Weights, SAEs and work arrays while a step runs."""
        return self.weights + self.sae_bytes(step.notebook) + step.cost.temp

    def hours_of(self, flops: float | int) -> float | int:
        """Time of so many FLOPs at the usual part of the peak speed."""
        return flops / (self.devices.flops * self.split * efficiency(self.devices.kind)) / 3600

    def flops(self, notebook: str) -> float | int:
        """FLOPs of a notebook."""
        return sum(s.flops for s in self.steps if s.notebook == notebook)

    def largest_batch(self, step: Step) -> int:
        """Rows of this step that would fit."""
        return max(0, step.cost.rows + (self.devices.memory - self.peak(step)) // step.cost.per_row)


def sizes_of(model: str) -> ModelConfig:
    """The config of a known model or of a folder. Raises `PreflightError` for any other."""
    config = config_of(model)
    if config is None:
        raise PreflightError(f"the sizes of {model!r} are not known here: make `model` a folder with its config.json")
    return config


def estimate(card: Mapping[str, Any], devices: Devices, compile: bool | None = None) -> Estimate:
    """What the card asks of these devices, compiled where they are present. Raises `PreflightError` or `CardError`."""
    config = sizes_of(card["model"])
    check_against_model(card, card["card"])
    split, size = largest_split(config, devices.count), 4 if devices.dtype == "float32" else 2
    n = tensors.n_params(config)
    saes, todo = dictionaries(card, config), steps(card, config, Part(size, split))
    if compile is None and (compile := present(devices)):
        devices = with_own_memory(devices)
    if compile:
        todo = [dataclasses.replace(step, cost=measured(step.cost, config, devices.dtype, split)) for step in todo]
    # a matrix that does not divide (words, key-value heads) is whole on every device; it is the embedding that counts
    whole = config.d_vocab * config.d_model * (1 if config.tied else 2) if config.d_vocab % split else 0
    weights = int(size * ((n - whole) / split + whole))
    rows = TEXT_TOKENS * card["rate_rows"] * len(saes)
    disk = 0 if _downloaded(card["model"]) else n * _stored(card["model"])
    disk += sum(d.bytes for d in saes) if any(_to_be_fetched(name) for name in card["saes"]) else 0
    return Estimate(card, config, devices, split, n, weights, saes, todo, disk, rows * config.d_model * 2, compile)


def _downloaded(model: str) -> bool:
    """Whether the model is a folder, or lies in the hub's cache with all its weights: a download may break off."""
    if located(model, "model").is_dir():
        return True
    cached = lambda name: try_to_load_from_cache(model, name)
    index, weights = cached("model.safetensors.index.json"), ["model.safetensors"]
    if isinstance(index, str):
        weights = json.loads(Path(index).read_text())["weight_map"].values()
    return all(isinstance(cached(name), str) for name in {"config.json", *weights})


def _to_be_fetched(name: str) -> bool:
    """Whether SAEs of this name come from the hub: not those of an embedded model, of a folder, or made by a run."""
    return not (name.startswith(LOCAL) or located(name, "saes").is_dir())


def _free_disk() -> int:
    """Bytes that are free where the hub's files go."""
    folder = Path(constants.HF_HUB_CACHE)
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _stored(model: str) -> int:
    """Bytes of a stored weight."""
    known = json.loads((Path(families.__file__).parent / "known_configs.json").read_text())
    return 4 if "-it" not in model and known.get(model, {}).get("torch_dtype", "bfloat16") == "float32" else 2


def measured(cost: Cost, config: ModelConfig, dtype: str, split: int = 1) -> Cost:
    """The cost with the compiler's figures for the devices that are there; what the function leaves out stays."""
    if cost.program is None:
        return cost
    low, high = (_compiled(cost, shallow(config, depth), dtype, split) for depth in _DEPTHS)
    share = (cost.depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    temp, flops = (a + (b - a) * share for a, b in zip(low, high, strict=True))
    return dataclasses.replace(cost, model_row=temp / cost.rows, model_flops=flops * split)


def shallow(config: ModelConfig, depth: int) -> ModelConfig:
    """The same model with its first `depth` layers alone."""
    windows = None if config.windows is None else config.windows[:depth]
    return dataclasses.replace(config, n_layers=depth, windows=windows)


def _compiled(cost: Cost, config: ModelConfig, dtype: str, split: int) -> tuple[float, float]:
    """Bytes of work arrays and results, and FLOPs, of one device."""
    put = lambda leaf, place=None: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)
    places = [shardings(config, make_mesh(jax.device_count() // split))] if split > 1 else []
    model = jax.tree.map(put, tensors.abstract(config), *places)
    function, *arguments = cost.program(model)
    program = jax.jit(function).lower(model, *arguments).compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return float(memory.temp_size_in_bytes + memory.output_size_in_bytes), float(cost["flops"])


def refuse(e: Estimate) -> None:
    """Raises `PreflightError` if something does not fit, with the worst step and what would do."""
    worst = max(e.steps, key=e.peak)
    if e.peak(worst) > e.devices.memory:
        raise PreflightError(_too_large(e, worst))
    if not e.here:
        return
    worst, room = max(e.steps, key=e.host_bytes), host_memory()
    if e.host_bytes(worst) > room:
        needs = f"notebook {worst.notebook} ({worst.what}) needs {_gb(e.host_bytes(worst))} of {_gb(room)}"
        less = "fewer `rate_rows` or `sae_layers` would need less"
        raise PreflightError(f"{e.card['card']} does not fit into the memory of this machine: {needs}; {less}")
    if e.disk > (free := _free_disk()):
        has = f"downloads {_gb(e.disk)} of weights and SAEs, and {_gb(free)} are free in {constants.HF_HUB_CACHE}"
        raise PreflightError(f"{e.card['card']} {has}: make room, or set HF_HUB_CACHE to a folder on another disk")


def _too_large(e: Estimate, worst: Step) -> str:
    """Why the worst step does not fit on a device, and what would."""
    parts = f"weights {_gb(e.weights)}, SAEs {_gb(e.sae_bytes(worst.notebook))}, work arrays {_gb(worst.cost.temp)}"
    rows = e.largest_batch(worst)
    advice = [f"{rows} rows of {worst.cost.rows} would fit"] if rows else []
    more = next((n for n in (2, 4, 8, 16, 32, 64) if n > e.devices.count and _fits(e, n)), None)
    advice += [f"{more} x {e.devices.kind} would do"] if more else []
    advice += ["fewer `sae_layers` would need less"] if e.sae_bytes(worst.notebook) > e.weights else []
    needs = f"notebook {worst.notebook} ({worst.what}) needs {_gb(e.peak(worst))} a device ({parts})"
    advice = "; ".join(advice) or "Take devices with more memory"
    return f"{e.card['card']} does not fit on {e.devices}: {needs}, and there are {_gb(e.devices.memory)}. {advice}."


def _gb(x: float | int) -> str:
    return f"{x / 1e9:,.1f} GB"


def _fits(e: Estimate, count: int) -> bool:
    other = estimate(e.card, dataclasses.replace(e.devices, count=count), compile=False)
    return all(other.peak(step) <= other.devices.memory for step in other.steps)


def show(e: Estimate) -> str:
    """The estimate as text."""
    used = f"the model divided among {e.split} of them" if e.split > 1 else "the model whole on one"
    if copies := e.devices.count - e.split:
        used += f"; the other {copies} hold{'s a copy and makes' if copies == 1 else ' copies and make'} nothing faster"
    lines = [
        f"{e.card['card']} on {e.devices}: {_gb(e.devices.memory)} usable each, {used}",
        f"model     {e.card['model']}: {e.n_params:,} parameters, {_gb(e.weights)} a device in {e.devices.dtype}",
        f"SAEs      {len(e.saes)} at {len(e.card['sae_layers'])} layers, "
        f"{max((d.d_sae for d in e.saes), default=0):,} latents: "
        f"{_gb(e.sae_bytes('06'))} a device in float32 when all are loaded",
        f"disk      {_gb(e.disk)} of weights and SAEs to download{f', {_gb(_free_disk())} free' if e.here else ''}; "
        f"host memory {_gb(e.host)} for the activations of notebook 01",
        f"figures   {'compiled for these devices' if e.here else 'by arithmetic, these devices are not here'}; "
        f"times at {100 * efficiency(e.devices.kind):.0f} % of the peak, without compilation",
        "",
        f"{'notebook':<9} {'largest computation':<32} {'batch':>12} {'a device':>10} {'FLOPs':>9} {'hours':>7} "
        f"{'largest batch':>14}",
    ]
    for notebook in sorted({s.notebook for s in e.steps}):
        own = [s for s in e.steps if s.notebook == notebook]
        top = max(own, key=e.peak)
        flops, batch = e.flops(notebook), f"{top.cost.rows} x {top.cost.seq}"
        lines.append(
            f"{notebook:<9} {top.what:<32} {batch:>12} {_gb(e.peak(top)):>10} {flops:9.1e} {e.hours_of(flops):7.2f} "
            f"{e.largest_batch(top):14,}"
        )
    total = e.hours_of(sum(s.flops for s in e.steps))
    return "\n".join([*lines, f"In all about {total:.1f} hours."])
