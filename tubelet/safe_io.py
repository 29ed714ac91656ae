"""The only place that reads files which strangers may have written. Nothing here can run code from a file.

safetensors, JSON, YAML; `.pth` through `weights_only=True`; `.npz` with `allow_pickle=False`. A test greps the whole
project for `torch.load`, `pickle` and `np.load` outside this file.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet.errors import TubeletError

if TYPE_CHECKING:
    import numpy as np
    import torch


def read_json(path: str | Path) -> Any:
    """A JSON file. Raises `TubeletError` that names the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise TubeletError(f"{path} cannot be read: {error.strerror or error}.", "check the path") from None
    except ValueError as error:
        raise TubeletError(f"{path} is not JSON ({error}).", "restore the file; it may be cut short") from None


def read_npz(source: str | Path | bytes) -> dict[str, np.ndarray]:
    """All arrays of an .npz file or its bytes; object arrays (which would be pickles) are refused by numpy."""
    import numpy as np

    try:
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except OSError as error:
        raise TubeletError(f"{source!r:.200} cannot be read: {error}.", "check the path") from None
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged or foreign file
        name = source if not isinstance(source, bytes) else f"<{len(source)} bytes>"
        raise TubeletError(f"{name} is not a plain .npz file ({type(error).__name__}: {error}).",
                           "write it again; files with pickled objects are never read") from None


def read_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file; object arrays (which would be pickles) are refused by numpy."""
    import numpy as np

    try:
        if not data.startswith(b"\x93NUMPY"):  # numpy would go on to read an .npz, or try a pickle
            raise ValueError("it does not begin as one")
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise TubeletError(f"<{len(data)} bytes> are not a plain .npy file ({type(error).__name__}: {error}).",
                           "write it again; files with pickled objects are never read") from None


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise TubeletError(f"{path} does not exist.", "check the path") from None
    except SafetensorError as error:
        raise TubeletError(f"{path} is not a safetensors file ({error}).", "copy it again; it may be cut short") from None


def read_pth(path: str | Path) -> Any:
    """A PyTorch checkpoint of somebody else, tensors and plain containers only (`weights_only=True`)."""
    import pickle

    import torch

    try:
        return torch.load(str(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().splitlines()[0]
        raise TubeletError(f"{path} holds more than tensors and plain containers, so it is not loaded ({first}).",
                           "convert it to safetensors on a machine you trust") from None
