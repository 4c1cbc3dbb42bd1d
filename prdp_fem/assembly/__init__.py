"""What is assembled of a problem, and how it is differentiated."""

# Its modules are imported by their names.
__all__: list[str] = []
