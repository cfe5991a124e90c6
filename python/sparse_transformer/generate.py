"""`python -m sparse_transformer.generate`; the function is `sparse_transformer.generate`.

Importing this module gives its name in the package to it, so it can be called as the function is.
"""

import sys
from types import ModuleType

from sparse_transformer.cli.generate import main
from sparse_transformer.generation import generate


class _Module(ModuleType):
    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Module

if __name__ == "__main__":
    sys.exit(main())
