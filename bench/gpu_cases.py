"""The comparisons of bench/gpu.py, one function each: whole update, its parts, appends, factors, several layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from gpu_bench import Bench, Entry, Problem, backends_of, error, floor

import rlsedit_kernels as rk

Errors = Callable[[str], dict[str, float]]
"""The errors against float64 of the back end of a name."""


def with_problem(bench: Bench, section: str, d: int, u: int, v: int) -> None:
    """A section that wants a problem of these sizes."""
    {"updates": updates, "parts": parts, "appends": appends}[section](bench, Problem(d, u, v, bench.device))


def ceilings(bench: Bench, d: int) -> None:
    """What the card does at best: the state read and written once, and an IEEE product of d x d matrices."""
    A, B = torch.randn(d, d, device=bench.device), torch.empty(d, d, device=bench.device)
    bench.compare("read and write once", {"d": d}, [Entry("copy", lambda: B.copy_(A))], floor(8.0 * d * d, 0.0))
    n = min(d, 8192)
    A, B = A[:n, :n].contiguous(), B[:n, :n].contiguous()
    bench.compare("IEEE product", {"d": n}, [Entry("torch.mm", lambda: torch.mm(A, A, out=B), most=5)])


WGMMA = "cuda, wgmma"
"""The CUDA back end with products by Hopper's wgmma, which docs/environment.md has as a switch."""


@contextmanager
def forced(name: str) -> Iterator[None]:
    """The back end of an entry, with what its name says beside it."""
    before = os.environ.get("RLSEDIT_CUDA_WGMMA")
    os.environ["RLSEDIT_CUDA_WGMMA"] = "1" if name == WGMMA else "0"
    try:
        with rk.use_backend(name.partition(",")[0]):
            yield
    finally:
        if before is None:
            del os.environ["RLSEDIT_CUDA_WGMMA"]
        else:
            os.environ["RLSEDIT_CUDA_WGMMA"] = before


def variants(device: str) -> list[str]:
    """Entries of the recursion: the back ends, and wgmma where the device has it."""
    names = backends_of(device)
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return [*names, WGMMA] if "cuda" in names and hopper else names


def whole_update(name: str, C: torch.Tensor, W: torch.Tensor, p: Problem) -> torch.Tensor:
    """State and weight by one back end; the gain."""
    with forced(name):
        gain = torch.ops.rlsedit_kernels.rls_update_(C, p.K, 1.0, 1.0)[0]
        torch.ops.rlsedit_kernels.weight_update_(W, p.K, p.V, gain)
    return gain


def updates(bench: Bench, p: Problem) -> None:
    """The whole update of state and weight, by each back end and each rival."""
    (d, v), u = p.W.shape, p.K.shape[0]
    eye = torch.eye(u, device=bench.device)
    exact_Y = p.C.double() @ p.K.double().mT
    exact_gain = torch.linalg.solve(p.K.double() @ exact_Y + eye.double(), exact_Y.mT).mT
    exact_W = p.W.double() + exact_gain @ (p.V.double() - p.K.double() @ p.W.double())
    rows = slice(0, min(d, 2048))  # of C: a float64 copy of all would be the largest thing here

    def errors_of(gain: torch.Tensor, C: torch.Tensor, W: torch.Tensor) -> dict[str, float]:
        exact_C = p.C[rows].double() - exact_gain[rows] @ exact_Y.mT
        return {"error": error(gain, exact_gain), "error_C": error(C[rows], exact_C), "error_W": error(W, exact_W)}

    def by(name: str) -> Entry:
        C, W = p.C.clone(), p.W.clone()  # an update changes them, and a rival must see the same problem each time

        def errors() -> dict[str, float]:
            fresh_C, fresh_W = p.C.clone(), p.W.clone()
            return errors_of(whole_update(name, fresh_C, fresh_W, p), fresh_C, fresh_W)

        return Entry(name, lambda: whole_update(name, C, W, p), errors)

    def woodbury() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        Y = p.C @ p.K.mT
        gain = torch.linalg.solve(p.K @ Y + eye, Y.mT).mT
        return gain, p.C - gain @ Y.mT, p.W + gain @ (p.V - p.K @ p.W)

    def alphaedit() -> torch.Tensor:
        system = p.C @ (p.K.mT @ p.K)  # P (K'K + M) with P = C and M = 0: the same size and cost
        system.diagonal().add_(1.0)
        return torch.linalg.solve(system, p.C @ (p.K.mT @ (p.V - p.K @ p.W)))

    entries = [by(name) for name in variants(bench.device)]
    if "cuda" in backends_of(bench.device) and bench.device == "cuda":
        entries.insert(1, Entry("cuda, in a graph", captured(p)))
    entries.append(Entry("plain torch Woodbury", woodbury, lambda: errors_of(*woodbury())))
    entries.append(Entry("AlphaEdit solve", alphaedit, most=4))
    least = floor(2.0 * 4 * d * d, 2.0 * d * d * u) + floor(3.0 * 4 * d * v, 4.0 * d * u * v)
    bench.compare("update of state and weight", {"d": d, "u": u, "v": v}, entries, least)


