"""What does a batch cost on 1 to 64 GPUs, by model and form: memory, bytes over links, time and efficiency?

A model of cost (`rlsedit_kernels/distributed/scaling.py`), not a measurement: bytes are those of the formulas that a
test compares with counted ones, rates are stated ones. Every one is printed, written with the result and can be changed
by a flag. `--docs` writes the tables into docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from harness import ROOT, arguments, report

from rlsedit_kernels.distributed.scaling import FORMS, MODELS, Rates, pays_from, table

DOCS = ROOT / "docs" / "distributed.md"
GPU_RESULT = ROOT / "bench" / "results" / "gpu.json"
NAMES = {"plain": "plain", "whitened": "whitened", "inverse_root": "inverse root"}

WORDS = {
    "memory": ("bytes/s of a GPU's memory, achievable on an H200 (docs/cuda.md)", 1e12, "TB/s"),
    "kernel_flops": ("flops/s of this package's kernels, 3xTF32 by mma.sync (docs/cuda.md)", 1e12, "TFLOP/s"),
    "torch_flops": ("flops/s of torch's IEEE float32 products (data sheet)", 1e12, "TFLOP/s"),
    "efficiency": ("fraction of these that kernels reach (docs/cuda.md: 70 to 80 %)", 1.0, ""),
    "chain": ("Gram, Cholesky, solve: latency of a batch (docs/cuda.md)", 1e-6, "us"),
    "launch": ("of one kernel from Python, where these are waited for", 1e-6, "us"),
    "bookkeeping": ("Python, checks and probes of one state in a bank", 1e-6, "us"),
    "nvlink": ("bytes/s into a GPU from its node (NVLink 4, one direction)", 1e9, "GB/s"),
    "infiniband": ("bytes/s into a GPU from other nodes (400 Gb/s for each GPU)", 1e9, "GB/s"),
    "link_efficiency": ("fraction of these that collectives reach", 1.0, ""),
    "near": ("a small collective within a node", 1e-6, "us"),
    "far": ("a small collective over several nodes", 1e-6, "us"),
    "node": ("GPUs of a node", 1.0, ""),
    "room": ("bytes of a GPU's memory", 1e9, "GB"),
    "cache": ("bytes of its second-level cache", 1e6, "MB"),
}


def shown(rates: Rates) -> dict[str, str]:
    """Each assumption by name: its value and what it is."""
    found = {}
    for name, (text, unit, symbol) in WORDS.items():
        value = f"{getattr(rates, name) / unit:g} {symbol}".strip()
        found[name] = f"{value}: {text}"
    return found


def markdown(rows: list[dict[str, Any]], rates: Rates, u: int, source: str) -> str:
    """What stands between the markers of docs/distributed.md."""
    lines = [f"Batches of {u} keys, float32. Assumed ({source}):", ""]
    lines += [f"- `--{name.replace('_', '-')}` {text}" for name, text in shown(rates).items()]
    for model in MODELS:
        mine = [row for row in rows if row["model"] == model.name]
        if mine:
            lines += ["", *(_experts(mine) if model.experts > 1 else _dense(mine))]
    return "\n".join([*lines, "", *remarks(rows, rates, u)])


def _dense(rows: list[dict[str, Any]]) -> list[str]:
    model = next(model for model in MODELS if model.name == rows[0]["model"])
    forms = [form for form in FORMS if any(row["form"] == form for row in rows)]
    heads = " | ".join(f"{NAMES[form]}: GB, MB | ms | efficiency" for form in forms)
    lines = [
        f"**{model.name}**, d = {model.d:,}, v = {model.v:,}: one layer ({model.layers} edited layers take "
        f"{model.layers} times the memory, bytes and time).",
        "",
        f"| GPUs | {heads} | {NAMES[forms[0]]}, one kernel for its rows: ms |",
        "|---" * (2 + 3 * len(forms)) + "|",
    ]
    for count in dict.fromkeys(row["gpus"] for row in rows):
        cells = {row["form"]: row for row in rows if row["gpus"] == count}
        parts = [
            f"{c['memory_GB']:.3g}, {c['received_MB']:.3g} | {c['layer_ms']:.3g} | {c['efficiency']:.2f}"
            for c in (cells[form] for form in forms)
        ]
        lines.append(f"| {count} | {' | '.join(parts)} | {cells[forms[0]]['fused_layer_ms']:.3g} |")
    return lines


def _experts(rows: list[dict[str, Any]]) -> list[str]:
    model = next(model for model in MODELS if model.name == rows[0]["model"])
    lines = [
        f"**{model.name}**, {model.experts} experts a layer of d = {model.d:,}, v = {model.v:,}, {model.chosen} for "
        f"each token, in a `StateBank` (plain form): one layer of {model.layers}.",
        "",
        "| GPUs | GB | GB, all layers | MB received | ms | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for c in rows:
        lines.append(
            f"| {c['gpus']} | {c['memory_GB']:.3g} | {c['memory_all_GB']:.3g} | {c['received_MB']:.3g} "
            f"| {c['layer_ms']:.3g} | {c['efficiency']:.2f} |"
        )
    return lines


def remarks(rows: list[dict[str, Any]], rates: Rates, u: int) -> list[str]:
    """Where sharding stops paying off, from the same figures."""
    lines = ["Where it stops paying off, by these figures:", ""]
    for form in dict.fromkeys(row["form"] for row in rows if "fused_layer_ms" in row):
        parts = []
        for model in MODELS:
            mine = [row for row in rows if row["form"] == form and row["model"] == model.name]
            if mine and model.experts == 1:
                fastest = min(mine, key=lambda row: row["layer_ms"])
                half = max(row["gpus"] for row in mine if row["efficiency"] >= 0.5)
                speed = f"{fastest['speedup']:.1f} times as fast as one"
                text = f"d = {model.d:,}: shortest at {fastest['gpus']} GPUs ({speed})"
                parts.append(text + (f", half efficient up to {half}" if half > 1 else ", nowhere half efficient"))
        least = ", ".join(f"{count} GPUs {_from(form, u, count, rates)}" for count in (2, 4, 8, 16))
        lines.append(f"- {NAMES[form]}: " + "; ".join(parts) + f". Faster than one GPU: {least}.")
    return lines


def _from(form: str, u: int, count: int, rates: Rates) -> str:
    least = pays_from(form, u, count, rates)
    return "never" if least is None else f"from d = {least:,}"


def fill(text: str, body: str) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: it has no markers.
    """
    pattern = re.compile(r"(<!-- begin scaling -->\n).*?(<!-- end scaling -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{DOCS.name} has no markers <!-- begin scaling --> and <!-- end scaling -->")
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text)


