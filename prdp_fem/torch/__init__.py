"""Networks trained through finite element solves: the bridge to PyTorch."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('prdp_fem.torch needs PyTorch: pip install "prdp-fem[torch]"') from error

from prdp_fem.torch.conversion import from_torch, to_torch
from prdp_fem.torch.layer import SolverLayer
from prdp_fem.training.exchange import Exchange
from prdp_fem.training.gathering import Gathering
from prdp_fem.training.loop import train
from prdp_fem.training.networks import MLP, GraphNetwork, ResNet
from prdp_fem.training.partition import Partition
from prdp_fem.training.reduction import GradientReduction, check_replicas, shared, total
from prdp_fem.training.sampling import EnsembleSampler, deal

__all__ = [
    "EnsembleSampler",
    "Exchange",
    "Gathering",
    "GradientReduction",
    "GraphNetwork",
    "MLP",
    "Partition",
    "ResNet",
    "SolverLayer",
    "check_replicas",
    "deal",
    "from_torch",
    "shared",
    "to_torch",
    "total",
    "train",
]
