"""Comparison with numbers that the authors' own code gave."""
