"""Golden files made by sae-lens 6.54: SAEs saved by it, and public formats that it loads, each with what it computes.

Run where sae-lens is installed, from anywhere: `python tests/golden/from_sae_lens.py`, or with `more` or `short` for
those of `more()` or `short()` alone. Beside each SAE lies `expected.npz`: inputs x, features f and reconstructions
x_hat. Weights are random; biases are large enough that leaving one out shows.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors.torch import save_file

HERE = Path(__file__).parent
D, F, OUT, TOKENS = 8, 24, 6, 12
METADATA = {
    "model_name": "gemma-2-2b",
    "hook_name": "blocks.3.hook_resid_pre",
    "hook_head_index": None,
    "prepend_bos": True,
}


def fill(sae: torch.nn.Module) -> None:
    """Random weights in place of the initial ones, thresholds and scales positive."""
    with torch.no_grad():
        for name, value in sae.named_parameters():
            value.copy_(torch.randn_like(value) * (0.4 if value.ndim == 2 else 0.5))
            if name == "threshold":
                value.abs_()


def expected(folder: Path, sae, x: torch.Tensor) -> None:
    with torch.no_grad():
        f, x_hat = sae.encode(x), sae(x)
    np.savez_compressed(folder / "expected.npz", x=x.numpy(), f=f.numpy(), x_hat=x_hat.numpy())


def saved_by_sae_lens(name: str, architecture: str, **settings) -> None:
    sae_class, config_class = get_sae_class(architecture)
    folder = HERE / "sae_lens" / name
    shutil.rmtree(folder, ignore_errors=True)
    hook_out = {"hook_name_out": "blocks.3.hook_mlp_out"} if "transcoder" in architecture else {}
    sites = (
        METADATA | hook_out | ({"hook_name": "blocks.3.mlp.hook_in"} if hook_out else {}) | settings.pop("metadata", {})
    )
    config = (
        {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
        | ({"d_out": OUT} if hook_out else {})
        | settings
    )
    sae = sae_class(config_class.from_dict(config | {"metadata": sites}))
    fill(sae)
    sae.save_model(folder)
    heads = (2, D // 2) if config.get("reshape_activations") == "hook_z" else (D,)
    expected(folder, sae, torch.randn(TOKENS, *heads))


def trained_by_sae_lens(name: str, architecture: str, **settings) -> None:
    """A batch-topk SAE as sae-lens leaves it after training: a jumprelu SAE."""
    sae_class, config_class = get_sae_training_class(architecture)
    folder = HERE / "sae_lens" / name
    shutil.rmtree(folder, ignore_errors=True)
    config = config_class(d_in=D, d_sae=F, device="cpu", k=4, **settings)
    for key, value in METADATA.items():
        setattr(config.metadata, key, value)
    sae = sae_class(config)
    fill(sae)
    sae.topk_threshold.fill_(0.6)
    sae.save_inference_model(folder)
    expected(folder, SAE.load_from_disk(folder), torch.randn(TOKENS, D))


def flat(name: str, weights: dict[str, torch.Tensor], **settings) -> None:
    """A file from before version 6, whose config was flat, as sae-lens still reads it."""
    folder = HERE / "sae_lens" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "gemma-2b",
        "l1_coefficient": 5.0,
    }
    config |= {
        "hook_point": "blocks.6.hook_resid_post",
        "hook_point_layer": 6,
        "hook_point_head_index": None,
    } | settings
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / "sae_weights.safetensors")
    sae = SAE.load_from_disk(folder)
    if config.get("normalize_activations") is True:  # what sae-lens does for registered SAEs
        sae.fold_activation_norm_scaling_factor(
            json.loads((folder / "activation_scaler.json").read_text())["scaling_factor"]
        )
    expected(folder, sae, torch.randn(TOKENS, D))


def plain(d_out: int = D, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = {"W_enc": 0.4 * torch.randn(D, F), "b_enc": 0.5 * torch.randn(F), "W_dec": 0.4 * torch.randn(F, d_out)}
    return weights | {"b_dec": 0.5 * torch.randn(d_out)} | more


def linear(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
    return {
        theirs: weights[ours].T.contiguous() if weights[ours].ndim == 2 else weights[ours]
        for theirs, ours in names.items()
    }


def through_loader(
    repo: str, inside: str, folder_name: str, d_sae_of: str | None = None, scale: float | None = None
) -> None:
    """What sae-lens' own loader of a public format makes of the file that lies in `HERE/repo/inside`."""
    name = next(key for key in ("llama_scope", "mwhanna", "gemma") if key in repo.replace("Llama", "llama_scope"))
    loader = {
        "llama_scope": loaders.llama_scope_sae_huggingface_loader,
        "mwhanna": loaders.mwhanna_transcoder_huggingface_loader,
        "gemma": loaders.gemma_2_transcoder_huggingface_loader
        if "transcoders" in repo
        else loaders.gemma_2_sae_huggingface_loader,
    }[name]
    small = {"d_in": D, "d_sae": F, "dtype": "float32"} | ({"d_out": D} if "transcoder" in repo else {})
    config, state, _ = loader(repo, folder_name, "cpu", False, small)
    config = loaders.handle_config_defaulting(config) if "transcoder" not in repo else config
    sae_class, config_class = get_sae_class(config["architecture"])
    sae = sae_class(config_class.from_dict(config))
    sae.load_state_dict(state)
    if scale:
        sae.fold_activation_norm_scaling_factor(scale)
    folder = HERE / repo / inside
    expected(
        folder if folder.is_dir() else folder.parent,
        sae,
        torch.randn(TOKENS, *((2, D // 2) if "att" in repo else (D,))),
    )


def more() -> None:
    """Flat files of other architectures, and the inference form of SAEs that are trained by a whole batch."""
    torch.manual_seed(1)
    weights = plain()
    gate = {"b_gate": weights.pop("b_enc"), "r_mag": 0.3 * torch.randn(F), "b_mag": 0.5 * torch.randn(F)}
    flat("flat_gated", weights | gate, architecture="gated")
    flat("flat_jumprelu", plain(threshold=torch.rand(F)), architecture="jumprelu")
    trained_by_sae_lens("batchtopk", "batchtopk")
    trained_by_sae_lens("matryoshka_batchtopk", "matryoshka_batchtopk", matryoshka_widths=[8, 24])


def short() -> None:
    """Files of version 6 that leave to sae-lens' defaults all that they can."""
    torch.manual_seed(2)
    for architecture in ("standard", "gated", "jumprelu", "topk"):
        weights = plain()
        more = {"threshold": torch.rand(F)} if architecture == "jumprelu" else {}
        if architecture == "gated":
            more = {"b_gate": weights.pop("b_enc"), "r_mag": 0.3 * torch.randn(F), "b_mag": 0.5 * torch.randn(F)}
        short_config(architecture, weights | more, **({"k": 4} if architecture == "topk" else {}))


def short_config(architecture: str, weights: dict[str, torch.Tensor], **settings) -> None:
    folder = HERE / "sae_lens" / f"short_{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32"} | settings
    config |= {"metadata": METADATA | {"sae_lens_version": "6.54.0"}}
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / "sae_weights.safetensors")
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.apply_b_dec_to_input
    expected(folder, sae, torch.randn(TOKENS, D))


def gemma_scope(kind: str, inside: str, lower_case: bool = False) -> None:
    repo = f"google/gemma-scope-2b-pt-{kind}"
    folder = HERE / repo / inside
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.numpy() for name, value in plain(threshold=torch.rand(F)).items()}
    if lower_case:
        weights = {name.replace("W_", "w_"): value for name, value in weights.items()} | {
            "scaling_factor": np.ones(F, np.float32)
        }
    if inside.startswith("embedding"):
        weights["b_dec"] *= 0  # sae-lens does not scale it with the decoder; without a bias there is no difference
    np.savez(folder / "params.npz", **weights)
    through_loader(repo, inside, inside)


