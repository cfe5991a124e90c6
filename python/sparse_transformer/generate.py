"""`python -m sparse_transformer.generate`; the function is `sparse_transformer.generate`."""

import sys

from sparse_transformer.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
