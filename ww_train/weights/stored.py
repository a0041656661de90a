"""Weights that are not in memory yet: shape and type are known, values are read when asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


class CheckpointError(ValueError):
    """A file or folder that cannot be read as weights; one line that says why and what to do."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: Its shape.
        dtype: Type of the values that `read` gives; what a rounding error is measured by.
        read: From a range `start, stop` of the first dimension to the values there, contiguous.
        identity: Equal for two names of one tensor; None if that cannot be told.
        read_only: Why the values are not those that are stored, such as "quantised", or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    identity: Hashable = None
    read_only: str | None = None

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def like(self) -> Tensor:
        """A tensor of this shape and type without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def _values(self, start: int, stop: int) -> Tensor:
        try:
            return self.read(start, stop)
        except CheckpointError:
            raise
        except (
            Exception
        ) as error:  # there is nothing that the parsers of damaged files do not raise
            text = next(iter(str(error).splitlines()), "")[:160]
            raise CheckpointError(f"cannot be read ({type(error).__name__}: {text})") from error

    def part(self, view: Tensor) -> Tensor:
        """The values of `view`, a view of `like()`, from the rows of the first dimension it covers."""
        row = math.prod(self.shape[1:])
        first = view.storage_offset()
        last = first + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
        start = first // row
        values = self._values(start, last // row + 1).contiguous()
        offset = values.storage_offset() + first - start * row
        return values.as_strided(view.shape, view.stride(), offset)


@dataclass(frozen=True, eq=False)
class Deferred:
    """A stack of weights that is read, gathered or multiplied out afresh each time it is asked for.

    Attributes:
        shape: `(rf, rows, cols)`.
        dtype: In which the weights are stored.
        load: Makes the stack.
        device: Where the stack will be.
        collective: Whether `load` must be called by all processes in the same order.
        rank: Largest possible rank of a slice, where that is less than its smaller dimension.
        core: Makes a smaller stack `(rf, rank, rank)` of the same positive singular values.
        view: On the meta device, the view of the whole parameter that the stack will be; None if it
            will be a copy.
        relocate: Gives the same on another device; None to move the stack that was made.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    device: torch.device = CPU
    collective: bool = False
    rank: int | None = None
    core: Callable[[], Tensor] | None = None
    view: Tensor | None = None
    relocate: Callable[[torch.device], Deferred] | None = None

    def to(self, device: torch.device) -> Deferred:
        """The same on another device: made there if it can be, else moved when it is in memory."""
        if device == self.device:
            return self
        if self.relocate is not None:
            return self.relocate(device)
        load, core = self.load, self.core
        return replace(
            self,
            device=device,
            load=lambda: load().to(device),
            core=None if core is None else lambda: core().to(device),
            view=None,
            relocate=self.to,  # from there it goes on without a detour
        )


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading; without a buffer, which would read ahead of what is needed."""
    return path.open("rb", buffering=0)


def raw_tensor(
    open_file: Callable[[], BinaryIO],
    where: str,
    offset: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    identity: Hashable = None,
) -> StoredTensor:
    """A tensor whose values lie row after row in a file, in this machine's byte order.

    Read by plain reads rather than a memory map: the pages of a map stay in memory as long as the
    file is open, and a file cut short while it is mapped kills the process.

    Args:
        open_file: Opens the file for reading; called for each read.
        where: File and name of the tensor, for errors.
        offset: Position of the first value.
        shape: Shape of the tensor.
        dtype: Type of the values.
        identity: See `StoredTensor`.
    """
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(start: int, stop: int) -> Tensor:
        # of its own pages, which go back to the system at once; the heap would keep them
        buffer = mmap.mmap(-1, max(1, (stop - start) * row))
        try:
            with open_file() as file:
                file.seek(offset + start * row)
                got = _fill(file, buffer, (stop - start) * row)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from error
        if got < (stop - start) * row:
            raise CheckpointError(f"{where} is cut short: copy or download the file again")
        values = torch.frombuffer(buffer, dtype=torch.uint8)[: (stop - start) * row]
        return values.view(dtype).view(stop - start, *shape[1:])

    return StoredTensor(shape, dtype, read, identity)


def _fill(file: BinaryIO, buffer: mmap.mmap, size: int) -> int:
    """Read until the buffer is full or the file ends; the number of bytes read."""
    done = 0
    with memoryview(buffer) as view:
        while done < size:
            number = file.readinto(view[done:size])  # type: ignore[attr-defined]
            if not number:
                break
            done += number
    return done


def in_memory(tensor: Tensor, identity: Hashable = None) -> StoredTensor:
    """A tensor that is in memory after all, in formats that cannot be read in parts."""
    return StoredTensor(
        tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop], identity
    )


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of the same values, copied only where torch cannot share the memory."""
    native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = np.array(array, dtype=native)
    return torch.from_numpy(np.asarray(array, dtype=native))


SCALES = (".weight_scale_inv", ".weight_scale")
"""Endings of the names of float8 weights' scales (DeepSeek and transformers; compressed-tensors)."""


def scaled(codes: Tensor | StoredTensor, scale: Tensor | StoredTensor) -> StoredTensor | str:
    """Float8 weights times their scales, in float32; or why that cannot be done.

    Args:
        codes: `(rows, cols)` float8.
        scale: One number, one for each row, or one for each block.
    """
    rows, cols = codes.shape
    shape = tuple(scale.shape)
    if math.prod(shape) == 1:
        shape = (1, 1)
    elif shape == (rows,):
        shape = (rows, 1)
    blocks = [_block(n, k) for n, k in zip((rows, cols), shape, strict=False)]
    if len(shape) != 2 or None in blocks:
        return f"float8 codes of shape {(rows, cols)} with scales of shape {tuple(scale.shape)}"
    height, width = (block or 1 for block in blocks)

    def read(start: int, stop: int) -> Tensor:
        factors = _values(scale).to(torch.float32).reshape(shape)
        factors = factors.repeat_interleave(width, 1)[:, :cols]
        factors = factors[torch.arange(start, stop, device=factors.device) // height]
        return factors.mul_(_values(codes, start, stop).to(torch.float32))

    identity = codes.identity if isinstance(codes, StoredTensor) else None
    return StoredTensor((rows, cols), torch.float32, read, identity, "quantised")


def _values(tensor: Tensor | StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor.detach()[start:stop] if tensor.ndim else tensor.detach()
    if not tensor.shape:
        return tensor.read(0, 1).reshape(())
    return tensor.read(start, tensor.shape[0] if stop is None else stop)


def _block(n: int, blocks: int) -> int | None:
    """Length of the blocks, of which the last may be short: a power of two if one fits."""
    if blocks == 1:
        return n
    for power in (1 << k for k in range(n.bit_length())):
        if -(-n // power) == blocks:
            return power
    return n // blocks if n % blocks == 0 else None
