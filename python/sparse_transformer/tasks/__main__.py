"""`python -m sparse_transformer.tasks`."""

import sys

from sparse_transformer.cli.tasks import main

if __name__ == "__main__":
    sys.exit(main())
