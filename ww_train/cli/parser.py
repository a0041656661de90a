"""The arguments of `ww-train`, and its help."""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any, NoReturn

from ww_train.cli import help as texts
from ww_train.cli.commands import analyze, describe, report, smooth
from ww_train.cli.compare import compare
from ww_train.cli.plan import calibrate_device, plan
from ww_train.cli.plot import FIGURES, plot
from ww_train.cli.values import (
    condition_of,
    count,
    device_name,
    layer_type,
    named,
    positive,
    rule_of,
    share,
    weights,
)
from ww_train.editing.rules import AboveBulk, Bottom, DetXTail, PowerLawTail, Top
from ww_train.planning import MAX_EVALS

RULES = (
    ("--detx", DetXTail(), "the trace-log (ERG) tail; this is the default"),
    ("--power-law", PowerLawTail(), "the power-law tail"),
    ("--above-bulk", AboveBulk(), "what exceeds the random bulk"),
)
"""Rules of `smooth` that have no number."""

SHARES = (
    ("--top", Top, "this share of the singular values, the largest; 0.2 is a fifth"),
    ("--bottom", Bottom, "this share, the smallest"),
)
"""Rules of `smooth` with a share."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; leaves the process with code 2 and one line if it makes no sense."""
    top = parser()
    top.check_command(argv, list(COMMANDS))
    args = top.parse_args(joined(argv))
    args.invocation = shlex.join(["ww-train", *argv])
    return args


def joined(argv: Sequence[str]) -> list[str]:
    """`--layers -head` as `--layers=-head`, which argparse would take for an option called -head."""
    result: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--layers" and (pattern := next(rest, None)) is not None:
            word = f"--layers={pattern}"
        result.append(word)
    return result


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and where to find help, and leave with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take no argument that is not known: its command says so, not the program as a whole."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def check_command(self, argv: Sequence[str], commands: Iterable[str]) -> None:
        """Leave with code 2 if the first word is no command; says which one it is like."""
        word = next(iter(argv), "-")
        if not word.startswith("-") and word not in commands:
            near = difflib.get_close_matches(word, commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
            self.error(f"there is no command {word!r}; {hint}")


def parser() -> Parser:
    """All commands and their arguments."""
    top = Parser(
        prog="ww-train",
        description="Read the weight spectra of a trained network: which layers learned, "
        "which did not, and which learned too much.",
        epilog=texts.OVERVIEW + texts.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"ww-train {version('ww-train')}")
    room = top.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, (arguments, summary) in COMMANDS.items():
        arguments(_command(room, name, summary))
    return top


def _command(room: argparse._SubParsersAction[Parser], name: str, summary: str) -> Parser:
    return room.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _analyze(sub: Parser) -> None:
    sub.set_defaults(command=analyze)
    sub.epilog = "".join(
        (texts.ANALYZE, texts.CONDITIONS, texts.JSON, texts.glossary(), "\n\n", texts.EXIT_CODES)
    )
    _model(sub)
    _adapter(sub)
    _choice(sub)
    _numbers(sub)
    _outputs(sub)
    _conditions(sub)


def _describe(sub: Parser) -> None:
    sub.set_defaults(command=describe)
    sub.epilog = texts.DESCRIBE
    _model(sub)
    _adapter(sub)
    _choice(sub)
    _outputs(sub)


def _compare(sub: Parser) -> None:
    sub.set_defaults(command=compare)
    sub.epilog = texts.COMPARE + texts.CONDITIONS + texts.EXIT_CODES
    sub.add_argument("base", type=weights, metavar="BASE", help="the model before")
    sub.add_argument(
        "finetuned",
        type=weights,
        metavar="FINETUNED",
        help="the model after, or a LoRA adapter of BASE, which is merged into it",
    )
    _choice(sub)
    _device(sub)
    sub.add_argument(
        "--distances",
        action="store_true",
        help="also how far the layers are apart: Frobenius and spectral norms, CKA, tails",
    )
    _outputs(sub)
    sub.add_argument(
        "--metrics-summary", metavar="FILE", help="write the summary of changes as JSON"
    )
    _conditions(sub)


def _plot(sub: Parser) -> None:
    sub.set_defaults(command=plot)
    sub.epilog = f"{texts.PLOT}figures:\n" + "\n".join(
        f"  {name:23} {meaning}" for name, meaning in FIGURES.items()
    )
    _model(sub)
    sub.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the images")
    sub.add_argument(
        "--figure",
        action="append",
        choices=list(FIGURES),
        metavar="NAME",
        help="which figure (see below); may be repeated; default: esd and those of the model",
    )
    sub.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="default: png")
    _adapter(sub)
    _choice(sub)
    _numbers(sub)


def _report(sub: Parser) -> None:
    sub.set_defaults(command=report)
    sub.epilog = texts.REPORT + texts.CONDITIONS + texts.EXIT_CODES
    _model(sub)
    sub.add_argument("-o", "--output", metavar="FILE", required=True, help="the page, '-' to print")
    sub.add_argument("--title", help="default: the name of the model")
    sub.add_argument("--date", default=f"{datetime.now():%Y-%m-%d}", help="default: today")
    _adapter(sub)
    _choice(sub)
    _numbers(sub)
    _conditions(sub)


