"""What is lost on the ways out of an edited model: a LoRA adapter by its rank, a delta, a folder, float32 and bf16.

SmolLM2-135M-Instruct is edited with facts that it knows otherwise, and the change of its weights is exported. "lora"
rows: the base with an adapter of that rank on top. "logits": relative difference of the logits, for the prompts of the
facts, from those of the edited model, after loading what was written (the adapter by PEFT where that is installed).
"bf16" rows: base and edited weights rounded to bfloat16, the adapter taken from the float32 master or from the two
roundings; the error is that of W - W_0 against the master's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import arguments, report

from rlsedit import EditConfig, Editor, evaluate, load_facts
from rlsedit.demo.known import choose_known
from rlsedit.export import (
    Checkpoint,
    apply_delta,
    changes_of_model,
    export_folder,
    factorise,
    given,
    save_delta,
    write_lora,
)
from rlsedit.export.lowrank import low_rank, noise_edge
from rlsedit.export.scores import with_adapter, with_weights
from rlsedit.facts.world import world_facts
from rlsedit.models import Adapter, smollm2
from rlsedit.moments import second_moments
from rlsedit.paths import cache_dir
from rlsedit.texts import installed_prose

Rows = list[dict[str, Any]]


def scored(name: str, rank: int | None, found: Any, **more: Any) -> dict[str, Any]:
    s = found.summary
    kinds = ("efficacy_success", "efficacy_accuracy", "paraphrase_success", "neighbourhood_success")
    return {"what": name, "rank": rank, **more, **{kind: s[kind].mean for kind in kinds}}


@torch.no_grad()
def logits(model: torch.nn.Module, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    rows = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double() for prompt in prompts]
    return torch.stack(rows)


def size_of(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 2**20


def routes(editor: Editor, prompts: list[str], factors: Any, work: Path) -> Rows:
    """Write, load back, compare."""
    base, tokenizer = smollm2.cached_copy(), editor.tokenizer
    wanted = logits(editor.model, tokenizer, prompts)
    masters = {n: editor.adapter.rows(n).clone() for n in editor.config.layers}
    changes = given(Checkpoint(base), masters)
    export_folder(base, masters, work / "hf")
    save_delta(base, changes, work / "bits", form="bits")
    save_delta(base, changes, work / "factors", form="factors")
    write_lora(factors, work / "lora", base=str(base))
    rows: Rows = []

    def add(name: str, model: torch.nn.Module) -> None:
        error = float((logits(model, tokenizer, prompts) - wanted).norm() / wanted.norm())
        rows.append({"what": name, "logits": error, "MiB": size_of(work / name.split(",")[0].split()[-1])})

    add("folder hf", smollm2.load_model(work / "hf")[0])
    for form in ("bits", "factors"):
        model = smollm2.load_model(base)[0]
        apply_delta(model, work / form)
        add(f"delta {form}", model)
    try:
        import peft
    except ImportError:
        return rows
    model = peft.PeftModel.from_pretrained(smollm2.load_model(base)[0], str(work / "lora"))
    add("peft lora", model)
    add("peft lora, merged", model.merge_and_unload())
    return rows


def halves(changes: Any) -> Rows:
    """Adapters of a bf16 model, from the master and from the two bf16 weights."""
    rows: Rows = []
    for change in changes:
        first = change.before().to(torch.bfloat16)
        exact = change.after().double() - change.before().double()
        master = (first.double() + exact).float()
        shown = master.to(torch.bfloat16)
        for name, after in (("master", master), ("two roundings", shown)):
            found = low_rank(after.double() - first.double(), noise_edge(first, after.dtype))
            error = float((found.left.double() @ found.right.double() - exact).norm() / exact.norm())
            rows.append({"what": f"bf16, {name}", "module": change.module, "rank": found.rank, "frobenius": error})
        error = float((shown.double() - first.double() - exact).norm() / exact.norm())
        rows.append({"what": "bf16, folder", "module": change.module, "frobenius": error})
    return rows


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, help="facts of the editor's formats; default: those of the demo")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8, 16, 24, 28, 31, 32])
    options = parser.parse_args()
    model, tokenizer = smollm2.load()
    adapter = Adapter.for_model(model)
    config = EditConfig.for_model(model, "rlsedit")
    moments = second_moments(
        model, tokenizer, config.layers, installed_prose(15_000), cache_dir=cache_dir("moments"), adapter=adapter
    )
    stream = load_facts(options.facts) if options.facts else world_facts(0)
    facts = choose_known(adapter, tokenizer, stream, options.count).facts
    rows = [scored("base", None, evaluate(model, tokenizer, facts, adapter=adapter))]
    before = {n: adapter.rows(n).clone() for n in config.layers}
    editor = Editor(model, tokenizer, "rlsedit", config, moments=moments, adapter=adapter)
    editor.edit(facts, batch_size=options.batch)
    rows.append(scored("edited", None, evaluate(model, tokenizer, facts, adapter=adapter)))
    after = {n: adapter.rows(n).clone() for n in config.layers}
    changes = changes_of_model(adapter, before, after)
    for rank in options.ranks:
        factors = factorise(changes, rank)
        parts = [part for _, part in factors]
        with (
            with_weights(model, {change.module: change.before() for change in changes}),
            with_adapter(model, factors),
        ):
            found = evaluate(model, tokenizer, facts, adapter=adapter)
        worst = {"frobenius": max(p.frobenius for p in parts), "spectral": max(p.spectral for p in parts)}
        rows.append(scored("lora", rank, found, **worst, of=max(p.full for p in parts)))
    with tempfile.TemporaryDirectory() as folder:
        prompts = [fact.text for fact in facts]
        rows += routes(editor, prompts, factorise(changes), Path(folder))
    rows += halves(changes)
    settings = {"facts": len(facts), "batch": options.batch, "layers": list(config.layers)}
    report("export_lora", settings, rows, options.json)


if __name__ == "__main__":
    main()
