"""Saving a square-root state over ranks, and loading it from one over any number of them, or from none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlsedit_kernels.distributed import restriction
from rlsedit_kernels.distributed.agreement import digest_of_saved
from rlsedit_kernels.distributed.probes import ShardedProbes
from rlsedit_kernels.distributed.rows import saved_rows
from rlsedit_kernels.distributed.square_root_batches import ShardedBatches
from rlsedit_kernels.distributed.triangular import ShardedTriangular
from rlsedit_kernels.states import saving
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.saving import saved_tensor
from rlsedit_kernels.states.square_root import SquareRootState


def state_dict(state: ShardedBatches) -> dict[str, object]:
    """Tensors (copies) and plain values; nothing is sent."""
    form, probes, ranks = state._form, state._probes, state.ranks
    return {
        **saving.header(state),
        "form": state.form,
        "tensors": {
            "L": ranks.dtensor(form.L.clone(), form.L.shape[1]),
            "basis": None if form.basis is None else ranks.dtensor(form.basis.clone(), state.d),
            "held": None if form.held is None else form.held.clone(),
            "trace": form.trace,
            "regular": form._regular,
        },
        "restriction": None if state._restriction is None else ranks.dtensor(state._restriction.clone(), state.d),
        "probes": {
            "z": ranks.dtensor(probes.z.clone(), state.d),
            "image": ranks.dtensor(probes.image.clone(), state.d),
        },
    }


def load_state_dict(state: ShardedBatches, saved: Mapping[str, Any]) -> None:
    """Restore into `state`; see `ShardedSquareRootState.load_state_dict`."""
    ranks, d = state.ranks, state.d
    with ranks.confirmed("load_state_dict") as agreed:
        with saving.as_saved():
            saving.check_header(state, saved)
            if saved["form"] != state.form:
                raise ValueError(f"load_state_dict: form must be {state.form!r}, got {saved['form']!r}")
            form = _form(state, saved["tensors"])
            count = min(state._probes.z.shape[1], d)
            z, image = (saved_rows(saved["probes"], name, (d, count), torch.float64, ranks) for name in ("z", "image"))
            counters, held = Counters.restored(saved["counters"]), restriction.restored(saved, d, ranks)
        agreed.update(r=form.L.shape[1], steps=counters.steps, trace=form.trace)
        agreed["a digest of what is loaded"] = digest_of_saved(saved)
    with ranks.guarded("load_state_dict"):
        form.measure()
    state._resume(form, ShardedProbes(ranks, z, image), counters, held)


def collected(state: ShardedBatches) -> SquareRootState:
    """See `ShardedSquareRootState.collect`."""
    form, probes, ranks, d = state._form, state._probes, state.ranks, state.d
    with ranks.guarded("collect"):
        L = ranks.gather(form.L, form.L.shape[1])
        basis = None if form.basis is None else ranks.gather(form.basis, d)
        z, image = ranks.gather(probes.z, d), ranks.gather(probes.image, d)
        known = None if state._restriction is None else ranks.gather(state._restriction, d)
    single = SquareRootState(state.prior, dtype=state.dtype, device=ranks.device, guard=state._watch.guard)
    saved = state_dict(state)
    factor = {"R": L.mT.contiguous(), "basis": basis, "held": form.held}
    saved["tensors"] = {**factor, "trace": form.trace, "regular": form._regular}
    saved["probes"], saved["restriction"] = {"z": z, "image": image}, known
    single.load_state_dict(saved)
    return single


def _form(state: ShardedBatches, saved: Mapping[str, Any]) -> ShardedTriangular:
    ranks, d = state.ranks, state.d
    name = "R" if "R" in saved else "L"
    value = saved.get(name)
    r = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() == 2 else d
    if saved.get("basis") is None and r != d:
        raise ValueError(f"load_state_dict: {name} must be ({d}, {d}), got {tuple(value.shape)}")  # type: ignore[union-attr]
    if name == "R":  # of a SquareRootState
        L = ranks.shard(saved_tensor(saved, "R", (r, r), state.dtype, ranks.device).mT.contiguous())
    else:
        L = saved_rows(saved, "L", (r, r), state.dtype, ranks)
    basis = None if saved.get("basis") is None else saved_rows(saved, "basis", (d, r), state.dtype, ranks)
    held = None
    if saved.get("held") is not None:
        held = saved_tensor(saved, "held", (r, None), torch.float64, ranks.device)
    return ShardedTriangular(ranks, L, basis, *saving.saved_figures(saved), held)
