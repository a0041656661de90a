"""Running a piece of code in two processes that talk over gloo."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300  # seconds; a busy machine is not a hang, but a rank that waits for ever is


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


LEAVE = """
import sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
"""At the end: a thread of gloo that lets go of a tensor while the interpreter ends aborts it."""


def run_ranks(code, folder, ranks=2):
    """Run the code in every rank, as torchrun does; what each wrote to `{folder}/{rank}.json`.

    The code can import from `tests`, and knows FOLDER and RANK.
    """
    script = folder / "script.py"
    head = f"import os, json\nFOLDER = {str(folder)!r}\nRANK = int(os.environ['RANK'])\n"
    tail = "\nwith open(f'{FOLDER}/{RANK}.json', 'w') as file:\n    json.dump(RESULT, file)\n"
    script.write_text(head + code + tail + LEAVE)
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
