"""Which hyper-parameters suit a small model? Grids, on facts that no evaluation here uses.

Each setting of a method writes the same stream of facts into the same weights and is scored on a part of them, with the
score of the CounterFact benchmark, and by the perplexity of a text that is neither that of the second moments nor the
one of an evaluation. Targets z* are those of the unedited model for every setting, so that a grid costs one
optimisation; ROME makes its own, one fact at a time, and has nothing in this grid. Settings are written behind one
another into the JSON file, and those that are there are not run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import arguments, report

from rlsedit import Editor
from rlsedit.cli.options import load_any
from rlsedit.config import EditConfig
from rlsedit.facts import Fact, without_edited_neighbours
from rlsedit.facts.io import load_facts
from rlsedit.methods import get_method
from rlsedit.metrics import evaluate
from rlsedit.models import Adapter
from rlsedit.moments import second_moments
from rlsedit.paths import cache_dir
from rlsedit.prompts import make_contexts
from rlsedit.targets import TargetCache, Targets
from rlsedit.tasks.perplexity import perplexity
from rlsedit.texts import read_text

GRIDS: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    "smollm2": {
        "rlsedit": {"mom2_weight": (300.0, 1000.0), "lam": (1.0, 3.0)},
        "alphaedit": {"l2": (1.0, 10.0), "null_threshold": (1e-2, 2e-2)},
        "memit_seq": {"mom2_weight": (300.0, 1000.0, 3000.0)},
        "memit": {"mom2_weight": (1000.0, 3000.0, 10000.0)},
        "ft": {"ft_rate": (5e-5, 5e-4), "ft_bound": (0.0, 5e-4)},
    },
    "gemma3": {
        "rlsedit": {"mom2_weight": (10.0, 30.0), "lam": (0.3, 1.0)},
        "alphaedit": {"l2": (0.1, 1.0, 10.0), "null_threshold": (1e-1, 5e-1)},
        "memit_seq": {"mom2_weight": (10.0, 30.0, 100.0)},
        "memit": {"mom2_weight": (10.0, 30.0, 100.0)},
        "ft": {"ft_rate": (5e-5, 5e-4), "ft_bound": (0.0, 5e-4)},
    },
}


class FirstTargets:
    """z* of the unedited model, whatever has been written since."""

    def __init__(self, targets: Targets, ids: list[str]) -> None:
        self._targets, self._at = targets, {name: i for i, name in enumerate(ids)}

    def __call__(self, _adapter: Any, _tokenizer: Any, facts: Any, *_args: Any, **_options: Any) -> Targets:
        """As `optimise_targets`."""
        rows = torch.tensor([self._at[fact.id] for fact in facts])
        found = self._targets
        return Targets(found.z[rows], found.start[rows], found.losses[rows], found.steps[rows])


def targets_of(adapter: Adapter, tokenizer: Any, facts: list[Fact], config: EditConfig) -> Targets:
    """z* of the model as it is, kept in parts so that a run that was stopped goes on."""
    contexts = make_contexts(adapter, tokenizer, config.contexts, config.context_length, config.seed)
    cache = TargetCache(cache_dir("targets"))
    parts = [cache(adapter, tokenizer, facts[i : i + 20], contexts, config) for i in range(0, len(facts), 20)]
    return Targets(*(torch.cat([getattr(t, n) for t in parts]) for n in ("z", "start", "losses", "steps")))


def settings_of(grid: dict[str, dict[str, tuple[float, ...]]], methods: list[str]) -> Iterator[tuple[str, dict]]:
    for method in methods:
        for values in product(*grid[method].values()):
            yield method, dict(zip(grid[method], values, strict=True))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a causal LM, or smollm2")
    parser.add_argument("--grid", choices=list(GRIDS), default="smollm2")
    parser.add_argument("--facts", type=Path, required=True, help="facts, such as CounterFact's")
    parser.add_argument("--text", type=Path, required=True, help="text of the second moments")
    parser.add_argument("--held-out", type=Path, required=True, help="text of the perplexity")
    parser.add_argument("--start", type=int, default=5000, help="the first fact of the file that is used")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--sample", type=int, default=50, help="facts that are scored")
    parser.add_argument("--methods", help="methods of the grid, all by default")
    parser.add_argument("--layers", help="edited layers, such as 4,5,6; those of the preset by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    model, tokenizer = load_any(options)
    adapter = Adapter.for_model(model)
    own = {"layers": tuple(int(n) for n in options.layers.split(","))} if options.layers else {}
    facts = load_facts(options.facts)[options.start :][: options.count]
    facts = without_edited_neighbours(facts)
    chosen = [facts[i * len(facts) // options.sample] for i in range(options.sample)]
    held_out = read_text(options.held_out)
    config = EditConfig.for_model(model, "rlsedit", **own)
    moments = second_moments(
        model, tokenizer, config.layers, read_text(options.text), cache_dir=cache_dir("moments"), adapter=adapter
    )
    methods = options.methods.split(",") if options.methods else list(GRIDS[options.grid])
    first, loss = None, None
    if any(get_method(method).signal != "steps" for method in methods):
        targets = targets_of(adapter, tokenizer, facts, config)
        first, loss = FirstTargets(targets, [fact.id for fact in facts]), float(targets.losses.double().mean())
    about = {
        "model": Path(options.model).name, "facts": [options.start, options.start + len(facts)],
        "file": options.facts.name, "batch": options.batch, "scored": len(chosen), "layers": list(config.layers),
        "mean_loss_of_targets": loss,
    }  # fmt: skip
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("settings") == about else []

    def measured(method: str, values: dict[str, float]) -> dict[str, Any]:
        summary = evaluate(model, tokenizer, chosen, adapter=adapter).summary
        text = perplexity(adapter, tokenizer, held_out).summary["perplexity"]
        return {
            "method": method, **values, "score": summary["score"].mean, "stderr": summary["score"].stderr,
            **{name: summary[f"{name}_success"].mean for name in ("efficacy", "paraphrase", "neighbourhood")},
            "perplexity": text.mean,
        }  # fmt: skip

    done = {json.dumps({k: row[k] for k in row if k in ("method", *EditConfig.__dataclass_fields__)}) for row in rows}
    if json.dumps({"method": "none"}) not in done:
        rows.append(measured("none", {}))
    for method, values in settings_of(GRIDS[options.grid], methods):
        if json.dumps({"method": method, **values}) in done:
            continue
        setting = EditConfig.for_model(model, method, **own, **values)
        editor = Editor(
            model, tokenizer, method, setting, moments=moments, adapter=adapter, targets=first, record=False
        )
        try:
            editor.edit(facts, batch_size=options.batch)
            rows.append(measured(method, values))
        except (ValueError, ArithmeticError) as error:
            rows.append({"method": method, **values, "error": " ".join(str(error).split())})
        finally:
            editor.reset()
        report("choose", about, rows, options.json)


if __name__ == "__main__":
    main()
