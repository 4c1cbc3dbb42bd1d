"""Networks trained through finite element solves: the bridge to PyTorch."""
try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('prdp_fem.torch needs PyTorch: pip install "prdp-fem[torch]"') from error

from prdp_fem.torch.conversion import from_torch, to_torch
from prdp_fem.torch.gathering import Gathering
from prdp_fem.torch.layer import SolverLayer
from prdp_fem.torch.networks import MLP, GraphNetwork, ResNet
from prdp_fem.torch.training import train

__all__ = ["MLP", "Gathering", "GraphNetwork", "ResNet", "SolverLayer", "from_torch", "to_torch", "train"]
