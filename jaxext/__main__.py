"""`python -m jaxext`, the same as the `jaxext` command."""

import sys

from jaxext.cli import main

if __name__ == "__main__":
    sys.exit(main())
