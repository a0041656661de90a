"""Running `ww-train` in the process of the tests, and what is asserted of its output."""

import json

from ww_train.cli import main


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    try:
        code = main(list(argv))
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err):
    """The error is one line of this program and no traceback."""
    assert err.startswith("ww-train")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def strict(document):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(document, parse_constant=refuse)
