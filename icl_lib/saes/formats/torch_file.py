"""Reading the tensors of a PyTorch file without PyTorch, and without running anything that is in it.

`torch.save` writes a zip with a pickle, `data.pkl`, and the raw numbers under `data/`. A pickle can name any function
and have it called. Here it may only name the ones with which PyTorch puts tensors together, and those are ours.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


class _Storage:
    """The type of numbers in a tensor, as the pickle names it."""

    __slots__ = ("dtype",)

    def __init__(self, name: str):
        self.dtype = np.dtype(_STORAGES[name])


class _Call:
    """A function that the pickle may call; an object without attributes, so that the pickle cannot set any."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"it sets {name} of a function")

    def __call__(self, *args):
        return self._function(*args)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *rest) -> np.ndarray:
    """A tensor as a view of its storage. What else PyTorch keeps (gradients wanted or not, hooks) is dropped."""
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor has shape {shape}, strides {stride} and offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches past its {storage.size} numbers")
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides).copy()


_CALLS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
}


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _Call(_CALLS[module, name])
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a tensor")

    def persistent_load(self, pid: Any) -> np.ndarray:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Storage):
            raise pickle.UnpicklingError("it refers to something that is not the numbers of a tensor")
        numbers = np.frombuffer(self._archive.read(f"{self._root}data/{pid[2]}"), pid[1].dtype)
        if numbers.size != pid[4]:
            raise pickle.UnpicklingError(f"storage {pid[2]} has {numbers.size} numbers, {pid[4]} were announced")
        return numbers


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, tensors as numpy arrays. Raises `FileNotFoundError`, or `ValueError` if the file is cut
    short, is no zip (PyTorch before 1.6), or holds anything but tensors and plain containers, naming what it is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it holds the weights of an SAE")
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("data.pkl")]
            if len(roots) != 1:
                raise zipfile.BadZipFile(f"{len(roots)} files named data.pkl, expected one")
            order = f"{roots[0]}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError(f"{path} was written on a big-endian machine: load and save it on an ordinary one")
            return _Reader(archive, roots[0]).load()
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a PyTorch file ({error}): cut short, or before 1.6?") from error
    except (pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is refused: {error}. Only files with nothing but tensors in them are read") from error
