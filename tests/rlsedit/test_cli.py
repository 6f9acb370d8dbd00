"""The command line, end to end on tiny models; wrong input gives one line on standard error and exit status 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support import language_models as lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsedit.cli import main
from rlsedit.facts import save_facts

SMALL = ["--layers", "1-2", "--set", "steps=3", "--set", "contexts=1", "--set", "context_length=3", "--device", "cpu"]
SMALL += ["--set", "mom2_weight=20"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, family, dtype in (
        ("llama", "llama", torch.float32), ("gpt2", "gpt2", torch.float32), ("half", "llama", torch.bfloat16)
    ):  # fmt: skip
        lm.tiny(family, dtype).save_pretrained(root / name)
        lm.tokenizer().save_pretrained(root / name)
        (root / name / "LICENSE").write_text("terms")
    return root


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    return tmp_path


def edit(model: Path, files: Path, *more: str) -> list[str]:
    return ["edit", str(model), "--facts", str(files / "facts.jsonl"), "--out", str(files / "out"),
            "--text", str(files / "text.txt"), *SMALL, *more]  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str, status: int = 2) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("rlsedit")
    assert error.count("\n") == 1, f"one line, got {error!r}"
    assert error.endswith("\n")
    for word in words:
        assert word in error


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("half", "bfloat16")])
def test_edit_writes_a_model_that_loads(
    models: Path, files: Path, name: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(edit(models / name, files, "--batch", "2")) == 0
    shown = capsys.readouterr().out
    assert "batch 2 of 2" in shown
    assert "efficacy" in shown
    assert "\x1b" not in shown
    assert "\r" not in shown
    out = files / "out"
    before = AutoModelForCausalLM.from_pretrained(models / name, dtype="auto")
    after = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert after.dtype == getattr(torch, dtype)
    changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert len(changed) == 2, changed
    assert all(f".{n}." in key for n, key in zip((1, 2), sorted(changed), strict=True))
    text = "Oslo is a city in Norway"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(models / name)(text)
    assert (out / "LICENSE").read_text() == "terms"
    report = json.loads((out / "rlsedit-report.json").read_text(encoding="utf-8"))
    assert report["facts"]["written"] == 4
    assert [entry["ids"] for entry in report["batches"]] == [["a", "b"], ["c", "d"]]
    assert report["config"]["layers"] == [1, 2]
    assert {p.name for p in files.iterdir()} == {"out", "facts.jsonl", "text.txt", "cache"}


def test_dry_run_changes_nothing(models: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(edit(models / "llama", files, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "mlp.down_proj of layers 1, 2: 48 x 32" in shown
    assert "not written" in shown
    assert not (files / "out").exists()


def test_a_recorded_run_can_be_followed(models: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = files / "run.safetensors"
    assert main(edit(models / "llama", files, "--record", str(record), "--no-evaluate", "--batch", "2")) == 0
    assert str(record) in capsys.readouterr().out
    assert main(["stability", "--stream", str(record)]) == 0
    assert "guarded" in capsys.readouterr().out
    fails(capsys, edit(models / "llama", files, "--force", "--record", str(files / "no" / "x")), "--record: no folder")
    resumed = ["edit", str(models / "llama"), "--facts", str(files / "facts.jsonl"), "--out", str(files / "out")]
    fails(capsys, [*resumed, "--resume", "--record", str(record)], "--record: begins with a run")


def test_what_an_editor_refuses_is_refused_before_second_moments_are_measured(
    models: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a dry run as well, which said that all was well."""
    monkeypatch.setattr("rlsedit.moments.second_moments", lambda *_, **__: pytest.fail("takes minutes"))
    several = edit(models / "llama", files, "--method", "rome")
    for more in ([], ["--dry-run"]):
        assert main([*several, *more]) == 2
        assert "must be one layer for 'rome', got (1, 2)" in capsys.readouterr().err
    profile = ["profile", "--model", str(models / "llama"), "--facts", str(files / "facts.jsonl"), "--layers", "1-2"]
    assert main([*profile, "--methods", "rome", "--device", "cpu"]) == 2
    assert "must be one layer for 'rome', got (1, 2)" in capsys.readouterr().err
    assert main([*profile[:-1], "9", "--device", "cpu"]) == 2
    assert "--layers: must be within 0 to" in capsys.readouterr().err


def test_an_existing_folder_is_kept_without_force(
    models: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "out").mkdir()
    (files / "out" / "mine").write_text("precious")
    fails(capsys, edit(models / "llama", files), "--out", "not empty", "--force")
    assert (files / "out" / "mine").read_text() == "precious"
    assert main(edit(models / "llama", files, "--force", "--no-evaluate", "--limit", "1")) == 0
    assert not (files / "out" / "mine").exists()
    assert (files / "out" / "config.json").exists()