def captured(p: Problem) -> Callable[[], object]:
    """State and weight in a CUDA graph, captured at the first call."""
    C, W, graphs = p.C.clone(), p.W.clone(), []

    def run() -> None:
        if not graphs:
            whole_update("cuda", C, W, p)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                whole_update("cuda", C, W, p)
            graphs.append(graph)
        graphs[0].replay()

    return run


BY_WGMMA = ("gain_products", "key_products", "rls_update_")
"""Ops that have a product by wgmma."""


def by_backend(
    bench: Bench, op: str, given: Sequence[object], errors: Callable[[str], dict[str, float]]
) -> list[Entry]:
    """An entry a back end that has the op; `given` is changed by in-place ops, over and over."""

    def entry(name: str) -> Entry:
        def run() -> object:
            with forced(name):
                return getattr(torch.ops.rlsedit_kernels, op)(*given)

        return Entry(name, run, lambda: errors(name))

    return [entry(name) for name in (variants if op in BY_WGMMA else backends_of)(bench.device)]


def parts(bench: Bench, p: Problem) -> None:
    """The ops of the recursion one by one."""
    d, u = p.C.shape[0], p.K.shape[0]
    shape, ops = {"d": d, "u": u}, torch.ops.rlsedit_kernels
    Y = p.C @ p.K.mT
    G = p.K @ Y
    exact_Y = p.C.double() @ p.K.double().mT
    Z = 1e-3 * Y

    def called(name: str, op: str, *given: object) -> object:
        with forced(name):
            return getattr(ops, op)(*given)

    def products(name: str) -> dict[str, float]:
        return {"error": error(called(name, "gain_products", p.C, p.K)[0], exact_Y)}  # type: ignore[index]

    entries = by_backend(bench, "gain_products", (p.C, p.K), products)
    entries.append(Entry("plain torch", lambda: p.K @ (p.C @ p.K.mT), lambda: {"error": error(p.C @ p.K.mT, exact_Y)}))
    bench.compare("gain_products", shape, entries, floor(4.0 * d * d, 2.0 * d * d * u))

    eye = torch.eye(u, device=bench.device).double()
    exact_gain = torch.linalg.solve(G.double() + eye, Y.double().mT).mT  # of what gain_solve is given

    def solved(name: str) -> dict[str, float]:
        return {"error": error(called(name, "gain_solve", Y, G, 1.0)[0], exact_gain)}  # type: ignore[index]

    entries = by_backend(bench, "gain_solve", (Y, G, 1.0), solved)
    bench.compare("gain_solve", shape, entries, floor(12.0 * d * u, 2.0 * d * u * u))

    rows = slice(0, min(d, 2048))
    exact_rows = p.C[rows].double() - Z[rows].double() @ Z.double().mT

    def changed(op: str, *more: object) -> Callable[[str], dict[str, float]]:
        def errors(name: str) -> dict[str, float]:
            fresh = p.C.clone()
            called(name, op, fresh, Z, *more, -1.0)
            return {"error": error(fresh[rows], exact_rows)}

        return errors

    weights(bench, p, exact_gain)

    whole_gain = torch.linalg.solve(p.K.double() @ exact_Y + eye, exact_Y.mT).mT
    exact_C = p.C[rows].double() - whole_gain[rows] @ exact_Y.mT

    def committed(name: str) -> dict[str, float]:
        fresh = p.C.clone()
        gain = called(name, "rls_update_", fresh, p.K, 1.0, 1.0)[0]  # type: ignore[index]
        return {"error": error(gain, whole_gain), "error_C": error(fresh[rows], exact_C)}

    C = p.C.clone()
    entries = by_backend(bench, "rls_update_", (C, p.K, 1.0, 1.0), committed)
    bench.compare("rls_update_", shape, entries, floor(2.5 * 4 * d * d, 3.0 * d * d * u))
    entries = by_backend(bench, "downdate_", (C, Z, -1e-6), changed("downdate_"))
    bench.compare("downdate_", shape, entries, floor(1.5 * 4 * d * d, 1.0 * d * d * u))
    entries = by_backend(bench, "downdate_gain_products_", (C, Z, p.K, -1e-6), changed("downdate_gain_products_", p.K))
    bench.compare("downdate_gain_products_", shape, entries, floor(2.0 * 4 * d * d, 3.0 * d * d * u))


