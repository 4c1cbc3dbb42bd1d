"""What to use for a problem, measured on it: a factorisation, or which iterations and ladder."""

from prdp_fem.advice.advice import Advice
from prdp_fem.advice.advisor import advise
from prdp_fem.advice.measurement import Measurement

__all__ = ["Advice", "Measurement", "advise"]
