"""Memory, bytes read and time of a model of 7B's shapes, streamed from sharded safetensors.

Writes a few blocks of full width (4096, 11008) in bfloat16 with heavy-tailed weights to a temporary
folder, measures it in a process of its own, and lets the peer analyse one layer of it in another.
Linux only: the kernel counts the memory and the bytes.

    python benchmarks/checkpoint_memory.py --blocks 1
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, HIDDEN = 4096, 11008

SHAPES = {
    **{f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"},
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
"""Layers of a block of Llama 7B."""

GIGABYTE = 1e9


def write_model(folder: Path, blocks: int) -> int:
    """Write one shard a block and the index; the number of bytes of weights."""
    generator = torch.Generator().manual_seed(0)
    index, size = {}, 0
    for block in range(blocks):
        file = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        prefix = f"model.layers.{block}"
        shard = {f"{prefix}.{n}.weight": heavy(*s, generator) for n, s in SHAPES.items()}
        shard[f"{prefix}.input_layernorm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
        size += sum(w.nbytes for w in shard.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return size


def heavy(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """A Gaussian matrix whose rows have heavy-tailed sizes, so that its spectrum has a tail."""
    sizes = torch.rand(rows, 1, generator=generator).pow_(-1 / 3)
    return (torch.randn(rows, cols, generator=generator) * sizes * 0.02).to(torch.bfloat16)


def kernel(file: str, field: str) -> int:
    """A number that the kernel keeps about this process."""
    return int(Path(f"/proc/self/{file}").read_text().split(f"{field}:")[1].split()[0])


def ours(folder: str, threads: int) -> dict[str, Any]:
    """Measure all layers: gigabytes of memory beyond the start, gigabytes read, seconds."""
    from ww_train import measure

    torch.set_num_threads(threads)
    measure(torch.randn(2000, 100))
    memory, read, start = kernel("status", "VmHWM"), kernel("io", "rchar"), time.perf_counter()
    report = measure(folder)
    seconds = time.perf_counter() - start
    return {
        "layers": len(report),
        "memory": 1024 * (kernel("status", "VmHWM") - memory) / GIGABYTE,
        "read": (kernel("io", "rchar") - read) / GIGABYTE,
        "seconds": seconds,
    }


def one_layer(folder: str, threads: int) -> dict[str, Any]:
    """A folder of one layer with us and with the peer, in seconds each."""
    from peer import peer, quiet

    from ww_train import measure

    torch.set_num_threads(threads)
    start = time.perf_counter()
    (layer,) = measure(folder)
    middle = time.perf_counter()
    with quiet():
        frame = peer().WeightWatcher(model=folder).analyze()
    end = time.perf_counter()
    return {
        "ours": middle - start,
        "peer": end - middle,
        "alpha": layer.alpha,
        "peer alpha": float(frame.alpha[0]),
    }


def in_a_process(what: str, folder: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", what, "--folder", folder]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6, help="blocks of 0.4 GB each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peer", action="store_true", help="leave out the comparison")
    parser.add_argument("--part", choices=("ours", "one_layer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = {"ours": ours, "one_layer": one_layer}[options.part]
        print(json.dumps(part(options.folder, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder), options.blocks)
        whole = in_a_process("ours", folder, options.threads)
        largest = 8 * max(math.prod(shape) for shape in SHAPES.values()) / GIGABYTE
        bound = 3 * largest + 0.5
        print(f"{whole['layers']} layers, {size / GIGABYTE:.2f} GB, {options.threads} threads")
        print(f"largest matrix in float64  {largest:6.2f} GB")
        print(f"memory beyond the start    {whole['memory']:6.2f} GB, claimed at most {bound:.2f}")
        print(f"bytes read                 {whole['read'] / (size / GIGABYTE):6.3f} of the weights")
        print(f"time                       {whole['seconds'] / whole['layers']:6.1f} s a layer")
        if not options.no_peer:
            single = Path(folder) / "single"
            single.mkdir()
            weight = heavy(WIDTH, WIDTH, torch.Generator().manual_seed(0))
            save_file({"fc.weight": weight}, single / "model.safetensors")
            one = in_a_process("one_layer", str(single), options.threads)
            print(
                f"a layer of {WIDTH} x {WIDTH}: {one['ours']:.1f} s, peer {one['peer']:.1f} s, ",
                end="",
            )
            print(f"{one['peer'] / one['ours']:.1f} times as long")
            print(f"its alpha: {one['alpha']:.4f}, peer {one['peer alpha']:.4f}")


if __name__ == "__main__":
    main()
