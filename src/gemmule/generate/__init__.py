"""From a model to text: sampling rules and the engine.

The package can be called, for `gemmule.generate` is its name as well as that of the function in `engine`.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from gemmule.generate.engine import generate

        return generate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
