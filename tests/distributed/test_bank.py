"""StateBank: the states of single processes, batched, on any number of ranks; all of an update or none of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run

import rlsedit_kernels as rk
from rlsedit_kernels.backends.registry import active_backend
from rlsedit_kernels.distributed import Ranks, StateBank, checkpoint
from rlsedit_kernels.distributed.bank_stack import rows_of
from rlsedit_kernels.distributed.volume import Received
from rlsedit_kernels.errors import LeverageError, RankError
from rlsedit_kernels.states import batch as batch_module

D = 24
Key = tuple[int, int]
Batches = dict[Key, tuple[torch.Tensor, float]]
NOISE = {0: 1.0, 1: 0.25}


def moment(seed: int, d: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * d, d, dtype=torch.float64, generator=generator) * torch.logspace(0, -1, d, dtype=torch.float64)
    return X.mT @ X / (3 * d)


def priors() -> dict[Key, rk.Prior]:
    """Layer 0: one prior for all experts; layer 1: one each; layer 2: another size; layer 3: narrow and a ridge."""
    common = rk.Prior.anchor(moment(0), lam=0.1)
    basis = torch.linalg.qr(moment(5))[0][:, :10]
    return {
        **{(0, e): common for e in range(5)},
        **{(1, e): rk.Prior.anchor(moment(1 + e), lam=0.1) for e in range(4)},
        **{(2, e): rk.Prior.anchor(moment(9 + e, 17), lam=0.2) for e in range(2)},
        (3, 0): rk.Prior.null_space(basis, 1.0),
        (3, 1): rk.Prior.ridge(D, 2.0),
    }


def stream(steps: int = 6, dtype: torch.dtype = torch.float32) -> list[Batches]:
    """Sparse batches of unlike size."""
    generator = torch.Generator().manual_seed(7)
    sizes = {key: prior.d for key, prior in priors().items()}
    found = []
    for step in range(steps):
        batches = {}
        for key, d in sizes.items():
            u = int(torch.randint(1, 12, (), generator=generator))
            K = torch.randn(u, d, generator=generator, dtype=torch.float64).to(dtype) * 0.2
            if step == 0 or float(torch.rand((), generator=generator)) < 0.6:
                batches[key] = (K, NOISE[(step + key[1]) % 2])
        found.append(batches)
    return found


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["plain", "whitened", "auto", "inverse_root"])
def test_a_bank_is_its_single_states_to_rounding(form: str, dtype: torch.dtype) -> None:
    bank = StateBank(priors(), form=form, dtype=dtype)
    single = {key: rk.CovarianceState(prior, form=form, dtype=dtype) for key, prior in priors().items()}
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for step, batches in enumerate(stream(dtype=dtype)):
        forget = 0.9 if step == 3 else 1.0
        gains = bank.update(batches, forget)
        assert list(gains) == list(batches)
        for key, (K, noise) in batches.items():
            assert relative(gains[key], single[key].update(K, noise, forget)) < tolerance, key
    for key, state in single.items():
        assert relative(bank.covariance(key), state.covariance()) < tolerance, key  # type: ignore[arg-type]
        mine, theirs = bank.health(key), state.health()
        assert mine is not None
        assert (mine.steps, mine.form, mine.status) == (theirs.steps, theirs.form, theirs.status)
        assert mine.smallest_pivot == pytest.approx(theirs.smallest_pivot, rel=1e-4)
        assert mine.drift < 10 * max(theirs.drift, tolerance)


def test_states_that_are_not_touched_keep_their_bits() -> None:
    bank = StateBank(priors(), form="whitened")
    bank.update(stream()[0])
    before = {key: bank.covariance(key) for key in bank.keys}
    touched: Batches = {key: (torch.ones(3, D), 1.0) for key in ((0, 1), (0, 2), (1, 3))}
    bank.update(touched)
    for key in bank.keys:
        assert torch.equal(bank.covariance(key), before[key]) == (key not in touched), key  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["plain", "whitened"])
def test_states_side_by_side_are_one_call_on_a_view(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts 0, 1, 2 and 4 of six: two calls, on the memory of the stack itself."""
    common = rk.Prior.anchor(moment(0), lam=0.1)
    bank = StateBank({e: common for e in range(6)}, form=form)
    calls: dict[str, list[tuple[int, tuple[int, ...]]]] = {"gain_products": [], "downdate_": []}
    for name, log in calls.items():
        plain = getattr(rk.ops, name)

        def noted(C: torch.Tensor, *rest: Any, plain: Any = plain, log: Any = log) -> Any:
            log.append((C.data_ptr(), tuple(C.shape)))
            return plain(C, *rest)

        monkeypatch.setattr(rk.ops, name, noted)
    bank.update({e: (0.1 * torch.randn(3 + e % 2, D), 1.0) for e in (4, 2, 0, 1)})
    first, fifth = (_matrix(bank, e).data_ptr() for e in (0, 4))
    assert calls["gain_products"] == [(first, (3, D, D)), (fifth, (1, D, D))]
    assert calls["downdate_"] == calls["gain_products"]
    assert fifth - first == 4 * D * D * 4


