"""Reads the text of a compiled TPU program, and counts what one run of it does.

The compiler's own cost figures count the body of a loop once and a Pallas kernel not at all. Here every instruction
counts as often as the loops around it run. What can be counted: bytes of collectives, cycles that the compiler
estimated for its fusions, copies, Pallas calls, and a floor of the bytes that move between HBM and the cores, each
operand taken as read once and a slice at its own size. What cannot: the time of a kernel, of a collective, or how much
of one hides behind the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PALLAS = "tpu_custom_call"

# bytes of a number
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2}
_WIDTHS |= {"u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

# the parts of the text: an array's type, sizes and layout; the first line of a computation; an instruction
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_METADATA = re.compile(r"kernel_metadata=\{\n.*?\n\}\}", re.DOTALL)  # of Mosaic, the only text over several lines
# what the compiler notes beside an instruction
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\b(body|calls|to_apply|called_computations|branch_computations)=\{?([%\w.\-, ]+)\}?")

_NO_ESTIMATE = 2**62  # from here on the compiler means that it has none

# move nothing themselves: names for what is there, or the second half of what was counted at its start
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id"}


@dataclass(frozen=True)
class Shape:
    """One array of a type: its bytes, and whether it lies in HBM rather than in a core's own memory."""

    size: float
    in_hbm: bool


@dataclass
class Instruction:
    """A line of a computation; a type that is a tuple has several arrays."""

    name: str
    shapes: list[Shape]
    op: str
    operands: list[str]
    text: str  # from the operation on

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return sum(s.size for s in self.shapes)

    @property
    def hbm(self) -> float:
        """Bytes of the result that lie in HBM."""
        return sum(s.size for s in self.shapes if s.in_hbm)

    @property
    def called(self) -> list[str]:
        """The computations that run inside, a loop's condition left out."""
        called = []
        for _, names in _CALLED.findall(self.text):
            for name in names.split(","):
                if name.strip():
                    called.append(name.strip().lstrip("%"))
        return called


@dataclass
class Computation:
    """Instructions by name, the root of which gives the result."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def parameter(self, number: int) -> str | None:
        """The name of an argument by its place; None if there is none."""
        for name, instruction in self.instructions.items():
            if instruction.text.startswith(f"parameter({number})"):
                return name
        return None

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """Who takes a value, and as which operand."""
        for instruction in self.instructions.values():
            for place, operand in enumerate(instruction.operands):
                if operand == name:
                    yield instruction, place


@dataclass
class Counts:
    """What one run of a program does on each chip; bytes."""

    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # how many collectives run
    synchronous: dict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # those of them that nothing runs beside
    cycles: float = 0.0
    traffic: float = 0.0
    largest_copy: float = 0.0
    pallas: int = 0  # calls in the text
    unknown_loops: int = 0  # whose number of rounds the text does not tell; counted once


def arrays(text: str) -> list[Shape]:
    """The arrays of a type."""
    out = []
    for kind, sizes, layout in _ARRAY.findall(text):
        # tokens and other types without numbers have no bytes
        if kind in _WIDTHS:
            size = float(_WIDTHS[kind])
            for n in filter(None, sizes.split(",")):
                size *= int(n)
            # S(n) in a layout is the memory space: none, or 0, is HBM
            out.append(Shape(size, re.search(r"S\([1-9]", layout) is None))
    return out


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at ``begin`` closes."""
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _instruction(name: str, line: str) -> Instruction:
    # "type operation(operands), attributes"; the type of a tuple is in parentheses and has blanks in it
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    kind = line[:end]
    text = line[end:].lstrip()
    begin = text.index("(")
    operands = re.findall(r"%([\w.\-]+)", text[begin : _closing(text, begin)])
    return Instruction(name, arrays(kind), text[:begin], operands, text)