def main() -> None:
    torch.manual_seed(0)
    # sae-lens asks the hub for single files: give it ours
    local = lambda repo_id, filename, subfolder="", **_: str(HERE / repo_id / subfolder / filename)
    loaders.hf_hub_download = local
    for name in (
        "standard",
        "gated",
        "jumprelu",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ):
        saved_by_sae_lens(name, name, apply_b_dec_to_input="transcoder" not in name)
    saved_by_sae_lens("standard_input_as_it_is", "standard", apply_b_dec_to_input=False)
    saved_by_sae_lens("topk", "topk", k=4, apply_b_dec_to_input=True)
    saved_by_sae_lens("topk_rescaled", "topk", k=4, rescale_acts_by_decoder_norm=True)
    z = {"hook_name": "blocks.3.attn.hook_z"}
    saved_by_sae_lens("hook_z", "jumprelu", reshape_activations="hook_z", apply_b_dec_to_input=True, metadata=z)
    flat("flat_standard", plain(scaling_factor=torch.ones(F)))
    flat("flat_topk", plain(), activation_fn_str="topk", activation_fn_kwargs={"k": 5})
    scaled = HERE / "sae_lens" / "flat_scaled"
    scaled.mkdir(parents=True, exist_ok=True)
    (scaled / "activation_scaler.json").write_text('{"scaling_factor": 0.21}\n')
    flat("flat_scaled", plain(), normalize_activations=True)
    gemma_scope("res", "layer_20/width_16k/average_l0_71")
    gemma_scope("res", "embedding/width_4k/average_l0_6")
    gemma_scope("att", "layer_3/width_16k/average_l0_117", lower_case=True)
    gemma_scope("mlp", "layer_0/width_65k/average_l0_72")
    gemma_scope("transcoders", "layer_5/width_16k/average_l0_87")
    norms = {"in": 11.0, "out": 11.0}
    folder = HERE / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    hyper = {
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.33,
        "dataset_average_activation_norm": norms,
    }
    hyper |= {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "norm_activation": "dataset-wise",
    }
    (folder / "hyperparams.json").write_text(json.dumps(hyper, indent=1) + "\n")
    save_file(linear(plain()), folder / "checkpoints" / "final.safetensors")
    through_loader("fnlp/Llama3_1-8B-Base-LXR-8x", folder.name, folder.name, scale=D**0.5 / norms["in"])
    folder = HERE / "mwhanna/qwen3-0.6b-transcoders-lowl0"
    folder.mkdir(parents=True, exist_ok=True)
    weights = plain()
    save_file(weights | {"W_enc": weights["W_enc"].T.contiguous()}, folder / "layer_7.safetensors")
    (folder / "config.yaml").write_text("model_name: Qwen/Qwen3-0.6B\nmodel_kind: transcoder_set\n")
    (folder / "wandb-config.yaml").write_text(
        f"d_model: {{value: {D}}}\nd_feature: {{value: {F}}}\nbatch_size: {{value: 1}}\n"
    )
    through_loader("mwhanna/qwen3-0.6b-transcoders-lowl0", "layer_7.safetensors", "layer_7.safetensors")
    more()
    short()


if __name__ == "__main__":
    {"more": more, "short": short}.get("".join(sys.argv[1:]), main)()
