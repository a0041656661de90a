"""A small character-level transformer, how it is trained, and where a trained one is kept."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from corpus import CHARACTERS, Text, shakespeare, split
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from tqdm import trange

CONTEXT, WIDTH, HEADS, BLOCKS, BATCH = 64, 128, 4, 4, 32

LAYERS = "blocks.*"
"""The 24 square and 1:4 matrices; the embeddings and the head are another matter."""


class Block(nn.Module):
    """Causal attention and a perceptron; query, key, value and output are layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in "qkvo")
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        q, k, v = (
            f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm_2(x))))


class TinyGPT(nn.Module):
    """Logits of the next character, `(batch, length, characters)`."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the next character, in nats, over windows of `CONTEXT + 1`."""
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module, text: Tensor, *, steps: int, lr: float, seed: int, title: str
) -> nn.Module:
    """AdamW on random windows of the first nine tenths; a tenth of warm-up, then cosine decay."""
    device = next(model.parameters()).device
    text, _ = split(text)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / steps))
    model.train()
    for step in (bar := trange(steps, desc=title, unit="step")):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        value = loss(model, text[starts + torch.arange(CONTEXT + 1)].to(device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
    return model.eval()


def rate(done: float) -> float:
    """Learning rate relative to the largest, when this share of the steps is done."""
    return min(1.0, 0.01 + 10.0 * done) * 0.5 * (1.0 + math.cos(math.pi * done))


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor, *, windows: int) -> float:
    """Loss on the first windows of the last tenth, which do not overlap."""
    _, held_out = split(text)
    found = held_out.unfold(0, CONTEXT + 1, CONTEXT)[:windows].to(next(model.parameters()).device)
    losses = [loss(model, part) * len(part) for part in found.split(128)]
    return float(torch.stack(losses).sum()) / len(found)


def arguments(
    doc: str | None, *, steps: int | None = None, windows: int = 512
) -> argparse.ArgumentParser:
    """The arguments that all scripts with this model have; `--steps` if they train it further."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    if steps:
        parser.add_argument("--steps", type=int, default=steps, help=f"of each training ({steps})")
    parser.add_argument("--pretrain-steps", type=int, default=1000, help="of the base model (1000)")
    held_out = f"of {CONTEXT} characters of validation text ({windows})"
    parser.add_argument("--windows", type=int, default=windows, help=held_out)
    parser.add_argument("--data-dir", help="folder with tinyshakespeare.txt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the results (runs/<script>)")
    return parser


def pretrained(args: argparse.Namespace) -> tuple[TinyGPT, Text]:
    """The base model and its text; a model that any of the scripts trained before is read again."""
    name, text = shakespeare(args.data_dir)
    torch.manual_seed(args.seed)
    model = TinyGPT().to(args.device)
    path = Path("runs/tiny_gpt", f"{name}-{args.pretrain_steps}steps-seed{args.seed}.safetensors")
    if path.is_file():
        print(f"base model: {path} (delete it to train it again)")
        model.load_state_dict(load_file(path, device=args.device))
        return model.eval(), (name, text)
    steps, seed = args.pretrain_steps, args.seed
    train(model, text, steps=steps, lr=2e-3, seed=seed, title=f"pre-training on {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model, (name, text)
