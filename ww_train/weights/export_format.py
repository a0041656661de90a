"""What `torch.export.save` writes (.pt2): the parameters, and the groups of convolutions.

| torch | program | weights |
|---|---|---|
| before 2.8 | `serialized_exported_program.json` | `serialized_state_dict.pt`, of `torch.save` |
| 2.8 | `<root>/models/model.json` | `<root>/data/weights/model.pt`, of `torch.save` |
| later | the same | a file for each, listed in `model_weights_config.json` |
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import torch

from ww_train.weights.slicing import grouped
from ww_train.weights.stored import CheckpointError, StoredTensor, raw_tensor
from ww_train.weights.torch_format import Catalogue, record, saved_parameters
from ww_train.weights.weight_matrix import Skipped

EXPORT_TYPES = {6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16}
"""Floating types of torch.export's schema, by number."""


BEFORE_2_8 = "serialized_state_dict.pt"
"""The member with the weights in the oldest archives."""


def exported(path: Path) -> Catalogue:
    """The parameters in an archive of `torch.export.save`; nothing of the program is run."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if BEFORE_2_8 in names:
        found = saved_parameters(path, BEFORE_2_8)
        return _with_groups(path, "serialized_exported_program.json", found)
    for ending, reader in (("model_weights_config.json", _listed), ("model.pt", saved_parameters)):
        for name in names:
            root, folder, file = name.rpartition("data/weights/")
            if folder and file == ending:
                return _with_groups(path, f"{root}models/model.json", reader(path, name))
    raise CheckpointError(
        f"{path} holds no weights of torch.export.save (compiled code, perhaps): "
        "save program.state_dict instead"
    )


def _listed(path: Path, config: str) -> Catalogue:
    """The parameters that lie in files of their own."""
    with zipfile.ZipFile(path) as archive:
        entries = json.loads(archive.read(config))["config"]
    folder = config.rpartition("/")[0]
    found: Catalogue = {}
    for name, entry in entries.items():
        meta = entry["tensor_meta"]
        shape = tuple(size.get("as_int", -1) for size in meta["sizes"])
        if not entry["is_param"] or len(shape) < 2:
            continue
        dtype = EXPORT_TYPES.get(meta["dtype"])
        rows = [stride.get("as_int") for stride in meta["strides"]]
        expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if dtype is None or entry["use_pickle"] or rows != expected:
            found[name] = Skipped(
                name, "stored in a way that cannot be read from an export archive"
            )
            continue
        opened, start = record(path, f"{folder}/{entry['path_name']}")
        offset = start + meta["storage_offset"].get("as_int", 0) * dtype.itemsize
        identity = (path, entry["path_name"], offset, shape)
        found[name] = raw_tensor(opened, f"{name} in {path}", offset, shape, dtype, identity)
    return found


def _with_groups(path: Path, program: str, found: Catalogue) -> Catalogue:
    """The parameters, of which those of grouped convolutions know their groups."""
    with zipfile.ZipFile(path) as archive:
        module = json.loads(archive.read(program))["graph_module"]
    specs = [
        spec["parameter"] for spec in module["signature"]["input_specs"] if "parameter" in spec
    ]
    parameters = {spec["arg"]["name"]: spec["parameter_name"] for spec in specs}
    for node in module["graph"]["nodes"]:
        given = {argument["name"]: argument["arg"] for argument in node["inputs"]}
        weight = parameters.get(given.get("weight", {}).get("as_tensor", {}).get("name"))
        groups = given.get("groups", {}).get("as_int", 1)
        if weight is not None and isinstance(tensor := found.get(weight), StoredTensor):
            found[weight] = grouped(tensor, groups)
    return found
