from datamodules import *  # noqa: F403 - for editors: they cannot see that vislearn.datamodules is this folder
