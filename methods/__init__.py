"""The unlearning methods, one file per paper."""

from .amnesiac import Amnesiac, AmnesiacML
from .attention_shift import AttentionShift
from .bad_teacher import BadTeacher
from .bidirectional import BidirectionalDistillation
from .blindspot import Blindspot
from .blur import BLUR
from .boundary import BoundaryExpand, BoundaryShrink
from .catnip import CATNIP
from .cf_k import CFk
from .cupid import CUPID
from .delete import DELETE
from .dipo import DiPO
from .eu_k import EUk
from .fine_tune import FineTune
from .first_epoch_gradient_ascent import FirstEpochGradientAscent
from .fisher_forgetting import FisherForgetting
from .gaussian_fine_tuning import GaussianAmnesiac
from .gradient_ascent import GradientAscent
from .influence_unlearning import InfluenceUnlearning
from .jit import JiT
from .l1_sparse import L1Sparse, PruneFirst
from .laf import LAF, LAFR
from .neg_grad_plus import NegGradPlus
from .npo import NPO
from .ntk import NTKScrub
from .potion import Potion
from .random_labels import RandomLabels
from .retrain import Retrain
from .rmu import RMU
from .rocr import ROCR
from .salun import SalUn, SalUnSoft
from .satimp import SatImp, SimImp, SimSat
from .scrub import SCRUB, SCRUBR
from .sim_npo import SimNPO
from .ssd import ASSD, LFSSD, SSD
from .unsir import UNSIR

__all__ = [
    "ASSD",
    "BLUR",
    "CATNIP",
    "CUPID",
    "DELETE",
    "LAF",
    "LAFR",
    "LFSSD",
    "NPO",
    "RMU",
    "ROCR",
    "SCRUB",
    "SCRUBR",
    "SSD",
    "UNSIR",
    "Amnesiac",
    "AmnesiacML",
    "AttentionShift",
    "BadTeacher",
    "BidirectionalDistillation",
    "Blindspot",
    "BoundaryExpand",
    "BoundaryShrink",
    "CFk",
    "DiPO",
    "EUk",
    "FineTune",
    "FirstEpochGradientAscent",
    "FisherForgetting",
    "GaussianAmnesiac",
    "GradientAscent",
    "InfluenceUnlearning",
    "JiT",
    "L1Sparse",
    "NTKScrub",
    "NegGradPlus",
    "Potion",
    "PruneFirst",
    "RandomLabels",
    "Retrain",
    "SalUn",
    "SalUnSoft",
    "SatImp",
    "SimImp",
    "SimNPO",
    "SimSat",
]
