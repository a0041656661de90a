import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

ORDER = [
    "spectrum",
    "selection",
    "divergence",
    "stored",
    "effective",
    "weight_matrix",
    "slicing",
    "formats",
    "distributed_format",
    "foreign_formats",
    "adapters",
    "checkpoints",
    "matrices",
    "linalg",
    "localization",
    "similarity",
    "power_law",
    "truncated",
    "fingers",
    "confidence",
    "erg",
    "marchenko_pastur",
    "kernel_mp",
    "smoothing_rules",
    "traps",
    "trap_causes",
    "editing",
    "rewriting",
    "trap_removal",
    "columns",
    "verdicts",
    "report",
    "analysis",
    "manifold",
    "rounding",
    "projection",
    "manifold_projection",
    "tail_projection",
    "trap_projection",
    "targets",
    "schedules",
    "momentum",
    "ranks",
    "steering",
    "replicas",
    "shards",
    "boundary",
    "clock",
    "optim",
    "exports",
    "matching",
    "readings",
    "compare",
    "distances",
    "smoothing",
    "plot_style",
    "layer_plots",
    "model_plots",
    "plots",
    "esd_svg",
    "markup",
    "glossary",
    "tables",
    "page_summary",
    "page_layers",
    "page",
    "weightwatcher",
    "conditions",
    "cli_help",
    "cli_output",
    "cli_source",
    "cli_plot",
    "cli_compare",
    "cli_commands",
    "cli_parser",
    "cli",
    "__main__",
    "__init__",
]
"""Modules of ww_train, bottom first: each may import only those before it."""

FRAMEWORKS = {
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "tensorboard",
    "torchvision",
    "transformers",
    "weightwatcher",
}

HEAVY = FRAMEWORKS | {"matplotlib", "pandas", "sklearn"}

MODULES = sorted((ROOT / "ww_train").glob("*.py"))


def imports(source):
    """Dotted names a file of ww_train imports, wherever in the file; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"ww_train.{base}" if base else "ww_train"
            if base == "ww_train":
                yield from (f"ww_train.{alias.name}" for alias in node.names)
            else:
                yield base


def violations(module, source):
    """What a module imports of ww_train that does not lie below it."""
    below = ORDER[: ORDER.index(module)]
    found = []
    for name in imports(source):
        package, *rest = name.split(".")
        if package == "callbacks" or (
            package == "ww_train" and rest[:1] not in [[b] for b in below]
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    assert path.stem in ORDER, f"add {path.stem} to ORDER at its height"
    assert violations(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("erg", "import ww_train.analysis", ["ww_train.analysis"]),
        ("erg", "from ww_train.analysis import measure", ["ww_train.analysis"]),
        ("erg", "from ww_train import traps", ["ww_train.traps"]),
        ("erg", "from .traps import Traps", ["ww_train.traps"]),
        ("erg", "from . import traps", ["ww_train.traps"]),
        ("erg", "def f():\n    import ww_train.optim as o", ["ww_train.optim"]),
        ("erg", "if TYPE_CHECKING:\n    from ww_train.traps import T", ["ww_train.traps"]),
        ("erg", "from ww_train.erg import erg_tail", ["ww_train.erg"]),
        ("erg", "import ww_train", ["ww_train"]),
        ("erg", "from ww_train import measure", ["ww_train.measure"]),
        ("cli", "from ww_train.callbacks import monitor", ["ww_train.callbacks"]),
        ("cli", "import callbacks", ["callbacks"]),
        ("spectrum", "from ww_train.matrices import Source", ["ww_train.matrices"]),
        ("erg", "from ww_train.spectrum import Spectrum\nimport torch, numpy", []),
        ("erg", "from .spectrum import Spectrum", []),
        ("linalg", "from ww_train import matrices, spectrum", []),
        ("erg", '"""import ww_train.optim"""', []),
    ],
)
def test_the_checker_finds_upward_imports_and_only_those(module, source, found):
    assert violations(module, source) == found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_core_knows_no_framework(path):
    packages = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
    assert packages & FRAMEWORKS == set()


def test_every_module_has_a_docstring():
    missing = [p.name for p in MODULES if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert missing == []


PROBE = """
import json, logging, random, sys, warnings
import numpy, scipy.special, torch, tqdm.auto  # what they change is not ours
root = logging.getLogger()
def state():
    return {
        "filters": [repr(f) for f in warnings.filters],
        "handlers": [repr(h) for h in root.handlers],
        "level": root.level,
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": repr(numpy.random.get_state()),
        "python generator": repr(random.getstate()),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "errstate": repr(numpy.geterr()),
        "excepthook": repr(sys.excepthook),
    }
before = state()
import IMPORTED
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def probe(imported):
    code = PROBE.replace("IMPORTED", imported)
    options = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    result = subprocess.run([sys.executable, "-c", code], **options)
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_importing_ww_train_is_light_and_changes_no_global_state():
    seen = probe("ww_train")
    assert "ww_train" in seen["modules"]
    assert HEAVY & set(seen["modules"]) == set()
    assert seen["changed"] == []


def test_the_probe_notices_a_heavy_import_that_changes_global_state(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import logging, random, warnings, pandas, torch\n"
        "logging.basicConfig()\nwarnings.simplefilter('ignore')\n"
        "random.seed(0)\ntorch.manual_seed(0)\n"
    )
    seen = probe(f"sys; sys.path.insert(0, {str(tmp_path)!r}); import noisy")
    assert "pandas" in seen["modules"]
    assert {"filters", "handlers", "torch generator", "python generator"} <= set(seen["changed"])
