"""Other people's tests, on stock JAX and on jaxext: `python compat/run.py --help`."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
