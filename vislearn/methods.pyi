from methods import *
from methods import ESTIMATORS as ESTIMATORS
from methods import CertifiedRemoval as CertifiedRemoval
from methods import DaRE as DaRE
from methods import DCKMeans as DCKMeans
from methods import ExactBernoulliNB as ExactBernoulliNB
from methods import ExactGaussianNB as ExactGaussianNB
from methods import ExactKNeighborsClassifier as ExactKNeighborsClassifier
from methods import ExactKNeighborsRegressor as ExactKNeighborsRegressor
from methods import ExactMultinomialNB as ExactMultinomialNB
from methods import ExactRidge as ExactRidge
from methods import InfluenceLogistic as InfluenceLogistic
from methods import InfluenceRidge as InfluenceRidge
from methods import QKMeans as QKMeans
from methods import __all__ as __all__
