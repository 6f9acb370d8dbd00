"""Checkpoints: to the bit at another number of ranks, whole or not there, refused by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.bits import same
from support.ranks import run
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from rlsedit_kernels import CovarianceState, Prior, SquareRootState
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedSquareRootState
from rlsedit_kernels.distributed.checkpoint import latest, load, save
from rlsedit_kernels.distributed.disk import MANIFEST, Disk, manifest_bytes, read_manifest
from rlsedit_kernels.errors import CheckpointError, RankError

ROWS, COLUMNS = 7, 5


class Table:
    """A state of the simplest kind: rows on the ranks, columns on the ranks, what all have, and plain values."""

    def __init__(self, ranks: Ranks, seed: int | None) -> None:
        self.ranks = ranks
        generator = torch.Generator().manual_seed(seed or 0)
        full = [torch.randn(ROWS, COLUMNS, generator=generator) * (seed is not None) for _ in range(3)]
        self.saved: dict[str, Any] = {
            "rows": ranks.dtensor(ranks.shard(full[0]).mT.contiguous().mT, ROWS),  # columns contiguous in memory
            "list": [ranks.dtensor(ranks.shard(full[1].mT.contiguous()).mT.contiguous(), COLUMNS, 1), 0.1 + 0.2],
            "all": full[2].double(),
            "plain": {"none": None, "flag": True, "number": -1e-300, "text": "ä"},
        }

    def state_dict(self) -> dict[str, Any]:
        return self.saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if saved.keys() != self.saved.keys():
            raise ValueError("load_state_dict: other keys")
        self.saved = dict(saved)

    def clone(self) -> Table:
        return Table(self.ranks, None)

    def full(self) -> list[Any]:
        saved = self.saved
        return [saved["rows"].full_tensor(), saved["list"][0].full_tensor(), *saved["list"][1:], saved["all"],
                saved["plain"]]  # fmt: skip


def _write_table(ranks: Ranks, folder: str, step: int, seed: int) -> list[Any]:
    table = Table(ranks, seed)
    save(folder, {"table": table}, step=step, extra={"position": step})
    return table.full()


def _read_table(ranks: Ranks, folder: str) -> tuple[list[Any], int, Any]:
    table = Table(ranks, None)
    found = load(folder, {"table": table})
    rows = table.saved["rows"].to_local()
    assert rows.mT.is_contiguous()
    assert table.saved["all"].is_contiguous()
    return table.full(), found.step, found.extra


@pytest.mark.parametrize(("first", "then"), [(4, 3), (3, 1), (1, 2), (2, 4)])
def test_any_number_of_ranks_reads_what_any_other_has_written(tmp_path: Path, first: int, then: int) -> None:
    written = run(first, _write_table, str(tmp_path), 3, 1)[0]
    for full, step, extra in run(then, _read_table, str(tmp_path)):
        assert same(full, written)
        assert (step, extra) == (3, {"position": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000003"]


def _expert(seed: int, batches: int = 0, d: int = 9, form: str = "auto") -> CovarianceState:
    generator = torch.Generator().manual_seed(seed)
    state = CovarianceState(Prior.ridge(d, 1.0 + seed), form=form)
    for _ in range(batches):
        state.commit(torch.randn(3, d, generator=generator))
    return state


def _bits(state: CovarianceState) -> list[Any]:
    saved = state.state_dict()
    return [state.covariance(), saved["counters"], saved["probes"]["image"]]  # type: ignore[index]


def _write_experts(ranks: Ranks, folder: str) -> None:
    mine = {f"expert.{e}": _expert(e, 2 + e) for e in range(5) if e % ranks.size == ranks.rank}
    mine["all"] = _expert(9, 4)  # the same on every rank
    save(folder, mine, step=8, ranks=ranks, extra={"left": [1, 2]} if ranks.rank == 0 else None)


def _read_experts(ranks: Ranks, folder: str) -> list[Any]:
    mine = {f"expert.{e}": _expert(e) for e in range(5) if e // 3 == ranks.rank}
    mine["all"] = _expert(9)
    assert load(folder, mine, ranks=ranks).extra == {"left": [1, 2]}
    return [_bits(state) for state in mine.values()]


def test_states_that_live_on_one_rank_are_read_by_whichever_asks(tmp_path: Path) -> None:
    run(3, _write_experts, str(tmp_path))
    found = run(2, _read_experts, str(tmp_path))
    wanted = [_bits(_expert(e, 2 + e)) for e in range(5)]
    everywhere = _bits(_expert(9, 4))
    for bits, expected in zip(found[0] + found[1], [*wanted[:3], everywhere, *wanted[3:], everywhere], strict=True):
        assert same(bits, expected)
    alone = {name: _expert(seed) for seed, name in [*((e, f"expert.{e}") for e in range(5)), (9, "all")]}
    load(tmp_path, alone)  # this process has no ranks
    for state, expected in zip(alone.values(), [*wanted, everywhere], strict=True):
        assert same(_bits(state), expected)


def _weights(ranks: Ranks, fill: bool, turned: bool) -> dict[str, torch.Tensor]:
    full = torch.arange(21.0).view(7, 3) * fill
    by_rows, by_columns = ranks.dtensor(ranks.shard(full), 7), ranks.dtensor(ranks.shard(full.mT).mT.contiguous(), 3, 1)
    weights: dict[str, torch.Tensor] = {
        "a": by_columns if turned else by_rows,
        "b": by_rows if turned else by_columns,
        "everywhere": torch.nn.Parameter(full.to(torch.bfloat16)),
        "replicated": distribute_tensor(full, ranks.mesh, [Replicate()]),
    }
    if ranks.rank == (0 if turned else ranks.size - 1):
        weights["here"] = full.double() if turned else full.double().mT.contiguous().mT
    return weights


def _write_weights(ranks: Ranks, folder: str) -> None:
    save(folder, {}, step=1, weights=_weights(ranks, True, False), ranks=ranks)


def _read_weights(ranks: Ranks, folder: str) -> dict[str, torch.Tensor]:
    weights = _weights(ranks, False, True)
    load(folder, {}, weights=weights, ranks=ranks)
    return {n: (w.full_tensor() if isinstance(w, DTensor) else w).detach() for n, w in weights.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_come_back_under_another_placement(tmp_path: Path) -> None:
    run(3, _write_weights, str(tmp_path))
    full = torch.arange(21.0).view(7, 3)
    for rank, found in enumerate(run(2, _read_weights, str(tmp_path))):
        assert ("here" in found) == (rank == 0)
        for name, weight in found.items():
            assert torch.equal(weight.double(), full.double()), name
    plain = {"weights/a": torch.empty(7, 3), "weights/here": torch.empty(7, 3, dtype=torch.float64)}
    dcp.load(plain, checkpoint_id=tmp_path / "step-0000000001")  # torch reads it without this package
    assert torch.equal(plain["weights/a"], full)
    assert torch.equal(plain["weights/here"], full.double())


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _disagree(ranks: Ranks, folder: str) -> list[str]:
    one = ranks.rank == 1
    same, other = torch.ones(2), torch.full((2,), 1.0 + one)
    texts = [
        _refused(lambda: save(folder, {}, step=4 + one, ranks=ranks)),
        _refused(lambda: save(folder, {}, step=4, extra={"at": int(one)}, ranks=ranks)),
        _refused(lambda: save(folder, {}, step=4, weights={"w": other}, ranks=ranks)),
        _refused(lambda: save(folder, {"s": _expert(0, 1 + one)}, step=4, ranks=ranks)),
        _refused(lambda: save(folder, {}, step=4, extra={1: 2} if one else None, ranks=ranks)),
        _refused(lambda: save(folder, {}, step=4, weights={"w": same})),
    ]
    assert latest(folder, ranks=ranks) is None
    save(folder, {}, step=4, weights={"w": same}, ranks=ranks)  # the ranks can go on
    return texts


def test_ranks_that_would_save_different_things_are_refused(tmp_path: Path) -> None:
    for rank, texts in enumerate(run(3, _disagree, str(tmp_path))):
        assert "step must be the same on all ranks, got 4 on rank 0 and 5 on rank 1" in texts[0]
        assert "extra must be the same on all ranks" in texts[1]
        assert "weights/w is not the same on all ranks" in texts[2]
        assert "ranks 0 and 1 have different states by the name 's'" in texts[3]
        assert "extra must come back from JSON" in texts[4]
        assert texts[4].startswith("TypeError" if rank == 1 else "RankError")
        assert "ranks must be given" in texts[5]


class Full(Disk):
    """A disk with no room for one rank."""

    def reached(self, point: str) -> None:
        if point == "begun":
            raise OSError(28, "No space left on device")


def _disk_full(ranks: Ranks, folder: str) -> tuple[str, Any, list[str]]:
    table = Table(ranks, 1)
    save(folder, {"table": table}, step=1)
    text = "accepted"
    try:
        save(folder, {"table": Table(ranks, 2)}, step=2, disk=Full() if ranks.rank == 1 else Disk())
    except (OSError, RankError) as error:
        text = f"{type(error).__name__}: {error}"
    again = Table(ranks, None)
    load(folder, {"table": again})
    assert same(again.full(), table.full())
    save(folder, {"table": Table(ranks, 2)}, step=2)
    return text, latest(folder, ranks=ranks), sorted(path.name for path in Path(folder).iterdir())


def test_a_save_that_one_rank_cannot_make_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    for rank, (text, newest, there) in enumerate(run(3, _disk_full, str(tmp_path))):
        assert text.startswith("OSError: [Errno 28]" if rank == 1 else "RankError: save: rank 1 failed: OSError")
        assert newest == 2
        assert there == ["step-0000000001", "step-0000000002"]


def _refuse_all(ranks: Ranks, folder: str) -> tuple[list[str], bool]:
    """Every rank has two states of its own; that of rank 1 that comes last does not fit."""
    save(folder, {f"{ranks.rank}.{i}": _expert(i, 3) for i in range(2)}, step=1, ranks=ranks)
    fresh = {f"{ranks.rank}.{i}": _expert(i, 1) for i in range(2)}
    before = [_bits(state) for state in fresh.values()]
    weights = {"w": torch.zeros(2)}
    bad = dict(fresh)
    if ranks.rank == 1:
        bad["1.1"] = _expert(5)
    texts = [
        _refused(lambda: load(folder, bad, ranks=ranks)),
        _refused(lambda: load(folder, {**fresh, "other": _expert(0)}, ranks=ranks)),
        _refused(lambda: load(folder, fresh, weights=weights, ranks=ranks)),
        _refused(lambda: load(folder, {} if ranks.rank == 1 else fresh, ranks=ranks)),
    ]
    unchanged = all(same(_bits(state), bits) for state, bits in zip(fresh.values(), before, strict=True))
    load(folder, {} if ranks.rank == 1 else fresh, strict=False, ranks=ranks)
    return texts, unchanged


def test_a_checkpoint_that_does_not_fit_is_refused_by_all_ranks_and_nothing_changes(tmp_path: Path) -> None:
    for texts, unchanged in run(2, _refuse_all, str(tmp_path)):
        assert "state '1.1': load_state_dict: the saved state was made with another prior" in texts[0]
        assert "has no state 'other'; it has '0.0', '0.1', '1.0', '1.1'" in texts[1]
        assert "has no weight 'w'; it has none" in texts[2]
        assert "no rank asks for the state '1.0', '1.1'" in texts[3]
        assert unchanged


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "is damaged": _flip,
    "is damaged: 3 bytes": lambda path: path.write_bytes(b"abc"),
    "is missing": Path.unlink,
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", MANIFEST])
def test_a_damaged_file_is_named(tmp_path: Path, what: str, name: str) -> None:
    save(tmp_path, {"one": _expert(1, 2)}, step=1)
    weight = torch.zeros(3)
    path = save(tmp_path, {"one": _expert(1, 5)}, step=2, weights={"w": torch.ones(3)})
    DAMAGE[what](path / name)
    state = _expert(1)
    before = _bits(state)
    with pytest.raises(CheckpointError, match=name) as caught:
        load(tmp_path, {"one": state}, weights={"w": weight})
    assert (what if name != MANIFEST else what[:10]) in str(caught.value)
    assert same(_bits(state), before)
    assert not weight.any()
    load(tmp_path, {"one": state}, step=1)  # the one before is still good
    assert same(_bits(state), _bits(_expert(1, 2)))


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, {"one": _expert(1, 2)}, step=1)
    (path / "__7_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__7_0\.distcp is foreign"):
        load(tmp_path, {"one": _expert(1)})


def test_metadata_of_other_tensors_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, {"one": _expert(1, 2)}, step=1)
    content, _ = read_manifest(path)
    content["tensors"]["states/one/probes/z"]["shape"][0] += 1
    (path / MANIFEST).write_bytes(manifest_bytes(content))
    with pytest.raises(CheckpointError, match="states/one/probes/z"):
        load(tmp_path, {"one": _expert(1)})


def test_old_checkpoints_go_and_steps_grow(tmp_path: Path) -> None:
    for step in (1, 5, 6, 9):
        save(tmp_path, {"one": _expert(1, step)}, step=step, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:010d}" for step in (5, 6, 9)]
    assert latest(tmp_path) == 9
    with pytest.raises(ValueError, match="step must be larger than 9"):
        save(tmp_path, {}, step=9)
    with pytest.raises(FileNotFoundError, match=r"step 1 in .*; there are: 5, 6, 9"):
        load(tmp_path, {"one": _expert(1)}, step=1)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load(tmp_path / "none", {})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"step": -1}, ValueError, "step must be >= 0, got -1"),
        ({"step": 1.0}, TypeError, "step must be an int, got float"),
        ({"step": 1, "keep": 0}, ValueError, "keep must be >= 1"),
        ({"step": 1, "extra": {"a": (1, 2)}}, TypeError, "extra must come back from JSON"),
        ({"step": 1, "extra": {"a": object()}}, TypeError, "extra must be plain JSON"),
        ({"step": 1, "weights": {"a/b": torch.ones(1)}}, ValueError, "names of weights must be text without '/'"),
        ({"step": 1, "weights": {"a": 3}}, TypeError, "weight 'a' must be a tensor, got int"),
        ({"step": 1, "weights": [3]}, TypeError, "weights must be a mapping from names, got list"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text.replace("'", ".")):
        save(tmp_path, {}, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {}, step=1, weights={"w": torch.ones(3)})
    for bad in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"weight 'w' must be torch\.float32 of shape \(3,\)"):
            load(tmp_path, {}, weights={"w": bad})


D = 10
FORMS = ("plain", "whitened", "inverse_root", "auto")


def _sharded(kind: str, ranks: Ranks) -> Any:
    if kind == "square_root":
        return ShardedSquareRootState(_prior(), ranks)
    return ShardedCovarianceState(_prior(), ranks, form=kind)


def _single(kind: str) -> Any:
    return SquareRootState(_prior()) if kind == "square_root" else CovarianceState(_prior(), form=kind)


def _prior() -> Prior:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(40, D, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)
    return Prior.anchor(keys.mT @ keys, mu=1.0, lam=0.1)


def _batches(first: int, last: int) -> list[torch.Tensor]:
    return [torch.randn(3, D, generator=torch.Generator().manual_seed(100 + i)) for i in range(first, last)]


def _advanced(state: Any, first: int, last: int) -> Any:
    for K in _batches(first, last):
        state.commit(K)
    return state


def _gathered(value: Any) -> Any:
    """A state_dict with every tensor whole."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: _gathered(entry) for name, entry in value.items()}
    return [_gathered(entry) for entry in value] if isinstance(value, list) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _write_state(ranks: Ranks, folder: str, kind: str) -> Any:
    state = _advanced(_sharded(kind, ranks), 0, 4)
    save(folder, {"layer": state}, step=4)
    return _gathered(state.state_dict())


