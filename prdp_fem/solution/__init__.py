"""The solution as a function of its inputs, and the derivatives of that function."""

# Its modules are imported by their names.
__all__: list[str] = []
