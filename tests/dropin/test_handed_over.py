"""Matrices that a caller hands over are what the fast answer assumes, or it is refused and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.builders import normal
from support.tolerances import relative_error
from torch import Tensor

from rlsedit_kernels import dropin
from rlsedit_kernels.dropin.doubts import Doubts

D, V, U, L2 = 48, 6, 4, 10.0
EYE = torch.eye(D)


def projector() -> Tensor:
    basis = torch.linalg.qr(normal(D, 20, seed=1))[0]
    return (basis @ basis.T)[None]


def moment() -> Tensor:
    samples = normal(5 * D, D, seed=3)
    return samples.T @ samples / len(samples)


K, R = normal(D, U, seed=4), normal(V, U, seed=5)
OTHER = normal(D, U, seed=6)
OTHER *= K.norm() / OTHER.norm()
TRACELESS = torch.diag(torch.tensor([1.0, -1.0]).repeat(D // 2))


def solve(P: Any, c: Any, gram: Tensor | None = None, ridge: Tensor | None = None, keys: Tensor = K) -> Tensor:
    """AlphaEdit's, with one of its matrices replaced."""
    gram, ridge = K @ K.T if gram is None else gram, L2 * EYE if ridge is None else ridge
    return torch.linalg.solve(P[0] @ (gram + c[0]) + ridge, P[0] @ keys @ R.T)


def off(position: tuple[int, int], value: float) -> Tensor:
    found = L2 * EYE
    found[position] = value
    return found