def test_a_failure_while_saving_loses_no_edit(
    models: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        fails(capsys, edit(models / "llama", files, "--no-evaluate", "--limit", "2"), "No space left on device")
    assert {p.name for p in files.iterdir()} == {"out", "facts.jsonl", "text.txt", "cache"}
    assert {p.name for p in (files / "out").iterdir()} == {"rlsedit"}  # edits, and no half of a model
    fails(capsys, edit(models / "llama", files), "--out", "--resume goes on")
    resume = [word for word in edit(models / "llama", files, "--no-evaluate", "--limit", "2", "--resume")]
    del resume[resume.index("--text") : resume.index("--text") + 2]
    assert main(resume) == 0
    assert "0 facts are left" in capsys.readouterr().out
    assert (files / "out" / "config.json").is_file()


def test_a_disk_that_is_full_while_tensors_are_saved(
    models: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors has an exception of its own for it."""
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    command = edit(models / "llama", files, "--no-evaluate")
    again = [part for part in command if part not in ("--text", str(files / "text.txt"))]
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        fails(capsys, command, f"{files / 'out'}: No space left on device")
    assert main([*again, "--resume"]) == 0
    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("rlsedit.export.lora.save_file", full)
    for kind in ("delta", "lora"):
        out = str(files / f"new-{kind}")
        fails(capsys, ["export", str(files / "out"), "--to", kind, "--out", out], f"{out}: No space left on device")


def test_a_failure_before_the_first_edit_leaves_no_folder(
    models: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise ValueError("the loss must be finite")

    monkeypatch.setattr("rlsedit.writing.targets.fact_rows", wrong)
    fails(capsys, edit(models / "llama", files, "--no-evaluate"), "the loss must be finite")
    assert {p.name for p in files.iterdir()} == {"facts.jsonl", "text.txt", "cache"}
    (files / "out").mkdir()
    (files / "out" / "mine").write_text("precious")
    fails(capsys, edit(models / "llama", files, "--no-evaluate", "--force"), "the loss must be finite")
    assert (files / "out" / "mine").read_text() == "precious"


def test_evaluate_and_stats(models: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, out = str(files / "facts.jsonl"), files / "scores.json"
    assert main(["evaluate", str(models / "gpt2"), "--facts", facts, "--out", str(out), "--device", "cpu"]) == 0
    assert "neighbourhood" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["id"] for row in report["rows"]] == ["a", "b", "c", "d"]
    assert set(report["summary"]["score"]) == {"mean", "stderr", "count", "low", "high"}
    stats = ["stats", str(models / "llama"), "--text", str(files / "text.txt"), "--layers", "1,3", "--device", "cpu"]
    assert main(stats) == 0
    assert "effective rank" in capsys.readouterr().out
    assert len(list((files / "cache" / "moments").iterdir())) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output, where a script reads it."""
    assert main(["--version"]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"rlsedit \d+\.\d+\.\d+\S*\n", shown.out)
    assert not shown.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, told in ((["--version"], "rlsedit: standard output: No space left on device\n"),
                            (["methods"], "rlsedit: No space left on device\n")):  # fmt: skip
        with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(arguments) in (1, 2)
            assert capsys.readouterr().err == told
            patch.undo()
            with suppress(OSError):
                full.close()


@pytest.mark.parametrize("module", ["rlsedit.cli", "rlsedit.config"])
def test_ctrl_c_while_the_command_or_what_its_options_need_is_imported(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlsedit.__main__ import run

    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == module:
                raise KeyboardInterrupt

    for name in ("_leave", "_send_again"):  # they are for a process of its own
        monkeypatch.setattr(f"rlsedit.__main__.{name}", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["rlsedit", "edit", "model", "--set", "steps=2"])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, module)
        patch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
        assert run() == 130
    assert capsys.readouterr().err == "rlsedit: interrupted; nothing has begun\n"
    monkeypatch.setattr(sys, "argv", ["rlsedit", "methods"])
    assert run() == 0


BLOCKED = "threading.Thread(target=threading.Event().wait).start()\n    raise KeyboardInterrupt"
DESTROYED = (
    "type('Slow', (), {'__del__': lambda _: signal.raise_signal(signal.SIGINT)})()\n    time.sleep(5)\n    return 0"
)


def test_ctrl_c_while_torch_is_imported() -> None:
    """torch keeps to itself what is raised while it imports NumPy, and goes on without it."""
    code = """
import sys
from rlsedit.__main__ import run

class Interrupted:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "numpy":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
sys.argv = ["rlsedit", "log", "none"]
sys.exit(run())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "rlsedit: interrupted; nothing half written is left\n")


@pytest.mark.parametrize("during", [BLOCKED, DESTROYED], ids=["a thread blocks", "an object is destroyed"])
def test_one_ctrl_c_ends_a_command(during: str) -> None:
    """An interrupted loader may leave a thread that waits for ever, and a destructor keeps what it raises to itself."""
    code = (
        "import signal, sys, threading, time, rlsedit.cli.methods as methods; from rlsedit.__main__ import run\n"
        f"def work(_):\n    {during}\n"
        "methods.run = work; sys.argv = ['rlsedit', 'methods']; sys.stdout.write('said'); sys.exit(run())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "said")
    assert done.stderr == "rlsedit: interrupted; nothing half written is left\n"


def test_closed_standard_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    assert main(["methods"]) == 0
    assert main(["fly"]) == 2


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    from rlsedit import list_methods

    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in list_methods())


def test_wrong_input(models: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = models / "llama"
    fails(capsys, [], "COMMAND")
    fails(capsys, ["fly"], "fly", "see rlsedit --help")
    fails(capsys, edit(files / "none", files), "none", "no folder")
    fails(capsys, edit(files / "cache", files), "cache")
    fails(capsys, edit(llama, files, "--method", "magic"), "magic", "rlsedit")
    fails(capsys, edit(llama, files, "--layers", "3-9"), "--layers", "0 to 4")
    fails(capsys, edit(llama, files, "--layers", "x"), "--layers", '"4-8"')
    fails(capsys, edit(llama, files, "--batch", "0"), "--batch", "at least 1")
    fails(capsys, edit(llama, files, "--batch", str(2**63)), "--batch", f"at most {2**63 - 1}")
    fails(capsys, edit(llama, files, "--layers", "0-9999999999"), "--layers", "at most 9999")  # no list of them is made
    fails(capsys, edit(llama, files, "--seed", "-1"), "--seed", "at least 0, got -1")
    fails(capsys, edit(llama, files, "--set", f"seed={2**63}"), "seed must be at least 0 and below 2^63")
    fails(capsys, edit(llama, files, "--force", "--out", ""), "--out: needs a path, got ''")  # not the folder one is in
    (files / "empty").touch()
    fails(capsys, edit(files / "none", files, "--text", str(files / "empty")), "--text:", "no text")  # before the model
    capsys.readouterr()
    fails(capsys, edit(files / "none", files, "--set", "stepz=3"), "--set", "stepz", "steps")  # nothing is loaded first
    fails(capsys, edit(files / "none", files, "--method", "magic"), "--method", "magic", "memit")
    fails(
        capsys,
        ["stats", str(llama), "--text", str(files / "text.txt"), "--seed", "3"],
        "unrecognized",
        "--seed",
        "see rlsedit stats --help",
    )
    fails(capsys, edit(llama, files, "--set", "steps=2.5"), "steps", "whole number")
    fails(capsys, edit(llama, files, "--set", "lr=1e400"), "lr must be finite, got inf")
    fails(capsys, edit(llama, files, "--set", "steps"), "NAME=NUMBER")
    fails(capsys, edit(files / "none", files, "--set", "lam=-1"), "--set: lam must not be negative, got -1")
    fails(capsys, edit(files / "none", files, "--set", "relative_to=mlp"), "--set: relative_to")  # before the model too
    fails(capsys, edit(llama, files, "--set", "relative_to=mlp"), "relative_to", "'hidden', 'module'")
    fails(capsys, edit(llama, files, "--device", "abacus"), "--device", "'abacus' is not there: needs cpu, cuda")
    fails(capsys, edit(llama, files, "--text", str(files / "no.txt")), "no.txt")
    fails(capsys, edit(llama, files, "--out", str(files / "text.txt")), "is a file")
    fails(capsys, edit(llama, files, "--out", str(llama)), "is the model itself")
    (files / "bad.jsonl").write_text('{"prompt": "{} is", "subject": "x"}\n')
    fails(capsys, ["evaluate", str(llama), "--facts", str(files / "bad.jsonl")], "bad.jsonl:1: target_new is missing")
    fails(capsys, ["evaluate", str(llama), "--facts", str(files / "no.jsonl")], "no.jsonl")
    fails(capsys, ["demo", "--limit", "none"], "--limit", "at least 1")
    fails(capsys, ["demo", "--method", "magic"], "magic")
    assert not (files / "out").exists()


def test_weights_that_are_cut_off_are_wrong_input(
    models: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors has an exception of its own for it, which named no file."""
    shutil.copytree(models / "llama", files / "cut")
    weights = files / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails(capsys, ["stats", str(files / "cut"), "--text", str(files / "text.txt")], f"MODEL: {files / 'cut'}", "load")


@pytest.mark.parametrize("place", ["model", "--facts", "--out"])
def test_a_name_that_is_not_utf_8_is_refused_before_any_work(
    models: Path, files: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors cannot open it and reports cannot name it, which came out behind the first batch."""
    arguments = edit(models / "llama", files)
    at = 1 if place == "model" else arguments.index(place) + 1
    arguments[at] = os.fsdecode(os.fsencode(arguments[at]) + b"\xff")
    before = sorted(files.iterdir())
    fails(capsys, arguments, "must be UTF-8", r"\udcff")
    assert sorted(files.iterdir()) == before


def test_both_ends_of_a_copy_that_fails_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """shutil puts the source first where it is the target's disk that is full."""

    def full(_: object) -> int:
        raise OSError(28, "No space left on device", "there", None, "here")

    monkeypatch.setattr("rlsedit.cli.methods.run", full)
    fails(capsys, ["methods"], "rlsedit: there to here: No space left on device")


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_too_little_memory_is_nothing_unexpected(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr("rlsedit.cli.methods.run", run)
    fails(capsys, ["methods"], "rlsedit: not enough memory: ", str(error), status=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_a_file_is_written_is_named(
    models: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system names the file that cannot be opened, and none where a write or its flush fails."""
    import tempfile

    from rlsedit.store.files import Disk

    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(files / "part")))
    out = files / "scores.json"
    scores = ["evaluate", str(models / "llama"), "--facts", str(files / "facts.jsonl"), "--device", "cpu"]
    fails(capsys, [*scores, "--out", str(out)], f"rlsedit: {out}: No space left on device")
    monkeypatch.undo()
    monkeypatch.setenv("RLSEDIT_CACHE", str(files / "cache"))

    def full(_: Disk, stream: object, data: bytes) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(data)

    monkeypatch.setattr(Disk, "write", full)
    fails(
        capsys, edit(models / "llama", files, "--no-evaluate"), f"rlsedit: {files / 'out'}", "No space left on device"
    )


def test_an_unknown_architecture_says_what_it_needs(
    models: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(files / "mixtral")
    lm.tokenizer().save_pretrained(files / "mixtral")
    capsys.readouterr()
    fails(capsys, edit(files / "mixtral", files), "'mixtral'", "unknown", "experts", "module=")


def test_interrupt_and_bugs(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    def broken(_: object) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr("rlsedit.cli.methods.run", interrupted)
    fails(capsys, ["methods"], "interrupted", status=130)
    monkeypatch.setattr("rlsedit.cli.methods.run", broken)
    fails(capsys, ["methods"], "unexpected KeyError", "surprise", "--debug", status=1)
    with pytest.raises(KeyError):
        main(["methods", "--debug"])


def _without_transformers(*args: str) -> subprocess.CompletedProcess[str]:
    """As in an environment of the kernels alone."""
    code = "import sys; sys.modules['transformers'] = None\nfrom rlsedit.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


def test_a_package_that_is_missing() -> None:
    """The extra that has it is named."""
    done = _without_transformers("stats", "model", "--text", "text.txt")
    assert done.returncode == 2
    assert done.stderr == "rlsedit: transformers is not installed: pip install 'rlsedit-kernels[editor]'\n"


def test_methods_are_listed_without_a_library_of_models() -> None:
    """Presets stood beside the hyper-parameters that methods take, and brought one along."""
    done = _without_transformers("methods")
    assert done.returncode == 0, done.stderr
    assert "alphaedit" in done.stdout


def test_as_a_module_without_heavy_imports() -> None:
    code = "import sys, rlsedit, rlsedit.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    path = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.stdout.split() == ["False", "False"], "`rlsedit --help` must not wait for torch"
    shown = subprocess.run(
        [sys.executable, "-m", "rlsedit", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    for command in ("demo", "edit", "evaluate", "stats", "methods"):
        assert command in shown.stdout


def test_public_names() -> None:
    import rlsedit

    assert {"Editor", "Fact", "load_facts", "list_methods", "__version__"} <= set(rlsedit.__all__)
    assert all(hasattr(rlsedit, name) for name in rlsedit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'editr'"):
        _ = rlsedit.editr  # type: ignore[attr-defined]
    assert shutil.which("python") is None or rlsedit.__version__
