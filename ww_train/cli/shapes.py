"""The shapes of a model's matrices, from its weights or from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ww_train.weights.checkpoints import PREFERENCE
from ww_train.weights.matrices import Source

WEIGHTS = (*PREFERENCE, "*.npy", ".metadata", "adapter_config.json")
"""Files by which a folder is known to hold weights."""


def shapes(path: Path) -> Source:
    """What `measure` takes, as far as shapes go: a checkpoint, or a configuration of a model.

    Raises:
        ValueError: If it is neither.
        ImportError: If a configuration needs Transformers, which is not there.
    """
    if path.is_dir() and (path / "config.json").is_file():
        if any(True for pattern in WEIGHTS for _ in path.glob(pattern)):
            return path
        return from_config(path / "config.json")
    return from_config(path) if path.is_file() and path.suffix == ".json" else path


def from_config(path: Path) -> nn.Module:
    """The model that a configuration of Transformers describes; its weights take no memory."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{path} is a configuration of Hugging Face Transformers, which is not installed: "
            "pip install 'ww-train[huggingface]', or give the weights"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = _built(transformers, config)
    except Exception as error:  # there is nothing that configurations of others do not raise
        text = next(iter(str(error).splitlines()), "")[:200]
        raise ValueError(f"{path}: Transformers makes no model of it ({text})") from error
    kind = config.dtype if hasattr(config, "dtype") else config.torch_dtype  # Transformers 5, 4
    return hollow(model.to(getattr(torch, kind) if isinstance(kind, str) else kind))


def _built(transformers: Any, config: Any) -> nn.Module:
    """The model of the class that a configuration names, else one with a head for language."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        model: nn.Module = named(config)
        return model
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # not a language model
        model = transformers.AutoModel.from_config(config)
    return model


def hollow(model: nn.Module) -> nn.Module:
    """Give a model on the meta device weights of one number each, seen in the shape of the weight."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:  # what is shared stays shared
                    empty = torch.zeros((), dtype=p.dtype).expand(p.shape)
                    made[id(p)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(p)]
    return model
