"""The texts of `ww-train --help`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ww_train.cli.conditions import AGGREGATES
from ww_train.glossary import HEADLINES, VERDICTS, Term

EXIT_CODES = """exit codes:
  0    fine
  1    a condition of --fail-if is true
  2    bad input or arguments; standard error says what is wrong, in one line
  3    a defect of ww-train itself; standard error shows where
  130  interrupted by Ctrl-C
  141  whatever read the output stopped reading"""

OVERVIEW = """examples:
  ww-train analyze model.safetensors             a table of all layers
  ww-train analyze my-model/ --randomize         with correlation traps; any model folder
  ww-train analyze my-model/ --fail-if 'alpha<2' exit code 1 if a layer is over-trained
  ww-train compare base/ finetuned/              what fine-tuning changed
  ww-train report my-model/ -o report.html       one page to read and to pass on

Each command has its own help: ww-train analyze --help

"""

ANALYZE = """examples:
  ww-train analyze model.safetensors
  ww-train analyze my-model/ --layers '*attention*' --layers '-*.value'
  ww-train analyze my-model/ --types dense --csv layers.csv
  ww-train analyze my-model/ --json - | jq '.layers[] | {longname, alpha, verdict}'
  ww-train analyze finetuned/ --base base/       the change that training made
  ww-train analyze my-model/ --fail-if 'alpha<2' --fail-if 'mean(alpha)>6'

"""

CONDITIONS = f"""conditions: COLUMN OPERATOR NUMBER, such as 'alpha<2' or 'num_traps>0', true if it is
  true of any layer; or AGGREGATE(COLUMN) OPERATOR NUMBER, such as 'mean(alpha)>6', with an
  aggregate of {", ".join(AGGREGATES)}. Operators: < <= > >= == !=. A missing number
  satisfies none. --fail-if may be given several times; one that is true is enough.
  num_skipped is the number of layers that could not be measured, whose numbers no other condition
  sees: 'num_skipped>0' is true if one holds NaN, but also if one is too small.

"""

JSON = """JSON: an object of "layers" (one object a layer, with the columns of the table as keys),
  "skipped" (name and reason of each layer that could not be analysed) and "summary" (means
  over the layers). A number that is missing or infinite is null.

"""


DESCRIBE = """examples:
  ww-train describe my-model/
  ww-train describe my-model/ --types conv2d --json -
"""

COMPARE = """examples:
  ww-train compare base/ finetuned/
  ww-train compare base/ lora/                   a LoRA adapter is merged into the base first
  ww-train compare base/ finetuned/ --distances
  ww-train compare base/ finetuned/ --metrics-summary metrics_summary.json
  ww-train compare base/ finetuned/ --fail-if 'alpha_change>0.5' --fail-if 'mean(alpha_finetuned)>6'

relative_delta is the norm of the difference over the norm of the base; a column NAME_change is
  NAME_finetuned less NAME_base; NAME_of_delta is that of the difference as a matrix.

--distances adds columns:
  frobenius, spectral  norms of the difference, in units of the weights
  cka                  linear CKA: 1 if the rows are alike up to a rotation and a scale
  left_overlap         of the singular vectors of the tail, as many as num_tail: 1 for the same
  right_overlap          space, about num_tail over the number of rows or columns by chance
  with --wide and in files also cosine, cka_centred, num_tail and esd_distance (Jensen-Shannon)

JSON: an object of "layers" (one object a layer), "summary" (means before, after, and their
  changes), "reading" (the changes in words), "missing", "extra", "reshaped" and "skipped" layers.

"""

PLOT = """examples:
  ww-train plot my-model/ -o images
  ww-train plot my-model/ -o images --figure randomized_esd --layers 'encoder.0.*' --format svg

"""

REPORT = """examples:
  ww-train report my-model/ -o report.html --randomize
  ww-train report finetuned/ --base base/ -o change.html --title 'What training changed'

"""

SMOOTH = """examples:
  ww-train smooth my-model/ -o smoothed/ --layers '*.mlp.*'
  ww-train smooth my-model/ -o smoothed/ --top 0.2
"""

PLAN = """examples:
  ww-train plan my-model/ --gpus 8 --step-seconds 0.5
  ww-train plan llama/config.json --gpus 512 --costs h100.json --tokens-per-step 4e6 --flops 1e15

Only headers are read: a config.json is enough, with Hugging Face Transformers installed. The ranks
  share the layers: "with 8 ranks" is until the last of them is done. "memory" is beyond the model on
  a rank, without sharded weights that are gathered; "results" are reports or projected weights that
  each rank receives.

A step of tokens takes 6 operations a token and parameter. Of a mixture of experts fewer
  parameters are at work: give --step-seconds.

"""

CALIBRATE = """examples:
  ww-train calibrate
  ww-train calibrate --device cuda -o h100.json

Takes a few seconds; measure on an idle machine. Without -o the costs are saved where ww-train
  finds them, in $XDG_CACHE_HOME/ww_train or ~/.cache/ww_train: one file for each device, version
  of PyTorch and number of threads.

looped  eigenvalues of an n x n matrix alone; batched: each of many at a time
host    the same on the host, with the copies; eigh: with vectors
gram32  the Gram matrix in float64 of weights in float32; gram16: of weights in bfloat16

"""


def glossary() -> str:
    """The verdicts and the numbers to read first, for the help."""
    return f"verdicts:\n{_terms(VERDICTS)}\n\nnumbers:\n{_terms(HEADLINES)}"


def _terms(terms: Sequence[Term]) -> str:
    lines = []
    for term in terms:
        healthy = f" Healthy: {term.healthy}." if term.healthy else ""
        lines += textwrap.wrap(
            f"{term.name:15} {term.meaning}{healthy}",
            width=88,
            initial_indent="  ",
            subsequent_indent=" " * 18,
        )
    return "\n".join(lines)