def weights(bench: Bench, p: Problem, gain: torch.Tensor) -> None:
    """K W, and W <- W + gain (V - K W), W being the transpose of the weight of an nn.Linear."""
    (d, v), u = p.W.shape, p.K.shape[0]
    shape = {"d": d, "u": u, "v": v}
    gain = gain.float()
    exact = p.W.double() + gain.double() @ (p.V.double() - p.K.double() @ p.W.double())

    def update(name: str, W: torch.Tensor) -> torch.Tensor:
        with forced(name):
            torch.ops.rlsedit_kernels.weight_update_(W, p.K, p.V, gain)
        return W

    def turned() -> torch.Tensor:  # a plain clone would keep the strides of p.W
        return p.W.mT.clone(memory_format=torch.contiguous_format).mT

    W, product = turned(), p.K.double() @ p.W.double()

    def formed(name: str) -> dict[str, float]:
        with forced(name):
            return {"error": error(torch.ops.rlsedit_kernels.key_products(W, p.K), product)}

    entries = by_backend(bench, "key_products", (W, p.K), formed)
    entries.append(Entry("plain torch", lambda: p.K @ W, lambda: {"error": error(p.K @ W, product)}))
    bench.compare("key_products", shape, entries, floor(4.0 * d * v, 2.0 * d * v * u))

    def entry(name: str) -> Entry:
        W = turned()
        return Entry(name, lambda: update(name, W), lambda: {"error": error(update(name, turned()), exact)})

    entries = [entry(name) for name in variants(bench.device)]
    bench.compare("weight_update_", shape, entries, floor(12.0 * d * v, 4.0 * d * u * v))