def _smooth(sub: Parser) -> None:
    sub.set_defaults(command=smooth, rule=DetXTail())
    sub.epilog = texts.SMOOTH
    _model(sub)
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help="file or folder to write")
    rules = sub.add_mutually_exclusive_group()
    for flag, rule, kept in RULES:
        rules.add_argument(flag, dest="rule", action="store_const", const=rule, help=f"keep {kept}")
    for flag, kind, kept in SHARES:
        rules.add_argument(
            flag, dest="rule", type=rule_of(kind), metavar="SHARE", help=f"keep {kept}"
        )
    _choice(sub)


def _plan(sub: Parser) -> None:
    sub.set_defaults(command=plan)
    sub.epilog = texts.PLAN
    sub.add_argument(
        "path",
        type=named,
        metavar="PATH",
        help="a model, or the config.json of one by Hugging Face",
    )
    sub.add_argument(
        "--gpus", type=count, metavar="N", help="ranks that share the layers; default: 1"
    )
    costs = sub.add_mutually_exclusive_group()
    costs.add_argument("--costs", metavar="FILE", help="costs that calibrate saved elsewhere")
    costs.add_argument(
        "--device",
        type=device_name,
        metavar="DEVICE",
        help="take the costs of this device, measuring them if need be; default: cpu",
    )
    sub.add_argument(
        "--max-evals",
        type=count,
        default=MAX_EVALS,
        metavar="N",
        help="layers with more eigenvalues are skipped, as the callbacks do; default: %(default)s",
    )
    _step(sub)
    sub.add_argument("--json", metavar="FILE", help="write the numbers as JSON; '-' to print them")


def _step(sub: Parser) -> None:
    group = sub.add_argument_group("how often")
    for flag, metavar, meaning in (
        ("--step-seconds", "S", "time of a training step"),
        ("--tokens-per-step", "T", "tokens of a step on all ranks; with --flops, instead of S"),
        ("--flops", "F", "peak operations a second of a rank; 40 %% of them are taken to be used"),
        ("--network", "GB", "gigabytes a second that a rank receives: adds gathering shards"),
    ):
        group.add_argument(flag, type=positive, metavar=metavar, help=meaning)
    group.add_argument(
        "--overhead",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="of the training time that a kind of measurement may take; default: 0.01",
    )


def _calibrate(sub: Parser) -> None:
    sub.set_defaults(command=calibrate_device)
    sub.epilog = texts.CALIBRATE
    sub.add_argument(
        "--device", type=device_name, metavar="DEVICE", help="cpu (the default), cuda or cuda:1"
    )
    sub.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="save there, for plan --costs, and not where ww-train looks; '-' to print JSON",
    )


def _model(sub: Parser) -> None:
    sub.add_argument(
        "path", type=weights, metavar="PATH", help="a model: a file of weights or a folder of them"
    )


def _adapter(sub: Parser) -> None:
    sub.add_argument(
        "--adapter",
        type=named,
        metavar="LORA",
        help="a LoRA adapter to merge into the model at PATH",
    )


def _choice(sub: Parser) -> None:
    group = sub.add_argument_group("which layers")
    group.add_argument(
        "--layers",
        action="append",
        metavar="PATTERN",
        help="a name or a pattern such as 'encoder.*'; '-PATTERN' leaves layers out; repeatable",
    )
    group.add_argument(
        "--types",
        action="append",
        type=layer_type,
        metavar="TYPE",
        default=[],
        help="a type of layers, such as dense or conv2d (describe lists them); repeatable",
    )


def _numbers(sub: Parser) -> None:
    group = sub.add_argument_group("what to measure")
    group.add_argument(
        "--base", type=weights, metavar="BASE", help="measure the difference to this model"
    )
    group.add_argument(
        "--randomize", action="store_true", help="find correlation traps; twice the time"
    )
    group.add_argument("--mp-fit", action="store_true", help="fit the random bulk")
    _device(sub)


def _device(sub: Parser) -> None:
    sub.add_argument(
        "--device", type=device_name, metavar="DEVICE", help="cpu (the default), cuda or cuda:1"
    )
    sub.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def _outputs(sub: Parser) -> None:
    group = sub.add_argument_group("output ('-' as FILE is standard output, instead of the table)")
    for kind in ("json", "csv", "parquet"):
        group.add_argument(f"--{kind}", metavar="FILE", help=f"write the numbers as {kind}")
    group.add_argument("--wide", action="store_true", help="print all columns, however wide")


def _conditions(sub: Parser) -> None:
    sub.add_argument(
        "--fail-if",
        action="append",
        type=condition_of,
        default=[],
        metavar="CONDITION",
        help="leave with code 1 if true, e.g. 'alpha<2'; repeatable; see analyze --help",
    )


COMMANDS: Mapping[str, tuple[Callable[[Parser], None], str]] = {
    "analyze": (_analyze, "measure every layer and print a table"),
    "describe": (_describe, "list what would be analysed, without computing"),
    "compare": (_compare, "what changed between two models"),
    "plot": (_plot, "draw the spectra and the model as images"),
    "report": (_report, "write one HTML page with everything"),
    "smooth": (_smooth, "write a copy with smoothed weights"),
    "plan": (_plan, "what watching a model would take, at any size"),
    "calibrate": (_calibrate, "measure what decompositions cost on a device"),
}
"""What adds the arguments of each command, and what the command does."""
