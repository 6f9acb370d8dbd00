"""Editor: writes batches of facts into several layers of a language model, each batch whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checking import check_facts, check_layers, check_lengths, checked_moments, number_of
from .config import EditConfig
from .facts import Fact
from .methods import Method, Solver, get_method
from .metrics import EvalReport, evaluate
from .models.adapter import Adapter
from .parallel.layers import AnyFolder, create_folder, first_figures, first_solver, open_folder
from .prompts import Context, make_contexts
from .reports import BatchReport, EditReport
from .store import conflicts, replay
from .store.conflicts import OnConflict
from .store.errors import StoreError
from .store.files import DISK, Disk, uninterrupted
from .store.index import Index
from .store.journal import Journal, MemoryJournal
from .store.ledger import now
from .store.records import Record, figures
from .store.removal import check_removable, take_out
from .store.session import Session, rest_of
from .targets import optimise_targets
from .weights import EditedWeights
from .writing import WRITERS, Job, LayerState
from .writing.job import FindTargets
from .writing.reporting import ProgressCallback, Stage, batch_report

if TYPE_CHECKING:
    from rlsedit_kernels.distributed import Ranks

    from .export import LoraReport

logger = logging.getLogger(__name__)


class Editor:
    """Locate-then-edit editor with one recursive least-squares state per edited layer.

    For a batch, layer i of n, ascending (docs/mathematics.md, facts 10 and 11; Meng et al. 2022, MEMIT, algorithm 1):
        K  keys at the layer's edited module, E = (z* - h) / (n - i), W <- W + gain E, state <- state with K.

    Args:
        model: a transformers causal LM; its edited weights are changed in place.
        tokenizer: its fast tokenizer.
        method: a name of `list_methods()`, or a recipe of one's own.
        config: hyper-parameters; None for `EditConfig.for_model(model, method)`.
        moments: {layer: E[k k'] (d, d)} from `rlsedit.moments.second_moments` for all edited layers, measured on the
            weights as they are. None: measured at the first edit on text the model writes itself, which is a makeshift.
        adapter: for an architecture that `Adapter.for_model` does not know.
        targets: makes z* in the place of `rlsedit.targets.optimise_targets`, such as a `TargetCache`.
        record: whether keys and targets of all batches are kept, which `remove`, `undo` and `save` need: in the memory
            of the host, about 4 u (2 d + 3 v) bytes a layer and batch, until `save` gives them a folder.
        states: where states go if the model lies on many processes, all of which then make the same calls
            (docs/distributed.md): "replicated", "layers", "sharded", or "auto" by their size.
        ranks: of processes that hold a copy of the model each and edit it together; a model that tensor parallelism or
            FSDP2 has spread says by itself where it lies.

    Raises:
        ValueError: unknown method or architecture, layers that do not exist, moments that do not fit, weights that are
            not finite, a prior that would be zero, several layers for a method that edits one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        method: str | Method = "rlsedit",
        config: EditConfig | None = None,
        *,
        moments: Mapping[int, Tensor] | None = None,
        adapter: Adapter | None = None,
        targets: FindTargets | None = None,
        record: bool = True,
        states: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.method: Method = method if isinstance(method, Method) else get_method(method)
        self.adapter = adapter or Adapter.for_model(model, ranks=ranks)
        self.model, self.tokenizer = model, tokenizer
        self.config = config or EditConfig.for_model(model, self.method)
        self._processes, self._states, self._number = self.adapter.processes, states, 0
        layers = self.config.layers
        with self._processes.together("Editor"):
            check_layers(self.adapter, self.method, self.config, states)
            self._moments = None if moments is None else checked_moments(self.adapter, layers, moments)
        with self._shared("Editor", self.method.name, self.config, states, _corners(self._moments)):
            self._weights = EditedWeights(self.adapter, layers)
        self._first: dict[int, Tensor] = {n: self.adapter.rows(n).clone() for n in layers}
        self._contexts: list[Context] | None = None
        self._layers: dict[int, LayerState] | None = None
        self._find_targets: FindTargets = optimise_targets if targets is None else targets
        self._starts: dict[int, Solver] = {}
        self._folder: AnyFolder | None = None
        self._journal: Journal | None = MemoryJournal() if record and self.method.signal != "steps" else None

    def edit(
        self,
        facts: Sequence[Fact],
        *,
        batch_size: int | None = None,
        progress: ProgressCallback | None = None,
        finish: bool = True,
        on_conflict: OnConflict = "keep-both",
    ) -> EditReport:
        """Write facts, in batches.

        Args:
            facts: at least one; ids distinct, and not those of edits that the model holds.
            batch_size: facts of one batch, at least 1; None for that of the config. ROME writes one at a time.
            progress: called with `Progress` events.
            finish: whether the sequence ends here, for a method with a step at its end (PRUNE).
            on_conflict: what is done about an edit with the same subject and the same prompt or named relation: both
                are kept, the new one replaces the old one (taken out as by `remove`, in the same step), or the facts
                are refused. Conflicts are logged and reported.

        Raises:
            ValueError: no facts, ids that repeat, a fact that cannot be encoded or is too long for the model, a refused
                conflict, a method that cannot replace, a state that has broken down. The batches before stay written;
                the batch at hand leaves weights, states and folder as they were.
            OSError: a batch cannot be made durable; as above.
        """
        size = self.config.batch_size if batch_size is None else batch_size
        size = min(size, 1) if self.method.single else size
        index = Index() if self._journal is None else self._journal.index
        with self._processes.together("Editor.edit"):
            facts = list(facts)
            check_facts(self.tokenizer, facts, size, on_conflict)
            found = conflicts.settle(facts, index, on_conflict)
            if found and on_conflict == "replace":
                check_removable(self.method, self.config, index)
        with self._shared("Editor.edit", facts, size, on_conflict, finish):
            self._prepare()
            with self._processes.together("Editor.edit"):
                check_lengths(self.adapter, self.tokenizer, facts, self.method, self._contexts or ())
            batches = conflicts.batches(facts, size, apart=on_conflict == "replace")
            report = EditReport(self.method.name, conflicts=found)
            for at, batch in enumerate(batches):
                old = index.conflicts(batch) if on_conflict == "replace" else []
                replaced = tuple(dict.fromkeys(conflict.old for conflict in old))
                report.batches.append(self._batch(batch, replaced, Stage(progress, at, len(batches))))
        if finish:
            self.finish()
        return report

    def evaluate(self, facts: Sequence[Fact], *, progress: Callable[[int, int], None] | None = None) -> EvalReport:
        """Efficacy, paraphrase and neighbourhood scores of the model as it is; see `rlsedit.metrics.evaluate`."""
        with self._shared("Editor.evaluate", facts):
            return evaluate(self.model, self.tokenizer, facts, adapter=self.adapter, progress=progress)

    def health(self) -> dict[int, dict[str, Any]]:
        """What the state of each edited layer reports of itself; empty before the first edit."""
        return {} if self._layers is None else {n: layer.solver.health() for n, layer in self._layers.items()}

    def finish(self) -> None:
        """The method's step at the end of a sequence, where it has one (PRUNE); on all layers or none."""
        if self.method.finish is not None and self._layers is not None:
            layers = self._layers
            self._step("finish", lambda: replay.finished(self._stream(), layers))

    def remove(self, ids: Sequence[str]) -> None:
        """Take edits out of the model: the weights that the stream without them has, to rounding.

        The recorded targets of all others stay (`rlsedit.store.removal`); costs one downdate, whatever was written.

        Args:
            ids: distinct ids of edits that the model holds.

        Raises:
            ValueError: unknown ids, nothing recorded, a method that cannot take single edits back.
            StoreError: a file that is needed is damaged.
            OSError: the step cannot be made durable. Weights, states and folder are then as they were.
        """
        names = [ids] if isinstance(ids, str) else list(ids)
        with self._processes.together("Editor.remove"):
            journal = self._recorded("remove")
            if unknown := [name for name in names if name not in journal.index.live]:
                raise ValueError(f"Editor.remove: ids must be of edits in the model, got {unknown[:5]}")
            if not names or len(set(names)) < len(names):
                raise ValueError(f"Editor.remove: ids must be distinct, at least one, got {names[:5]}")
            check_removable(self.method, self.config, journal.index)
        layers = self._layers
        assert layers is not None
        with self._shared("Editor.remove", names):
            self._step("remove", lambda: self._without(layers, names), tuple(names))

    def undo(self) -> tuple[str, ...]:
        """Take the last step back (a batch, a removal, a finish), to the bit; the ids of a batch are returned.

        The steps since the last snapshot before it are repeated from the records; without a folder all of them.

        Raises:
            ValueError: nothing to undo, or nothing recorded.
            StoreError: a file that is needed is damaged.
            OSError: the step cannot be made durable.
        """
        journal = self._recorded("undo")
        if not journal.index.stack:
            raise ValueError("Editor.undo: there is no step to take back")
        *stack, last = journal.index.stack
        with self._shared("Editor.undo"):
            self._prepare()
            snapshots = None if self._folder is None else self._folder.snapshots
            self._step("undo", lambda: replay.restore(self._stream(), journal, stack, snapshots), last.ids)
        return last.ids

    def reset(self) -> None:
        """Back to the weights the editor was made with, bit for bit, and to the prior."""
        if self._folder is not None and self._folder.journal.index.stack:
            self._step("reset", lambda: replay.restore(self._stream(), self._folder.journal, ()))  # type: ignore[union-attr]
        elif self._folder is None and self._journal is not None:
            self._journal = MemoryJournal()
        with torch.no_grad():
            for n, weight in self._first.items():
                self.adapter.rows(n).copy_(weight)
        self._weights = EditedWeights(self.adapter, self.config.layers)
        self._layers = None

    def save(self, path: str | os.PathLike[str], *, every: int = 20, disk: Disk = DISK) -> None:
        """Keep this editor in a folder: all steps so far, and from then on each step before it counts as written.

        Called again it takes a snapshot, which makes a later `resume` short; one is taken every `every` steps besides.

        Args:
            path: the output folder; `path/rlsedit` is made in it.
            every: steps between two snapshots, at least 1.
            disk: how files are written, for tests.

        Raises:
            ValueError: nothing was recorded, or another folder keeps this editor.
            StoreError: the folder holds edits of another stream.
            OSError: it cannot be written.
        """
        if every < 1:
            raise ValueError(f"Editor.save: every must be at least 1, got {every}")
        with self._shared("Editor.save", os.path.realpath(path)):
            self._save(path, every, disk)

    def _save(self, path: str | os.PathLike[str], every: int, disk: Disk) -> None:
        if self._folder is not None:
            kept = self._folder.path
            if os.path.realpath(kept) != os.path.realpath(path):
                raise ValueError(f"Editor.save: path must be {kept}, where this editor is kept, got {path}")
        else:
            if self._journal is None and self._number:
                raise ValueError("Editor.save: the edits so far were not recorded; save before the first edit")
            self._prepare()
            assert self._moments is not None
            base = {n: (self._first[n], self._moments[n]) for n in self.config.layers}
            records = self._journal if isinstance(self._journal, MemoryJournal) else ()
            self._folder = create_folder(self.adapter, path, self._session(), base, records, every=every, disk=disk)
            self._journal = self._folder.journal
        self._folder.snapshot(self._parts(), due=False)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        tokenizer: Any,
        *,
        method: Method | None = None,
        adapter: Adapter | None = None,
        targets: FindTargets | None = None,
        every: int = 20,
        disk: Disk = DISK,
        states: str = "auto",
        ranks: Ranks | None = None,
    ) -> Editor:
        """The editor that a folder keeps, to the bit, whatever ended the process that wrote it.

        Args:
            path: the output folder.
            model: the model that was edited, with any values in the edited weights: they are set.
            tokenizer: its tokenizer.
            method: the recipe, where it is none of `list_methods()`.
            adapter, targets: as for `Editor`.
            every, disk: as for `save`.
            states, ranks: as for `Editor`; the folder may have been written by another number of processes.

        Raises:
            FolderBusyError: another process writes to the folder.
            StoreError: no such folder, another model, or a damaged file that cannot be done without.
        """
        adapter = adapter or Adapter.for_model(model, ranks=ranks)
        folder = open_folder(adapter, path, every=every, disk=disk)
        try:
            session = folder.session
            if method is not None and method.name != session.method:
                raise StoreError(f"resume: method must be {session.method!r}, got {method.name!r}")
            session.check(adapter)
            with adapter.processes.together("resume"):
                base = {n: folder.first(n, adapter.rows(n).device) for n in session.config.layers}
            with torch.no_grad():
                for n, (weight, _) in base.items():
                    adapter.rows(n).copy_(weight)
            editor = cls(
                model, tokenizer, method or session.method, session.config,
                moments={n: moment for n, (_, moment) in base.items()}, adapter=adapter, targets=targets,
                states=states,
            )  # fmt: skip
            editor._contexts = list(session.contexts)
            editor._folder, editor._journal = folder, folder.journal
            with editor._shared("Editor.resume"):
                stack = folder.journal.index.stack
                editor._layers = replay.restore(editor._stream(), folder.journal, stack, folder.snapshots)
            editor._weights.keep()
            return editor
        except BaseException:
            folder.close()
            raise

    def export_lora(
        self, path: str | os.PathLike[str], rank: int | None = None, facts: Sequence[Fact] | None = None, *,
        replace: bool = False, progress: Callable[[int, int], None] | None = None,
    ) -> LoraReport:  # fmt: skip
        """The edits as a LoRA adapter for PEFT and vLLM, from the float32 masters; see `rlsedit.export.export_lora`.

        Raises:
            ValueError: nothing has been edited, a rank out of range, a `path` that holds something.
        """
        from .export import export_lora

        after = {n: self._weights.wide(n) for n in self.config.layers}
        about = {"method": self.method.name, "edits": None if self._journal is None else len(self._journal.index.live)}
        with self._shared("Editor.export_lora", os.path.realpath(path), rank, facts, replace):
            return export_lora(
                self.adapter, self.tokenizer, self._first, after, path,
                rank=rank, facts=facts, about=about, replace=replace, progress=progress,
            )  # fmt: skip

    @property
    def folder(self) -> AnyFolder | None:
        """The folder that keeps this editor."""
        return self._folder

    @property
    def planned(self) -> list[Fact]:
        """Facts that were asked for and not written when the process before this one ended."""
        return [] if self._folder is None else [row.fact for row in self._folder.ledger.edits(state="planned")]

    @property
    def records(self) -> Iterator[Record]:
        """The batches that count, in order, with keys, residuals and targets of each layer on the CPU.

        Raises:
            ValueError: nothing was recorded.
            StoreError: a record is damaged.
        """
        journal = self._recorded("records")
        return (journal.load(e.number, "cpu") for e in tuple(journal.index.stack) if e.kind == "batch")

    @property
    def first_weights(self) -> dict[int, Tensor]:
        """W_0 (d, v) of each edited layer, in the dtype of the model; not copies."""
        return dict(self._first)

    def close(self) -> None:
        """Give the folder back to other writers; nothing is lost without it."""
        if self._folder is not None:
            self._folder.close()
            self._folder, self._journal = None, None

    def _prepare(self) -> None:
        if self._contexts is None:
            self._contexts = make_contexts(
                self.adapter, self.tokenizer, self.config.contexts, self.config.context_length, self.config.seed
            )
        if self._moments is None:
            from .selftext import own_moments

            found = own_moments(self.adapter, self.tokenizer, self.config)
            self._moments = checked_moments(self.adapter, self.config.layers, found)
        if self._layers is None:
            self._layers = {n: self._first_state(n) for n in self.config.layers}

    def _first_state(self, layer: int) -> LayerState:
        """The state of a layer before the first batch; the prior is factored once."""
        assert self._moments is not None
        about = self.adapter, self.config, layer, self._moments[layer], self._weights.dtype(layer)
        if layer not in self._starts:
            self._starts[layer] = first_solver(self.method, self._states, *about)
        return LayerState(self._starts[layer], first_figures(*about))

    @contextmanager
    def _shared(self, what: str, *about: object) -> Iterator[None]:
        """A call of all processes, with the same arguments: what fails in one fails in all."""
        if self._processes.many:
            self._processes.agree(what, step=self._number, number_of_the_arguments=number_of(*about))
        with self._processes.guarded(what):
            yield

    def _batch(self, facts: list[Fact], replaced: tuple[str, ...], stage: Stage) -> BatchReport:
        assert self._contexts is not None
        assert self._layers is not None
        before = self._layers
        if self._folder is not None:
            self._folder.plan(facts)
        try:
            layers = before
            if replaced:
                layers = self._without(before, replaced)
                self._weights.nest()
            job = Job(
                self.adapter, self.tokenizer, facts, self._contexts, self.config, self.method, self._weights, layers,
                stage, self._find_targets,
            )  # fmt: skip
            written = WRITERS[self.method.signal](job)
            following = {**layers, **written.states}
            stage("report", len(facts), len(facts))
            report = batch_report(self.method, self.config, facts, written, stage.seconds, following)
            noise = self.method.noise(self.config, len(facts))
            record = Record(
                self._number + 1, "batch", now(), tuple(facts), replaced, written.owners, noise, job.rows,
                report=figures(report),
            )  # fmt: skip
            self._commit(record, following)  # one assignment in it: all layers or none
        except BaseException as error:
            if self._layers is before:
                self._weights.revert()
                if self._folder is not None and isinstance(error, Exception):
                    self._folder.failed(facts, " ".join(str(error).split())[:500] or type(error).__name__)
            raise
        stage("batch", len(facts), len(facts))
        return report

    def _step(self, kind: str, work: Callable[[], dict[int, LayerState]], removed: tuple[str, ...] = ()) -> None:
        """One step that writes no facts: all layers, states and folder, or nothing."""
        before = self._layers
        try:
            following = work()
            self._commit(Record(self._number + 1, kind, now(), removed=removed), following)
        except BaseException:
            if self._layers is before:
                self._weights.revert()
            raise

    def _commit(self, record: Record, layers: dict[int, LayerState]) -> None:
        """From the moment that the record is durable the step has been taken."""
        if self._journal is not None:
            sums, sizes = replay.marks(self._stream(), layers)
            record = replace(record, number=len(self._journal.entries) + 1, sums=sums, sizes=sizes)
        with uninterrupted():
            if self._folder is not None:
                self._folder.append(record)
            elif self._journal is not None:
                self._journal.append(record)
            self._layers = layers
            self._weights.keep()
            self._number = record.number
        if self._folder is not None:
            try:
                self._folder.snapshot(self._parts(), due=True)
            except OSError as error:
                logger.warning("%s: no snapshot for now, the records have everything: %s", self._folder.path, error)

    def _without(self, layers: Mapping[int, LayerState], names: Sequence[str]) -> dict[int, LayerState]:
        journal = self._recorded("remove")
        return take_out(self.method, self.config, self._weights, layers, journal, journal.index, names)

    def _recorded(self, what: str) -> Journal:
        if self._journal is None:
            raise ValueError(
                f"Editor.{what}: nothing was recorded; make the editor with record=True, or give it a folder by "
                "Editor.save before the first edit"
            )
        return self._journal

    def _stream(self) -> replay.Stream:
        return replay.Stream(self.method, self.config, self._weights, self._first, self._first_state)

    def _parts(self) -> dict[int, tuple[Tensor, object]]:
        return {n: (self._weights.wide(n), state) for n, state in (self._layers or {}).items()}

    def _session(self) -> Session:
        adapter, layers = self.adapter, self.config.layers
        model = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        assert self._contexts is not None
        return Session(
            self.method.name, self.config, tuple(self._contexts), adapter.module, adapter.layout,
            str(adapter.rows(layers[0]).dtype), rest_of(adapter, layers), model, {},
        )  # fmt: skip


def _corners(moments: Mapping[int, Tensor] | None) -> list[list[float]]:
    """Some entries of each second moment, which tell one from another."""
    return [] if moments is None else [moment[:: -(-len(moment) // 64), 0].tolist() for moment in moments.values()]
