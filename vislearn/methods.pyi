from methods import *
from methods import __all__ as __all__
