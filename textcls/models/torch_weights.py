"""The tensors in a file of torch.save, read without PyTorch and without running what a pickle may hold."""

import collections
import io
import pickle
import zipfile
from typing import Any, Callable, Optional

import numpy as np

from textcls.common.errors import UserError

DTYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8"}
EXPECTED = "tensors as torch.save writes them (torch 1.6 or later)"


class _Reader(pickle.Unpickler):
    """Unpickles names, numbers and tensors: whatever else a pickle refers to is refused before it is imported or called."""

    def __init__(self, content: bytes, read_storage: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(content))
        self._read_storage = read_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known: dict[tuple[str, str], Callable] = {("torch._utils", "_rebuild_tensor_v2"): _rebuild,
                                                  ("collections", "OrderedDict"): collections.OrderedDict}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"its pickle refers to {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, size = pid
        values = np.frombuffer(self._read_storage(str(key)), dtype)
        if kind != "storage" or len(values) != size:
            raise pickle.UnpicklingError("a storage is not of the size that it says")
        return values


def _rebuild(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """As torch._utils._rebuild_tensor_v2: the tensor in a storage. ValueError for one that is not stored row by row."""
    array = storage[offset:offset + int(np.prod(shape, dtype=np.int64))].reshape(shape)
    if tuple(step * array.itemsize for step in strides) != array.strides:
        raise ValueError("a tensor is not stored row by row")
    return array.astype(np.float32)


def read_torch(path: str) -> dict[str, np.ndarray]:
    """Read a state_dict that torch.save wrote: {name: float32 array}. UserError where it is damaged or holds anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled: Optional[str] = next((name for name in names if name.endswith("data.pkl")), None)
            if pickled is None or any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("no data.pkl, or compressed")
            root = pickled.removesuffix("data.pkl")
            state = _Reader(archive.read(pickled), lambda key: archive.read(f"{root}data/{key}")).load()
    except FileNotFoundError:
        raise UserError(f"{path}: file not found, expected {EXPECTED}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: refused ({error}), expected {EXPECTED}") from None
    if not isinstance(state, dict) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise UserError(f"{path}: holds no tensors with names, expected {EXPECTED}")
    return {str(name): value for name, value in state.items()}
