"""Golden files made by dictionary_learning 0.1: one folder for each of its classes, with what the class computes.

Run where it is installed: `python tests/golden/from_dictionary_learning.py`. The folders are as its `trainSAE` leaves
them; `backup` is as an interrupted run of its main branch leaves them, with an optimiser in `ae.pt`;
`AutoEncoderTopK_early` as its first version did, whose TopK had no threshold. Features are those of `from_pretrained`.
With `early` only the last is made.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

HERE = Path(__file__).parent / "dictionary_learning"
D, F, TOKENS = 8, 24, 12


def make(cls, *args):
    dictionary = cls(D, F, *args)
    with torch.no_grad():
        for name, value in dictionary.named_parameters():
            value.copy_(torch.randn_like(value) * (0.4 if value.ndim == 2 else 0.5))
            if name == "threshold":
                value.abs_()
        if "threshold" in dict(dictionary.named_buffers()):
            dictionary.threshold.fill_(0.6)
    return dictionary


def save(name: str, dictionary, submodule: str, k: int | None = None) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.save({key: value.cpu() for key, value in dictionary.state_dict().items()}, folder / "ae.pt")
    trainer = {
        "dict_class": type(dictionary).__name__,
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
    }
    trainer |= {"submodule_name": submodule} | ({"k": k} if k else {})
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer, "buffer": {"d_submodule": D, "ctx_len": 128}}, indent=1) + "\n"
    )
    loaded = type(dictionary).from_pretrained(folder / "ae.pt")
    x = torch.randn(TOKENS, D)
    extra = {}
    with torch.no_grad():
        if type(dictionary) is AutoEncoderTopK:
            extra["f_threshold"] = loaded.encode(x, use_threshold=True).numpy()
        np.savez_compressed(
            folder / "expected.npz", x=x.numpy(), f=loaded.encode(x).numpy(), x_hat=loaded(x).numpy(), **extra
        )


def backup() -> None:
    dictionary = make(AutoEncoder)
    optimizer = torch.optim.Adam(dictionary.parameters())
    dictionary(torch.randn(4, D)).sum().backward()
    optimizer.step()
    (HERE / "backup").mkdir(parents=True, exist_ok=True)
    state = {
        "step": 1200,
        "ae": dictionary.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": {"dict_class": "AutoEncoder"},
        "norm_factor": 3.2,
    }
    torch.save(state, HERE / "backup" / "ae.pt")


def early_topk() -> None:
    torch.manual_seed(1)
    save("AutoEncoderTopK_early", make(AutoEncoderTopK, 4), "resid_post_layer_3", 4)
    folder = HERE / "AutoEncoderTopK_early"
    state = torch.load(folder / "ae.pt")
    torch.save({key: value for key, value in state.items() if key != "threshold"}, folder / "ae.pt")
    expected = dict(np.load(folder / "expected.npz"))
    np.savez_compressed(folder / "expected.npz", **{key: expected[key] for key in ("x", "f", "x_hat")})


def main() -> None:
    torch.manual_seed(0)
    save("AutoEncoder", make(AutoEncoder), "resid_post_layer_3")
    save("AutoEncoderNew", make(AutoEncoderNew), "attn_out_layer3")
    save("GatedAutoEncoder", make(GatedAutoEncoder), "mlp_out_layer_3")
    save("AutoEncoderTopK", make(AutoEncoderTopK, 4), "resid_post_layer_3", 4)
    save("BatchTopKSAE", make(BatchTopKSAE, 4), "resid_post_layer_3", 4)
    save("MatryoshkaBatchTopKSAE", make(MatryoshkaBatchTopKSAE, 4, [8, 16]), "resid_post_layer_3", 4)
    save("JumpReluAutoEncoder", make(JumpReluAutoEncoder), "resid_post_layer_3")
    backup()
    early_topk()


if __name__ == "__main__":
    early_topk() if sys.argv[1:] == ["early"] else main()
