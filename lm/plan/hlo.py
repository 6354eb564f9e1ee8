"""What a compiled TPU program will take, read off its optimized and scheduled HLO text: FLOPs,
bytes, collectives, time.

Times are models, not measurements. Each operation has three: what it can't be faster than (FLOPs at
the matrix units' peak, bytes at the memory's), what the compiler itself estimates
(`estimated_cycles`, pessimistic), and a figure in between. They are played through the schedule:
asynchronous transfers run beside the compute, and only what the compute then waits for is added to
the step. Not modelled: contention for memory between transfers and compute, DCN beyond its
bandwidth, host offload, stalls of the input.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet figures (cloud.google.com/tpu/docs, system architecture), per jax device."""

    name: str
    peak: float  # bf16 FLOP/s
    clock: float  # Hz: peak / FLOPs per cycle of all matrix units
    hbm: float  # bytes/s
    # bytes that a program may use, by the compiler (the data sheets' figure less what is reserved)
    memory: float
    link: float  # bytes/s of one ICI link, one way
    wrap: int  # a torus dim of a multiple of this length is closed to a ring
    # splash attention with segments: share of peak at head size 128, forward and backward, from
    # VLIW bundle counts
    kernel: tuple[float, float]


# fmt: off
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 1.05e9, 1.2e12, 30.75 * 2**30, 4.5e10, 4, (0.54, 0.70)),
    "TPU v5 lite": Chip("v5e", 197e12, 1.5e9, 8.1e11, 15.75 * 2**30, 4.5e10, 16, (0.56, 0.73)),
    "TPU v5": Chip("v5p", 459e12, 1.75e9, 2.76e12, 95.74 * 2**30, 9e10, 4, (0.54, 0.70)),
    "TPU v6 lite": Chip("v6e", 918e12, 1.75e9, 1.64e12, 31.25 * 2**30, 9e10, 16, (0.21, 0.28)),
}
# fmt: on
DCN = 6.25e9  # bytes/s of a chip between slices: a host's 200 Gbit/s over its four chips
GROUPED = ("ragged-dot", "tgmm")  # kernels of lm.nn.moe
MODELS = ("compiler", "calibrated", "roofline")

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "token": 0,
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?")


class Array(collections.namedtuple("Array", "dtype shape on_chip")):
    @property
    def bytes(self) -> int:
        return _BYTES.get(self.dtype, 1) * math.prod(self.shape)


def arrays(type_text: str) -> list[Array]:
    """The arrays of an HLO type, those in VMEM (memory space 1) marked."""
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in layout)
        for dtype, dims, layout in _ARRAY.findall(type_text)
    ]


def _total(type_text: str, hbm_only: bool = False) -> int:
    return sum(a.bytes for a in arrays(type_text) if not (hbm_only and a.on_chip))


@dataclasses.dataclass
class Op:
    name: str
    opcode: str
    type: str
    arguments: str
    attributes: str
    is_root: bool

    def __post_init__(self):
        self.operands = re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def called(self) -> str | None:
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")


