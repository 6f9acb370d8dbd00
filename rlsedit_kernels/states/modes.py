"""The mode of torch in which states work, whatever the caller's, and what inference mode leaves out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from rlsedit_kernels.backends.precision import ieee_products, untouched


@contextlib.contextmanager
def normal_mode() -> Iterator[None]:
    """`ieee_products`, and outside of inference mode: what is made in the block may be changed in place anywhere.

    torch lets tensors that were made in inference mode be changed in that mode only, and finds out when a batch is half
    written.
    """
    if untouched() and not torch.is_inference_mode_enabled():
        yield
        return
    with ieee_products():
        if not torch.is_inference_mode_enabled():
            yield
            return
        with torch.inference_mode(False), torch.no_grad():
            yield


def writing(A: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """The mode in which a tensor of somebody else may be changed in place: inference mode where it was made in it."""
    if A.is_inference() and not torch.is_inference_mode_enabled():
        return torch.inference_mode()
    return contextlib.nullcontext()


def version(A: torch.Tensor) -> int | None:
    """Counts the changes in place of A and of what it is a view of; None for one of inference mode, which has none."""
    return None if A.is_inference() else A._version
