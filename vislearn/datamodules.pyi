from datamodules import *
from datamodules import __all__ as __all__
