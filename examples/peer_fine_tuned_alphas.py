"""WeightWatcher's notebook of fine-tuned alphas, as a script: only the import has changed.

    python examples/peer_fine_tuned_alphas.py

A small Llama made from a config learns Python's reference manual and is then fine-tuned on Python's
source text. WeightWatcher analyses the difference of the two models, layer by layer: alphas of the
updates, how they are distributed, and how far the layers have moved. With `import weightwatcher as ww`
the script runs as well.
"""

# %% A base model, and a fine-tuned copy of it
import copy

from corpus import manual, source
from tiny_llama import tiny_llama, train

import ww_train as ww

STEPS = 60

base_model = tiny_llama()
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
