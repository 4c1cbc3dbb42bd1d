"""Networks trained through finite element solves: the bridge to PyTorch."""
try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('prdp_fem.torch needs PyTorch: pip install "prdp-fem[torch]"') from error

from prdp_fem.torch.conversion import from_torch, to_torch
from prdp_fem.torch.exchange import Exchange
from prdp_fem.torch.gathering import Gathering
from prdp_fem.torch.layer import SolverLayer
from prdp_fem.torch.networks import MLP, GraphNetwork, ResNet
from prdp_fem.torch.partition import Partition
from prdp_fem.torch.reduction import GradientReduction, check_replicas, shared, total
from prdp_fem.torch.sampling import EnsembleSampler, deal
from prdp_fem.torch.training import train

__all__ = ["EnsembleSampler", "Exchange", "Gathering", "GradientReduction", "GraphNetwork", "MLP", "Partition", "ResNet", "SolverLayer",
           "check_replicas", "deal", "from_torch", "shared", "to_torch", "total", "train"]
