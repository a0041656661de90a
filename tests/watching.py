"""What the tests of the monitor and of its callbacks share."""

import threading

SUMMARIES = {
    "ww/num_layers",
    "ww/alpha_mean",
    "ww/alpha_min",
    "ww/alpha_max",
    "ww/erg_gap_mean",
    "ww/trace_log_mean",
    "ww/traps_total",
    "ww/seconds",
    "ww/num_measured",
}
"""Tags that every measurement has; those after the first step also `ww/overhead`."""


def without_seconds(history):
    cost = ("ww/seconds", "ww/overhead")
    return [{k: v for k, v in record.items() if k not in cost} for record in history]


def of_layers(history):
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("ww_")} for r in history}


def helpers():
    """Threads of monitors in the background that are still there."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ww_train")]
