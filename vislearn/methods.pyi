from methods import *
