"""When `WWPGD` projects: what it has counted, and the options that say at which counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ww_train.steering.tasks import Outcome


@dataclass
class Clock:
    """All mutable state of a `WWPGD`, in one object that proxies and copies of it share."""

    steps: int = 0  # executed optimizer steps
    epochs: int = 0  # boundaries passed
    boundary: int = -1  # `steps` at the last boundary
    warned: set[str] = field(default_factory=set)
    projected: tuple[Outcome, ...] = ()  # what was done at the last boundary

    def numbers(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "epochs": self.epochs, "boundary": self.boundary}


def check_clock(
    every_n_epochs: int, every_n_steps: int | None, steps_per_epoch: int | None
) -> None:
    """Raise unless the options that say when to project are whole, positive and consistent.

    Raises:
        TypeError: If one is not a whole number.
        ValueError: If one is below 1, or they contradict.
    """
    for name, number in (
        ("every_n_epochs", every_n_epochs),
        ("every_n_steps", every_n_steps),
        ("steps_per_epoch", steps_per_epoch),
    ):
        if number is None and name != "every_n_epochs":
            continue
        if not isinstance(number, int):
            raise TypeError(f"{name} must be a whole number, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if every_n_steps is not None and (every_n_epochs != 1 or steps_per_epoch is not None):
        raise ValueError(
            "every_n_steps= counts steps and takes the place of epochs: give it without "
            "every_n_epochs= and steps_per_epoch="
        )
