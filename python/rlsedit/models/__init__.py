"""Model families: adapters, and running spans of their layers."""

from .adapter import Adapter
from .families import FAMILIES, Family

__all__ = ["FAMILIES", "Adapter", "Family"]