def parsed(given: list[str] | None = None) -> tuple[argparse.Namespace, Rates, str]:
    """Options, rates, and where the efficiency of the kernels is from."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--u", type=int, default=100, help="keys of a batch")
    parser.add_argument(
        "--measured", type=Path, default=GPU_RESULT, help="a result of bench/gpu.py, used where it is there"
    )
    parser.add_argument("--docs", action="store_true", help=f"write the tables into {DOCS.relative_to(ROOT)}")
    for field in fields(Rates):
        kind = int if field.name == "node" else float
        text = f"{WORDS[field.name][0]} (default {field.default:g})".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=text)
    options = parser.parse_args(given)
    if options.u < 1:
        parser.error(f"--u must be >= 1, got {options.u}")
    chosen = {field.name: value for field in fields(Rates) if (value := getattr(options, field.name)) is not None}
    rates, source = Rates(), "stated rates, no timing of the kernels is there"
    try:
        if options.measured.exists():
            rates = rates.measured(json.loads(options.measured.read_text(encoding="utf-8")))
            source = f"stated rates; efficiency of the kernels from {options.measured.name}"
        rates = replace(rates, **chosen)
    except ValueError as error:
        parser.error(str(error))
    return options, rates, source


def main() -> None:
    options, rates, source = parsed()
    rows = table(rates, u=options.u)
    for name, text in shown(rates).items():
        print(f"{name:>16} = {text}")
    settings = {"u": options.u, "dtype": "float32", "source": source, "rates": asdict(rates), "meaning": shown(rates)}
    settings["models"] = [asdict(model) for model in MODELS]
    report("scaling", settings, rows, options.json)
    print("\n".join(remarks(rows, rates, options.u)))
    if options.docs:
        text = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(fill(text, markdown(rows, rates, options.u, source)), encoding="utf-8")


if __name__ == "__main__":
    main()
