"""Unrolled differentiation: the exact derivative of the map from an operator, a right-hand side and a guess to the K-th iterate."""
from prdp_fem.unrolled.colouring import colour_columns
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.steepest_descent import SteepestDescent
from prdp_fem.unrolled.unrolled_ksp import UnrolledKSP

__all__ = ["OperatorCotangent", "SteepestDescent", "UnrolledKSP", "colour_columns"]
