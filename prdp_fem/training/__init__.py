"""Networks, how they are trained through solves, and how ranks share both."""

# Its names are those of prdp_fem.torch, which says where torch is absent, and has the layer that
# modules here build on.
import prdp_fem.torch  # noqa: F401

# Its modules are imported by their names.
__all__: list[str] = []
