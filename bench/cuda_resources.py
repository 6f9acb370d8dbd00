"""What the compiler made of the CUDA kernels: registers, stack, and machine instructions, from the built library.

Needs `cuobjdump`: that of a CUDA toolkit, or the one that the Python package `triton` carries. No GPU. Shared memory is
dynamic: what a kernel asks for stands in its source and is checked by the emulator.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from harness import ROOT, arguments, report

LIBRARY = ROOT / "rlsedit_kernels" / "_C_cuda.so"
COUNTED = {
    "HMMA tf32": re.compile(r"HMMA\.1688\.F32\.TF32"),
    "HGMMA tf32": re.compile(r"\bHGMMA\.\S*\.F32\.TF32"),
    "DMMA": re.compile(r"\bDMMA\b"),
    "FFMA": re.compile(r"\bFFMA\b"),
    "LDGSTS": re.compile(r"\bLDGSTS"),
    "spills": re.compile(r"\b(?:LDL|STL)\b"),
}


def cuobjdump() -> str:
    """Path of the tool.

    Raises:
        SystemExit: there is none.
    """
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    spec = importlib.util.find_spec("triton")
    for directory in spec.submodule_search_locations or [] if spec is not None else []:
        candidate = Path(directory) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if candidate.is_file():
            return str(candidate)
    raise SystemExit("cuda_resources: cuobjdump was not found (it is part of the CUDA toolkit and of triton)")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(names: list[str]) -> dict[str, str]:
    """Kernel and engine of each mangled name."""
    plain = output("c++filt", *names).splitlines() if shutil.which("c++filt") and names else names
    short = (
        re.sub(r"rlsedit::|\(anonymous namespace\)::|^void |\(.*", "", name.replace("(bool)", "")) for name in plain
    )
    return dict(zip(names, short, strict=True))


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    options = parser.parse_args()
    if not options.library.is_file():
        parser.error(
            f"{options.library} is not there: build it with `RLSEDIT_CUDA=1 python setup.py build_ext --inplace`"
        )
    tool, library = cuobjdump(), str(options.library)
    used, arch = {}, ""
    name = ""
    for line in output(tool, "--dump-resource-usage", library).splitlines():
        if match := re.search(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            used[arch, name] = {"registers": int(match[1]), "stack_bytes": int(match[2])}
    counts: dict[tuple[str, str], Counter[str]] = {}
    for line in output(tool, "--dump-sass", library).splitlines():
        if match := re.search(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
        else:
            found = counts.setdefault((arch, name), Counter())
            found.update(kind for kind, pattern in COUNTED.items() if pattern.search(line))
    names = readable(sorted({name for _, name in used}))
    rows = [
        {"arch": arch, "kernel": names[name], **row, **{kind: counts[arch, name][kind] for kind in COUNTED}}
        for (arch, name), row in sorted(used.items(), key=lambda item: (item[0][0], names[item[0][1]]))
        if (arch, name) in counts
    ]
    report(
        "cuda_resources", {"library": options.library.name, "bytes": options.library.stat().st_size}, rows, options.json
    )


if __name__ == "__main__":
    main()
