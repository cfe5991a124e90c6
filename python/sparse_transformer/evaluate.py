"""`python -m sparse_transformer.evaluate`."""

import sys

from sparse_transformer.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
