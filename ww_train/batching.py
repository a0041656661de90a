"""Eigenvalues on an accelerator: the Gram matrices of one size together, within its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from ww_train.costs import Route
from ww_train.linalg import gram, symmetric_eigenvalues

BATCH_BYTES = 1 << 28
"""Gram matrices that may wait for others of their size."""

Choose: TypeAlias = Callable[[int, int], Route]
"""The fastest way for matrices of a size, given how many there are together."""

Solved: TypeAlias = "tuple[int, list[Tensor]]"
"""Position of a layer, and the eigenvalues `(rf, M)` of each of its stacks, in host memory."""


Shortage: TypeAlias = Callable[[torch.device], object]
"""Called where the memory of a device does not suffice, and something smaller is tried."""


class Bucket:
    """Gram matrices of one size that are decomposed together, and to which layers they belong.

    Where the device's memory does not suffice, fewer are taken at a time, and in the end the host.

    Args:
        device: Where the matrices are.
        choose: Which way to take.
        short: Called where memory did not suffice.
    """

    def __init__(self, device: torch.device, choose: Choose, short: Shortage) -> None:
        self._device = device
        self._choose = choose
        self._short = short
        self._waiting: list[tuple[int, list[Tensor]]] = []

    @property
    def nbytes(self) -> int:
        """Size of the Gram matrices that wait."""
        return sum(g.nbytes for _, own in self._waiting for g in own)

    def add(
        self,
        owner: int,
        stacks: Callable[[], Iterable[Tensor]],
        retreat: Callable[[], object] = bool,
    ) -> Iterator[Solved]:
        """Add a layer's stacks; gives what had to be solved to make room.

        Args:
            owner: Position of the layer.
            stacks: Makes them; called again where memory did not suffice.
            retreat: Called before the last time, to have them made on the host.

        Cost: no synchronisation, unless memory does not suffice.
        """
        grams = self._made(stacks)
        if grams is None:
            self._short(self._device)
            yield from self.solve()
            grams = self._made(stacks)
        if grams is None:
            retreat()
            grams = [gram(stack.cpu()) for stack in stacks()]
        self._waiting.append((owner, grams))

    def _made(self, stacks: Callable[[], Iterable[Tensor]]) -> list[Tensor] | None:
        """The Gram matrices; None without the memory, of which nothing is held then."""
        try:
            return [gram(stack) for stack in stacks()]
        except torch.OutOfMemoryError:
            return None

    def solve(self) -> Iterator[Solved]:
        """The eigenvalues of all that wait, in host memory.

        Cost: one copy to the host and, by the check of the solver's result, one synchronisation for
        each batch.
        """
        waiting, self._waiting = self._waiting, []
        owned = [(owner, len(own)) for owner, own in waiting]
        grams = [g for _, own in waiting for g in own]
        del waiting
        evals = self._solved(grams)
        del grams  # the memory may be needed for what becomes of the eigenvalues
        parts = iter(evals)
        for owner, number in owned:
            yield owner, list(islice(parts, number))

    def _solved(self, grams: list[Tensor]) -> list[Tensor]:
        """Eigenvalues of each stack of Gram matrices, those of one size and place together.

        Stacks of one layer differ in size where its own spectrum comes from factors.
        """
        evals: dict[int, Tensor] = {}
        kinds = [(g.device, g.shape[-1]) for g in grams]
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, own in enumerate(kinds) if own == kind]
            sizes = [len(grams[i]) for i in chosen]
            parts = torch.split(self._batch([grams[i] for i in chosen]), sizes)
            evals |= dict(zip(chosen, parts, strict=True))
        return [evals[i] for i in range(len(grams))]

    def _batch(self, grams: list[Tensor]) -> Tensor:
        number, n = sum(len(g) for g in grams), grams[0].shape[-1]
        # what is on the host already is there for lack of memory
        route = self._choose(n, number) if grams[0].device == self._device else "looped"
        if route == "host":
            grams = [g.cpu() for g in grams]
        try:
            if route == "batched":
                together = torch.cat(grams) if len(grams) > 1 else grams[0]
                return symmetric_eigenvalues(together).cpu()
            return torch.cat([symmetric_eigenvalues(m[None]) for g in grams for m in g]).cpu()
        except torch.OutOfMemoryError:
            self._short(self._device)
        if number == 1:
            return symmetric_eigenvalues(grams[0].cpu())
        if len(grams) == 1:
            grams = list(torch.split(grams[0], 1))
        middle = len(grams) // 2
        return torch.cat([self._batch(grams[:middle]), self._batch(grams[middle:])])


def warn_once() -> Shortage:
    """A warning of a shortage that is given at its first call only."""
    given: list[torch.device] = []

    def warn(device: torch.device) -> None:
        if not given:
            given.append(device)
            warnings.warn(
                f"the memory of {device} does not suffice: fewer layers at a time, or the CPU",
                stacklevel=2,
            )

    return warn
