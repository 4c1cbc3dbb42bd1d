"""Unrolled differentiation: the exact derivative of the K-th iterate of a KSP by its inputs.

They are the operator, the right-hand side and the guess. What is unrolled is registered: see
:mod:`prdp_fem.unrolled.registry`.
"""

# methods and preconditioners register what they state.
from prdp_fem.unrolled.colouring import colour_columns
from prdp_fem.unrolled.methods import Iteration
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.preconditioners import Preconditioner
from prdp_fem.unrolled.registry import restated_preconditioners, unrolled_methods
from prdp_fem.unrolled.steepest_descent import SteepestDescent
from prdp_fem.unrolled.unrolled_ksp import UnrolledKSP

__all__ = [
    "Iteration",
    "OperatorCotangent",
    "Preconditioner",
    "SteepestDescent",
    "UnrolledKSP",
    "colour_columns",
    "restated_preconditioners",
    "unrolled_methods",
]
