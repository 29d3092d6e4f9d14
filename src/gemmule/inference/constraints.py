"""placeholder"""

from typing import Any

Constraint = Any
ConstraintSpec = Any
