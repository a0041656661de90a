"""Run the tests of the callbacks with the oldest and newest frameworks that are supported.

For each row of the matrix a virtual environment is made and kept, so that a second run is quick. It
takes ww_train, torch and all that a row does not name from the environment that runs this.

    python benchmarks/versions.py --folder FOLDER
    python benchmarks/versions.py --folder FOLDER --only transformers-4.46
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

MATRIX = {
    "lightning-2.5": (["lightning==2.5.*"], "test_lightning.py"),
    "lightning-newest": (["lightning"], "test_lightning.py"),
    "transformers-4.46": (["transformers==4.46.*", "accelerate==1.0.*"], "test_huggingface.py"),
    "transformers-4.57": (["transformers==4.57.*", "accelerate"], "test_huggingface.py"),
    "transformers-newest": (["transformers", "accelerate"], "test_huggingface.py"),
}
"""Name, requirements and tests of each environment."""

COMMON = ["pytest>=8", "hypothesis>=6.100", "tensorboard", "matplotlib", "peft"]


def prepare(folder: Path, requirements: list[str]) -> Path:
    """Make an environment that sees this one's packages behind its own; its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        site = next(folder.glob("lib/python*/site-packages"))
        # added behind its own packages, so that those win over the caller's of the same name
        line = f"import site; site.addsitedir({str(Path(torch.__file__).parents[1])!r})"
        (site / "packages_of_the_caller.pth").write_text(line)
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *COMMON, *requirements], check=True
    )
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the environments go")
    parser.add_argument("--only", choices=MATRIX, nargs="+", default=list(MATRIX))
    args = parser.parse_args()
    failed = []
    for name in args.only:
        requirements, tests = MATRIX[name]
        python = prepare(args.folder / name, requirements)
        print(f"{name}: tests/{tests}", flush=True)
        command = [str(python), "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        command += ["-W", "ignore:pkg_resources is deprecated"]  # by old versions of Lightning
        if subprocess.run([*command, f"tests/{tests}"], cwd=ROOT).returncode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
