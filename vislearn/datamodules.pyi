from datamodules import *
