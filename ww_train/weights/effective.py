"""The weights that a module uses, where they are not simply its parameters.

Parametrizations, weight normalisation, spectral normalisation and pruning compute a weight from
parameters of other names; quantised modules keep it packed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

COMPUTED_FROM = re.compile(r"(^|\.)(parametrizations\..*|weight_(orig|mask|g|v))$")
"""Names of what parametrizations, pruning and weight normalisation compute a weight from."""


def own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """Names, tensors and read-only reasons of the weights that belong to `module` itself."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return  # the module that owns the list yields the effective weight
    computed = {hook.name: hook for hook in map(_Hook, module._forward_pre_hooks.values()) if hook}
    for name, parameter in module._parameters.items():
        if parameter is not None and not any(name.startswith(f"{own}_") for own in computed):
            yield name, parameter, None
    with torch.no_grad():
        for name, hook in computed.items():
            yield name, hook.weight(module), "its weight is computed by a hook before each forward"
        if nn.utils.parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name, chain in module.parametrizations.items():
                with _evaluating(chain):
                    effective = getattr(module, name)
                yield name, effective, "its weight is computed by a parametrization"
    if type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "weight"):
        packed: Any = module.weight  # a method there
        yield "weight", packed(), "quantised"


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a moment: spectral norm advances its vectors when read in training."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class _Hook:
    """A forward pre-hook that computes a weight: weight_norm, spectral_norm or pruning of old."""

    def __init__(self, hook: object) -> None:
        self.hook: Any = hook
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        self.name: str = name if isinstance(name, str) else ""

    def __bool__(self) -> bool:
        known = hasattr(self.hook, "compute_weight") or hasattr(self.hook, "apply_mask")
        return bool(self.name) and known

    def weight(self, module: nn.Module) -> Tensor:
        """The weight that the next forward pass would use; no state of the hook is advanced."""
        weight: Tensor
        if hasattr(self.hook, "apply_mask"):
            weight = self.hook.apply_mask(module)
        elif hasattr(self.hook, "n_power_iterations"):
            weight = self.hook.compute_weight(module, do_power_iteration=False)
        else:
            weight = self.hook.compute_weight(module)
        return weight