def _matrix(bank: StateBank, key: Any) -> torch.Tensor:
    form = bank.state(key)._form  # type: ignore[union-attr]
    return form.C if form.name == "plain" else form.matrix  # type: ignore[union-attr, return-value]


def test_experts_that_share_a_prior_share_its_root() -> None:
    common = rk.Prior.anchor(moment(0), lam=0.1)
    shared = StateBank({e: common for e in range(6)}, form="whitened")
    assert shared.nbytes() == (6 + 1) * D * D * 4
    own = StateBank({e: rk.Prior.anchor(moment(e), lam=0.1) for e in range(6)}, form="whitened")
    assert own.nbytes() == (6 + 6) * D * D * 4
    assert StateBank({e: common for e in range(6)}, form="plain").nbytes() == 6 * D * D * 4


def test_rows_are_filled_up_by_the_size_of_the_batch_alone() -> None:
    assert [rows_of(u) for u in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 16, 16, 24]
    assert [rows_of(u, "cuda") for u in (1, 8, 16, 17)] == [16, 16, 16, 32]


def test_keys_of_zeros_change_nothing() -> None:
    """The claim on which filling up rests, for a state by itself."""
    K = torch.randn(5, D, dtype=torch.float64)
    prior = rk.Prior.anchor(moment(0), lam=0.1)
    one, other = (rk.CovarianceState(prior, form="plain", dtype=torch.float64) for _ in range(2))
    gain = one.update(K, 0.3, 0.95)
    filled = other.update(torch.cat([K, torch.zeros(3, D, dtype=torch.float64)]), 0.3, 0.95)
    assert torch.equal(filled[:, 5:], torch.zeros(D, 3, dtype=torch.float64))
    assert relative(filled[:, :5], gain) < 1e-15
    assert relative(other.covariance(), one.covariance()) < 1e-15


def test_hard_writes_and_batches_that_need_float64_go_by_themselves() -> None:
    common = rk.Prior.anchor(moment(0), lam=0.1)
    bank = StateBank({e: common for e in range(4)}, form="plain")
    single = {e: rk.CovarianceState(common, form="plain") for e in range(4)}
    K = torch.randn(3, D, generator=torch.Generator().manual_seed(3))
    dependent = torch.cat([K, K])
    batches = {0: (K, 1.0), 1: (100.0 * K, 1e-3), 2: (dependent, 0.0), 3: (K, 1.0)}
    gains = bank.update(batches)
    for e, (keys, noise) in batches.items():
        assert relative(gains[e], single[e].update(keys, noise)) < 1e-6
        assert relative(bank.covariance(e), single[e].covariance()) < 1e-6  # type: ignore[arg-type]
    health = bank.health(1)
    assert health is not None
    assert health.careful_steps == 1
    assert 0.5 * torch.finfo(torch.float32).eps * 1e7 > batch_module.CAREFUL_FROM


def test_probes_behind_a_hard_write_know_the_batches_that_are_written_together() -> None:
    common = rk.Prior.anchor(moment(0), lam=0.1)
    bank, single = StateBank({e: common for e in range(3)}, form="plain"), rk.CovarianceState(common, form="plain")
    generator = torch.Generator().manual_seed(3)
    for noise in (1.0, 1.0, 0.0, 1.0):  # no check of the guard is due behind the third
        K = torch.randn(3, D, generator=generator)
        bank.update({0: (K, 1.0), 1: (K, noise), 2: (K, 1.0)})
        single.update(K, noise)
    state = bank.state(1)
    assert state is not None
    ours, alone = (one.state_dict()["probes"]["image"] for one in (state, single))
    assert relative(ours, alone) < 1e-6


