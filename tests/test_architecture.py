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
    "ranks",
    "weights",
    "weights.effective",
    "weights.stored",
    "weights.weight_matrix",
    "weights.slicing",
    "weights.torch_format",
    "weights.export_format",
    "weights.formats",
    "weights.distributed_format",
    "weights.foreign_formats",
    "weights.low_rank",
    "weights.adapters",
    "weights.checkpoints",
    "weights.matrices",
    "cores",
    "linalg",
    "exports",
    "costs",
    "batching",
    "operations",
    "calibration",
    "decomposition",
    "localization",
    "power_law",
    "truncated",
    "fingers",
    "confidence",
    "erg",
    "marchenko_pastur",
    "kernel_mp",
    "randomness",
    "traps",
    "trap_causes",
    "columns",
    "verdicts",
    "report",
    "planning",
    "scale",
    "dealing",
    "measurement",
    "analysis",
    "rayleigh",
    "sensitivity",
    "tracking",
    "editing.rules",
    "editing.edits",
    "editing.rewriting",
    "editing.smoothing",
    "editing.trap_removal",
    "editing",
    "steering",
    "steering.manifold",
    "steering.rounding",
    "steering.projection",
    "steering.manifold_projection",
    "steering.tail_projection",
    "steering.trap_projection",
    "steering.targets",
    "steering.schedules",
    "steering.momentum",
    "steering.tasks",
    "steering.replicas",
    "steering.shards",
    "steering.boundary",
    "steering.clock",
    "steering.optim",
    "comparing",
    "comparing.matching",
    "comparing.readings",
    "comparing.similarity",
    "comparing.distances",
    "comparing.comparison",
    "plots.style",
    "plots.bins",
    "plots.ticks",
    "plots.spectrum",
    "plots.noise",
    "plots.vectors",
    "plots.model",
    "plots.training",
    "plots",
    "glossary",
    "tables",
    "page.markup",
    "page.esd",
    "page.summary",
    "page.layers",
    "page",
    "weightwatcher.layers",
    "weightwatcher.options",
    "weightwatcher.tables",
    "weightwatcher.distances",
    "weightwatcher.figures",
    "weightwatcher.watched",
    "weightwatcher.editing",
    "weightwatcher.watcher",
    "weightwatcher",
    "cli.conditions",
    "cli.values",
    "cli.help",
    "cli.output",
    "cli.source",
    "cli.plot",
    "cli.compare",
    "cli.shapes",
    "cli.plan",
    "cli.commands",
    "cli.parser",
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

MODULES = sorted((ROOT / "ww_train").rglob("*.py"))


def dotted(path):
    """Name of a module below ww_train; a package is the module of its `__init__`."""
    parts = path.relative_to(ROOT / "ww_train").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(source, package="ww_train"):
    """Dotted names a file of ww_train imports, wherever in the file; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = package.rsplit(".", node.level - 1)[0]
                base = f"{home}.{base}" if base else home
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner.removeprefix("ww_train.") in ORDER
                yield inner if base == "ww_train" or is_module else base


def violations(module, source):
    """What a module imports of ww_train that does not lie below it."""
    below = ORDER[: ORDER.index(module)]
    found = []
    package = f"ww_train.{module}".rpartition(".")[0]
    for name in dict.fromkeys(imports(source, package)):
        head, _, rest = name.partition(".")
        if head == "callbacks" or (head == "ww_train" and _module(rest) not in below):
            found.append(name)
    return found


def _module(name):
    """The longest beginning of a dotted name that is a module."""
    while name not in ORDER and "." in name:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_down(path):
    module = dotted(path)
    assert module in ORDER, f"add {module} to ORDER at its height"
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("erg", "import ww_train.analysis", ["ww_train.analysis"]),
        ("erg", "from ww_train.analysis import measure", ["ww_train.analysis"]),
        ("erg", "from ww_train import traps", ["ww_train.traps"]),
        ("erg", "from .traps import Traps", ["ww_train.traps"]),
        ("erg", "from . import traps", ["ww_train.traps"]),
        ("erg", "def f():\n    import ww_train.steering.optim as o", ["ww_train.steering.optim"]),
        ("erg", "if TYPE_CHECKING:\n    from ww_train.traps import T", ["ww_train.traps"]),
        ("erg", "from ww_train.erg import erg_tail", ["ww_train.erg"]),
        ("erg", "import ww_train", ["ww_train"]),
        ("erg", "from ww_train import measure", ["ww_train.measure"]),
        ("cli", "from ww_train.callbacks import monitor", ["ww_train.callbacks"]),
        ("cli", "import callbacks", ["callbacks"]),
        ("spectrum", "from ww_train.weights.matrices import Source", ["ww_train.weights.matrices"]),
        ("erg", "from ww_train.spectrum import Spectrum\nimport torch, numpy", []),
        ("erg", "from .spectrum import Spectrum", []),
        ("linalg", "from ww_train import ranks, spectrum", []),
        ("erg", '"""import ww_train.steering.optim"""', []),
    ],
)
def test_the_checker_finds_upward_imports_and_only_those(module, source, found):
    assert violations(module, source) == found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_the_core_knows_no_framework(path):
    packages = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
    # a configuration of Transformers is a model only to Transformers
    allowed = {"transformers"} if dotted(path) == "cli.shapes" else set()
    assert packages & FRAMEWORKS <= allowed


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