@contextmanager
def trusting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without any check of what is handed over."""
    with monkeypatch.context() as patched:
        patched.setattr(Doubts, "settle", lambda self: None)
        yield


RIDGES = {
    "another diagonal": torch.diag(torch.linspace(L2, 100 * L2, D)),
    "no diagonal": L2 * torch.ones(D, D),
    "an element beside it": off((3, 7), 5.0),
    "the last of the diagonal": off((D - 1, D - 1), 3.0),
    "zero": torch.zeros(D, D),
    "NaN": off((5, 6), float("nan")),
    "NaN on the diagonal": off((5, 5), float("nan")),
}
WRONG_GRAMS = {
    "of other keys": OTHER @ OTHER.T,
    "with another term": K @ K.T + 0.01 * EYE,
    "with a term without trace": K @ K.T + 0.05 * TRACELESS,
    "asymmetric": K @ K.T + torch.triu(torch.full((D, D), 0.05), 1),
    "one column": K @ K.T + 0.5 * torch.outer(EYE[3], EYE[9]),
    "NaN": K @ K.T * float("nan"),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", RIDGES)
def test_alphaedit_looks_at_all_of_the_ridge(name: str, verify: bool) -> None:
    P, c = dropin.alphaedit(projector(), L2, verify=verify)
    with pytest.raises(ValueError, match=r"L2 must be 10 as it was given, got|off the diagonal"):
        solve(P, c, ridge=RIDGES[name])
    with pytest.raises(ValueError, match="solved for only"):
        c[0] += K @ K.T


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", WRONG_GRAMS)
def test_alphaedit_compares_the_keys_of_both_sides(name: str, verify: bool) -> None:
    P, c = dropin.alphaedit(projector(), L2, verify=verify)
    with pytest.raises(ValueError, match="must be that of the keys of this batch"):
        solve(P, c, gram=WRONG_GRAMS[name])


def test_other_keys_of_equal_size_on_the_right() -> None:
    P, c = dropin.alphaedit(projector(), L2)
    with pytest.raises(ValueError, match="Are the keys on the right-hand side others"):
        solve(P, c, keys=OTHER)


def test_what_is_committed_is_what_was_solved_for() -> None:
    P, c = dropin.alphaedit(projector(), L2)
    solve(P, c)
    with pytest.raises(ValueError, match="it is of their size, but differs"):
        c[0] += OTHER @ OTHER.T
    again = K * (1.0 + 1e-4 * normal(D, U, seed=7))  # another forward pass
    c[0] += again @ again.T
    assert P.health()[0].steps == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [({"ridge": RIDGES["another diagonal"]}, "layer 0"), ({"gram": WRONG_GRAMS["of other keys"]}, "layer 0")],
)
def test_verification_takes_the_matrices_that_were_given(
    what: dict[str, Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    P, c = dropin.alphaedit(projector(), L2, verify=True)
    with trusting(monkeypatch), pytest.raises(dropin.VerificationError, match=message):
        solve(P, c, **what)
    solve(P, c)  # still verified, and right


def test_verification_of_memit_and_of_the_reference_code(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance, stand = dropin.Moment(moment(), verify=True), dropin.Covariance(moment(), verify=True)
    with trusting(monkeypatch):
        with pytest.raises(dropin.VerificationError, match="MEMIT"):
            torch.linalg.solve(15 * covariance + OTHER @ OTHER.T, K)
        with pytest.raises(dropin.VerificationError, match="RLSEdit"):
            steps(stand, eye=2.0 * torch.eye(U)) @ K
        with pytest.raises(dropin.VerificationError, match="RLSEdit"):
            steps(stand, transposed=OTHER.T) @ K


@pytest.mark.parametrize("name", [*WRONG_GRAMS])
def test_memit_compares_the_keys_of_both_sides(name: str) -> None:
    with pytest.raises(ValueError, match="must be that of the keys of this batch"):
        torch.linalg.solve(15 * dropin.Moment(moment()) + WRONG_GRAMS[name], K)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda P, c: solve(P, c, ridge=torch.tensor(L2)), r"L2 \* eye must have shape \(48, 48\), got \(\)"),
        (lambda P, c: solve(P, c, ridge=L2 * EYE[:1]), r"L2 \* eye must have shape"),
        (lambda P, c: solve(P, c, gram=K.square().sum()), r"K @ K.T must have shape"),
        (lambda P, c: solve(P, c, keys=K[:-1]), r"K must have shape \(48, -1\)"),
        (lambda P, c: P[0] @ K @ R[:, 1:].T, r"R.T must have shape \(4, -1\)"),
        (lambda P, c: torch.linalg.solve(15 * dropin.Moment(moment()) + K @ K.T, K[:, 0]), "must have shape"),
        (lambda P, c: torch.linalg.solve(15 * dropin.Moment(moment()) + K[0], K), "must have shape"),
        (lambda P, c: dropin.Covariance(moment()) @ K[:, 0], "K must have shape"),
    ],
)
def test_shapes_that_torch_would_broadcast_are_refused(use: Callable[[Any, Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(*dropin.alphaedit(projector(), L2))


@pytest.mark.parametrize(
    "use",
    [
        lambda P, c: torch.linalg.solve(P[0] @ (K @ K.T + c[0]) + L2 * EYE, P[0] @ K @ R.T, left=False),
        lambda P, c: torch.add(K @ K.T, c[0], alpha=2),
        lambda P, c: torch.linalg.solve(15 * dropin.Moment(moment()) + K @ K.T, K, left=False),
        lambda P, c: torch.add(K @ K.T, 15 * dropin.Moment(moment()), alpha=2),
    ],
)
def test_a_keyword_that_changes_the_expression_is_refused(use: Callable[[Any, Any], object]) -> None:
    with pytest.raises(TypeError, match="no part of the known solve"):
        use(*dropin.alphaedit(projector(), L2))


def test_keywords_that_change_nothing_are_taken() -> None:
    P, c = dropin.alphaedit(projector(), L2)
    found = torch.linalg.solve(
        torch.add(L2 * EYE, P[0] @ torch.add(K @ K.T, c[0], alpha=1)), P[0] @ K @ R.T, left=True, out=None
    )
    assert relative_error(found, solve(P, c)) == 0.0


@pytest.mark.parametrize("name", ["K @ K.T", "L2", "K", "R"])
def test_operands_that_change_before_the_solve(name: str) -> None:
    """Torch would have computed with what they were."""
    P, c = dropin.alphaedit(projector(), L2)
    parts = {"K @ K.T": K @ K.T, "L2": L2 * EYE, "K": K.clone(), "R": R.T.clone()}
    system = P[0] @ (parts["K @ K.T"] + c[0]) + parts["L2"]
    right = P[0] @ parts["K"] @ parts["R"]
    parts[name].mul_(1.0)
    with pytest.raises(ValueError, match="was changed in place between the expression and its solve"):
        torch.linalg.solve(system, right)


def test_a_cache_that_grows_before_the_solve() -> None:
    P, c = dropin.alphaedit(projector(), L2)
    taken, system = c[0], P[0] @ (K @ K.T + c[0]) + L2 * EYE
    solve(P, c)
    c[0] += K @ K.T
    with pytest.raises(ValueError, match="between the system and its solve"):
        torch.linalg.solve(system, P[0] @ K @ R.T)
    with pytest.raises(ValueError, match="since this"):
        K @ K.T + taken


def test_what_may_be_a_copy_of_the_cache_does_not_grow() -> None:
    P, c = dropin.alphaedit(projector(), L2)
    solve(P, c)
    part = c[0].cpu().float()
    with pytest.raises(TypeError, match="grows in its place"):
        part += K @ K.T
    c[0] += K @ K.T


def test_a_cache_that_is_no_sum_of_batches() -> None:
    gram = (OTHER @ OTHER.T)[None]
    with pytest.raises(ValueError, match="which are symmetric, got elements of size"):
        dropin.alphaedit(projector(), L2, gram + torch.triu(torch.ones(D, D)))
    P, c = dropin.alphaedit(projector(), L2, -gram)
    for _ in range(2):
        with pytest.raises(ValueError, match="must be a sum of K K', got the eigenvalue"):
            solve(P, c)
    P, c = dropin.alphaedit(projector(), L2, gram)
    past = projector()[0] @ (K @ K.T + gram[0]) + L2 * EYE
    assert relative_error(solve(P, c), torch.linalg.solve(past, projector()[0] @ K @ R.T)) < 1e-5


def test_a_moment_must_not_change() -> None:
    mine = moment()
    stand = dropin.Moment(mine)
    torch.linalg.solve(15 * stand + K @ K.T, K)
    mine.mul_(2.0)
    with pytest.raises(ValueError, match="the second moment was changed in place"):
        torch.linalg.solve(15 * stand + K @ K.T, K)


def steps(C: Any, *, eye: Tensor | None = None, transposed: Tensor | None = None, keys: Tensor = K) -> Any:
    """The reference code's C - G @ G.T, with one of its matrices replaced."""
    F = C @ keys
    S = (torch.eye(U) if eye is None else eye) + (keys.T if transposed is None else transposed) @ F
    G = torch.linalg.solve_triangular(torch.linalg.cholesky(S, upper=True), F, upper=True, left=False)
    return C - G @ G.T


