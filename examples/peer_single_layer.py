"""WeightWatcher's notebook of a single layer, as a script: only the import has changed.

    python examples/peer_single_layer.py

A network learns the digits that scikit-learn ships. WeightWatcher lists its layers, analyses one of
them with figures, and compares its spectrum with that of its shuffled weights. With
`import weightwatcher as ww` the script runs as well.
"""

# %% A trained model
import os

import torch
from images import load
from torch import nn

import ww_train as ww

EPOCHS, FOLDER = 30, "runs/peer_single_layer"

torch.manual_seed(0)
(x, y), (test_x, test_y) = (data.tensors for data in load("digits"))
model = nn.Sequential(
    nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
error = float((model(test_x).argmax(1) != test_y).float().mean())
print(f"test error {error:.3f}")

# %% Its layers, and the id of the second
watcher = ww.WeightWatcher(model=model)
description = watcher.describe()
print(description[["layer_id", "name", "layer_type", "N", "M", "num_evals"]].to_string(index=False))
layer_id = int(description.layer_id.iloc[1])

# %% All layers, and the means over them
details = watcher.analyze()
print(details[["layer_id", "alpha", "D", "num_pl_spikes", "warning"]].to_string(index=False))
print({name: round(float(value), 3) for name, value in watcher.get_summary(details).items()})

# %% The one layer, with everything and all figures
os.makedirs(FOLDER, exist_ok=True)
details = watcher.analyze(
    layers=[layer_id],
    mp_fit=True,
    randomize=True,
    detX=True,
    vectors=True,
    plot=True,
    savefig=FOLDER,
)
print(sorted(os.listdir(FOLDER)))
row = details.iloc[0]
print(f"alpha {row.alpha:.2f} above xmin {row.xmin:.3f}: {row.num_pl_spikes} eigenvalues")
print(f"ERG tail: {row.detX_num} eigenvalues, gap {row.ERG_gap}")
print(f"random bulk up to {row.bulk_max:.3f}, {row.num_spikes} spikes, {row.num_traps} traps")

# %% The eigenvalues themselves
evals = watcher.get_ESD(layer=layer_id)
shuffled = watcher.get_ESD(layer=layer_id, random=True)
print(f"{len(evals)} eigenvalues, the largest {max(evals):.3f}; shuffled {max(shuffled):.3f}")
print(f"{(evals >= row.xmin - 1e-9).sum()} of them in the tail")
assert len(watcher.analyze(layers=[-layer_id])) == len(description) - 1
