"""Original against patched on a checkout of another code base: `python bench/patch_upstream.py FOLDER --code memit`.

The editing function of that checkout runs on a small random model (or on a folder given by --model), without anything
being downloaded: second moments come from random tokens, context templates are fixed, and what asks for "cuda" gets the
CPU where there is no GPU. Keys, z*, residuals and the solve are those of the checkout.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import arguments, report
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlsedit import patch

TEMPLATES = [["{}"], ["The story so far. {}", "Therefore it is. {}", "I know this. {}"]]
SUBJECTS = ("Ada Lovelace", "Mount Kenya", "The river Oder", "Lake Turkana", "Emmy Noether", "Port Moresby", "Iceland")
RELATIONS = ("{} is named after", "{} is known for", "The neighbour of {} is", "{} was first seen in")
TARGETS = ("Vienna", "music", "a stone", "winter", "the sea")
NAME = "tiny/llama-random"  # EasyEdit looks for "llama" or "gpt2-xl" in names


@dataclass(frozen=True)
class Code:
    """Where a code base has its editing function.

    Attributes:
        patch: name for `rlsedit.patch`.
        module, function: the function that edits.
        strings: whether `target_new` is a plain string.
    """

    patch: str
    module: str
    function: str
    strings: bool = False


EASY = "easyeditor.models"
CODES = {
    "alphaedit": Code("alphaedit", "AlphaEdit.AlphaEdit_main", "apply_AlphaEdit_to_model"),
    "memit": Code("memit", "memit.memit_main", "apply_memit_to_model"),
    "rlsedit": Code("rlsedit", "RLSEdit.RLSEdit_main", "apply_RLSEdit_to_model"),
    "easyedit": Code("easyedit", f"{EASY}.alphaedit.AlphaEdit_main", "apply_AlphaEdit_to_model", True),
    "easyedit-memit": Code("easyedit", f"{EASY}.memit.memit_main", "apply_memit_to_model", True),
}
PACKAGES = ("AlphaEdit", "memit", "RLSEdit", "rome", "util", "easyeditor")


class OnCpu(TorchFunctionMode):
    """What asks for a GPU gets the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        named = {key: self._cpu(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        if func is Tensor.to:
            args = (args[0], *(self._cpu(value) for value in args[1:]))
        return func(*args, **named)

    @staticmethod
    def _cpu(value: Any) -> Any:
        return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


@contextmanager
def imported(folder: Path, code: Code) -> Iterator[Any]:
    """The module of the checkout, freshly imported; its packages' own `__init__` and downloads are left out."""
    before, place = dict(sys.modules), Path.cwd()
    with ExitStack() as stack:
        stack.callback(os.chdir, place)
        stack.callback(_forget, before)
        _forget({name: m for name, m in before.items() if name.partition(".")[0] not in PACKAGES})
        os.chdir(folder)  # util/globals.py reads globals.yml from where it is started
        root = folder / "easyeditor" if code.module.startswith("easyeditor") else folder
        for package in [root, *sorted(p for p in root.rglob("*") if p.is_dir() and any(p.glob("*.py")))]:
            name = ".".join(package.relative_to(folder).parts)
            if name and name.partition(".")[0] in PACKAGES and all(part.isidentifier() for part in name.split(".")):
                _package(name, package)
        easy = code.module.startswith("easyeditor")
        _stub(f"{EASY}.rome.layer_stats" if easy else "rome.layer_stats", "layer_stats")
        _stub("easyeditor.util.generate" if easy else "util.generate", "generate_fast")
        module = importlib.import_module(code.module)
        os.chdir(stack.enter_context(tempfile.TemporaryDirectory()))  # what it writes goes there
        module.CONTEXT_TEMPLATES_CACHE = TEMPLATES  # type: ignore[attr-defined]
        yield module


def _forget(keep: dict[str, Any]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.modules.update({name: m for name, m in keep.items() if name.partition(".")[0] in PACKAGES})


def _package(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, package)


def _stub(name: str, function: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{name}.{function} was called, which would download something")

    module = types.ModuleType(name)
    setattr(module, function, refuse)
    sys.modules[name] = module


def byte_tokenizer() -> Any:
    """One token a byte, so that nothing has to be fetched."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def build(kind: str, dtype: torch.dtype) -> tuple[Any, Any, SimpleNamespace]:
    """Model, tokenizer, and the names of its parts."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        tok = byte_tokenizer()
        config = transformers.GPT2Config(
            vocab_size=len(tok), n_positions=256, n_embd=48, n_layer=4, n_head=4, n_inner=128,
            bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(config)
        where = ("transformer.h.{}.mlp.c_proj", "transformer.h.{}", "transformer.ln_f", "transformer.h")
    else:
        if kind == "llama":
            tok = byte_tokenizer()
            config = transformers.LlamaConfig(
                vocab_size=len(tok), hidden_size=48, intermediate_size=128, num_hidden_layers=4,
                num_attention_heads=4, max_position_embeddings=256,
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config)
        else:
            tok = transformers.AutoTokenizer.from_pretrained(kind)
            model = transformers.AutoModelForCausalLM.from_pretrained(kind, dtype=torch.float32)
            tok.pad_token = tok.pad_token or tok.eos_token
        where = ("model.layers.{}.mlp.down_proj", "model.layers.{}", "model.norm", "model.layers")
    tok.padding_side = "right"
    model = model.to(dtype).eval()
    model.config._name_or_path = NAME
    model.config.n_embd = getattr(model.config, "n_embd", None) or model.config.hidden_size  # what MEMIT asks for
    if kind in ("gpt2", "llama"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)  # a random model of the usual scale has next to no features
    _tuples(model, where[3], where[2])
    tied = bool(getattr(model.config, "tie_word_embeddings", False))  # then lm_head has no parameter of its own
    head = ("transformer.wte" if kind == "gpt2" else "model.embed_tokens") if tied else "lm_head"
    return model, tok, SimpleNamespace(rewrite=where[0], layer=where[1], norm=where[2], head=head)


def _tuples(model: Any, layers: str, norm: str) -> None:
    """Let layers return (states,), as those code bases expect; newer versions of transformers return the states."""

    def unwrap(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][0], *args[1:]) if args and isinstance(args[0], tuple) else args

    for module in [*model.get_submodule(layers), model.get_submodule(norm)]:
        module.register_forward_pre_hook(unwrap)
    for module in model.get_submodule(layers):
        module.register_forward_hook(lambda _m, _a, out: out if isinstance(out, tuple) else (out,))


@torch.no_grad()
def second_moments(model: Any, layers: list[int], rewrite: str, tokens: int) -> dict[int, Tensor]:
    """E[k k'] (d, d) float32 by layer, over random tokens."""
    sums: dict[int, Tensor] = {}

    def collect(layer: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            keys = args[0].flatten(0, -2).double()
            sums[layer] = sums.get(layer, torch.zeros((), dtype=torch.float64)) + keys.T @ keys

        return hook

    handles = [model.get_submodule(rewrite.format(i)).register_forward_pre_hook(collect(i)) for i in layers]
    generator = torch.Generator().manual_seed(1)
    for _ in range(tokens // 512):
        model(input_ids=torch.randint(0, model.config.vocab_size - 1, (8, 64), generator=generator))
    for handle in handles:
        handle.remove()
    return {layer: (total / (tokens // 512 * 512)).float() for layer, total in sums.items()}


def projector(moment: Tensor, threshold: float) -> Tensor:
    """P (d, d) of the directions whose second moment lies below the threshold, as AlphaEdit's `get_project`."""
    U, S, _ = torch.linalg.svd(moment, full_matrices=False)
    null = U[:, threshold > S]
    return null @ null.T


@dataclass(frozen=True)
class Mode:
    """How one run goes.

    Attributes:
        name: for the result.
        first: the batch from which on the solve is patched; None for never.
        verify: of `rlsedit.patch`.
        anew: every run optimises its own z*; else all take those of the first run.
        moved: relative noise on the weights to begin with.
    """

    name: str
    first: int | None = None
    verify: bool = False
    anew: bool = False
    moved: float = 0.0


@dataclass
class Run:
    """Weights after each batch, processor seconds of each batch, and how many solves the stand-ins answered."""

    weights: list[list[Tensor]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    answered: int = 0

    def count(self, stack: ExitStack) -> None:
        """Count what comes to `torch.linalg` and is no tensor; RLSEdit factors where the others solve."""
        for name in ("solve", "cholesky"):
            original = getattr(torch.linalg, name)

            def watch(first: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
                self.answered += not isinstance(first, Tensor)
                return _original(first, *args, **kwargs)

            setattr(torch.linalg, name, watch)
            stack.callback(setattr, torch.linalg, name, original)


@dataclass
class World:
    """What all runs of a comparison share."""

    code: Code
    model: Any
    tok: Any
    hparams: Any
    moments: dict[int, Tensor]
    batches: int
    facts: int

    def requests(self, batch: int) -> list[dict[str, Any]]:
        """Facts of one batch."""
        found = []
        for i in range(batch * self.facts, (batch + 1) * self.facts):
            target = TARGETS[i % len(TARGETS)]
            found.append(
                {
                    "case_id": i,
                    "prompt": RELATIONS[i // len(SUBJECTS) % len(RELATIONS)],
                    "subject": SUBJECTS[i % len(SUBJECTS)],
                    "target_new": target if self.code.strings else {"str": target},
                }
            )
        return found

    def weights(self) -> list[Tensor]:
        """Copies of the edited weights."""
        names = [self.hparams.rewrite_module_tmp.format(layer) for layer in self.hparams.layers]
        return [self.model.get_submodule(name).weight.detach().clone() for name in names]

    def run(self, module: Any, begin: list[Tensor], mode: Mode, targets: Path, batches: int | None = None) -> Run:
        """Edit from the weights `begin` on; z* come from the files in `targets`, which the first run writes."""
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            for layer, weight in zip(self.hparams.layers, begin, strict=True):
                noise = mode.moved * torch.randn(weight.shape, generator=generator)
                there = self.model.get_submodule(self.hparams.rewrite_module_tmp.format(layer)).weight
                there.copy_(weight.float() * (1.0 + noise))
        name = NAME.replace("/", "_")
        for layer, moment in self.moments.items():
            module.COV_CACHE[name, self.hparams.rewrite_module_tmp.format(layer)] = moment
        kept: dict[str, Any] = {} if mode.anew else {"cache_template": str(targets / "{}_{}_{}.npz")}
        if self.code.patch == "alphaedit":
            P = torch.stack([projector(m, self.hparams.nullspace_threshold) for m in self.moments.values()])
            kept |= {"P": P, "cache_c": torch.zeros_like(P)}
        run = Run()
        with ExitStack() as stack:
            run.count(stack)
            for batch in range(self.batches if batches is None else batches):
                if batch == mode.first:
                    stack.enter_context(patch(self.code.patch, verify=mode.verify))
                torch.manual_seed(batch)
                begun = time.process_time()
                with redirect_stdout(io.StringIO()):
                    found = getattr(module, self.code.function)(
                        self.model, self.tok, self.requests(batch), self.hparams, **kept
                    )
                run.seconds.append(time.process_time() - begun)
                if self.code.patch in ("alphaedit", "rlsedit"):
                    kept["cache_c"] = found[1]
                run.weights.append(self.weights())
        return run


def hyperparameters(args: Any, parts: SimpleNamespace, moments: dict[int, Tensor]) -> Any:
    """The names that the four code bases ask for."""
    spectrum = torch.cat([torch.linalg.eigvalsh(m) for m in moments.values()])
    return SimpleNamespace(
        layers=args.layers, fact_token="subject_last", model_name=NAME, device=0, P_loc="there is none", stats_dir="",
        v_num_grad_steps=args.steps, v_lr=0.5, v_loss_layer=args.last, v_weight_decay=1e-3, clamp_norm_factor=1.0,
        kl_factor=0.0625, mom2_update_weight=args.weight, mom2_dataset="none", mom2_n_samples=1, mom2_dtype="float32",
        rewrite_module_tmp=parts.rewrite, layer_module_tmp=parts.layer, ln_f_module=parts.norm,
        lm_head_module=parts.head, nullspace_threshold=float(spectrum.quantile(0.8)),
        L2=args.l2, lambda_reg=args.lam, mu_reg=1.0,
    )  # fmt: skip


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative difference of the weights of a layer, Frobenius norm."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def changes(found: list[Tensor], wanted: list[Tensor], begin: list[Tensor]) -> float:
    """The same, relative to what the edits changed."""
    triples = zip(found, wanted, begin, strict=True)
    return max(float((a.double() - b.double()).norm() / (b.double() - w.double()).norm()) for a, b, w in triples)


def compare(folder: Path, name: str, args: Any) -> list[dict[str, Any]]:
    """Rows for one function of the checkout: patched, verified, begun without and continued with, left again."""
    code = CODES[name]
    model, tok, parts = build(args.model, getattr(torch, args.dtype))
    moments = second_moments(model, args.layers, parts.rewrite, args.tokens)
    hparams = hyperparameters(args, parts, moments)
    world = World(code, model, tok, hparams, moments, args.batches, args.facts)
    begin = world.weights()
    half = args.batches // 2
    modes = [
        Mode("patched", 0),
        Mode("patched, verify", 0, verify=True),
        Mode(f"patched from batch {half}", half),
    ]
    if args.own_targets:
        modes += [Mode("patched, own z*", 0, anew=True)]
        modes += [Mode("original, weights moved by 1e-7, own z*", anew=True, moved=1e-7)]
    rows = []
    with tempfile.TemporaryDirectory() as targets, nullcontext() if torch.cuda.is_available() else OnCpu():
        with imported(folder, code) as module:
            wanted = world.run(module, begin, Mode("original"), Path(targets))
        for mode in modes:
            with imported(folder, code) as module:
                before = {key: value for key, value in vars(module).items() if callable(value)}
                found = world.run(module, begin, mode, Path(targets))
                same = all(vars(module)[key] is value for key, value in before.items())
                module.cache_c_new = False
                again = world.run(module, begin, Mode("original"), Path(targets), 2)
            pairs = list(zip(found.weights, wanted.weights, strict=True))
            rows.append(
                {
                    "code": name,
                    "model": args.model if args.model in ("llama", "gpt2") else Path(args.model).name,
                    "dtype": args.dtype,
                    "mode": mode.name,
                    "difference": max(relative(a, b) for a, b in pairs),
                    "of_change": max(changes(a, b, begin) for a, b in pairs),
                    "changed": relative(wanted.weights[-1], begin),
                    "answered": found.answered,
                    "equal_behind": same
                    and all(relative(a, b) == 0.0 for a, b in zip(again.weights, wanted.weights, strict=False)),
                    "original_cpu_ms": None if mode.anew else 1e3 * statistics.median(again.seconds),
                    "patched_cpu_ms": None if mode.anew else 1e3 * statistics.median(found.seconds),
                }
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments(__doc__ or "")
    parser.add_argument("folder", type=Path, help="a checkout of the code base")
    parser.add_argument("--code", choices=("alphaedit", "memit", "rlsedit", "easyedit"), required=True)
    parser.add_argument("--version", default="", help="what the checkout is, for the result: repository and commit")
    parser.add_argument("--model", default="llama", help="llama, gpt2 (small, random), or a folder with a Llama")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--last", type=int, default=3, help="the layer on whose output the loss is taken")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--facts", type=int, default=3, help="a batch")
    parser.add_argument("--steps", type=int, default=4, help="gradient steps for z*")
    parser.add_argument("--tokens", type=int, default=1 << 14, help="random tokens for the second moments")
    parser.add_argument("--weight", type=float, default=100.0, help="mom2_update_weight")
    parser.add_argument("--l2", type=float, default=1.0, help="AlphaEdit's L2")
    parser.add_argument("--lam", type=float, default=1.0, help="RLSEdit's lambda")
    parser.add_argument(
        "--own-targets", action="store_true", help="also let each run optimise its own z*, beside what noise alone does"
    )
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}")
    folder = args.folder.resolve()
    rows: list[dict[str, Any]] = []
    for name in [name for name in CODES if name.partition("-")[0] == args.code]:
        if not (folder / (CODES[name].module.replace(".", "/") + ".py")).is_file():
            parser.error(f"{args.folder} has no {CODES[name].module}: is it a checkout of the code base {args.code}?")
        rows += [{"version": args.version, **row} for row in compare(folder, name, args)]
    target = args.json.resolve() if args.json else None
    new = {(row["version"], row["code"], row["model"], row["dtype"]) for row in rows}
    if target is not None and target.is_file():
        kept = json.loads(target.read_text(encoding="utf-8"))["rows"]
        rows = [r for r in kept if (r["version"], r["code"], r["model"], r["dtype"]) not in new] + rows
    settings = {key: getattr(args, key) for key in ("layers", "batches", "facts", "steps", "weight", "l2", "lam")}
    report("patch_upstream", settings, rows, target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
