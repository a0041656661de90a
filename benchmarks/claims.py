"""What a benchmark says at its end: PASS or MISS for each claim, SKIP where it cannot run."""

from __future__ import annotations

from typing import NoReturn


def verdict(claim: str, holds: bool, measured: str) -> None:
    """Print one claim with what was measured."""
    print(f"{'PASS' if holds else 'MISS'}  {claim}: {measured}")


def skip(reason: object) -> NoReturn:
    """Say why the benchmark cannot run here and exit with status 0."""
    print(f"SKIP  {reason}")
    raise SystemExit(0)
