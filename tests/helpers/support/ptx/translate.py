"""PTX, what nvcc and Triton make of a kernel, as C++ that a CPU runs: one function for each kernel.

An instruction becomes a call of the function of its name in `instructions.h`, registers become variables, and branches
become jumps; nothing is simplified on the way. What an instruction means is said in `instructions.h` and, for those
that threads do together, in `machine.cpp`. An instruction that is not known is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from support.ptx.module import Kernel, Unknown

TYPES = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"} | {
    name: name for name in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64", "pred")
}
"""The types of PTX as `instructions.h` has them."""

BYTES = {"u8": 1, "s8": 1, "u16": 2, "s16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
"""What products of integers have room in."""

# Modifiers that change neither a result nor an order here: how a branch diverges, hints for caches, the rounding that
# is meant where none is named.
_SILENT = {"rn", "uni", "aligned", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "relaxed", "weak"}
_ARITHMETIC = {
    "add", "sub", "mul", "div", "rem", "min", "max", "and", "or", "xor", "shl", "shr", "neg", "abs", "not", "sqrt",
    "rcp", "rsqrt", "clz", "fma", "mad", "bfi", "bfe", "prmt",
}  # fmt: skip
_PLAIN = {"ret": "return;", "nanosleep": "", "trap": 'ptx_fail("a trap");'}  # the same whatever their operands

KINDS = {
    "mma": ("mma", "wgmma.mma"),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "global": ("ld.global", "st.global", "ld.acquire", "st.release", "atom", "prefetch"),
    "copy": ("cp.async.c", "cp.async.bulk"),
    "shuffle": ("shfl",),
    "barrier": ("bar", "mbarrier", "cp.async.wait", "wgmma.", "fence", "cp.async.commit"),
    "special": ("sqrt", "rcp", "rsqrt", "div", "rem"),
    "parameter": ("ld.param",),
}
"""Kinds of instructions that a profile counts, by how they begin; the rest are "float", "jump" and "integer"."""


def cpp(kernel: Kernel) -> str:
    """C++ for a kernel: `extern "C" void ptx_kernel(const Thread&, void* const* parameters)`."""
    return _Translation(kernel).source()


def _split(text: str) -> list[str]:
    """Operands: what commas separate outside of braces and brackets."""
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += letter in "{["
        depth -= letter in "}]"
        if letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()] if part.strip() else parts


def _as(to: str, kind: str, value: str) -> str:
    """A value of one type as another: the same bits, and of integers the lower ones, or more of the sign."""
    if to == kind:
        return value
    if to in BYTES and kind in BYTES and not {to, kind} & {"f32", "f64"}:
        return f"{to}({value})"
    if BYTES.get(to) != BYTES.get(kind):
        raise Unknown(f"{kind} in a register of {to}")
    return f"__builtin_bit_cast({to}, {value})"


def _name(register: str) -> str:
    return "r_" + re.sub(r"[^\w]", "_", register.lstrip("%"))


@dataclass
class _Translation:
    kernel: Kernel
    parameters: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    """Of registers; a name of an inner scope keeps its last one."""
    sums: list[list[str]] = field(default_factory=list)
    """Registers that products of a warpgroup are formed in."""
    lines: list[str] = field(default_factory=list)
    place: str = ""
    """The line of the source that the next instructions are of."""
    sites: list[str] = field(default_factory=list)
    """Accesses to memory: instruction and line."""

    def source(self) -> str:
        head, _, body = self.kernel.text.partition("{")
        self.parameters = {name: i for i, name in enumerate(re.findall(r"([\w$]+)(?:\[\d+\])?\s*[,)]", head))}
        static = self._shared_memory()
        body = body.rsplit("}", 1)[0]
        for statement in self._statements(body):
            self._statement(statement)
        pending = "".join(
            f"  bool pending_{i} = false;\n  f32 sums_{i}[{len(registers)}];\n" for i, registers in enumerate(self.sums)
        )
        code = "\n".join(self.lines)
        sites = ",\n    ".join(f'"{site}"' for site in [*self.sites, ""])
        return (
            '#include "instructions.h"\n\n'
            f'extern "C" const unsigned ptx_static = {static}, ptx_most_threads = {self.kernel.most_threads};\n\n'
            'extern "C" void ptx_kernel(const Thread& thread, void* const* parameters) {\n'
            f"  (void)parameters;\n{pending}{code}\n}}\n\n"
            f'#ifdef PTX_PROFILE\nextern "C" const char* const ptx_sites[] = {{\n    {sites}}};\n#endif\n'
        )

    def _shared_memory(self) -> int:
        """Places of the variables in shared memory; the bytes of those of known size, in front of the dynamic ones."""
        pattern = r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;"
        size = 0
        dynamic = []
        for align, kind, name, count in re.findall(pattern, self.kernel.module + self.kernel.text):
            if count == "" and f"{name}[]" in self.kernel.module:
                dynamic.append(name)
                continue
            size = -(-size // int(align)) * int(align)
            self.symbols[name] = size
            size += BYTES[TYPES[kind]] * int(count or 1)
        size = -(-size // 16) * 16
        self.symbols |= dict.fromkeys(dynamic, size)
        return size

    @staticmethod
    def _statements(body: str) -> Iterator[str]:
        """Statements, labels with their colon, and the braces of scopes."""
        at = 0
        token = re.compile(r"\s*(?:([\w$]+:)(?!:)|([{}])|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)", re.DOTALL)
        while body[at:].strip():
            found = token.match(body, at)
            if found is None:
                raise Unknown(f"a statement: {body[at : at + 80]!r}")
            yield next(group for group in found.groups() if group is not None).strip()
            at = found.end()

    def _statement(self, text: str) -> None:
        if not text:
            return
        if text in "{}":
            self.lines.append(f"  {text}")
        elif text.endswith(":"):
            self.lines.append(f"{_name(text[:-1])}:;")
        elif text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".loc"):
            self._line(text)
        elif text.startswith((".pragma", ".shared")):
            pass
        elif text.startswith("."):
            raise Unknown(text)
        else:
            guard, negated, opcode, operands = re.match(  # type: ignore[union-attr]
                r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL
            ).group(2, 1, 3, 4)
            code = self._instruction(opcode, _split(operands))
            condition = f"if ({negated}{_name(guard)}) " if guard else ""
            self.lines.append(f"  {condition}{{ {self._counted(opcode)}{code} }}")

    def _line(self, text: str) -> None:
        """Where an instruction stands, and where the outermost function that it was inlined into is called."""
        numbers = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", text)
        self.place = " < ".join(f"{self.kernel.files.get(file, '?')}:{line}" for file, line in numbers)

    @staticmethod
    def _counted(opcode: str) -> str:
        base = opcode.split(".")[0]
        kind = next((name for name, known in KINDS.items() if opcode.startswith(known)), None)
        if kind is None:
            floating = ".f32" in opcode or ".f64" in opcode
            kind = "float" if floating and base in _ARITHMETIC else "jump" if base in ("bra", "ret") else "integer"
        return f"PTX_COUNT(k_{kind}); "

    def _noted(self, opcode: str, space: str, address: str, size: int) -> str:
        """What an access tells a profile (profile.py)."""
        self.sites.append(f"{opcode} {self.place}")
        return f"PTX_NOTE({len(self.sites) - 1}, '{space[0]}', {address}, {size}); "

    def _registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        for name in _split(names):
            counted = re.fullmatch(r"(%\w+)<(\d+)>", name)
            every = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
            self.types |= dict.fromkeys(every, TYPES[kind])
            for start in range(0, len(every), 12):
                self.lines.append(f"  {TYPES[kind]} {', '.join(map(_name, every[start : start + 12]))};")

    # operands

    def _value(self, operand: str, kind: str) -> str:
        """An operand to be read as a type."""
        if operand.startswith("0f"):
            return _as(kind, "f32", f"float_of(0x{operand[2:]}u)")
        if operand.startswith("0d"):
            return _as(kind, "f64", f"double_of(0x{operand[2:]}ull)")
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF
            return _as(kind, "u32", f"{number}u") if kind in ("f32", "f64") else f"{kind}({number}ull)"
        if operand in self.symbols:
            return f"{kind}(thread.start + {self.symbols[operand]})"
        special = re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", operand)
        if special:
            return f"{kind}(thread.{special[1]}.{special[2]})"
        if operand in ("%laneid", "%warpid"):
            return f"{kind}(thread.tid.x {'& 31' if operand == '%laneid' else '>> 5'})"
        if operand in self.types:
            return _as(kind, self.types[operand], _name(operand))
        raise Unknown(f"operand {operand}")

    def _set(self, operand: str, value: str, kind: str) -> str:
        """A value of a type for a register."""
        if operand == "_":
            return f"(void)({value});"
        if operand not in self.types:
            raise Unknown(f"register {operand}")
        return f"{_name(operand)} = {_as(self.types[operand], kind, value)};"

    @staticmethod
    def _list(operand: str) -> list[str]:
        return _split(operand.strip("{}")) if operand.startswith("{") else [operand]

    def _address(self, operand: str) -> str:
        """The number in brackets."""
        inside = operand.strip("[] ")
        found = re.fullmatch(r"(%?[\w$]+)\s*(?:\+\s*(-?\w+))?", inside)
        if found is None:
            raise Unknown(f"address {operand}")
        base, offset = found.group(1), int(found.group(2) or "0", 0)
        if base in self.symbols:
            return f"u64(thread.start + {self.symbols[base] + offset})"
        return f"u64({_name(base)}) + u64({offset & 0xFFFFFFFFFFFFFFFF}ull)"

    # instructions

    def _instruction(self, opcode: str, operands: list[str]) -> str:
        base, *rest = opcode.split(".")
        modifiers = [modifier for modifier in rest if modifier not in _SILENT]
        if base in _PLAIN:
            return _PLAIN[base]
        special = getattr(self, f"_do_{base}", None)
        if special is not None:
            return str(special(opcode, modifiers, operands))
        if base in _ARITHMETIC:
            return self._arithmetic(base, modifiers, operands)
        raise Unknown(opcode)

    def _arithmetic(self, base: str, modifiers: list[str], operands: list[str]) -> str:
        *how, last = modifiers
        kind = TYPES[last]
        function = "_".join([base, *(word for word in how if word != "rn")])
        kinds = [kind] * (len(operands) - 1)
        if base in ("shl", "shr"):
            kinds[1] = "u32"
        elif function in ("mad_wide",):
            kinds[2] = WIDE[kind]
        elif base in ("bfi", "bfe"):
            kinds[-2:] = ["u32", "u32"]
        values = ", ".join(self._value(o, k) for o, k in zip(operands[1:], kinds, strict=True))
        result = {"mul_wide": WIDE.get(kind, kind), "mad_wide": WIDE.get(kind, kind), "clz": "u32"}.get(function, kind)
        return self._set(operands[0], f"{function}_<{kind}>({values})", result)

    def _do_mov(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        kind = TYPES[modifiers[-1]]
        to, source = operands
        if to.startswith("{"):
            parts = self._list(to)
            half = {1: kind, 2: {"u64": "u32", "u32": "u16"}.get(kind, "")}[len(parts)]
            code = f"const {kind} whole = {self._value(source, kind)}; "
            return code + " ".join(
                self._set(part, f"{half}(whole >> {8 * BYTES[half] * i})", half) for i, part in enumerate(parts)
            )
        if source.startswith("{"):
            parts = self._list(source)
            half = {"u64": "u32", "u32": "u16"}[kind]
            joined = " | ".join(
                f"{kind}({self._value(part, half)}) << {8 * BYTES[half] * i}" for i, part in enumerate(parts)
            )
            return self._set(to, f"{kind}({joined})", kind)
        return self._set(to, self._value(source, kind), kind)

    def _do_cvt(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        *how, to, source = modifiers
        if any(word not in ("rzi", "rna") for word in how):
            raise Unknown(opcode)
        function = "_".join(["cvt", *how])
        value = self._value(operands[1], TYPES[source])
        if to == "tf32":
            return self._set(operands[0], f"{function}_tf32({value})", "u32")
        return self._set(operands[0], f"{function}<{TYPES[to]}>({value})", TYPES[to])

    def _do_cvta(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if "global" not in modifiers:
            raise Unknown(opcode)
        return self._set(operands[0], self._value(operands[1], "u64"), "u64")

    def _do_setp(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        compare, *joined, kind = modifiers
        kind = TYPES[kind]
        test = f"compare_{compare}({self._value(operands[1], kind)}, {self._value(operands[2], kind)})"
        if joined:
            negated, other = operands[3].startswith("!"), _name(operands[3].lstrip("!"))
            sign = {"and": "&", "or": "|", "xor": "^"}[joined[0]]
            test = f"({test} {sign} {'!' if negated else ''}{other})"
        if "|" in operands[0]:
            raise Unknown(opcode)
        return self._set(operands[0], test, "pred")

    def _do_selp(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        kind = TYPES[modifiers[-1]]
        to, yes, no, condition = operands
        return self._set(to, f"({_name(condition)} ? {self._value(yes, kind)} : {self._value(no, kind)})", kind)

    def _do_bra(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        return f"goto {_name(operands[0])};"

    def _memory(self, modifiers: list[str]) -> tuple[str, int, str]:
        """Space, elements and type of a load or store."""
        known = {"global", "shared", "param", "shared::cta"}
        space = next((word for word in modifiers if word in known), "generic")
        count = next((int(word[1:]) for word in modifiers if word in ("v2", "v4", "v8")), 1)
        rest = set(modifiers[:-1]) - known - {"v2", "v4", "v8", "nc", "volatile"}
        if rest or space == "generic":
            raise Unknown(".".join(modifiers))
        return space.partition(":")[0], count, TYPES[modifiers[-1]]

    def _do_ld(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if "acquire" in modifiers:
            if set(modifiers[:-1]) != {"acquire", "gpu", "global"} or TYPES[modifiers[-1]] != "u32":
                raise Unknown(opcode)
            return self._set(self._list(operands[0])[0], f"ptx_acquire({self._address(operands[1])})", "u32")
        space, count, kind = self._memory(modifiers)
        to = self._list(operands[0])
        if space == "param":
            found = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", operands[1])
            if found is None or found[1] not in self.parameters:
                raise Unknown(f"{opcode} {operands}")
            place = f"parameter<{kind}>(parameters[{self.parameters[found[1]]}], {int(found[2] or 0)}"
            return " ".join(self._set(name, f"{place} + {i * BYTES[kind]})", kind) for i, name in enumerate(to))
        code = self._noted(opcode, space, self._address(operands[1]), count * BYTES[kind])
        code += f"const {kind}* from = {space}<const {kind}, {count}>(thread, {self._address(operands[1])}); "
        code += " ".join(f"const {kind} v{i} = at(from, {i});" for i in range(count)) + " "
        return code + " ".join(self._set(name, f"v{i}", kind) for i, name in enumerate(to))

    def _do_st(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        values = self._list(operands[1])
        if "release" in modifiers:
            if modifiers != ["release", "gpu", "global", modifiers[-1]] or TYPES[modifiers[-1]] != "u32":
                raise Unknown(opcode)
            return f"ptx_release({self._address(operands[0])}, {self._value(values[0], 'u32')});"
        space, count, kind = self._memory(modifiers)
        code = self._noted(opcode, space, self._address(operands[0]), count * BYTES[kind])
        code += f"{kind}* to = {space}<{kind}, {count}>(thread, {self._address(operands[0])}); "
        return code + " ".join(f"put(to, {i}, {self._value(value, kind)});" for i, value in enumerate(values))

    def _do_atom(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        words = [word for word in modifiers if word not in ("global", "gpu", "acquire", "release", "acq_rel")]
        functions = {"add u32": "ptx_add", "exch b32": "ptx_exchange"}
        if "global" not in modifiers or " ".join(words) not in functions:
            raise Unknown(opcode)
        function = functions[" ".join(words)]
        return self._set(
            operands[0], f"{function}({self._address(operands[1])}, {self._value(operands[2], 'u32')})", "u32"
        )

    def _do_bar(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if opcode == "bar.warp.sync":
            return f"ptx_warp_sync({self._value(operands[0], 'u32')});"
        if opcode != "bar.sync":
            raise Unknown(opcode)
        count = self._value(operands[1], "u32") if len(operands) > 1 else "0"
        return f"ptx_barrier({self._value(operands[0], 'u32')}, {count});"

    def _do_shfl(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        mode = {"idx": 0, "bfly": 1, "up": 2, "down": 3}[modifiers[1]]
        to, _, valid = operands[0].partition("|")
        values = ", ".join(self._value(operand, "u32") for operand in operands[1:])
        code = f"bool in_range; {self._set(to, f'ptx_shuffle({mode}, {values}, &in_range)', 'u32')}"
        return code + (f" {self._set(valid, 'in_range', 'pred')}" if valid else "")

    def _do_prefetch(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        return f"ptx_prefetch({self._address(operands[0])});"

    def _do_ldmatrix(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        registers, count = self._list(operands[0]), self._matrices(opcode)
        code = self._noted(opcode, "shared", self._address(operands[1]), 16)
        code += f"u32 d[{count}]; ptx_load_matrices(d, {count}, {self._address(operands[1])}); "
        return code + " ".join(self._set(register, f"d[{i}]", "u32") for i, register in enumerate(registers))

    def _do_stmatrix(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        values = ", ".join(self._value(register, "u32") for register in self._list(operands[1]))
        count = self._matrices(opcode)
        code = self._noted(opcode, "shared", self._address(operands[0]), 16)
        return (
            f"{code}const u32 d[{count}] = {{{values}}}; ptx_store_matrices(d, {count}, {self._address(operands[0])});"
        )

    @staticmethod
    def _matrices(opcode: str) -> int:
        found = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", opcode)
        if found is None:
            raise Unknown(opcode)
        return int(found[1])

    def _do_mma(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if opcode == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32":
            name, sums, factors, nd, na, nb = "tf32(d, a, b)", "f32", "u32", 4, 4, 2
        else:
            found = re.fullmatch(r"mma\.sync\.aligned\.m(8|16)n8k(4|8|16)\.row\.col\.f64\.f64\.f64\.f64", opcode)
            if found is None or found.groups() in (("8", "8"), ("8", "16")):
                raise Unknown(opcode)
            halves, parts = int(found[1]) // 8, int(found[2]) // 4
            name, sums, factors = f"f64(d, a, b, {halves}, {parts})", "f64", "f64"
            nd, na, nb = 2 * halves, halves * parts, parts
        d, a, b, c = map(self._list, operands)
        code = f"{sums} d[{nd}] = {{{', '.join(self._value(x, sums) for x in c)}}}; "
        code += f"const {factors} a[{na}] = {{{', '.join(self._value(x, factors) for x in a)}}}; "
        code += f"const {factors} b[{nb}] = {{{', '.join(self._value(x, factors) for x in b)}}}; "
        code += f"ptx_mma_{name}; "
        return code + " ".join(self._set(x, f"d[{i}]", sums) for i, x in enumerate(d))

    def _do_cp(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if opcode == "cp.async.commit_group":
            return "ptx_copy_commit();"
        if opcode == "cp.async.wait_group":
            return f"ptx_copy_wait({int(operands[0], 0)});"
        if opcode == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
            to, source, count, barrier = operands
            return (
                f"ptx_copy_bulk({self._address(to)}, {self._address(source)}, {self._value(count, 'u32')}, "
                f"{self._address(barrier)});"
            )
        if opcode not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
            raise Unknown(opcode)
        size = int(operands[2], 0)
        valid = self._value(operands[3], "u32") if len(operands) > 3 else str(size)
        if (opcode == "cp.async.cg.shared.global") != (size == 16) and "cg" in opcode:
            raise Unknown(f"{opcode} of {size} bytes")
        to, source = self._address(operands[0]), self._address(operands[1])
        code = self._noted(opcode, "shared", to, size)
        code += f"if ({valid} > 0) {{ {self._noted(opcode, 'global', source, size)}}} "
        return f"{code}ptx_copy({to}, {source}, {size}, {valid});"

    # Hopper

    def _do_mbarrier(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if opcode == "mbarrier.init.shared::cta.b64":
            return f"ptx_barrier_init({self._address(operands[0])}, {self._value(operands[1], 'u32')});"
        if opcode == "mbarrier.arrive.shared::cta.b64":
            return f"ptx_barrier_arrive({self._address(operands[1])}, 0);"
        if opcode == "mbarrier.arrive.expect_tx.shared::cta.b64":
            return f"ptx_barrier_arrive({self._address(operands[1])}, {self._value(operands[2], 'u32')});"
        if opcode == "mbarrier.try_wait.parity.shared::cta.b64":
            waited = f"ptx_barrier_wait({self._address(operands[1])}, {self._value(operands[2], 'u32')})"
            return self._set(operands[0], waited, "pred")
        raise Unknown(opcode)

    def _do_fence(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if opcode != "fence.proxy.async.shared::cta":
            raise Unknown(opcode)
        return "ptx_fence_async();"

    def _do_wgmma(self, opcode: str, modifiers: list[str], operands: list[str]) -> str:
        if opcode == "wgmma.fence.sync.aligned":
            return "ptx_wgmma_fence();"
        if opcode == "wgmma.commit_group.sync.aligned":
            return "ptx_wgmma_commit();"
        if opcode == "wgmma.wait_group.sync.aligned":
            if operands != ["0"]:
                raise Unknown(f"{opcode} {operands[0]}")
            code = "ptx_wgmma_wait(); "
            for i, registers in enumerate(self.sums):
                written = " ".join(self._set(x, f"sums_{i}[{k}]", "f32") for k, x in enumerate(registers))
                code += f"if (pending_{i}) {{ {written} pending_{i} = false; }} "
            return code
        found = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k8\.f32\.tf32\.tf32", opcode)
        d, a = map(self._list, operands[:2])
        if found is None or len(a) != 4 or len(d) != int(found[1]) // 2 or operands[4:] != ["1", "1"]:
            raise Unknown(opcode)
        if d not in self.sums:
            self.sums.append(d)
        i = self.sums.index(d)
        # The registers belong to the product until it has been waited for.
        taken = " ".join(
            f"sums_{i}[{k}] = {self._value(x, 'f32')}; {self._set(x, 'not_a_number()', 'f32')}" for k, x in enumerate(d)
        )
        values = ", ".join(self._value(x, "u32") for x in a)
        adds = self._value(operands[3], "pred")
        return (
            f"if (!pending_{i}) {{ {taken} pending_{i} = true; }} const u32 a[4] = {{{values}}}; "
            f"ptx_wgmma(sums_{i}, {found[1]}, a, {self._value(operands[2], 'u64')}, {adds});"
        )