class Program:
    """The computations of a program's text."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = None  # the computation whose lines come
        for line in _METADATA.sub("kernel_metadata={}}", text).splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], Computation())
                self.entry = header[2] if header[1] else self.entry
            # braces within a computation are indented
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _LINE.match(line)):
                current.instructions[found[2]] = _instruction(found[2], found[3])
                current.root = found[2] if found[1] else current.root
        if not self.entry:
            raise ValueError("this is no text of a compiled program: it has no entry")

    def count(self) -> Counts:
        """Walks the program as it runs."""
        counts = Counts()
        self._walk(self.entry, 1, counts, seen=set(), fused=False, beside=False)
        return counts

    def _walk(
        self, name: str, times: float, counts: Counts, *, seen: set[tuple[str, str]], fused: bool, beside: bool
    ) -> None:
        """Adds up a computation that runs so many times; ``beside``: while others do."""
        computation = self.computations[name]
        for i in computation.instructions.values():
            self._collective(i, times, counts, seen, beside)
            counts.pallas += f'custom_call_target="{PALLAS}"' in i.text
            # what is inside a fusion does not go through HBM; the fusion is counted as a whole
            if not fused:
                cycles = _CYCLES.search(i.text)
                if cycles and int(cycles[1]) < _NO_ESTIMATE:
                    counts.cycles += int(cycles[1]) * times
                counts.traffic += self._moved(computation, i) * times
                if i.op in ("copy", "copy-start"):
                    counts.largest_copy = max(counts.largest_copy, max((s.size for s in i.shapes), default=0))
            inner = i.called
            if i.op == "while":
                times_inside = self._trips(i, counts) * times
                inner = [n for n in inner if f"body=%{n}" in i.text or f"body={n}" in i.text]
            else:
                times_inside = times
                if "to_apply=" in i.text and i.op not in ("call", "call-start", "async-start"):
                    inner = []  # the sum of a reduction
            # what has been started runs beside the instructions that follow
            apart = beside or i.op in ("call-start", "async-start")
            for called in inner:
                if called in self.computations:
                    self._walk(called, times_inside, counts, seen=seen, fused=fused or i.op == "fusion", beside=apart)

    def _trips(self, loop: Instruction, counts: Counts) -> int:
        """How often a loop runs."""
        if found := _TRIPS.search(loop.text):
            return int(found[1])
        # a loop that counts to a limit has that one number in its condition
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        body = self.computations[condition[1]].instructions.values() if condition else ()
        limits: list[int] = []
        for instruction in body:
            if instruction.op == "constant":
                limits += map(int, re.findall(r"constant\((\d+)\)", instruction.text))
        if len(limits) == 1:
            return limits[0]
        counts.unknown_loops += 1
        return 1

    @staticmethod
    def _collective(i: Instruction, times: float, counts: Counts, seen: set[tuple[str, str]], beside: bool) -> None:
        kind = i.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        # fused with computing, one collective stands in the text up to three times
        chain = re.search(r'chain_id="(\d+)"', i.text)
        channel = re.search(r"channel_id=(\d+)", i.text)
        if chain and channel:
            if (chain[1], channel[1]) in seen:
                return
            seen.add((chain[1], channel[1]))
        # the type of a start holds operand and result
        pair = i.op.endswith("-start") and kind in ("all-gather", "collective-permute")
        size = (max((s.size for s in i.shapes), default=0) if pair else i.size) * times
        counts.collectives[kind] += size
        counts.operations[kind] += times
        if not (beside or chain or i.op.endswith("-start") or "async_collective_name" in i.text):
            counts.synchronous[kind] += size

    def _moved(self, where: Computation, i: Instruction) -> float:
        """Bytes between HBM and the cores, of an instruction that is not inside a fusion."""

        def of(name: str) -> Instruction | None:
            return where.instructions.get(name)

        # what a loop or a call moves is counted in its own computation
        if i.op in _FREE or i.op.endswith("-done") or i.op in ("while", "call", "conditional"):
            return 0
        if i.op == "fusion":
            inner = self.computations[i.called[0]]
            taken = 0.0
            for place, operand in enumerate(i.operands):
                source = of(operand)
                parameter = inner.parameter(place)
                if source is not None and source.hbm:
                    taken += self._read(inner, parameter, source.hbm) if parameter else source.hbm
            return taken + self._written(inner, i)
        # its type is destination, source and a handle
        if i.op == "copy-start":
            return sum(s.size for s in i.shapes[:2] if s.in_hbm)
        # operand, result, handle: of the operand only the slice is read
        if i.op.endswith("slice-start") and len(i.shapes) > 1:
            return i.shapes[1].size * (2 if i.shapes[1].in_hbm else 1)
        if i.op == "dynamic-slice":
            return i.size + i.hbm
        # in place: the update is read, and written
        if i.op == "dynamic-update-slice":
            update = of(i.operands[1])
            return 2 * update.size if update else 0
        # everything else reads each operand once, whole, and writes its result
        sources = [of(name) for name in set(i.operands)]
        return sum(s.hbm for s in sources if s is not None) + i.hbm

    def _read(self, inside: Computation, name: str, whole: float) -> float:
        """How much of a value a fused computation reads: all of it, or only slices."""
        total = whole if inside.root == name else 0.0
        for user, place in inside.users(name):
            # inside a fusion a copy is only another order, of which no more is computed than is read
            if user.op in ("bitcast", "copy") or (user.op == "fusion" and self._is_copy(user)):
                part = self._read(inside, user.name, whole)
            elif user.op in ("dynamic-slice", "slice", "gather") and place == 0:
                part = user.size
            elif (user.op in ("dynamic-update-slice", "scatter") and place == 0) or user.op == "tuple":
                part = 0.0  # the rest of it stays where it is
            elif user.op == "fusion":
                deeper = self.computations[user.called[0]]
                parameter = deeper.parameter(place)
                part = self._read(deeper, parameter, whole) if parameter else whole
            else:
                part = whole
            # several slices add up; whoever reads all of it has read the slices, too
            total = max(total, part) if part >= whole else total + part
        return min(total, whole)

    def _is_copy(self, fusion: Instruction) -> bool:
        """Whether a fusion does nothing but copy its only operand."""
        inner = self.computations[fusion.called[0]]
        return inner.instructions[inner.root].op == "copy" and len(inner.instructions) == 2

    def _written(self, inside: Computation, fusion: Instruction) -> float:
        """How much of a fusion's results goes to HBM."""
        root = inside.instructions[inside.root]
        if root.op != "tuple":
            return min(fusion.hbm, self._result(inside, root.name)) if fusion.hbm else 0.0
        parts = zip(fusion.shapes, root.operands, strict=False)
        return sum(min(s.size, self._result(inside, name)) for s, name in parts if s.in_hbm)

    def _result(self, inside: Computation, name: str) -> float:
        """How much a fused computation writes of a result: an update in place counts as the update."""
        i = inside.instructions[name]
        if i.op == "tuple":
            return sum(self._result(inside, x) for x in i.operands)
        if i.op == "bitcast":
            return self._result(inside, i.operands[0])
        if i.op in ("dynamic-update-slice", "scatter"):
            update = inside.instructions.get(i.operands[1 if i.op == "dynamic-update-slice" else 2])
            return update.size if update else i.size
        if i.op == "fusion":
            deeper = self.computations[i.called[0]]
            return self._result(deeper, deeper.root)
        return i.size
