"""Target hidden states z*: the objective, its fast optimisation and the plain one."""

from .optimise import Targets, optimise_targets
from .reference import plain_targets

__all__ = ["Targets", "optimise_targets", "plain_targets"]
