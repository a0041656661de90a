"""A tiny Llama of characters and its training, for the examples with a Hugging Face model."""

from __future__ import annotations

import torch
from corpus import CHARACTERS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT, BATCH = 48, 16


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two untrained blocks of width 96."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CHARACTERS,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
        )
    )


def train(model: nn.Module, text: Tensor, steps: int, rate: float) -> float:
    """Learn to predict the next character; only what wants gradients is trained. The last loss."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        batch = torch.stack([text[start : start + CONTEXT] for start in starts])
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    return loss.item()
