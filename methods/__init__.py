"""The unlearning methods, one file per paper."""

from .fine_tune import FineTune
from .gradient_ascent import GradientAscent
from .neg_grad_plus import NegGradPlus
from .random_labels import RandomLabels
from .ssd import ASSD, LFSSD, SSD

__all__ = ["ASSD", "LFSSD", "SSD", "FineTune", "GradientAscent", "NegGradPlus", "RandomLabels"]
