"""The commands `calibrate` and `plan`: what decompositions cost here, and a model at scale."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ww_train import exports
from ww_train.calibration import cache_file, calibrate, costs_of
from ww_train.cli.shapes import shapes
from ww_train.cli.source import first_process
from ww_train.costs import Costs
from ww_train.scale import Load, Scale, scale, step_seconds
from ww_train.tables import printable, show
from ww_train.weights.matrices import reasons

if TYPE_CHECKING:
    import pandas as pd

MILLISECONDS = ("looped", "batched", "host", "eigh")
"""Curves of `Costs` that are printed in milliseconds a matrix."""

WHAT = ("spectra", "traps", "projection")
"""Rounds of a `Scale`."""


OF_THIS_CPU = (
    "these are costs of this CPU; for GPUs run `ww-train calibrate --device cuda -o costs.json` on "
    "one and pass --costs costs.json"
)


def calibrate_device(args: Namespace) -> int:
    """Measure the costs of a device; print and save them."""
    if args.output is not None and args.output != exports.STDOUT:
        exports.check(args.output)
    if not first_process():
        return 0
    costs = calibrate(args.device or "cpu")
    path = args.output
    if path is None and (found := cache_file(costs.machine)) is not None:
        found.parent.mkdir(parents=True, exist_ok=True)
        path = str(found)
    if path is not None:
        exports.write_bytes(costs.to_json().encode(), path)
    if path != exports.STDOUT:
        print(f"{costs.machine}\n")
        show(costs_table(costs), ("n", *MILLISECONDS, "gram32", "gram16", "fastest"))
        print("\nmilliseconds a matrix, Gflop/s of Gram matrices; fastest of 1 and of 64 matrices")
        print(f"saved in {printable(path)}" if path else "not saved: there is no home folder")
    return 0


def plan(args: Namespace) -> int:
    """Say what watching and steering a model would take."""
    if args.json not in (None, exports.STDOUT):
        exports.check(args.json)
    _check_step(args)
    if not first_process():
        return 0
    saved = read_costs(args.costs) if args.costs else None
    model = shapes(Path(args.path))
    costs, origin = (saved, args.costs) if saved else known_or_measured(args.device or "cpu")
    network = math.inf if args.network is None else 1e9 * args.network
    ranks = args.gpus or 1
    found = scale(model, costs, ranks, max_evals=args.max_evals, network=network)
    step = _step(args, found)
    if args.json is not None:
        document = {**asdict(found), "machine": asdict(costs.machine), "step_seconds": step}
        every = None if step is None else intervals(found, step, args.overhead)
        document |= {"overhead": args.overhead, "every": every}
        exports.write_bytes(exports.to_json(document), args.json)
    if args.json != exports.STDOUT:
        print(f"{amount(found.parameters)} parameters in matrices, {counted(found.ranks, 'rank')}")
        print(printable(f"costs of {costs.machine}, {origin}"))
        if args.gpus and not saved and costs.machine.kind == "cpu":
            print(OF_THIS_CPU)
        _print(found, step, args)
    return 0


def known_or_measured(device: torch.device | str) -> tuple[Costs, str]:
    """The costs of a device, as `costs_of` gives them, and in words where they come from."""
    measured: list[Costs] = []

    def measure(where: torch.device) -> Costs:
        measured.append(calibrate(where))
        return measured[-1]

    costs = costs_of(device, measure=measure)
    path = cache_file(costs.machine)
    if path is None or not path.is_file():
        return costs, "measured now, not saved"
    return costs, f"measured now, saved in {path}" if measured else f"saved in {path}"


def intervals(found: Scale, step: float, overhead: float) -> dict[str, int]:
    """Steps between two rounds of each kind, each alone."""
    return {name: _load(found, name).every(step, overhead) for name in WHAT}


def read_costs(path: str) -> Costs:
    """The costs in a file that `calibrate` saved.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is something else.
    """
    try:
        return Costs.from_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def costs_table(costs: Costs) -> pd.DataFrame:
    """One row a size."""
    import pandas as pd

    rows = []
    for n in costs.looped.sizes or costs.host.sizes:
        row: dict[str, object] = {"n": n}
        for name in MILLISECONDS:
            curve = getattr(costs, name)
            row[name] = 1e3 * curve(n) if curve.sizes and n <= curve.sizes[-1] else math.nan
        row |= {
            "gram32": costs.gram_rate(n) / 1e9,
            "gram16": costs.gram_rate(n, torch.bfloat16) / 1e9,
            "fastest": f"{costs.fastest(n)}, {costs.fastest(n, 64)}",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _check_step(args: Namespace) -> None:
    """Raise ValueError for half of a training step."""
    if (args.tokens_per_step is None) != (args.flops is None):
        raise ValueError("--tokens-per-step and --flops go together")
    if args.step_seconds is not None and args.flops is not None:
        raise ValueError("give --step-seconds, or --tokens-per-step and --flops, not both")


def _step(args: Namespace, found: Scale) -> float | None:
    if args.flops is None:
        return None if args.step_seconds is None else float(args.step_seconds)
    return step_seconds(found.parameters, args.tokens_per_step, args.flops, found.ranks)


def _load(found: Scale, name: str) -> Load:
    load: Load = getattr(found, name)
    return load


def _print(found: Scale, step: float | None, args: Namespace) -> None:
    import pandas as pd

    print()
    rows = [_row(name, _load(found, name), found.ranks) for name in WHAT]
    show(pd.DataFrame(rows), list(rows[0]))
    _print_traffic(found, args)
    if found.skipped:
        print(f"skipped {len(found.skipped)}: {printable(reasons(found.skipped, 3))}")
    print(advice(found, step, args.overhead))


def _row(name: str, load: Load, ranks: int) -> Mapping[str, Any]:
    shared = {f"with {ranks} ranks": load.longest} if ranks > 1 else {}
    return {
        "round": name,
        "layers": load.layers,
        "seconds on one rank": load.seconds,
        **shared,
        "memory": size(load.memory),
        "results": size(load.results),
    }


def _print_traffic(found: Scale, args: Namespace) -> None:
    if found.ranks == 1:
        return
    counted = "not counted" if args.network is None else "counted"
    print(
        f"sharded weights: a rank receives {size(found.traps.gathered)} in a round, at most "
        f"{size(found.traps.largest)} at a time ({counted} in the seconds)"
    )


def advice(found: Scale, step: float | None, overhead: float) -> str:
    """How often for this share of the training time: in steps if their time is known."""
    if step is None:
        spectra, traps, projection = (
            duration(_load(found, name).longest / overhead) for name in WHAT
        )
        unit = "; --step-seconds gives steps"
    else:
        every = intervals(found, step, overhead)
        spectra, traps, projection = (counted(every[name], "step") for name in WHAT)
        unit = f"; a step takes {duration(step)}"
    return (
        f"to stay within {100 * overhead:g} % of the training time, measure spectra at most every "
        f"{spectra} (traps: {traps}; projecting: {projection}), if only one of them is done{unit}"
    )


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"1 {what}" if number == 1 else f"{number:,} {what}s"


def duration(seconds: float) -> str:
    """Seconds as a person says them, with two or three digits."""
    units = ((86400.0, "days", 5.0), (3600.0, "h", 2.0), (60.0, "min", 2.0))
    for unit, name, least in units:
        if seconds >= least * unit:
            return f"{_digits(seconds / unit)} {name}"
    return f"{_digits(seconds)} s"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def amount(number: int) -> str:
    """A number that can be read."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number:,}"


def size(nbytes: int) -> str:
    """Bytes with a unit."""
    power = 3 if nbytes >= 1e9 else 2 if nbytes >= 1e6 else 1
    return f"{nbytes / 1000**power:.3g} {('kB', 'MB', 'GB')[power - 1]}"
