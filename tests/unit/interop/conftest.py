"""The fixtures of random_models.py, for every file here."""

from random_models import every_kind

__all__ = ["every_kind"]
