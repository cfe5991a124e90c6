"""`python -m sparse_transformer.export`; the function is `sparse_transformer.export_model`."""

import sys

from sparse_transformer.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