def appends(bench: Bench, p: Problem) -> None:
    """Rows appended to a triangular factor, and the gain from it."""
    d, u = p.R.shape[0], p.K.shape[0]
    R, stacked = p.R.clone(), torch.cat([p.R, p.K])
    rows = slice(0, min(d, 2048))
    information = p.R[:, rows].double().mT @ p.R.double() + p.K[:, rows].double().mT @ p.K.double()

    def appended(name: str) -> dict[str, float]:
        with rk.use_backend(name):
            fresh = p.R.clone()
            torch.ops.rlsedit_kernels.qr_append_(fresh, p.K)
        return {"error": error(fresh[:, rows].double().mT @ fresh.double(), information)}

    def dense() -> torch.Tensor:
        return torch.linalg.qr(stacked, mode="r")[1]

    def dense_error() -> dict[str, float]:
        new = dense()
        return {"error": error(new[:, rows].double().mT @ new.double(), information)}

    entries = by_backend(bench, "qr_append_", (R, p.K), appended)
    for entry in entries:
        entry.most = 3 if entry.name == "torch" else 7
    entries.append(Entry("torch.linalg.qr of the stack", dense, dense_error, most=2))
    bench.compare("qr_append_", {"d": d, "u": u}, entries, floor(4.0 * d * d, 2.0 * d * d * u))

    appends_rhs(bench, p)
    half = torch.linalg.solve_triangular(p.R.double().mT, p.K.double().mT, upper=False)
    exact = torch.linalg.solve_triangular(p.R.double(), half, upper=True)
    del half

    def gained(name: str) -> dict[str, float]:
        with rk.use_backend(name):
            return {"error": error(torch.ops.rlsedit_kernels.qr_gain(p.R, p.K), exact)}

    entries = by_backend(bench, "qr_gain", (p.R, p.K), gained)
    for entry in entries:
        entry.most = 7
    bench.compare("qr_gain", {"d": d, "u": u}, entries, floor(4.0 * d * d, 2.0 * d * d * u))


def appends_rhs(bench: Bench, p: Problem) -> None:
    """Rows appended to a triangular factor and to its right-hand side."""
    (d, v), u = p.W.shape, p.K.shape[0]
    R, B = p.R.clone(), p.W.clone()
    rows = slice(0, min(d, 2048))
    exact = p.R[:, rows].double().mT @ p.W.double() + p.K[:, rows].double().mT @ p.V.double()

    def appended(name: str) -> dict[str, float]:
        fresh_R, fresh_B = p.R.clone(), p.W.clone()
        with rk.use_backend(name):
            torch.ops.rlsedit_kernels.qr_append_rhs_(fresh_R, fresh_B, p.K, p.V)
        return {"error": error(fresh_R[:, rows].double().mT @ fresh_B.double(), exact)}  # R'B gains K'V

    entries = by_backend(bench, "qr_append_rhs_", (R, B, p.K, p.V), appended)
    for entry in entries:
        entry.most = 3 if entry.name == "torch" else 7
    least = floor(4.0 * d * d + 8.0 * d * v, 2.0 * d * u * (d + 2 * v))
    bench.compare("qr_append_rhs_", {"d": d, "u": u, "v": v}, entries, least)


def factors(bench: Bench, sizes: Sequence[int]) -> None:
    """Batched Cholesky."""
    for u in sizes:
        for count in (5, 64):
            A = torch.randn(count, u, u, device=bench.device)
            A = A @ A.mT / u + torch.eye(u, device=bench.device)
            exact = torch.linalg.cholesky(A.double())

            def torchs(A: torch.Tensor = A) -> torch.Tensor:
                return torch.linalg.cholesky_ex(A)[0]

            def errors(name: str, A: torch.Tensor = A, exact: torch.Tensor = exact) -> dict[str, float]:
                with rk.use_backend(name):
                    return {"error": error(torch.ops.rlsedit_kernels.cholesky(A)[0], exact)}

            entries = [e for e in by_backend(bench, "cholesky", (A,), errors) if e.name != "torch"]
            own = Entry("torch.linalg.cholesky_ex", torchs, lambda f=torchs, e=exact: {"error": error(f(), e)})  # type: ignore[misc]
            bench.compare("cholesky", {"count": count, "u": u}, [*entries, own], floor(8.0 * count * u * u, 0.0))


def layers(bench: Bench, d: int, u: int, count: int = 5) -> None:
    """Several layers in the same launches, and one after the other."""
    made = [Problem(d, u, 16, bench.device) for _ in range(count)]
    C, K = torch.stack([p.C for p in made]), torch.stack([p.K for p in made])

    def one_by_one() -> None:
        for i in range(count):
            torch.ops.rlsedit_kernels.rls_update_(C[i], K[i], 1.0, 1.0)

    entries = by_backend(bench, "rls_update_", (C, K, 1.0, 1.0), lambda name: {})
    entries.append(Entry("one after the other", one_by_one))
    least = floor(2.0 * 4 * count * d * d, 2.0 * count * d * d * u)
    bench.compare("rls_update_ of layers", {"count": count, "d": d, "u": u}, entries, least)


