"""Data sets, one file each."""

from .digits import Digits

__all__ = ["Digits"]
