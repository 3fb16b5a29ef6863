"""`python -m vislearn`."""

from .main import main

main()
