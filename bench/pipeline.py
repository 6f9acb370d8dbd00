"""How fast are z* and keys of many facts, beside one-by-one optimisation that runs the whole model at each step?

One by one is the way of MEMIT's and AlphaEdit's released code: for each fact Adam on delta through the model's own
forward, all contexts of the fact in one padded batch, all logits formed; then for each edited layer a forward of the
whole model for its keys. It is run on a sample of the facts, before and after the pipeline in the same run; both
reach the same losses, which stand beside the times. SmolLM2-135M and facts made from small PyPI packages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from harness import arguments, report

from rlsedit.config import EditConfig
from rlsedit.facts import Fact
from rlsedit.facts.world import world_facts
from rlsedit.keys import KeyStream
from rlsedit.models import Adapter, smollm2
from rlsedit.prompts import Context, make_contexts
from rlsedit.targets import Targets, optimise_targets
from rlsedit.targets.reference import plain_targets
from rlsedit.targets.rows import fact_rows


def keys_together(adapter: Adapter, tokenizer, facts, contexts, config: EditConfig) -> dict[int, torch.Tensor]:
    rows = [row for row in fact_rows(tokenizer, facts, contexts) if row.kind == "nll"]
    stream = KeyStream(adapter, rows, contexts, config.max_tokens)
    return {n: stream.keys(n) for n in config.layers}


@torch.no_grad()
def keys_one_by_one(adapter: Adapter, tokenizer, facts, contexts, config: EditConfig) -> dict[int, torch.Tensor]:
    """For each fact and layer a forward of the whole model, as `compute_ks` of the released codes does."""
    weights = torch.tensor([context.weight for context in contexts], dtype=torch.float32)
    found: dict[int, list[torch.Tensor]] = {n: [] for n in config.layers}
    for fact in facts:
        rows = [row for row in fact_rows(tokenizer, [fact], contexts) if row.kind == "nll"]
        length = max(len(row.inputs) for row in rows)
        ids = torch.tensor([list(row.inputs) + [0] * (length - len(row.inputs)) for row in rows])
        mask = torch.tensor([[1] * len(row.inputs) + [0] * (length - len(row.inputs)) for row in rows])
        for n in config.layers:
            seen: list[torch.Tensor] = []
            hook = adapter.edited(n).register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            try:
                adapter.model(input_ids=ids, attention_mask=mask)
            finally:
                hook.remove()
            at = seen[0][torch.arange(len(rows)), [row.pivot for row in rows]]
            found[n].append(weights @ at)
    return {n: torch.stack(parts) for n, parts in found.items()}


def timed(action) -> tuple[float, object]:
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def sample(facts: Sequence[Fact], count: int) -> list[int]:
    return [i * len(facts) // count for i in range(count)]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--one-by-one", type=int, default=8, help="facts of the sample, half before and half after")
    options = parser.parse_args()
    model, tokenizer = smollm2.load()
    adapter, config = Adapter.for_model(model), EditConfig.for_model(model)
    facts = world_facts(0)[: options.facts]
    contexts: list[Context] = make_contexts(adapter, tokenizer, config.contexts, config.context_length, config.seed)
    args = (contexts, config)
    optimise_targets(adapter, tokenizer, facts[:2], *args)  # warm
    chosen = sample(facts, options.one_by_one)
    halves = [chosen[::2], chosen[1::2]]
    seconds = {"z*": {"one by one": 0.0, "together": 0.0}, "keys": {"one by one": 0.0, "together": 0.0}}
    alone: dict[int, tuple[float, int]] = {}
    own_keys: dict[int, dict[int, torch.Tensor]] = {}

    def one_by_one(part: list[int]) -> None:
        some = [facts[i] for i in part]
        spent, found = timed(lambda: plain_targets(adapter, tokenizer, some, *args))
        assert isinstance(found, Targets)
        seconds["z*"]["one by one"] += spent
        alone.update({i: (float(found.losses[j]), int(found.steps[j])) for j, i in enumerate(part)})
        with adapter.frozen():
            spent, keys = timed(lambda: keys_one_by_one(adapter, tokenizer, some, *args))
        seconds["keys"]["one by one"] += spent
        assert isinstance(keys, dict)
        own_keys.update({i: {n: keys[n][j] for n in config.layers} for j, i in enumerate(part)})

    one_by_one(halves[0])
    spent, targets = timed(lambda: optimise_targets(adapter, tokenizer, facts, *args))
    assert isinstance(targets, Targets)
    seconds["z*"]["together"] = spent
    with adapter.frozen():
        seconds["keys"]["together"], keys = timed(lambda: keys_together(adapter, tokenizer, facts, *args))
    assert isinstance(keys, dict)
    one_by_one(halves[1])

    loss = [abs(float(targets.losses[i]) - value) for i, (value, _) in alone.items()]
    steps = [abs(int(targets.steps[i]) - count) for i, (_, count) in alone.items()]
    away = max(
        float((keys[n][i] - own_keys[i][n]).norm() / own_keys[i][n].norm()) for i in own_keys for n in config.layers
    )
    rows = []
    for what, both in seconds.items():
        each = {"one by one": both["one by one"] / len(chosen), "together": both["together"] / len(facts)}
        rows.append({"what": what, **{f"{k}, s per fact": v for k, v in each.items()},
                     "ratio": each["one by one"] / each["together"]})  # fmt: skip
    total = [sum(row[f"{k}, s per fact"] for row in rows) for k in ("one by one", "together")]
    rows.append({"what": "both", "one by one, s per fact": total[0], "together, s per fact": total[1],
                 "ratio": total[0] / total[1]})  # fmt: skip
    settings = {
        "model": "SmolLM2-135M", "facts": len(facts), "one_by_one_facts": len(chosen), "contexts": len(contexts),
        "layers": list(config.layers), "mean_loss_together": float(targets.losses.mean()),
        "largest_difference_of_a_loss": max(loss), "largest_difference_of_steps": max(steps),
        "largest_difference_of_a_key": away, "mean_steps": float(targets.steps.double().mean()),
    }  # fmt: skip
    print({key: value for key, value in settings.items() if key.startswith(("mean", "largest"))})
    report("pipeline", settings, rows, options.json)


if __name__ == "__main__":
    main()
