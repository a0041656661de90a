"""`python -m ww_train` is `ww-train`."""

import sys

from ww_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
