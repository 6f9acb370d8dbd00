"""Forms of a covariance by name."""

from __future__ import annotations

from rlsedit_kernels.states.held import HeldForm
from rlsedit_kernels.states.inverse_root import InverseRootForm
from rlsedit_kernels.states.plain import PlainForm
from rlsedit_kernels.states.whitened import WhitenedForm

FORMS = ("auto", "plain", "whitened", "inverse_root")
"""What a state may be asked for."""

Form = PlainForm | WhitenedForm | InverseRootForm | HeldForm

FORM_CLASSES: dict[str, type[PlainForm] | type[WhitenedForm] | type[InverseRootForm]] = {
    "plain": PlainForm,
    "whitened": WhitenedForm,
    "inverse_root": InverseRootForm,
}