@pytest.mark.parametrize(("scale", "noise"), [(30.0, 1.0), (0.1, 0.1**2 / 30.0**2)])
def test_an_automatic_state_that_moves_leaves_the_others_in_place(scale: float, noise: float) -> None:
    """Large keys or small noise make the plain form unsafe for one expert: it goes on in another, and is right."""
    common = rk.Prior.anchor(moment(0), lam=0.1)
    bank = StateBank({e: common for e in range(3)})
    single = rk.CovarianceState(common)
    small, large = torch.randn(4, D) * 0.1, torch.randn(4, D) * scale
    bank.update({e: (small, 1.0) for e in range(3)})
    bank.update({1: (large, noise), 2: (small, 1.0)})
    gains = bank.update({e: (small.flip(0), 1.0) for e in range(3)})
    single.update(small)
    single.update(large, noise)
    assert relative(gains[1], single.update(small.flip(0))) < 1e-5
    assert [bank.state(e).form for e in range(3)] == ["plain", single.form, "plain"]  # type: ignore[union-attr]
    assert single.form != "plain"
    assert ": rho" in bank.state(1).health().reason  # and not because it had drifted


@pytest.mark.parametrize("bad", ["nan", "overflow", "unknown", "shape", "noise"])
def test_one_bad_batch_leaves_all_states_unchanged(bad: str) -> None:
    bank = StateBank(priors(), form="plain")
    bank.update(stream()[0])
    before = _everything(bank)
    batches: dict[Any, Any] = {(0, e): (torch.ones(2, D), 1.0) for e in range(4)}
    text = {"nan": "NaN", "overflow": "overflows", "unknown": "no state", "shape": "d = 24", "noise": "noise"}[bad]
    if bad == "nan":
        batches[0, 2] = (torch.full((2, D), float("nan")), 1.0)
    elif bad == "overflow":
        batches[0, 2] = (torch.full((2, D), 1e30), 1.0)
    elif bad == "unknown":
        batches[7, 7] = (torch.ones(2, D), 1.0)
    elif bad == "shape":
        batches[0, 2] = (torch.ones(2, D + 1), 1.0)
    else:
        batches[0, 2] = (torch.ones(2, D), -1.0)
    with pytest.raises(ValueError, match=text):
        bank.update(batches)
    assert same(_everything(bank), before)


def _everything(bank: StateBank) -> dict[str, Any]:
    return bank.state_dict()["states"]  # type: ignore[return-value]


def test_removal_takes_back_or_changes_nothing() -> None:
    bank = StateBank(priors(), dtype=torch.float64)
    first, second = stream(2, torch.float64)
    bank.update(first)
    before = {key: bank.covariance(key) for key in second}
    bank.update(second)
    some = next(iter(second))
    single = rk.CovarianceState(priors()[some], form="plain", dtype=torch.float64)
    single.update(*first[some])
    single.update(*second[some])
    gains = bank.remove(second)
    assert relative(gains[some], single.remove(*second[some])) < 1e-10
    for key in second:
        assert relative(bank.covariance(key), before[key]) < 1e-9  # type: ignore[arg-type]
    kept = _everything(bank)
    strange = {(0, 0): first[0, 0], (0, 1): (100.0 * torch.ones(1, D, dtype=torch.float64), 1.0)}
    with pytest.raises(LeverageError, match=r"state \(0, 1\)"):
        bank.remove(strange)
    assert same(_everything(bank), kept)
    bank.update(second)  # the stacks are still those of the states
    for key in second:
        assert bank.state(key).steps == 2  # type: ignore[union-attr]


def test_a_batch_prepared_before_another_is_not_written() -> None:
    bank = StateBank(priors())
    one, other = stream(2)
    saved = bank.state_dict()
    for change in (lambda: bank.update(other), lambda: bank.remove(other), lambda: bank.load_state_dict(saved)):
        prepared = bank.prepare(one)
        change()
        before = _everything(bank)
        with pytest.raises(ValueError, match="has changed since"):
            bank.write(prepared)
        assert same(_everything(bank), before)


