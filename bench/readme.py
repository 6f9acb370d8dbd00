"""Write tables of README.md and docs/, between their markers, and figures of the profiles, from bench/results/."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edit_tables import METHODS, compared, demo, edited_stream
from gpu_tables import comparison, targets

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Result = dict[str, Any]


def device(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"


HEADLINE = (
    "rlsedit, ops", "RLSFilter plain", "plain torch Woodbury", "RLSEdit, released sequence", "dense Cholesky",
    "dense Cholesky, float64", "MEMIT, float64", "AlphaEdit, Cholesky", "AlphaEdit, released",
)  # fmt: skip
"""Contenders of the tables in README.md and docs/evaluation.md; docs/profile.md has all."""


def shapes(*results: Result, names: Sequence[str] | None = None) -> str:
    """Time of a whole batch by shape, with ratios and errors."""
    columns = [{row["name"]: row for row in result["rows"]} for result in results]
    problems = [result["rows"][0]["problem"] for result in results]
    machine = results[-1]["machine"]
    calls = ", ".join(str(result["settings"]["repetitions"]) for result in results)
    lines = [
        f"One whole batch of {problems[-1]['u']} keys, state and weight, one layer, {problems[-1]['dtype']} "
        f"({machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}): median of {calls} calls (by "
        "column; n: fewer), and in brackets how many times that of the first row. error: |W - W_exact| / "
        "|W_exact - W_0| against float64 at the largest d, behind two batches (MEMIT's: one, it keeps none).",
        "",
        *_on_groups(results[-1], names),
        "| | " + " | ".join(f"d = {p['d']}, v = {p['v']}" for p in problems) + " | error |",
        "|---" * (len(problems) + 2) + "|",
    ]
    for name in (name for name in names or columns[-1] if name in columns[-1]):
        cells = [_median(column.get(name), result) for column, result in zip(columns, results, strict=True)]
        error = columns[-1][name]["error"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'' if error is None else f'{error:.0e}'} |")
    return "\n".join(lines)


def _on_groups(result: Result, names: Sequence[str] | None) -> list[str]:
    """What a ratio is to where the first row was measured again, by the contender in the table that shows it most."""
    rows = [row for row in result["rows"] if row["times"] is not None and row["ratio"]]
    rows = [row for row in rows if names is None or row["name"] in names]
    row = max(rows, key=lambda row: abs(_beside(row) / _first(row, result)["times"]["median"] - 1.0))
    first, time = _first(row, result), row["times"]["median"]
    shown, beside = _time(first["times"]["median"]), _time(_beside(row))
    if shown == beside:
        return []
    text = (
        "Ratios are to the first row as measured in turns with the contender. What does not fit into memory together "
        "is measured in groups, each with the first row anew; where its time there is not the one shown, it stands "
        f"behind the ratio: {row['name']}: {_time(time)} = {_ratio(row)} × {beside}, and "
        f"{time / first['times']['median']:.0f} times the {shown} that the first row took in the first group."
    )
    if row.get("baseline") is None:
        text += (
            " The file keeps time and ratio, from which such a time is worked out, and not of how many calls it is the "
            f"median (at most {result['settings']['repetitions']})."
        )
    return [text, ""]


def _median(row: Result | None, result: Result) -> str:
    """Time, ratio, the baseline's time where it is not the one of the first row, and the calls where they are fewer."""
    if row is None or row["times"] is None:
        return ""
    times, about = row["times"], []
    if row["ratio"] is not None:
        shown = _time(_first(row, result)["times"]["median"])
        beside = _time(_beside(row))
        about.append(_ratio(row) + ("" if beside == shown else f" × {beside}"))
    if times["repetitions"] < result["settings"]["repetitions"]:
        about.append(f"n = {times['repetitions']}")
    return _time(times["median"]) + (f" ({'; '.join(about)})" if about else "")


def _first(row: Result, result: Result) -> Result:
    """The row of the baseline on the same problem."""
    name = result["settings"]["baseline"]
    return next(one for one in result["rows"] if one["name"] == name and one["problem"] == row["problem"])


def _beside(row: Result) -> float:
    """Seconds of the baseline in the same group; files older than that field give it by time and ratio."""
    kept = row.get("baseline")
    return float(row["times"]["median"] / row["ratio"] if kept is None else kept)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1.0 else f"{seconds:.3g} s"


def _ratio(row: Result) -> str:
    return f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"


