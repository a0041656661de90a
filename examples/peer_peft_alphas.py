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

from corpus import manual, source
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama, train

import ww_train as ww

STEPS, RANK = 60, 24

base_model = tiny_llama()
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