def _as_placed(one: Any, other: Any) -> bool:
    """To the bit with the kernels of this package; plain torch rounds otherwise in a batch of another size."""
    if active_backend("gain_products") == "cpu":
        return same(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_as_placed(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return relative(one, other) < 1e-4
    return type(one) is type(other)


def _bank_of(ranks: Ranks | None, form: str, steps: int) -> tuple[StateBank, list[dict[Key, torch.Tensor]]]:
    bank = StateBank(priors(), ranks, form=form)
    gains = []
    for batches in stream(steps):
        kept = {
            key: (K if bank.owner(key) == bank.rank else None, noise) for key, (K, noise) in reversed(batches.items())
        }
        gains.append(bank.update(kept, gather=True))
    return bank, gains


def _streamed(ranks: Ranks, form: str) -> tuple[list[dict[Key, torch.Tensor]], dict[str, Any], Any]:
    bank, gains = _bank_of(ranks, form, 4)
    return gains, _everything(bank), bank.placement


@pytest.mark.parametrize("form", ["plain", "whitened", "auto"])
def test_the_same_bits_wherever_states_are_placed(form: str) -> None:
    alone, expected = _bank_of(None, form, 4)
    for size in (1, 2, 3, 4):
        found = run(size, _streamed, form)
        union: dict[str, Any] = {}
        for gains, states, placement in found:
            assert placement == found[0][2]
            for mine, wanted in zip(gains, expected, strict=True):
                assert _as_placed(mine, wanted)
            assert not union.keys() & states.keys()
            union |= states
        assert _as_placed(union, _everything(alone))
        assert all(len(states) > 0 for _, states, _ in found)


def _fails(ranks: Ranks, kind: str) -> tuple[bool, str]:
    bank = StateBank(priors(), ranks)
    first, second, third = stream(3)
    bank.update(first)
    before = _everything(bank)
    mine = dict(second)
    key = next(key for key in second if bank.owner(key) == 1 and len(second[key][0]) > 1)
    last = ranks.rank == ranks.size - 1
    mine[key] = (300.0 * mine[key][0], mine[key][1])  # so large that its state would move to another form
    if kind == "alone" and bank.owner(key) == ranks.rank:
        mine[key] = (torch.full_like(mine[key][0], float("nan")), 1.0)
    elif kind == "missing" and bank.owner(key) == ranks.rank:
        mine[key] = (None, mine[key][1])  # type: ignore[assignment]
    elif kind == "noise" and last:
        mine[key] = (mine[key][0], 7.0)
    elif kind == "named" and last:
        del mine[key]
    elif kind == "u" and last:
        mine[key] = (torch.cat([mine[key][0]] * 2), mine[key][1])
    elif kind == "list" and bank.owner(key) != ranks.rank:
        mine[key] = (mine[key][0].tolist(), mine[key][1])
    elif kind == "shape" and last:
        mine[key] = (mine[key][0][0], mine[key][1])
    elif kind == "order" and last:
        mine[key] = (mine[key][0].flip(0), mine[key][1])
    text = ""
    try:
        bank.update(mine, 0.5 if kind == "forget" and last else 1.0)
    except (TypeError, ValueError, RankError) as error:
        text = f"{type(error).__name__}: {error}"
    unchanged = same(_everything(bank), before)
    bank.update(third)  # the ranks are still in step
    return unchanged, text


TEXTS = {
    "alone": "must be finite",
    "missing": "must be given on rank 1",
    "noise": "noises must be the same",
    "named": "states_named must be the same",
    "u": "u of state",
    "list": "K must be a torch.Tensor, got list",
    "shape": "K must have shape (u, d)",
    "order": "digest of K of state",
    "forget": "forget must be the same",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_fails_on_one_rank_changes_nothing_on_any(kind: str) -> None:
    for unchanged, text in run(3, _fails, kind):
        assert TEXTS[kind] in text
        assert unchanged


def _saved(ranks: Ranks) -> dict[str, Any]:
    return _bank_of(ranks, "auto", 3)[0].state_dict()


def _resumed(ranks: Ranks | None, parts: list[dict[str, Any]]) -> dict[str, Any]:
    bank = StateBank(priors(), ranks)
    bank.load_state_dict({"version": 1, "states": dict(itertools.chain(*(part["states"].items() for part in parts)))})
    bank.update(stream(4)[3])
    return _everything(bank)


def test_saved_at_three_ranks_and_loaded_at_others() -> None:
    parts = run(3, _saved)
    wanted = _everything(_bank_of(None, "auto", 4)[0])
    for found in ([_resumed(None, parts)], run(2, _resumed, parts)):
        union = {name: state for part in found for name, state in part.items()}
        assert _as_placed(union, wanted)


def _checkpointed(ranks: Ranks, folder: str) -> None:
    bank, _ = _bank_of(ranks, "auto", 3)
    checkpoint.save(folder, bank.named(), step=3, ranks=ranks)


def _restored(ranks: Ranks | None, folder: str) -> dict[str, Any]:
    bank = StateBank(priors(), ranks)
    checkpoint.load(folder, bank.named(), ranks=ranks)
    bank.update(stream(4)[3])
    return _everything(bank)


def test_a_checkpoint_of_three_ranks_goes_on_at_others(tmp_path: Path) -> None:
    run(3, _checkpointed, str(tmp_path))
    wanted = _everything(_bank_of(None, "auto", 4)[0])
    for found in ([_restored(None, str(tmp_path))], run(2, _restored, str(tmp_path))):
        union = {name: state for part in found for name, state in part.items()}
        assert _as_placed(union, wanted)


def test_a_state_that_is_missing_is_found_before_anything_is_loaded() -> None:
    bank, _ = _bank_of(None, "auto", 1)
    saved = bank.state_dict()
    before = _everything(bank)
    states = dict(saved["states"])  # type: ignore[call-overload]
    del states["1.3"]
    with pytest.raises(ValueError, match=r"lack 1\.3"):
        bank.load_state_dict({**saved, "states": states})
    states["1.3"] = {**before["1.3"], "dtype": "torch.float64"}
    with pytest.raises(ValueError, match=r"state \(1, 3\): .*this state is torch.float32"):
        bank.load_state_dict({**saved, "states": states})
    assert same(_everything(bank), before)


def _counted(ranks: Ranks) -> list[tuple[int, int]]:
    bank = StateBank(priors(), ranks, guard="off")
    found = []
    for gather, batches in zip((False, True, True), stream(3), strict=True):
        sizes = {key: len(K) for key, (K, _) in batches.items()}
        with Received() as received:
            bank.update(batches, gather=gather)
        found.append((received.bytes, bank.update_bytes(sizes, gather=gather)))
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_sent_is_what_the_formula_says(size: int) -> None:
    for counted in run(size, _counted):
        assert all(bytes_ == formula for bytes_, formula in counted)
        assert (counted[0][0] > 0) == (size > 1)
        assert counted[0][0] <= (size - 1) * 16 * (len(priors()) + 10)


def _made(ranks: Ranks) -> None:
    StateBank({0: rk.Prior.ridge(4 + ranks.rank, 1.0), 1: rk.Prior.ridge(4, 1.0)}, ranks)


def _broken_prior(ranks: Ranks) -> None:
    indefinite = rk.Prior.precision(torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])))
    StateBank({0: rk.Prior.ridge(4, 1.0), 1: indefinite}, ranks)