def batch_sizes(result: Result) -> str:
    """Table 2 of the paper: the update of one layer by method and batch size."""
    problem, machine = result["rows"][0]["problem"], result["machine"]
    sizes = sorted({row["problem"]["u"] for row in result["rows"]})
    rows = {(row["name"], row["problem"]["u"]): row for row in result["rows"]}
    lines = [
        f"One whole batch, state and weight, d = {problem['d']}, v = {problem['v']}, {problem['dtype']} "
        f"({machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}): median of "
        f"{result['settings']['repetitions']} calls, how many times that of the first row, and the error of W against "
        "float64.",
        "",
        "| | " + " | ".join(f"u = {u} | error" for u in sizes) + " |",
        "|---" * (2 * len(sizes) + 1) + "|",
    ]
    for name in (name for name in HEADLINE if (name, sizes[0]) in rows):
        cells = [f"{_median(rows[name, u], result)} | {rows[name, u]['error']:.0e}" for u in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def history(result: Result) -> str:
    """Cost against the number of batches before."""
    ages = sorted({row["problem"]["history"] for row in result["rows"]})
    rows = {(row["name"], row["problem"]["history"]): row for row in result["rows"]}
    problem = result["rows"][0]["problem"]
    lines = [
        "",
        f"Milliseconds of a batch after so many batches of {problem['u']} keys, d = {problem['d']}, "
        f"v = {problem['v']}; the ages of one contender stand side by side in one run.",
        "",
        "| | " + " | ".join(f"after {age}" for age in ages) + " | last over first |",
        "|---" * (len(ages) + 2) + "|",
    ]
    for name in dict.fromkeys(name for name, _ in rows):
        times = [rows[name, age]["times"] for age in ages]
        if all(times):
            cells = " | ".join(f"{1e3 * t['median']:.3g}" for t in times)
            lines.append(f"| {name} | {cells} | {times[-1]['median'] / times[0]['median']:.2f} |")
    return "\n".join(lines)


def stream(result: Result) -> str:
    """Memory over a stream."""
    peaks = [row["peak_extra_percent"] for row in result["rows"]]
    growth = max(row["memory_growth_MB"] for row in result["rows"])
    settings, ages = result["settings"], [row["batches"] for row in result["rows"]]
    grown = f"{growth:.1f}" if growth >= 0.1 else "less than 0.1"
    span = " to ".join(dict.fromkeys(f"{peak:.0f}" for peak in (min(peaks), max(peaks))))
    return (
        f"\nMemory at d = {settings['d']}, u = {settings['u']}: an update takes {span} % "
        f"of what the filter keeps, at its peak (measured without the guard, whose check takes more for a moment); "
        f"over {ages[1] - ages[0]} batches of a stream it grows by {grown} MB."
    )


FORMS = ("plain", "auto", "square root, carried", "plain, float64")
"""Rows of the table in README.md; docs/stability.md has all."""


def long_stream(result: Result, forms: Sequence[str] | None = None) -> str:
    """Error of W by form and prior after a long stream."""
    settings = result["settings"]
    return _errors(
        result,
        f"Error of W against a float64 solution of all batches at once, in the S-norm, after {settings['batches']} "
        f"batches of {settings['u']} correlated keys, d = {settings['d']}, float32 unless said. Condition: that of the "
        "prior, keys scaled so that k'C_0 k = 1. Ridge: |k|² = 500, so that rho = 3e-5 / λ².",
        forms,
    )


def real_keys(result: Result) -> str:
    """The same on the keys of a model."""
    settings = result["settings"]
    return "\n" + _errors(
        result,
        f"The same on real keys: SmolLM2-135M, layer {settings['layer']}, the subjects of {settings['facts']} facts in "
        f"batches of {settings['u']}; rho is again about 3e-5 / λ².",
    )


def _errors(result: Result, text: str, forms: Sequence[str] | None = None) -> str:
    problems = list(dict.fromkeys(row["problem"] for row in result["rows"]))
    forms = forms or list(dict.fromkeys(row["form"] for row in result["rows"]))
    cells = {(row["form"], row["problem"]): row for row in result["rows"]}
    lines = [text, "", "| form | " + " | ".join(problems) + " |", "|---" * (len(problems) + 1) + "|"]
    for form in forms:
        lines.append(f"| {form} | " + " | ".join(_error(cells[form, problem]) for problem in problems) + " |")
    return "\n".join(lines)


def _error(row: Result) -> str:
    return f"refused at batch {row['failed_at']}" if row["error_W"] is None else f"{row['error_W']:.0e}"


def engines(result: Result) -> str:
    """Time of the ops by engine of the native CPU library."""
    settings, rows = result["settings"], result["rows"]
    names = list(dict.fromkeys(row["engine"] for row in rows))
    found = {(row["op"], row["u"], row["engine"]): row for row in rows}
    lines = [
        f"By engine of the native CPU library, and plain torch: d = {settings['d']}, float32 ({device(result)}). "
        f"Milliseconds, the median over {settings['rounds']} rounds of the fastest of {settings['calls']} calls; in "
        "brackets how many times the first column, the median over the rounds of each round's ratio, so that it is "
        "not quite the ratio of the two times.",
        "",
        "| | u | " + " | ".join(names) + " | largest error |",
        "|---" * (len(names) + 3) + "|",
    ]
    for op, u in dict.fromkeys((row["op"], row["u"]) for row in rows):
        mine = [found[op, u, name] for name in names]
        cells = [f"{row['ms']:.3g}" + ("" if i == 0 else f" ({row['ratio']:.2f})") for i, row in enumerate(mine)]
        lines.append(f"| {op} | {u} | " + " | ".join(cells) + f" | {max(row['error'] for row in mine):.1e} |")
    return "\n".join(lines)


def accesses(result: Result, *others: Result, backend: str) -> str:
    """How the compiled kernels of a back end reach memory; `others` were compiled by other versions of Triton."""
    settings = result["settings"]
    u = settings["u"][0]
    mine, *theirs = ([r for r in x["rows"] if r["backend"] == backend and r["u"] == u] for x in (result, *others))
    by = f"Triton {settings['triton']}, " if others else ""
    lines = [
        f"Counted, not measured: d = {settings['d']}, u = {u}, v = {settings['v']}, float32 ({by}`bench/accesses.py`, "
        f"commit {result['machine']['commit']}). In brackets: times the fewest rounds of the 32 banks of shared "
        "memory, or sectors of 32 bytes of global memory, in which the same words could be had.",
        "",
        "| op | kernel | blocks | instructions of a thread (PTX) | of which mma | rounds of shared memory | sectors |"
        + "".join(f" rounds, Triton {other['settings']['triton']} |" for other in others),
        "|---" * (7 + len(others)) + "|",
    ]
    for row, *rows in zip(mine, *theirs, strict=True):
        if any((row["case"], row["kernel"]) != (r["case"], r["kernel"]) for r in rows):
            raise ValueError(f"accesses: other kernels were counted than {row['kernel']} of {row['case']}")
        kinds = row["instructions_per_thread"]
        cells = [f"`{row['kernel']}`", str(row["blocks"]), f"{sum(kinds.values()):.0f}", f"{kinds['mma']:.0f}"]
        for count, name in ((row, "rounds"), (row, "sectors"), *((r, "rounds") for r in rows)):
            least = count[f"least_{name}"]
            cells.append(f"{count[name]} ({count[name] / least:.2f})" if least else "")
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def append(result: Result) -> str:
    """Time of an append beside the alternatives."""
    settings = result["settings"]
    lines = [
        "",
        f"Rows appended to a triangular factor: d = {settings['d']}, u = {settings['u']}, right-hand side of "
        f"{settings['v']} columns, {settings['dtype']} ({device(result)}).",
        "",
        "| | median ms | p20 to p80 | relative to qr_append_ | backward error | after 300 small batches |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        error = f"{row['backward_error']:.1e}" if "backward_error" in row else ""
        streamed = f"{row['stream_error']:.1e}" if "stream_error" in row else ""
        lines.append(
            f"| {row['name']} | {row['median_ms']:.0f} | {row['p20_ms']:.0f} to {row['p80_ms']:.0f} "
            f"| {row['times_append']:.1f} | {error} | {streamed} |"
        )
    return "\n".join(lines)


def pipeline(result: Result) -> str:
    """z* and keys of many facts, beside one fact at a time through the whole model."""
    about = result["settings"]
    loss, key = about["largest_difference_of_a_loss"], about["largest_difference_of_a_key"]
    lines = [
        f"{about['facts']} facts, {about['model']}, layers {about['layers'][0]} to {about['layers'][-1]}, "
        f"{about['contexts']} contexts ({device(result)}); seconds a fact. Both reach the same losses: they differ by "
        f"{loss:.0e} at most, keys by {key:.0e}.",
        "",
        "| | one by one | together | ratio |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        one, together = row["one by one, s per fact"], row["together, s per fact"]
        lines.append(f"| {row['what']} | {one:.2f} | {together:.3f} | {row['ratio']:.1f} |")
    return "\n".join(lines)


def _runs(folder: str) -> tuple[str, ...]:
    """The finished runs of an evaluation, in the order of `METHODS`."""
    names = (f"{folder}/runs/{method}-seed0-order0.json" for method in METHODS)
    return tuple(name for name in names if (RESULTS / name).exists())


STREAMS = _runs("smollm2_counterfact")
SMALL_STREAMS = _runs("gemma3_counterfact")
COMPARISONS = ("compare_1.json", "compare_2.json", "compare_3.json")
SHAPES = ("profile_smollm2-135m.json", "profile_4096.json", "profile_llama3-8b.json")

Part = tuple[tuple[str, ...], Callable[..., str]]

ACCESSES = ("accesses.json", "accesses_triton36.json")

SECTIONS: dict[tuple[str, str], tuple[Part, ...]] = {
    ("README.md", "update"): ((SHAPES, partial(shapes, names=HEADLINE)),),
    ("README.md", "numerics"): ((("long_stream.json",), partial(long_stream, forms=FORMS)),),
    ("README.md", "demo"): ((("demo.json",), demo),),
    ("README.md", "stream"): ((STREAMS, edited_stream),),
    ("docs/methods.md", "compare"): ((COMPARISONS, compared),),
    ("docs/evaluation.md", "stream"): ((STREAMS, edited_stream),),
    ("docs/evaluation.md", "gemma stream"): ((SMALL_STREAMS, edited_stream),),
    ("docs/evaluation.md", "pipeline"): ((("pipeline.json",), pipeline),),
    ("docs/evaluation.md", "batch sizes"): ((("profile_sweep_u.json",), batch_sizes),),
    ("docs/profile.md", "update"): ((SHAPES, shapes), (("profile_history.json",), history), (("stream.json",), stream)),
    ("docs/profile.md", "append"): ((("qr.json",), append),),
    ("docs/profile.md", "engines"): ((("engines.json",), engines),),
    ("docs/cuda.md", "accesses"): ((("accesses.json",), partial(accesses, backend="cuda")),),
    ("docs/triton.md", "accesses"): ((ACCESSES, partial(accesses, backend="triton")),),
    ("docs/cuda.md", "gpu"): ((("gpu.json",), partial(comparison, backend="cuda")), (("gpu.json",), targets)),
    ("docs/triton.md", "gpu"): ((("gpu.json",), partial(comparison, backend="triton")),),
    ("docs/stability.md", "forms"): ((("long_stream.json",), long_stream), (("real_keys.json",), real_keys)),
}
"""By page and marker: files under bench/results/ and what makes text of them."""

AWAITED = frozenset({"gpu.json"})
"""Results that need a machine which is not always at hand: None where they are not there yet."""


def _result(file: str) -> Any:
    path = RESULTS / file
    return None if file in AWAITED and not path.exists() else json.loads(path.read_text(encoding="utf-8"))


def draw() -> None:
    """The figures of README.md and docs/profile.md, from the same results."""
    from rlsedit.report.profile_plots import plot_axis, plot_bars, plot_roofline
    from rlsedit_kernels.profile import load

    folder = ROOT / "docs" / "profile"
    folder.mkdir(exist_ok=True)
    largest = load(RESULTS / SHAPES[-1])
    plot_bars(largest, folder / "cost.svg")
    plot_roofline(largest, folder / "roofline.svg")
    plot_axis(load(RESULTS / "profile_history.json"), folder / "history.svg")


def fill(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers for {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text)


def pages() -> dict[Path, str]:
    """Each page with its tables as the results have them."""
    texts: dict[Path, str] = {}
    for (page, name), parts in SECTIONS.items():
        path = ROOT / page
        results = [[_result(file) for file in files] for files, _ in parts]
        body = "\n".join(make(*given) for given, (_, make) in zip(results, parts, strict=True))
        texts[path] = fill(texts.get(path) or path.read_text(encoding="utf-8"), name, body)
    return texts


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