@pytest.mark.parametrize(
    "use",
    [
        lambda C: C - (C @ K) @ (C @ K).T,
        lambda C: C - C @ K,
        lambda C: K.T @ (C @ K) + K.T @ (C @ K),
        lambda C: torch.linalg.cholesky(K.T @ (C @ K)),
        lambda C: torch.linalg.cholesky(C @ K),
        lambda C: torch.add(torch.eye(U), K.T @ (C @ K), alpha=2),
        lambda C: torch.linalg.solve_triangular(factor(C, upper=True), C @ K, upper=True, left=False),
        lambda C: triangular(C, upper=True, left=True),
        lambda C: triangular(C, factor_upper=False, upper=True, left=False),
        lambda C: triangular(C, upper=True, left=False, unitriangular=True),
        lambda C: triangular(C, upper=True, left=False).T @ triangular(C, upper=True, left=False),
    ],
)
def test_the_reference_code_takes_its_steps_in_order(use: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"not? part of the (known update|known solve|solve)"):
        use(dropin.Covariance(moment()))


def factor(C: Any, upper: bool) -> Any:
    return torch.linalg.cholesky(torch.eye(U) + K.T @ (C @ K), upper=upper)


def triangular(C: Any, factor_upper: bool = True, **how: bool) -> Any:
    F = C @ K
    return torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.eye(U) + K.T @ F, upper=factor_upper), F, **how
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"eye": 2.0 * torch.eye(U)}, "what is added to K' C K must be 1"),
        ({"eye": torch.eye(U) + torch.diag(torch.ones(U - 1), 1)}, "off the diagonal"),
        ({"eye": torch.ones(())}, "eye must have shape"),
        ({"transposed": OTHER.T}, "K.T has 192 elements that are not those of this batch"),
        ({"transposed": OTHER.T[:, :1]}, "K.T must have shape"),
    ],
)
def test_the_reference_code_is_given_its_own_matrices(what: dict[str, Tensor], message: str) -> None:
    stack = torch.stack([dropin.Covariance(moment())])
    for _ in range(2):  # a second try is refused as the first one
        with pytest.raises(ValueError, match=message):
            stack[0] = steps(stack[0], **what)
    assert stack[0].health() is None or stack[0].health().steps == 0
    with pytest.raises(ValueError, match="K of the new C @ K has 192 elements"):
        steps(stack[0]) @ OTHER


