"""WeightWatcher's notebook of fine-tuned alphas, as a script: only the import has changed.

    python examples/peer_fine_tuned_alphas.py

A small Llama made from a config learns Python's reference manual and is then fine-tuned on Python's
source text. WeightWatcher analyses the difference of the two models, layer by layer: alphas of the
updates, how they are distributed, and how far the layers have moved. With `import weightwatcher as ww`
the script runs as well.
"""

# %% A base model, and a fine-tuned copy of it
import copy

import torch
from corpus import CHARACTERS, manual, source
from transformers import LlamaConfig, LlamaForCausalLM

import ww_train as ww

STEPS, CONTEXT, BATCH = 60, 48, 16


def train(model, text, steps, rate):
    """Learn to predict the next character."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
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
        tie_word_embeddings=False,
    )
)
print(f"base model: loss {train(base_model, manual()[1], STEPS, 2e-3):.2f}")
model = copy.deepcopy(base_model)
print(f"fine-tuned: loss {train(model, source()[1], STEPS, 5e-4):.2f}")

# %% The fine-tuned model minus the base model
watcher = ww.WeightWatcher(model=model, base_model=base_model)
details = watcher.analyze(layers=["dense"], detX=True)
print(details[["longname", "alpha", "D", "num_pl_spikes", "detX_num"]].to_string(index=False))

# %% How the alphas are distributed
alphas = details[details.status == "success"].alpha
print(
    f"alpha of the updates: mean {alphas.mean():.2f}, from {alphas.min():.2f} to {alphas.max():.2f}"
)
print(f"over-trained {(alphas < 2).sum()}, in the safe zone {alphas.between(2, 6).sum()}, ", end="")
print(f"under-trained {(alphas > 6).sum()}")

# %% The two models themselves
for title, one in (("base model", base_model), ("fine-tuned", model)):
    summary = ww.WeightWatcher(model=one).analyze(layers=["dense"])
    print(
        f"{title}: mean alpha {summary.alpha.mean():.3f}, stable rank {summary.stable_rank.mean():.2f}"
    )

# %% How far the layers have moved
mean, _, table = ww.WeightWatcher().distances(model, base_model)
print(f"mean distance {mean:.3f}")
print(table[["longname", "delta_W", "M", "N"]].to_string())
_, _, similarity = ww.WeightWatcher().distances(model, base_model, method="cka")
print(f"least similar: {similarity.sort_values('delta_W').longname.iloc[0]}")
