"""The methods, one file per paper: unlearning of networks in `__all__`, scikit-learn estimators in `ESTIMATORS`, and
strategies that learn a stream of tasks in `STRATEGIES`."""

import importlib
import typing

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
from .private_training import PrivateTraining
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
    "PrivateTraining",
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

# what `vislearn classical` offers, and the file of each: fitted, not trained, so no entries of the zoo above; loaded
# when they are asked for, because scikit-learn takes a second to import
ESTIMATORS = {
    "CertifiedRemoval": "certified_removal",
    "DCKMeans": "quantised_k_means",
    "DaRE": "dare_forest",
    "ExactBernoulliNB": "naive_bayes",
    "ExactGaussianNB": "naive_bayes",
    "ExactKNeighborsClassifier": "k_nearest_neighbours",
    "ExactKNeighborsRegressor": "k_nearest_neighbours",
    "ExactMultinomialNB": "naive_bayes",
    "ExactRidge": "linear_regression",
    "InfluenceLogistic": "influence_removal",
    "InfluenceRidge": "influence_removal",
    "QKMeans": "quantised_k_means",
}

# what `vislearn continual` learns tasks with, and the file of each
STRATEGIES = {
    "CLPU": "clpu",
    "DERpp": "replay",
    "ER": "replay",
    "EWC": "ewc",
    "Finetune": "replay",
    "LwF": "lwf",
    "UER": "uer",
    "UnCLe": "uncle",
}

if typing.TYPE_CHECKING:
    from .certified_removal import CertifiedRemoval as CertifiedRemoval
    from .clpu import CLPU as CLPU
    from .dare_forest import DaRE as DaRE
    from .ewc import EWC as EWC
    from .influence_removal import InfluenceLogistic as InfluenceLogistic
    from .influence_removal import InfluenceRidge as InfluenceRidge
    from .k_nearest_neighbours import ExactKNeighborsClassifier as ExactKNeighborsClassifier
    from .k_nearest_neighbours import ExactKNeighborsRegressor as ExactKNeighborsRegressor
    from .linear_regression import ExactRidge as ExactRidge
    from .lwf import LwF as LwF
    from .naive_bayes import ExactBernoulliNB as ExactBernoulliNB
    from .naive_bayes import ExactGaussianNB as ExactGaussianNB
    from .naive_bayes import ExactMultinomialNB as ExactMultinomialNB
    from .quantised_k_means import DCKMeans as DCKMeans
    from .quantised_k_means import QKMeans as QKMeans
    from .replay import ER as ER
    from .replay import DERpp as DERpp
    from .replay import Finetune as Finetune
    from .uer import UER as UER
    from .uncle import UnCLe as UnCLe


def __getattr__(name: str) -> typing.Any:
    if file := ESTIMATORS.get(name) or STRATEGIES.get(name):
        return getattr(importlib.import_module(f".{file}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
