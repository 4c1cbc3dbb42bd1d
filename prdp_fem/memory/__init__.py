"""Where vectors and matrices lie: on the host or on a device, one by one or in batches."""

# Its modules are imported by their names.
__all__: list[str] = []
