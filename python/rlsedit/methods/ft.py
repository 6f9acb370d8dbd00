"""FT, FT-L and FT-W (baselines of Meng et al. 2022 and 2023): Adam on the edited weights, no recursion.

FT-L keeps every entry within `ft_bound` of what it was before the batch, FT-W decays the weights by `ft_decay`.
"""

from __future__ import annotations

from torch import Tensor

from .method import Method
from .solver import Proposal, Start


class NoSolver:
    """Stands for the state of a method that has none."""

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, NoSolver]:
        """Always refused: nothing is solved for."""
        raise TypeError("ft: there is no solve; its writer takes gradient steps (rlsedit.writing.steps)")

    def health(self) -> dict[str, object]:
        """The kind."""
        return {"kind": "gradient steps"}


def make(_start: Start) -> NoSolver:
    """Nothing."""
    return NoSolver()


METHOD = Method(
    "ft",
    "fine-tuning of the edited weights by Adam; FT-L with ft_bound, FT-W with ft_decay",
    solver=make,
    commit="never",
    signal="steps",
    entangled="gradient steps on all facts of a batch cannot be told apart",
)
