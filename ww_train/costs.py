"""What decompositions cost on a device: tables of seconds by size, and which way is the fastest."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

import torch

Route: TypeAlias = 'Literal["looped", "batched", "host"]'
"""One matrix after another on the device; many at a time; one after another on the host."""


@dataclass(frozen=True)
class Curve:
    """Seconds by size, measured at some sizes and continued between and beyond them.

    Between two sizes the logarithms are interpolated; above the last one seconds grow with a power
    of the size; below the first they stay, because what is left there is the cost of a call.

    Attributes:
        sizes: Sizes, ascending; none if it could not be measured.
        seconds: Seconds at each.
        power: Exponent above the last size.
    """

    sizes: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    power: float = 3.0

    def __post_init__(self) -> None:
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        if len(self.sizes) != len(self.seconds) or not all(a < b for a, b in pairs):
            raise ValueError("a curve has ascending sizes and the seconds of each")
        numbers = (*self.sizes, *self.seconds, self.power)
        if not all(0.0 < number < math.inf for number in numbers):
            raise ValueError("the sizes and seconds of a curve are positive and finite")

    def __call__(self, size: float) -> float:
        """Seconds at a size; infinity if none was measured."""
        if not self.sizes:
            return math.inf
        if size >= self.sizes[-1]:
            return float(self.seconds[-1] * (size / self.sizes[-1]) ** self.power)
        if size <= self.sizes[0]:
            return self.seconds[0]
        i = bisect_left(self.sizes, size)
        low, high = self.sizes[i - 1], self.sizes[i]
        share = math.log(size / low) / math.log(high / low)
        return float(self.seconds[i - 1] ** (1.0 - share) * self.seconds[i] ** share)


@dataclass(frozen=True)
class Machine:
    """What costs depend on, beside the size of the matrix.

    Attributes:
        device: Name of the device.
        kind: Its type, such as "cpu", "cuda" or "mps".
        torch: Version of PyTorch.
        cuda: Version of CUDA that PyTorch was built for, on a CUDA device.
        threads: Threads that PyTorch uses, on the CPU; None for an accelerator, whose costs hardly
            depend on them.
    """

    device: str
    kind: str
    torch: str
    cuda: str | None
    threads: int | None

    def __str__(self) -> str:
        cuda = f", CUDA {self.cuda}" if self.cuda else ""
        plural = "" if self.threads == 1 else "s"
        threads = f", {self.threads} thread{plural}" if self.threads else ""
        return f"{self.device} ({self.kind}), torch {self.torch}{cuda}{threads}"


@dataclass(frozen=True)
class Costs:
    """Measured seconds of what `ww_train` does to a matrix, all of float64 unless stated.

    Attributes:
        machine: Where it was measured.
        looped: Eigenvalues of an n x n matrix alone; none on a device without float64.
        batched: The same, each of many: as one batch on an accelerator, on the CPU spread over the
            cores. None beyond the size of which two matrices make a batch.
        host: The same with a copy to the host and back; none where the device is the host.
        eigh: Eigenvalues and vectors of each of as many as `batched` has at a time.
        gram32: The float64 Gram matrix of n x n weights in float32.
        gram16: The same of bfloat16.
        shuffle: A random permutation, by the number of entries.
        copy_rate: Bytes a second from the device to the host; None if it could not be measured.
    """

    machine: Machine
    looped: Curve
    batched: Curve
    host: Curve
    eigh: Curve
    gram32: Curve
    gram16: Curve
    shuffle: Curve
    copy_rate: float | None

    def __post_init__(self) -> None:
        if self.copy_rate is not None and not 0.0 < self.copy_rate < math.inf:
            raise ValueError(f"copy_rate is positive and finite, got {self.copy_rate}")

    def fastest(self, n: int, number: int = 1) -> Route:
        """The fastest way to the eigenvalues of `number` n x n matrices that are there together."""
        routes = self._routes(n, number)
        return min(routes, key=lambda route: routes[route])

    def eigenvalue_seconds(self, n: int, number: int = 1) -> float:
        """Seconds of the fastest way to the eigenvalues of `number` n x n matrices, of all."""
        return min(self._routes(n, number).values())

    def _routes(self, n: int, number: int) -> dict[Route, float]:
        alone = self.looped(n)
        together = bool(self.batched.sizes) and n <= self.batched.sizes[-1]
        return {
            "looped": number * alone,
            # no batch is faster than its slowest matrix
            "batched": max(alone, number * self.batched(n)) if together else math.inf,
            "host": number * self.host(n),
        }

    def eigenvector_seconds(self, n: int) -> float:
        """Seconds of the eigenvalues and vectors of an n x n matrix, one of many."""
        return self.eigh(n)

    def gram_seconds(self, N: int, M: int, dtype: torch.dtype = torch.float32) -> float:
        """Seconds of the float64 Gram matrix of N x M weights, N >= M, of a type."""
        curve = self.gram16 if dtype.itemsize <= 2 else self.gram32
        if not curve.sizes:
            return math.inf
        first = max(M, curve.sizes[0])
        return curve(first) * max(1.0, N * M * M / first**3)

    def gram_rate(self, n: int, dtype: torch.dtype = torch.float32) -> float:
        """Operations a second of the Gram matrix of n x n weights."""
        return 2.0 * n**3 / self.gram_seconds(n, n, dtype)

    def shuffle_seconds(self, entries: int) -> float:
        """Seconds of a random permutation of so many entries."""
        return self.shuffle(entries)

    def to_json(self) -> str:
        """All numbers as text that `from_json` reads back exactly."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Costs:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If it is something else; says what.
        """
        try:
            document = json.loads(text)
            parts: dict[str, Any] = {
                field.name: _curve(document[field.name])
                for field in fields(cls)
                if field.name not in ("machine", "copy_rate")
            }
            rate = document["copy_rate"]
            parts["copy_rate"] = None if rate is None else float(rate)
            return cls(machine=_machine(document["machine"]), **parts)
        except KeyError as error:
            raise ValueError(f"no costs as `ww-train calibrate` saves them: no {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"no costs as `ww-train calibrate` saves them: {error}") from error


def _machine(document: Mapping[str, Any]) -> Machine:
    cuda, threads = document["cuda"], document["threads"]
    return Machine(
        str(document["device"]),
        str(document["kind"]),
        str(document["torch"]),
        None if cuda is None else str(cuda),
        None if threads is None else int(threads),
    )


def _curve(document: Mapping[str, Any]) -> Curve:
    sizes = tuple(int(size) for size in document["sizes"])
    seconds = tuple(float(value) for value in document["seconds"])
    return Curve(sizes, seconds, float(document["power"]))