def worst_error(bench: Bench, name: str) -> float | None:
    """The largest error of an entry by that of torch on the same problem, over all comparisons and results."""
    keys = ("what", "d", "u", "v", "count")
    plain = {
        tuple(row.get(k) for k in keys): row
        for row in bench.rows
        if row.get("name") in ("torch", "torch.linalg.cholesky_ex") and "error" in row
    }
    ratios = [
        float(row[key]) / float(rival[key])  # type: ignore[arg-type]
        for row in bench.rows
        if row.get("name") == name and (rival := plain.get(tuple(row.get(k) for k in keys))) is not None
        for key in ("error", "error_C", "error_W")
        if isinstance(row.get(key), float) and isinstance(rival.get(key), float) and rival[key]
    ]
    return max(ratios, default=None)


def targets(bench: Bench, d: int, sizes: Sequence[int], factor_sizes: Sequence[int]) -> list[dict[str, object]]:
    """The figures to reach, each with what was measured; nothing where either side is missing."""

    def ratio(what: str, name: str, rival: float | None, **shape: int) -> float | None:
        ours = bench.median(what, name, **shape)
        return rival / ours if ours and rival else None

    u, update = sizes[0], "update of state and weight"
    ours = bench.median(update, "cuda", u=u)
    found: list[tuple[str, float, float | None, bool]] = []  # name, wanted, got, whether less is better
    found.append(("ms of the whole update", 1.3, ours, True))
    for rival, wanted in (("AlphaEdit solve", 100.0), ("plain torch Woodbury", 3.0)):
        found.append((f"times {rival}", wanted, ratio(update, "cuda", bench.median(update, rival, u=u), u=u), False))
    once = bench.median("read and write once", "copy", d=d)
    if 1 in sizes:
        one = bench.median(update, "cuda", u=1)
        state = bench.median("rls_update_", "cuda", u=1)
        found.append(
            ("u = 1, state and weight, by a copy of the state", 1.5, one / once if one and once else None, True)
        )
        found.append(
            ("u = 1, state alone, by a copy of the state", 1.5, state / once if state and once else None, True)
        )
    for n in factor_sizes:
        for count in (5, 64) if 32 <= n <= 256 else ():
            rival_ms = bench.median("cholesky", "torch.linalg.cholesky_ex", u=n, count=count)
            got = ratio("cholesky", "cuda", rival_ms, u=n, count=count)
            found.append((f"times cholesky_ex, {count} of {n}", 3.0, got, False))
    append = bench.median("qr_append_", "torch.linalg.qr of the stack", u=u)
    found.append(("times torch.linalg.qr", 20.0, ratio("qr_append_", "cuda", append, u=u), False))
    found.append(("ms of an append", 12.0, bench.median("qr_append_", "cuda", u=u), True))
    triton = bench.median(update, "triton", u=u)
    found.append(("Triton: ms of the whole update by CUDA's", 1.5, triton / ours if triton and ours else None, True))
    rival_ms = bench.median(update, "AlphaEdit solve", u=u)
    found.append(("Triton: times AlphaEdit solve", 60.0, rival_ms / triton if triton and rival_ms else None, False))
    for name in ("cuda", WGMMA, "triton"):
        worst = worst_error(bench, name)
        if name != WGMMA or worst is not None:
            found.append((f"{name}: largest error by torch's in IEEE float32", 2.0, worst, True))

    def row(name: str, wanted: float, got: float | None, less: bool) -> dict[str, object]:
        met = None if got is None else (got <= wanted if less else got >= wanted)
        return {"what": "target", "name": name, "wanted": wanted, "measured": got, "met": met}

    return [row(*each) for each in found]
