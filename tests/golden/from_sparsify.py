"""Golden files made by sparsify (eai-sparsify 1.3): an SAE and transcoders with and without a skip matrix.

Run where it is installed: `python tests/golden/from_sparsify.py`.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent / "sparsify"
D, F, TOKENS = 8, 24, 12


def save(hookpoint: str, **settings) -> None:
    folder = HERE / hookpoint
    shutil.rmtree(folder, ignore_errors=True)
    coder = SparseCoder(D, SparseCoderConfig(k=4, **settings))
    with torch.no_grad():
        for value in coder.parameters():
            value.copy_(torch.randn_like(value) * (0.4 if value.ndim == 2 else 0.5))
    coder.save_to_disk(folder)
    coder = SparseCoder.load_from_disk(folder)
    x = torch.randn(TOKENS, D)
    with torch.no_grad():
        top = coder.encode(x)
        f = torch.zeros(TOKENS, F).scatter_(1, top.top_indices, top.top_acts)
        np.savez_compressed(folder / "expected.npz", x=x.numpy(), f=f.numpy(), x_hat=coder(x).sae_out.numpy())


def main() -> None:
    torch.manual_seed(0)
    save("layers.3", num_latents=F, normalize_decoder=False)
    save("embed_tokens", expansion_factor=F // D)
    save("layers.2.mlp", num_latents=F, transcode=True)
    save("layers.4.mlp", num_latents=F, transcode=True, skip_connection=True)


if __name__ == "__main__":
    main()
