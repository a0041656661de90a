"""WeightWatcher's notebook of PEFT alphas, as a script: only the import has changed.

    python examples/peer_peft_alphas.py

A small Llama made from a config learns Python's reference manual; then LoRA adapters of rank 24 learn
Python's source text. WeightWatcher analyses the updates B A alone, in the model and from the folder
that peft saves, and together with the weights that they change. With `import weightwatcher as ww` the
script runs as well, with other numbers: that leaves out the scaling of updates, and measures 24
eigenvalues only of a weight with its update.
"""

# %% A model with trained adapters
import tempfile

import torch
from corpus import CHARACTERS, manual, source
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ww_train as ww

STEPS, CONTEXT, BATCH, RANK = 60, 48, 16, 24


def train(model, text, steps, rate):
    """Learn to predict the next character; only what wants gradients is trained."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        batch = torch.stack([text[start : start + CONTEXT] for start in starts])
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    return loss.item()


torch.manual_seed(0)
base_model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
)
print(f"base model: loss {train(base_model, manual()[1], STEPS, 2e-3):.2f}")
config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj", "up_proj"])
model = get_peft_model(base_model, config)
model.print_trainable_parameters()
print(f"with adapters: loss {train(model, source()[1], STEPS, 2e-3):.2f}")

# %% The updates alone: at most RANK eigenvalues each are above zero
watcher = ww.WeightWatcher(model=model)
details = watcher.analyze(peft=True)
print(details[["longname", "N", "M", "alpha", "D", "num_pl_spikes"]].to_string(index=False))
print(f"mean alpha of {len(details)} updates: {details.alpha.mean():.2f}")

# %% Weights, updates, and weights with their updates
details = watcher.analyze(peft="with_base", min_evals=RANK)
adapted = details[details.peft]
print(adapted[["longname", "alpha", "norm", "stable_rank"]].to_string(index=False))

# %% The folder of the adapter, without the model
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    details = ww.WeightWatcher(model=folder).analyze(peft=True)
print(f"from the folder: mean alpha of {len(details)} updates {details.alpha.mean():.2f}")
