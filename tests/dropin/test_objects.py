"""The stand-ins by themselves: what they refuse, and the blocks of docs/dropin.md."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import normal
from support.tolerances import relative_error
from torch import Tensor

from rlsedit_kernels import CovarianceState, Prior, dropin

D, V, U, L2 = 30, 6, 4, 2.0
DOCS = Path(__file__).parents[2] / "docs" / "dropin.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def projectors() -> Tensor:
    bases = [torch.linalg.qr(normal(D, 20, seed=seed))[0] for seed in (1, 2)]
    return torch.stack([basis @ basis.T for basis in bases])


def moment() -> Tensor:
    samples = normal(5 * D, D, seed=3)
    return samples.T @ samples / len(samples)


K, R = normal(D, U, seed=4), normal(V, U, seed=5)
EYE = torch.eye(D)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda P, c: P + 1.0 * EYE, TypeError, "arithmetic with ProjectorStack"),
        (lambda P, c: torch.linalg.svd(P[0, :, :]), TypeError, "no part of an expression"),
        (lambda P, c: P[0, :, :] @ c[1, :, :], TypeError, r"P\[i\] @ _Cache"),
        (lambda P, c: P[0, :, :] @ (K @ K.T + c[1, :, :]), TypeError, r"P\[i\] @ _Gram"),
        (lambda P, c: P[0, :3, :], TypeError, "layer by layer"),
        (lambda P, c: P[2, :, :], TypeError, "layer by layer"),
        (lambda P, c: c[True], TypeError, "layer by layer"),
        (lambda P, c: P[EYE[0]], TypeError, "layer by layer"),
        (lambda P, c: P[0].T, AttributeError, "_Projector.T is no part of the solve"),
        (lambda P, c: c.norm(), AttributeError, "CacheStack.norm is no part of the solve"),
        (
            lambda P, c: torch.linalg.solve(P[0] @ (K @ K.T + c[0]) + 3.0 * EYE, P[0] @ K @ R.T),
            ValueError, "L2 must be 2 as it was given, got 3",
        ),
        (lambda P, c: P[0] @ (K @ K.T + c[0]) + L2 * EYE + L2 * EYE, TypeError, "one term beside"),
        (lambda P, c: torch.linalg.solve(P[0] @ (K @ K.T + c[0]), P[0] @ K @ R.T), TypeError, "lacks L2"),
        (
            lambda P, c: torch.linalg.solve(P[0] @ (K @ K.T + EYE + c[0]) + L2 * EYE, P[0] @ K @ R.T),
            ValueError, "another term in the system",
        ),
        (
            lambda P, c: torch.linalg.solve(P[0] @ (K @ K.T + c[0]) + L2 * EYE, P[1] @ K @ R.T),
            TypeError, "of one layer",
        ),
        (lambda P, c: torch.linalg.solve(P[0] @ (K @ K.T + c[0]) + L2 * EYE, K @ R.T), TypeError, "both sides"),
        (lambda P, c: c[0].__iadd__(K @ K.T), ValueError, "solved for only"),
        (lambda P, c: c.__setitem__(0, K @ K.T), TypeError, "only grow by K @ K.T"),
        (lambda P, c: P.__setitem__((0, slice(None), slice(None)), EYE), TypeError, "P must stay as it was given"),
        (lambda P, c: 0.9 * EYE + 0.1 * c[0, :, :], TypeError, "arithmetic with _Cache"),
        (lambda P, c: c[0] - EYE, TypeError, "arithmetic with _Cache"),
        (lambda P, c: EYE @ (K @ K.T + c[0]), TypeError, r"cache_c.tensor\(\)"),
    ],
)  # fmt: skip
def test_alphaedit_refuses_what_it_does_not_know(
    use: Callable[[Any, Any], object], error: type[Exception], message: str
) -> None:
    P, cache = dropin.alphaedit(projectors(), L2)
    with pytest.raises(error, match=message):
        use(P, cache)


def test_a_batch_is_committed_once_and_with_its_own_keys() -> None:
    P, cache = dropin.alphaedit(projectors(), L2)
    torch.linalg.solve(P[0] @ (K @ K.T + cache[0]) + L2 * EYE, P[0] @ K @ R.T)
    other = normal(D, U, seed=9)
    with pytest.raises(ValueError, match="must be that of the keys"):
        cache[0] += other @ other.T
    cache[0] += K @ K.T
    with pytest.raises(ValueError, match="solved for only, and once"):
        cache[0] += K @ K.T
    assert P.health()[0].steps == 1
    assert P.health()[1] is None


def test_a_layer_by_other_indices() -> None:
    P, cache = dropin.alphaedit(projectors(), L2)
    wanted = torch.linalg.solve(P[1] @ (K @ K.T + cache[1]) + L2 * EYE, P[1] @ K @ R.T)
    for i in (-1, np.int64(1), (torch.tensor(1), ...), (1, slice(None), slice(None))):
        assert torch.equal(torch.linalg.solve(P[i] @ (K @ K.T + cache[i]) + L2 * EYE, P[i] @ K @ R.T), wanted)


def test_alphaedit_names_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"P must be a tensor of shape \(layers, d, d\), got \(30, 30\)"):
        dropin.alphaedit(projectors()[0], L2)
    with pytest.raises(ValueError, match="cache_c must have the shape of P"):
        dropin.alphaedit(projectors(), L2, projectors()[:1])
    with pytest.raises(ValueError, match="l2 must be finite and > 0"):
        dropin.alphaedit(projectors(), 0.0)


@pytest.mark.parametrize(
    ("given", "error"),
    [(None, TypeError), (moment()[0], ValueError), (moment()[:3], ValueError), (moment().long(), ValueError)],
)
def test_memit_names_a_wrong_moment(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="the second moment must"):
        dropin.Moment(given)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda cov: torch.linalg.solve(15 * cov.double() + K @ K.T + EYE, K), "two terms"),
        (lambda cov: torch.inverse(cov.cuda()), "no part of an expression"),
        (lambda cov: cov * EYE, "multiplied by a number"),
        (lambda cov: torch.linalg.solve(15 * cov + K @ K.T, cov), "right-hand side"),
    ],
)
def test_memit_refuses_what_it_does_not_know(use: Callable[[Any], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        use(dropin.Moment(moment()))


def test_memit_fetches_each_moment_once() -> None:
    asked = []

    def get_cov(model: object, tok: object, layer_name: str, **_: object) -> Tensor:
        asked.append(layer_name)
        return moment()

    get, model = dropin.memit(get_cov), object()
    assert get(model, None, "a") is get(model, None, "a") is not get(model, None, "b")
    get(model, None, "a", force_recompute=True)
    assert isinstance(get(model, None, "a", inv=True), Tensor)
    assert asked == ["a", "b", "a", "a"]


def test_memit_fetches_a_moment_again_where_it_may_be_another_one() -> None:
    """As in forks whose second moment takes the requests of the batch before in; what is equal keeps its state."""
    moments, asked = [moment(), moment(), 2.0 * moment(), moment(), 3.0 * moment()], []

    def get_cov(
        model: object, tok: object, layer_name: str, dtype: str, last: Any = None, hparams: Any = None
    ) -> Tensor:
        asked.append(last)
        return moments[len(asked) - 1]

    get, model, config = dropin.memit(get_cov), object(), SimpleNamespace()
    requests = ["a fact"]
    first, same, other = (get(model, None, "a", "float32", last=requests, hparams=config) for _ in range(3))
    assert first is same is not other
    for stand, factor in ((first, 1.0), (other, 2.0)):
        wanted = torch.linalg.solve(15 * factor * moment() + K @ K.T, K)
        assert relative_error(torch.linalg.solve(15 * stand + K @ K.T, K), wanted) < 1e-4
    plain = get(model, None, "a", "float32", hparams=config)
    assert get(model, None, "a", dtype="float32", last=None, hparams=config) is plain is not other
    assert get(model, None, "a", "float32", hparams=SimpleNamespace()) is not plain
    assert len(asked) == 5


@pytest.mark.parametrize("weight", [1000.0, -1.0])
@pytest.mark.parametrize("keys", [K, K.double()])
def test_a_moment_that_is_not_positive_definite_is_solved_with_as_it_is(weight: float, keys: Tensor) -> None:
    """What the original gives then hangs on the rounding of the moment; a lifted one would have another answer."""
    few = normal(D - 9, D, seed=7)
    given = few.T @ few / len(few)
    stand = dropin.Moment(given, verify=True)
    gram = keys @ keys.T
    with pytest.warns(RuntimeWarning, match="solved as the original does, at its cost: .* positive definite"):
        found = torch.linalg.solve(weight * stand.double() + gram, keys)
    assert torch.equal(found, torch.linalg.solve(weight * given.to(keys) + gram, keys))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one is enough
        with pytest.raises(ValueError, match="of the keys of this batch"):
            torch.linalg.solve(weight * stand.double() + 2.0 * gram, keys)


@pytest.mark.parametrize("smallest", [1e-5, 1e-7])
def test_a_moment_with_small_eigenvalues_is_not_lifted(smallest: float) -> None:
    turned = torch.linalg.qr(normal(D, D, seed=8).double())[0]
    given = (turned * torch.logspace(0.0, math.log10(smallest), D, dtype=torch.float64)) @ turned.T
    given, keys = ((given + given.T) / 2.0).float(), K.double()
    found = torch.linalg.solve(1000 * dropin.Moment(given).double() + keys @ keys.T, keys)
    wanted = torch.linalg.solve(1000 * given.double() + keys @ keys.T, keys)
    assert relative_error(found, wanted) < 1e-8


@pytest.mark.parametrize("smallest", [1e-5, 1e-7])
def test_an_information_with_small_eigenvalues_is_not_lifted(smallest: float) -> None:
    turned = torch.linalg.qr(normal(D, D, seed=8).double())[0]
    given = (turned * torch.logspace(2.0, 2.0 + math.log10(smallest), D, dtype=torch.float64)) @ turned.T
    given = ((given + given.T) / 2.0).float()
    found = dropin.Covariance(given, verify=True).update(K)
    assert relative_error(found, torch.linalg.solve(given.double() + K.double() @ K.double().T, K.double())) < 1e-5


def test_a_singular_information_is_lifted() -> None:
    few = normal(D - 9, D, seed=7)
    given = few.T @ few / len(few)
    values, vectors = torch.linalg.eigh(given.double())
    lifted = (vectors * values.clamp_min(4.0 * torch.finfo(given.dtype).eps * float(values[-1]))) @ vectors.T
    wanted = torch.linalg.solve(lifted + K.double() @ K.double().T, K.double())
    assert relative_error(dropin.Covariance(given).update(K), wanted) < 1e-3


def test_memit_over_memit_is_memit() -> None:
    get = dropin.memit(dropin.memit(lambda model, tok, layer_name: moment()))
    assert get("model", None, "a") is get("model", None, "a")


def test_memit_knows_a_model_by_its_name_or_by_itself() -> None:
    """As the cache of that code does; the address of a model that is gone may be that of another."""
    asked = []

    def get_cov(model: object, tok: object, layer_name: str) -> Tensor:
        asked.append(model)
        return moment()

    get = dropin.memit(get_cov)
    named = [SimpleNamespace(config=SimpleNamespace(_name_or_path=name)) for name in ("one", "one", "two", "")]
    assert get(named[0], None, "a") is get(named[1], None, "a") is not get(named[2], None, "a")
    assert get(named[3], None, "a") is get(named[3], None, "a")
    assert len(asked) == 3
    del asked[:]
    assert len({id(get(SimpleNamespace(), None, "a")) for _ in range(3)}) == 3


def test_a_matrix_that_comes_again_is_factored_once() -> None:
    make = dropin.rls(lambda matrix, **_: matrix)
    first, again, other = make(moment()), make(moment().clone(), layer_idx=3), make(2.0 * moment())
    gains = [covariance.update(K) for covariance in (first, again, other)]
    assert torch.equal(gains[0], gains[1])
    assert first._prior is again._prior is not other._prior
    assert [covariance.health().steps for covariance in (first, again)] == [1, 1]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda C: C - K @ K.T, r"C - \w+ is not part"),
        (lambda C: torch.linalg.inv(C), "no part of an expression"),
        (lambda C: change(C, K) @ normal(D, U + 1, seed=8), "multiplied by the keys of its batch"),
        (lambda C: torch.stack([C], dim=1), "along dimension 0"),
        (lambda C: torch.stack([C]).__setitem__(0, K @ K.T), "its own update"),
    ],
)
def test_the_reference_code_refuses_what_it_does_not_know(use: Callable[[Any], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        use(dropin.Covariance(moment()))


def change(C: Any, keys: Tensor) -> Any:
    """What the reference code writes."""
    F = C @ keys
    upper = torch.linalg.cholesky(torch.eye(keys.shape[1]) + keys.T @ F, upper=True)
    G = torch.linalg.solve_triangular(upper, F, upper=True, left=False)
    return C - G @ G.T


def test_a_copied_covariance_is_independent() -> None:
    stack = torch.stack([dropin.Covariance(moment())])
    twin = stack.clone()
    twin[0] = change(twin[0], K)
    assert stack[0].health() is None
    assert twin[0].health().steps == 1


@pytest.mark.parametrize("block", [b for b in BLOCKS if "class" not in b], ids=lambda b: b.split("\n")[2][:40])
def test_a_how_to_changes_at_most_ten_lines(block: str) -> None:
    assert 1 <= len([line for line in block.splitlines() if line.strip()]) <= 10
    compile(block if not block.startswith(" ") else "if True:\n" + block, "docs/dropin.md", "exec")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_editor_of_thirty_lines(dtype: torch.dtype, bias: bool) -> None:
    """It minimises its objective for a layer of any dtype; batches that are removed or fail leave no trace."""
    (block,) = [b for b in BLOCKS if "class LinearEditor" in b]
    assert len([line for line in block.splitlines() if line.strip()]) <= 30
    space: dict[str, Any] = {}
    exec(compile(block, "docs/dropin.md", "exec"), space)
    inputs, layers = normal(4 * D, D, seed=6), [torch.nn.Linear(D, V, bias=bias, dtype=dtype) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    first = layers[0].weight.detach().clone().double()
    editors = [space["LinearEditor"](layer, inputs, 2.0) for layer in layers]
    batches = {
        n: (normal(U, D, seed=10 + i).to(dtype), normal(U, V, seed=20 + i).to(dtype)) for i, n in enumerate("abc")
    }
    for name, batch in batches.items():
        editors[0].write(name, *batch)
        if name != "b":
            editors[1].write(name, *batch)
    information = 2.0 * inputs.double().T @ inputs.double() / len(inputs)
    keys = torch.cat([k for k, _ in batches.values()]).double()
    values = torch.cat([v for _, v in batches.values()]).double()
    if bias:
        values -= layers[0].bias.detach().double()
    wanted = torch.linalg.solve(information + keys.T @ keys, information @ first.T + keys.T @ values)
    master = 1e-10 if dtype == torch.float64 else 1e-5
    assert relative_error(editors[0].master.double(), wanted.T) < master
    assert relative_error(layers[0].weight.detach().double(), wanted.T) < max(master, torch.finfo(dtype).eps / 2)
    before, covariance = layers[0].weight.detach().clone(), editors[0].state.covariance()
    for name, batch in {"shape": (K.T, R), "NaN": (K.T * float("nan"), R.T)}.items():
        with pytest.raises((RuntimeError, ValueError)):
            editors[0].write(name, *batch)
    with pytest.raises(KeyError):
        editors[0].remove("shape")
    assert torch.equal(layers[0].weight, before)
    assert torch.equal(editors[0].state.covariance(), covariance)
    editors[0].remove("b")
    assert relative_error(editors[0].master, editors[1].master) < 10.0 * master  # a removal loses a digit
    assert list(editors[0].written) == ["a", "c"]


def test_rows_of_a_handed_over_cache() -> None:
    """The state of a cache of earlier keys is that of the keys themselves."""
    keys = normal(7, D, seed=12)
    gram = (keys.T @ keys)[None].expand(2, D, D)
    P, cache = dropin.alphaedit(projectors(), L2, gram)
    found = torch.linalg.solve(P[0] @ (K @ K.T + cache[0]) + L2 * EYE, P[0] @ K @ R.T)
    state = CovarianceState(Prior.null_space(projectors()[0], L2), device=K.device)
    state.commit(keys)
    torch.testing.assert_close(found, state.gain(K.T) @ R.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("make", "name"), [(dropin.memit, "memit: get_cov"), (dropin.rls, "rls: inverse")])
@pytest.mark.parametrize("given", [None, 3, torch.eye(2)])
def test_what_is_no_function_is_refused_at_once(make, name, given) -> None:
    """Not in the middle of the first batch."""
    with pytest.raises(TypeError, match=f"dropin.{name} must be the function that is replaced, got"):
        make(given)
