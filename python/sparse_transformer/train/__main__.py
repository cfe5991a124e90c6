"""See the package."""

from sparse_transformer.cli.train import main
from sparse_transformer.memory import keep_freed_memory
from sparse_transformer.train.distributed import leave

if __name__ == "__main__":
    keep_freed_memory()
    leave(main())
