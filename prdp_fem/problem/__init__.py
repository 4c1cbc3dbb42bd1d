"""A variational problem taken apart: its forms over copies of what the user's depend on."""

# Its modules are imported by their names.
__all__: list[str] = []
