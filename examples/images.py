"""The images of the examples: embedded digits, or MNIST and Fashion-MNIST from a folder or download."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

NAMES = ("digits", "mnist", "fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load(name: str, data_dir: str | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Train and test set: flat images scaled to mean 0 and deviation 1, and integer labels.

    `digits` (1797 images of 8x8) ships with scikit-learn. The others (70,000 of 28x28) are read from
    IDX files, gzipped or not, in `data_dir` or the folder named by WW_TRAIN_DATA, or in a subfolder
    with the dataset's name; without a folder torchvision downloads them. Where neither is possible a
    line says so and the digits are used.
    """
    folder = None if name == "digits" or name not in NAMES else _folder(name, data_dir)
    if folder is None and name in NAMES[1:]:
        print(
            f"no {name}: no --data-dir, no WW_TRAIN_DATA and no download; using the digits instead"
        )
        name = "digits"
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        train_x, test_x, train_y, test_y = train_test_split(
            images, labels, test_size=0.25, random_state=0, stratify=labels
        )
    elif name in NAMES:
        assert folder is not None
        (train_x, train_y), (test_x, test_y) = (_read(folder, part) for part in ("train", "test"))
    else:
        raise SystemExit(f"unknown dataset {name!r}; known: {', '.join(NAMES)}")
    mean, std = train_x.mean(), train_x.std()
    return _tensors((train_x - mean) / std, train_y), _tensors((test_x - mean) / std, test_y)


def _tensors(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    return TensorDataset(
        torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)
    )


def _folder(name: str, data_dir: str | None) -> Path | None:
    data_dir = data_dir or os.environ.get("WW_TRAIN_DATA")
    if data_dir is None:
        try:
            import torchvision

            dataset = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
            getattr(torchvision.datasets, dataset)("data", download=True)
        except (ModuleNotFoundError, OSError, RuntimeError):  # no torchvision, no network
            return None
        return Path("data", dataset, "raw")
    for folder in (Path(data_dir, name), Path(data_dir)):
        if all(_find(folder, file) for files in FILES.values() for file in files):
            return folder
    expected = ", ".join(file for files in FILES.values() for file in files)
    raise SystemExit(f"no {name} in {data_dir}: expected the files {expected}, each may end in .gz")


def _find(folder: Path, file: str) -> Path | None:
    return next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None)


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for file in FILES[part]:
        path = _find(folder, file)
        assert path is not None
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        dims = raw[3]  # IDX: two zero bytes, type (8 = bytes), number of dimensions, the dimensions
        shape = np.frombuffer(raw, ">i4", dims, offset=4)
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape))
    images, labels = arrays
    return images.reshape(len(images), -1).astype(np.float32), labels
