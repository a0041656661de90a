import email
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import ww_train

ROOT = pathlib.Path(__file__).parents[1]


def run(arguments, cwd, **environment):
    result = subprocess.run(
        arguments, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built by the declared backend from a copy: the working tree stays clean."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no setuptools in this environment to build with")
    if int(version.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than the required 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("ww_train", "callbacks", "tests", "benchmarks", "examples"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    run([sys.executable, "-c", build], source)
    (path,) = out.glob("*.whl")
    return path


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    payload = {n for n in names if not n.partition("/")[0].endswith(".dist-info")}
    core = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ww_train").rglob("*.py")}
    page = {f"ww_train/page/page.{kind}" for kind in ("html", "css", "js")}
    adapters = {f"ww_train/callbacks/{p.name}" for p in (ROOT / "callbacks").glob("*.py")}
    assert payload == core | adapters | page | {"ww_train/py.typed"}
    assert "ww_train/callbacks/__init__.py" in payload
    assert {n.partition("/")[0] for n in payload} == {"ww_train"}


def test_metadata(wheel):
    fields = metadata(wheel)
    assert fields["Name"] == "ww-train"
    assert fields["Version"] == ww_train.__version__
    assert fields["License-Expression"] == "MIT"
    required = {r.partition(">")[0] for r in fields.get_all("Requires-Dist") if "extra" not in r}
    assert required == {"torch", "numpy", "scipy", "pandas", "rich", "safetensors", "tqdm"}


def test_the_licence_is_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())


def test_the_unpacked_wheel_works_from_an_unrelated_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import json, torch, ww_train, ww_train.callbacks\n"
        "report = ww_train.measure(torch.nn.Linear(40, 30))\n"
        "print(json.dumps([ww_train.__file__, ww_train.callbacks.__file__, len(report)]))\n"
    )
    out = run([sys.executable, "-W", "error", "-c", code], elsewhere, PYTHONPATH=str(site))
    core, adapters, layers = json.loads(out)
    assert pathlib.Path(core) == site / "ww_train" / "__init__.py"
    assert pathlib.Path(adapters) == site / "ww_train" / "callbacks" / "__init__.py"
    assert layers == 1
