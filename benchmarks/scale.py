"""What watching and steering takes from 124M to 405B parameters and 1 to 1024 ranks, on paper.

The shapes are those of the real architectures, built by Transformers without weights. The seconds
come from measured costs: this machine's, or those of a GPU that were saved there by `ww-train
calibrate --device cuda -o FILE`. Each table shows, for a number of ranks, the seconds until the last
rank is done with a round of spectra, of spectra and traps, and of projections, the memory that a
rank needs beyond the model, what it receives if the weights are sharded, and the steps from one
round to the next that keep each within 1 % of the training: steps of --tokens tokens at 40 % of
--flops. Traffic is not in the seconds unless --network says how fast it is.

Then the plan is held against the clock where that can be done here: a round over random weights of
the shapes of GPT-2 124M, with one thread and with two.

    python benchmarks/scale.py                       # costs of this CPU
    python benchmarks/scale.py --costs h100.json --flops 1e15
    python benchmarks/scale.py --device cuda
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from claims import skip
from torch import Tensor, nn

from ww_train import measure
from ww_train.calibration import calibrate
from ww_train.cli.plan import size
from ww_train.cli.shapes import hollow
from ww_train.costs import Costs
from ww_train.scale import PROJECTION, SPECTRA, TRAPS, Work, scale, seconds, step_seconds
from ww_train.steering.tasks import project_
from ww_train.weights.matrices import WeightMatrix, weight_matrices

RANKS = (1, 8, 64, 512, 1024)

HEADER = (
    f"{'ranks':>6}{'spectra s':>12}{'traps s':>12}{'project s':>12}{'memory':>10}{'sharded':>10}"
    f"{'step s':>10}{'spectra':>9}{'traps':>9}{'project':>9}"
)


def architectures() -> dict[str, nn.Module]:
    """Models by name, whose weights take no memory."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        skip(f"{error}; pip install transformers")

    def llama(
        width: int, hidden: int, blocks: int, heads: int, groups: int, words: int
    ) -> nn.Module:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=words,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)

    with torch.device("meta"):
        models = {
            "GPT-2 124M": GPT2LMHeadModel(GPT2Config()),
            "Llama 2 7B": llama(4096, 11008, 32, 32, 32, 32000),
            "Llama 3 8B": llama(4096, 14336, 32, 32, 8, 128256),
            "Llama 3 70B": llama(8192, 28672, 80, 64, 8, 128256),
            "Llama 3 405B": llama(16384, 53248, 126, 128, 8, 128256),
        }
    return {name: hollow(model) for name, model in models.items()}


def table(name: str, model: nn.Module, costs: Costs, args: argparse.Namespace) -> None:
    """One model for all numbers of ranks; its largest layers too, which `measure` skips."""
    network = math.inf if args.network is None else 1e9 * args.network
    for ranks in RANKS:
        found = scale(model, costs, ranks, max_evals=None, network=network)
        if ranks == RANKS[0]:
            billions = found.parameters / 1e9
            print(f"\n{name}: {found.traps.layers} matrices, {billions:.3g} billion parameters")
            print(HEADER)
        loads = (found.spectra, found.traps, found.projection)
        step = step_seconds(found.parameters, args.tokens, args.flops, ranks)
        print(
            f"{ranks:6d}"
            + "".join(f"{load.longest:12.4g}" for load in loads)
            + f"{size(max(load.memory for load in loads)):>10}{size(found.traps.gathered):>10}"
            + f"{step:10.3g}"
            + "".join(f"{load.every(step, 0.01):9d}" for load in loads)
        )


def gpt2() -> dict[str, Tensor]:
    """Random weights of the shapes of a GPT-2 of 124M parameters."""
    block = {"attn": (2304, 768), "proj": (768, 768), "fc": (3072, 768), "out": (768, 3072)}
    shapes = {f"h.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    shapes |= {"wte": (50257, 768), "wpe": (1024, 768)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) / 50
        for name, shape in shapes.items()
    }


def least_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reality(repeats: int) -> None:
    """Predicted and measured seconds of a round, with costs that are measured just before."""
    state = gpt2()
    every = [m for m in weight_matrices(state) if isinstance(m, WeightMatrix)]
    inner = [m for m in every if m.layer_type != "embedding"]
    model = nn.ModuleList(nn.Linear(m.shape[2], m.shape[1], bias=False) for m in inner)
    for layer, matrix in zip(model, inner, strict=True):
        layer.weight = nn.Parameter(matrix.stack[0].clone())
    rounds: tuple[tuple[str, Work, list[WeightMatrix], Callable[[], object]], ...] = (
        ("spectra", SPECTRA, every, lambda: measure(state)),
        ("traps", TRAPS, every, lambda: measure(state, randomize=True)),
        ("projection", PROJECTION, inner, lambda: project_(model, 0.01)),
    )
    print("\nGPT-2 124M, random weights, against the clock")
    print(f"{'threads':>8}{'round':>12}{'predicted s':>13}{'measured s':>12}{'ratio':>8}")
    for number in (1, 2):
        with threads(number):
            costs = calibrate("cpu")
            for name, work, matrices, call in rounds:
                predicted = seconds(matrices, costs, work)
                taken = least_seconds(call, repeats)
                print(
                    f"{number:8d}{name:>12}{predicted:13.2f}{taken:12.2f}{predicted / taken:8.2f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--costs", type=Path, help="what `ww-train calibrate -o` saved elsewhere")
    source.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=float, default=4e6, help="tokens of a step")
    parser.add_argument("--flops", type=float, default=1e15, help="peak operations a second a rank")
    parser.add_argument("--network", type=float, help="gigabytes a second that a rank receives")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        skip("no CUDA device; --costs takes those of another machine")
    costs = Costs.from_json(args.costs.read_bytes()) if args.costs else calibrate(args.device)
    print(f"costs of {costs.machine}")
    for name, model in architectures().items():
        table(name, model, costs, args)
    reality(args.repeats)


if __name__ == "__main__":
    main()