def _closing(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError("unbalanced brackets in HLO text")


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
    """({computation: its operations in order}, the entry's name)."""
    computations, entry, current, pending = {}, "", None, []

    def finish():
        if pending:
            line = "".join(pending)
            pending.clear()
            head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
            rest = line[head.end() :]
            type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            opcode = re.match(r"\s*([\w\-]+)\(", rest[type_end:])
            start = type_end + opcode.end() - 1
            end = _closing(rest, start)
            current.append(
                Op(
                    head.group(2),
                    opcode.group(1),
                    rest[:type_end],
                    rest[start + 1 : end],
                    rest[end + 1 :],
                    bool(head.group(1)),
                )
            )

    for line in text.split("\n"):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            finish()
        elif re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            finish()
            pending.append(line)
        elif pending:
            pending.append(line)  # kernel metadata may hold line breaks
    return computations, entry


def first_group(attributes: str, num_devices: int) -> list[int]:
    """The devices of a collective's first group."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in found.group(1).split(",")]
    if found := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        groups, size, dims, order = found.groups()
        ids = np.arange(int(groups) * int(size)).reshape([int(n) for n in dims.split(",")])
        return (
            ids.transpose([int(n) for n in order.split(",")] if order else None)
            .reshape(int(groups), int(size))[0]
            .tolist()
        )
    return list(range(num_devices))


@dataclasses.dataclass
class Collective:
    kind: str
    axes: tuple[str, ...]  # of the mesh
    wire: float  # bytes that each device sends, as a ring does it
    seconds: float
    asynchronous: bool
    exposed: float = 0.0  # seconds that the compute waits for it
    count: int = 1


@dataclasses.dataclass
class Cost:
    """Of one run of a computation."""

    # category -> seconds
    time: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    flops: float = 0.0  # of matmuls
    kernel_flops: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    hbm: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int) -> None:
        for mine, theirs in ((self.time, other.time), (self.kernels, other.kernels)):
            for key, value in theirs.items():
                mine[key] += times * value
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm += times * other.hbm
        self.collectives += [
            dataclasses.replace(c, count=c.count * times) for c in other.collectives
        ]

    @property
    def seconds(self) -> float:
        return sum(self.time.values())


class HloModule:
    """An optimized HLO module on a mesh.

    Args:
      coordinates: of each device of the mesh, in its order: (slice, x, y, z).
      mesh: axis -> size, in the mesh's order.
      block: tile of the attention kernel.
    """

    def __init__(
        self,
        text: str,
        chip: Chip,
        coordinates: Sequence[tuple[int, ...]],
        mesh: dict[str, int],
        block: int = 1024,
    ):
        self.computations, self.entry = parse(text)
        self.chip, self.coordinates, self.mesh, self.block = (
            chip,
            np.asarray(coordinates),
            mesh,
            block,
        )
        self.sides = self.coordinates.max(axis=0) + 1
        self.by_name = {
            name: {op.name: op for op in ops} for name, ops in self.computations.items()
        }
        self.notes: collections.Counter = collections.Counter()
        self._flops: dict[str, float] = {}
        self._used: dict[str, dict] = {}

    # Loops

    def _constant(self, computation: str, name: str) -> int | None:
        op = self.by_name[computation].get(name)
        while op is not None and op.opcode in ("copy", "bitcast", "convert") and op.operands:
            op = self.by_name[computation].get(op.operands[0])
        return (
            int(op.arguments)
            if op is not None
            and op.opcode == "constant"
            and re.fullmatch(r"-?\d+", op.arguments.strip())
            else None
        )

    def trips(self, loop: Op) -> int:
        """How often a loop runs. Those of jax.lax.scan count from 0 by 1 to a constant."""
        if known := loop.attribute(r"known_trip_count[^\d]*(\d+)"):
            return int(known)
        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        for op in self.computations[condition]:
            if op.opcode == "compare":
                limits = [
                    n
                    for n in (self._constant(condition, name) for name in op.operands)
                    if n is not None
                ]
                if len(limits) == 1 and "direction=LT" in op.attributes:
                    return limits[0]
        self.notes[f"loop {loop.name}: unknown number of trips, taken as 1"] += 1
        return 1

    # FLOPs

    def _matmul_flops(self, op: Op, computation: str) -> float:
        out, left, right = (
            arrays(t)[0].shape
            for t in (op.type, *(self.by_name[computation][name].type for name in op.operands[:2]))
        )
        if op.opcode == "dot":
            dims = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
            return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in dims.split(",") if d)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
        window = dict(
            part.split("=") for part in (op.attribute(r"window=\{([^}]*)\}") or "").split()
        )
        flops = (
            2.0
            * out[labels[2].index("b")]
            * out[labels[2].index("f")]
            * right[labels[1].index("i")]
        )
        for i in range(len(labels[0]) - 2):
            setting = lambda key, default: window[key].split("x")[i] if key in window else default  # noqa: B023
            size_in, size_out, taps = (
                left[labels[0].index(str(i))],
                out[labels[2].index(str(i))],
                int(setting("size", "1")),
            )
            dilation = int(setting("lhs_dilate", "1"))
            # Only taps on a real element count: batch dims of a matmul become windows that are
            # mostly padding.
            place = (
                np.arange(size_out)[:, None] * int(setting("stride", "1"))
                - int(setting("pad", "0_0").split("_")[0])
                + np.arange(taps)[None, :] * int(setting("rhs_dilate", "1"))
            )
            flops *= int(
                np.sum((place >= 0) & (place <= (size_in - 1) * dilation) & (place % dilation == 0))
            )
        return flops / int(op.attribute(r"batch_group_count=(\d+)") or 1)

    def flops(self, computation: str) -> float:
        """Of the matmuls in a fused computation."""
        if computation not in self._flops:
            self._flops[computation] = sum(
                self._matmul_flops(op, computation)
                if op.opcode in ("convolution", "dot")
                else self.flops(op.called)
                if op.opcode == "fusion"
                else 0.0
                for op in self.computations[computation]
            )
        return self._flops[computation]

    # Bytes

    def _hbm(self, op: Op, computation: str) -> float:
        """Bytes that an operation reads from and writes to HBM. What a fusion only slices or
        updates in part counts by that part.
        """
        named = self.by_name[computation]
        operands = [named[name].type if name in named else "" for name in op.operands]
        if op.opcode == "dynamic-update-slice":
            return 2.0 * _total(operands[1], True)
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * _total(op.type, True)
        if op.opcode != "fusion":
            return _total(op.type, True) + sum(_total(t, True) for t in operands)
        inside = self.computations[op.called]
        total = 0.0
        for parameter in inside:
            if parameter.opcode == "parameter":
                kind = operands[int(parameter.arguments)]
                total += (
                    0.0
                    if all(a.on_chip for a in arrays(kind))
                    else self._read(op.called, parameter.name, _total(kind))
                )
        root = next(o for o in inside if o.is_root)
        outputs, types = (
            (root.operands, arrays(op.type))
            if root.opcode == "tuple"
            else ([root.name], arrays(op.type)[:1])
        )
        return total + sum(
            min(self._written(op.called, name), a.bytes)
            for name, a in zip(outputs, types)
            if not a.on_chip
        )

    def _users(self, computation: str) -> dict[str, list[tuple[Op, int]]]:
        if computation not in self._used:
            users = self._used[computation] = collections.defaultdict(list)
            for user in self.computations[computation]:
                for position, name in enumerate(user.operands):
                    users[name].append((user, position))
        return self._used[computation]

    def _read(self, computation: str, name: str, whole: float) -> float:
        """Bytes that a fused computation reads of a value of `whole` bytes."""
        total = 0.0
        for user, position in self._users(computation)[name]:
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += _total(user.type) if position == 0 else 0.0
            elif user.opcode in ("bitcast", "reshape"):
                total += self._read(computation, user.name, whole)
            elif user.opcode == "fusion":
                inner = next(
                    p.name
                    for p in self.computations[user.called]
                    if p.opcode == "parameter" and int(p.arguments) == position
                )
                total += self._read(user.called, inner, whole)
            elif not (
                user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and position == 0)
            ):
                return whole
        return min(total, whole)

    def _written(self, computation: str, name: str) -> float:
        op = self.by_name[computation][name]
        if op.opcode in ("bitcast", "reshape"):
            return self._written(computation, op.operands[0])
        if op.opcode == "dynamic-update-slice":
            return _total(self.by_name[computation][op.operands[1]].type)
        if op.opcode == "fusion":
            root = next(o for o in self.computations[op.called] if o.is_root)
            return (
                _total(op.type) if root.opcode == "tuple" else self._written(op.called, root.name)
            )
        return 0.0 if op.opcode == "parameter" else _total(op.type)

    # Collectives

    def _collective(self, op: Op, computation: str, kind: str, asynchronous: bool) -> Collective:
        named = self.by_name[computation]
        inputs = sum(_total(named[name].type) for name in op.operands if name in named)
        output = _total(op.type)
        if op.opcode.endswith("-start"):
            output = max(output - inputs, inputs) if kind == "all-gather" else inputs
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", op.attributes)
            group, share, size = [int(n) for n in pairs[0]] if pairs else [0], 1.0, inputs
        else:
            group = first_group(op.attributes, len(self.coordinates))
            share, size = (
                (len(group) - 1) / len(group),
                {"all-gather": output, "reduce-scatter": inputs, "all-to-all": output}.get(
                    kind, 2 * inputs
                ),
            )
        places = np.stack(np.unravel_index(group, tuple(self.mesh.values())))
        axes = tuple(axis for axis, row in zip(self.mesh, places) if len(set(row)) > 1)
        where = self.coordinates[group]
        spans = [len(set(where[:, i])) for i in range(where.shape[1])]
        # A ring in each torus dim that the group spans; both ways round where it is closed.
        links = sum(
            (2 if side % self.chip.wrap == 0 and span == side else 1)
            for span, side in zip(spans[1:], self.sides[1:])
            if span > 1
        )
        speed = (
            DCN
            if spans[0] > 1
            else self.chip.link * max(1 if kind == "collective-permute" else links, 1)
        )
        return Collective(kind, axes, size * share, size * share / speed, asynchronous)

    def _inside(self, computation: str) -> list[tuple[str, Op, str]]:
        """The collectives in a fused or asynchronous computation: (kind, operation, where)."""
        found = []
        for op in self.computations.get(computation, ()):
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found.append((kind, op, computation))
            elif op.called and op.opcode in ("fusion", "call", "async-start"):
                found += self._inside(op.called)
        return found

    # Time

    def _kernel(self, op: Op, computation: str) -> tuple[str, float, float]:
        """(name, FLOPs, seconds) of a Pallas kernel. Of attention: the blocks at and below the
        diagonal. Of others (libtpu puts one of its own in the place of a small unmasked attention):
        as the kernel declares, at the speed of attention; of experts' matmuls, of its backward
        kernel, which is no more than a guess.
        """
        name = re.sub(r"[.\d]+$", "", op.name)
        shapes = [
            arrays(self.by_name[computation][n].type)[0]
            for n in op.operands
            if n in self.by_name[computation]
        ]
        hbm = (
            _total(op.type, True) + sum(s.bytes for s in shapes if not s.on_chip)
        ) / self.chip.hbm
        # queries first; one row has no batch dim
        heads = [s.shape for s in shapes if len(s.shape) in (3, 4) and s.dtype in ("bf16", "f32")]
        if "splash" not in name and (
            declared := op.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
        ):
            if grouped := name.startswith(GROUPED):
                self.notes[
                    f"experts' matmuls: {self.chip.kernel[1]:.0%} of the peak is a guess, for all "
                    "rows that there is room for"
                ] += 1
            return (
                name,
                float(declared),
                max(hbm, float(declared) / (self.chip.peak * self.chip.kernel[grouped])),
            )
        if "splash" not in name or not heads:
            self.notes[f"kernel {name}: unknown, timed by its bytes"] += 1
            return name, 0.0, hbm
        batch, num_heads, length, head_dim = (1, *heads[0])[-4:]
        blocks = max(length // min(self.block, length), 1)
        backward = "dkv" in name or "dq" in name
        flops = (
            2.0
            * batch
            * num_heads
            * length
            * length
            * head_dim
            * (5 if backward else 2)
            * (blocks + 1)
            / (2 * blocks)
        )
        return (
            name,
            flops,
            max(
                hbm,
                flops / (self.chip.peak * self.chip.kernel[backward] * min(1.0, head_dim / 128)),
            ),
        )

    def _compute_seconds(self, op: Op, flops: float, hbm: float, model: str) -> float:
        chip = self.chip
        least = max(flops / chip.peak, hbm / chip.hbm)
        cycles = op.attribute(r'"estimated_cycles":"(\d+)"')
        if cycles is None or model == "roofline":
            return least
        estimate = max(int(cycles) / chip.clock, least)
        if model == "compiler":
            return estimate
        # Bundle simulations confirm 40% of what the compiler adds to a matmul's limit, and little
        # of what it adds to other loops'.
        return least + 0.4 * (estimate - least) if flops else min(estimate, least / 0.85)

    def cost(self, model: str, computation: str | None = None, cache: dict | None = None) -> Cost:
        """Plays a computation's schedule (the entry's by default)."""
        cache = {} if cache is None else cache
        computation = computation or self.entry
        if computation in cache:
            return cache[computation]
        total, now, links, memory = Cost(), 0.0, 0.0, 0.0
        flying: dict[str, tuple[float, Collective | None]] = {}  # name or channel -> (end, what)

        def spend(category: str, seconds: float) -> None:
            nonlocal now
            total.time[category] += seconds
            now += seconds

        def start(key: str, collective: Collective) -> None:
            nonlocal links
            links = max(now, links) + collective.seconds
            flying[key] = links, collective
            total.collectives.append(collective)

        def wait(key: str, category: str) -> None:
            end, collective = flying.get(key, (0.0, None))
            if end > now:
                if collective:
                    collective.exposed += end - now
                spend(f"waiting for {collective.kind if collective else category}", end - now)

        def at_once(collective: Collective) -> None:
            collective.exposed = collective.seconds
            total.collectives.append(collective)
            spend(f"waiting for {collective.kind}", collective.seconds)

        for op in self.computations[computation]:
            kind = op.opcode.removesuffix("-start").removesuffix("-done")
            if op.opcode in _FREE:
                continue
            if op.opcode == "while":
                inner, times = (
                    self.cost(model, op.attribute(r"body=%?([\w.\-]+)"), cache),
                    self.trips(op),
                )
                total.add(inner, times)
                now += times * inner.seconds
            elif op.opcode in ("call", "conditional"):
                names = (
                    [op.called]
                    if op.called
                    else re.findall(
                        r"%([\w.\-]+)", op.attribute(r"branch_computations=\{([^}]*)\}") or ""
                    )
                )
                inner = max(
                    (self.cost(model, name, cache) for name in names if name in self.computations),
                    key=lambda c: c.seconds,
                    default=Cost(),
                )
                total.add(inner, 1)
                now += inner.seconds
            elif kind in COLLECTIVES:
                if op.opcode.endswith("-done"):
                    wait(op.operands[0], kind)
                elif op.opcode.endswith("-start"):
                    start(op.name, self._collective(op, computation, kind, True))
                else:
                    at_once(self._collective(op, computation, kind, False))
            elif (
                kind in ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
                and op.opcode != kind
            ):
                if op.opcode.endswith("-start"):
                    memory = (
                        max(now, memory)
                        + min((a.bytes for a in arrays(op.type) if a.shape), default=0)
                        / self.chip.hbm
                    )
                    flying[op.name] = memory, None
                else:
                    wait(op.operands[0], "memory")
            elif op.opcode == "async-start":
                inside = self._inside(op.called or "")
                for inner_kind, inner, where in inside:
                    start(op.name, self._collective(inner, where, inner_kind, True))
                if not inside:
                    self.notes["asynchronous computations without a collective: not timed"] += 1
            elif op.opcode in ("async-done", "async-update"):
                if op.opcode == "async-done":
                    wait(op.operands[0], "asynchronous computation")
                elif op.operands[0] in flying:
                    flying[op.name] = flying[op.operands[0]]
            elif (
                op.opcode == "custom-call"
                and 'custom_call_target="tpu_custom_call"' in op.attributes
            ):
                name, flops, seconds = self._kernel(op, computation)
                total.kernels[name] += 1
                total.kernel_flops += flops
                spend("experts' matmuls" if name.startswith(GROUPED) else "kernels", seconds)
            elif op.opcode not in ("custom-call", "send", "recv", "send-done", "recv-done"):
                flops = (
                    self.flops(op.called)
                    if op.opcode == "fusion"
                    else self._matmul_flops(op, computation)
                    if op.opcode in ("dot", "convolution")
                    else 0.0
                )
                hbm = self._hbm(op, computation)
                total.flops += flops
                total.hbm += hbm
                spend(
                    "matmuls" if flops else "other compute",
                    self._compute_seconds(op, flops, hbm, model),
                )
                self._fused_collectives(op, start, wait, at_once, flying)
        cache[computation] = total
        return total

    def _fused_collectives(self, op: Op, start, wait, at_once, flying) -> None:
        """Collectives inside a fusion: the start or the end of an asynchronous one, or one that the
        fusion does itself.
        """
        if op.opcode != "fusion":
            return
        marks = " ".join(
            o.attributes for o in self.computations[op.called] if o.opcode == "custom-call"
        )
        for kind, inner, where in self._inside(op.called):
            channel = inner.attribute(r"channel_id=(\d+)") or inner.name
            if "AsyncCollectiveStart" in marks:
                start(channel, self._collective(inner, where, kind, True))
            elif "AsyncCollectiveDone" in marks:
                wait(channel, kind)
            elif channel not in flying:
                scattered = kind == "all-reduce" and "scatter" in f"{op.name} {op.called}"
                at_once(
                    self._collective(inner, where, "reduce-scatter" if scattered else kind, False)
                )
