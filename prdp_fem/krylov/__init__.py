"""PETSc's KSP and SNES under a setting, and all that is known of their types."""

# Its modules are imported by their names.
__all__: list[str] = []