def test_the_lower_factor_serves_as_well() -> None:
    C = dropin.Covariance(moment())
    F = C @ K
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.eye(U) + K.T @ F), F.T, upper=False)
    assert relative_error((C - half.T @ half) @ K, torch.linalg.solve(moment() + K @ K.T, K)) < 1e-4


def test_a_covariance_that_is_not_stored_is_not_written() -> None:
    stack = torch.stack([dropin.Covariance(moment())])
    new = steps(stack[0])
    gain = new @ K
    assert stack[0].health().steps == 0
    stack[0] = new
    stack[0] = new
    assert stack[0].health().steps == 1
    assert torch.equal(new @ K, gain)
    assert relative_error(gain, torch.linalg.solve(moment() + K @ K.T, K)) < 1e-4


def test_two_batches_from_one_covariance() -> None:
    """The second one would have replaced the first."""
    stack = torch.stack([dropin.Covariance(moment())])
    news = [steps(stack[0]), steps(stack[0], keys=OTHER)]
    stack[0] = news[0]
    with pytest.raises(ValueError, match="C has got another batch since"):
        stack[0] = news[1]
    assert stack[0].health().steps == 1


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda A: A.bfloat16() @ A.bfloat16().T,
    "float16": lambda A: A.half() @ A.half().T,
    "float64": lambda A: A.double() @ A.double().T,
    "float32": lambda A: A.float() @ A.float().T,
}


@pytest.mark.parametrize("keys", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("shape", [(48, 4), (400, 900), (1000, 1)])
def test_rounding_of_the_product_is_no_doubt(name: str, keys: torch.dtype, shape: tuple[int, int]) -> None:
    for A in (
        normal(*shape, seed=7),
        normal(*shape, seed=8).abs() + 3.0,
        normal(*shape, seed=9) * torch.logspace(0, -6, shape[1]),
    ):
        given = A.to(keys)
        doubts = Doubts()
        doubts.gram(ROUNDED[name](given), given)
        doubts.settle()


@contextmanager
def lowered() -> Iterator[None]:
    with torch.autocast(K.device.type, dtype=torch.bfloat16):
        yield


def test_alphaedit_under_autocast_is_alphaedit() -> None:
    found = []
    for block in (pytest.MonkeyPatch.context, lowered):
        P, c = dropin.alphaedit(projector(), L2, (OTHER @ OTHER.T)[None], verify=True)
        with block():
            for seed in (11, 12, 13):
                keys = normal(D, U, seed=seed)
                for gram in (keys @ keys.T, (keys @ keys.T).float()):
                    change = torch.linalg.solve(P[0] @ (gram + c[0]) + L2 * EYE, P[0] @ keys @ R.T)
                c[0] += keys @ keys.T
            found.append([change, c.tensor()])
    assert found[0][0].dtype == found[1][0].dtype == torch.float32
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_memit_and_the_reference_code_under_autocast() -> None:
    found: list[list[Tensor]] = []
    second_moment = moment()
    for block in (pytest.MonkeyPatch.context, lowered):
        with block():
            covariance = dropin.Moment(second_moment, verify=True)
            stack = torch.stack([dropin.Covariance(second_moment, verify=True)])
            gains = [torch.linalg.solve(15 * covariance + keys @ keys.T, keys) for keys in (K, OTHER, K.double())]
            for keys in (K, OTHER):
                stack[0] = new = steps(stack[0], keys=keys)
                gains.append(new @ keys)
            found.append(gains)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_narrow_residual_takes_no_digits_from_the_gain() -> None:
    P, c = dropin.alphaedit(projector(), L2)
    residual = R.bfloat16()
    found = torch.linalg.solve(P[0] @ (K @ K.T + c[0]) + L2 * EYE, P[0] @ K @ residual.T)
    Q = projector()[0].double()
    wide = K.double()
    wanted = torch.linalg.solve(Q @ wide @ wide.T + L2 * EYE.double(), Q @ wide @ residual.double().T)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), wanted) < 1e-5
