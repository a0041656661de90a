"""A small character-level GPT and its text, for transformer_evidence.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

CONTEXT, WIDTH, HEADS, BLOCKS = 96, 128, 4, 3


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a norm and with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Logits of the next character, `(batch, length, characters)`."""

    def __init__(self, characters: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        for weights in (self.embedding.weight, self.position.weight):
            nn.init.normal_(weights, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position.weight[: text.shape[1]]
        return self.norm(self.blocks(x)) @ self.embedding.weight.T


def load_text(folder: str | None) -> Tensor:
    """The text as indices into its sorted characters.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(folder or ".", "tinyshakespeare.txt")
    if not path.is_file():
        raise FileNotFoundError(f"no tinyshakespeare.txt in {path.parent}: give --data-dir")
    text = path.read_text()
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text])


def batches_of(
    text: Tensor, *, batch: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows at random places, and the same shifted by one character."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (batch, 1), generator=generator)
        windows = text[starts + torch.arange(CONTEXT + 1)]
        yield windows[:, :-1], windows[:, 1:]


def windows_of(text: Tensor, every: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """All windows at distances of `every` characters, and the same shifted by one character."""
    windows = text.unfold(0, CONTEXT + 1, every)
    return windows[:, :-1], windows[:, 1:]