def _too_large(ranks: Ranks) -> None:
    StateBank({0: rk.Prior.ridge(8, 1.0), 1: rk.Prior.ridge(4, 1.0)}, ranks, memory=200.0)


def test_priors_that_differ_or_cannot_be_factored_are_an_error_everywhere() -> None:
    for outcome in run(2, _made, check=False):
        assert isinstance(outcome.error, ValueError)
        assert "states must be the same on all ranks" in str(outcome.error)
    for outcome in run(2, _broken_prior, check=False):
        assert isinstance(outcome.error, (ValueError, RankError))
        assert "S0 must be positive definite" in str(outcome.error)
    for outcome in run(2, _too_large, check=False):
        assert "no rank can keep 0 whole" in str(outcome.error)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"priors": {}}, ValueError, "at least one state"),
        ({"priors": {0: 1.0}}, TypeError, r"priors\[0\] must be a Prior"),
        ({"priors": {(1, 2): rk.Prior.ridge(4, 1.0), "1.2": rk.Prior.ridge(4, 1.0)}}, ValueError, "same name"),
        ({"form": "square_root"}, ValueError, "form must be one of"),
        ({"dtype": torch.float16}, TypeError, "dtype must be"),
        ({"work": {1: 2.0}}, ValueError, "work must have an entry"),
        ({"memory": 32.0}, ValueError, "the states take 64 bytes and 1 ranks have 32"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"priors": {0: rk.Prior.ridge(4, 1.0)}, **arguments}
    with pytest.raises(error, match=text):
        StateBank(**given)
