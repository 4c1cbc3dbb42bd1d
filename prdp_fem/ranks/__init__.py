"""What ranks do together: agree, take turns, and end."""

# Its modules are imported by their names.
__all__: list[str] = []
