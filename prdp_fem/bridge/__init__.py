"""Rows of samples in, solutions out, and back: what any framework's bridge to solvers does.

On arrays of NumPy, or on whatever a framework has on the device of a solver.
"""

# Its modules are imported by their names.
__all__: list[str] = []
