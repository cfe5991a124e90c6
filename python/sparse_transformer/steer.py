"""`python -m sparse_transformer.steer`; the function is `sparse_transformer.intervene`."""

import sys

from sparse_transformer.cli.steer import main

if __name__ == "__main__":
    sys.exit(main())