def _read_state(ranks: Ranks, folder: str, kind: str) -> tuple[Any, Any]:
    state = _sharded(kind, ranks)
    load(folder, {"layer": state})
    found = _gathered(state.state_dict())
    return found, _gathered(_advanced(state, 4, 6).update(_batches(6, 7)[0]))


def _uninterrupted(ranks: Ranks, kind: str) -> Any:
    return _gathered(_advanced(_sharded(kind, ranks), 0, 6).update(_batches(6, 7)[0]))


@pytest.mark.parametrize("kind", ["square_root", *FORMS])
def test_a_sharded_state_goes_on_at_another_number_of_ranks(tmp_path: Path, kind: str) -> None:
    written = run(4, _write_state, str(tmp_path), kind)[0]
    for size in (3, 1, 4):  # 10 rows are 4 + 4 + 2, all, or 3 + 3 + 3 + 1
        gain = run(size, _uninterrupted, kind)[0]
        for saved, after in run(size, _read_state, str(tmp_path), kind):
            assert _equal(saved, written)
            assert torch.equal(after, gain) if size == 4 else torch.allclose(after, gain, rtol=1e-4, atol=1e-6)
    single = _single(kind)
    load(tmp_path, {"layer": single})
    alone = _advanced(_single(kind), 0, 4)
    assert single.steps == 4
    C = alone.covariance()
    assert float((single.covariance() - C).norm()) <= 5e-5 * float(C.norm())  # either is off by 1e-5 in float32


def _read_plain(ranks: Ranks, folder: str, kind: str) -> Any:
    state = _sharded(kind, ranks)
    load(folder, {"layer": state})
    return _gathered(_advanced(state, 4, 6).update(_batches(6, 7)[0]))


@pytest.mark.parametrize("kind", ["square_root", *FORMS])
def test_a_single_state_goes_on_at_several_ranks(tmp_path: Path, kind: str) -> None:
    alone = _advanced(_single(kind), 0, 4)
    save(tmp_path, {"layer": alone}, step=4)
    gain = _advanced(alone, 4, 6).update(_batches(6, 7)[0])
    for after in run(3, _read_plain, str(tmp_path), kind):
        assert torch.allclose(after, gain, rtol=1e-4, atol=1e-6)
