"""FLOPs, bytes, collectives and time of a compiled TPU program, read off its optimized and
scheduled HLO text.

Times are models, not measurements. Each operation has three: the roofline that it can't beat (FLOPs
at the matrix units' peak, bytes at the memory's), the compiler's own estimate (`estimated_cycles`,
pessimistic), and a calibrated figure in between. `_Simulator` plays them through the schedule:
asynchronous transfers run beside the compute, and a step pays only for what the compute then waits
for. Not modelled: contention for memory between transfers and compute, DCN beyond its bandwidth,
host offload, stalls of the input.

Words are XLA's: a module has computations, and a computation has instructions in the order of their
schedule. Interconnect bytes (`interconnect_bytes` here, `wire_gb` in reports) are those that a
device sends to others: over ICI within a slice, over DCN between slices.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet figures (cloud.google.com/tpu/docs, system architecture), per jax device."""

    peak_flops: float  # bf16 FLOP/s
    clock_hz: float  # peak / FLOPs per cycle of all matrix units
    hbm_bandwidth: float  # bytes/s
    # Bytes that a program may use, by the compiler: the data sheet's figure less what is reserved.
    memory: float
    link_bandwidth: float  # bytes/s of one ICI link, one way
    ring_multiple: int  # a torus dim of a multiple of this length is closed to a ring
    # Share of the peak that splash attention with segments reaches at head size 128: (forward,
    # backward), from VLIW bundle counts.
    attention_shares: tuple[float, float]


# By `device_kind`.
# fmt: off
CHIPS = {
    "TPU v4": Chip(275e12, 1.05e9, 1.2e12, 30.75 * 2**30, 4.5e10, 4, (0.54, 0.70)),
    "TPU v5 lite": Chip(197e12, 1.5e9, 8.1e11, 15.75 * 2**30, 4.5e10, 16, (0.56, 0.73)),  # v5e
    "TPU v5": Chip(459e12, 1.75e9, 2.76e12, 95.74 * 2**30, 9e10, 4, (0.54, 0.70)),  # v5p
    "TPU v6 lite": Chip(918e12, 1.75e9, 1.64e12, 31.25 * 2**30, 9e10, 16, (0.21, 0.28)),  # v6e
}
# fmt: on
DCN_BANDWIDTH = 6.25e9  # bytes/s of a chip between slices: a host's 200 Gbit/s over its four chips

MODELS = ("compiler", "calibrated", "roofline")
# Bundle simulations confirm this share of what the compiler adds to a matmul's roofline ...
CALIBRATED_EXCESS = 0.4
# ... and little of what it adds to other loops: those run at this share of the memory's bandwidth.
CALIBRATED_BANDWIDTH = 0.85

GROUPED_MATMULS = ("ragged-dot", "tgmm")  # kernels of lm.nn.moe, by the start of their names
ATTENTION_BLOCK = 1024  # tile of the splash kernel in lm.nn.kernels
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
_SLICES = ("dynamic-slice", "slice", "gather")
# Instructions that take no time.
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
_UNTIMED = ("custom-call", "send", "recv", "send-done", "recv-done")
_DTYPE_BYTES = {
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

_WINDOW_DEFAULTS = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}

_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")


# The text


class Array(NamedTuple):
    """An array of an HLO type, such as bf16[8,128]{1,0:S(1)}."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # in VMEM, not in HBM

    @property
    def nbytes(self) -> int:
        return _DTYPE_BYTES.get(self.dtype, 1) * math.prod(self.shape)


def _integers(text: str) -> list[int]:
    """The numbers of a list such as "2,16,8"; [] for ""."""
    return [int(number) for number in text.split(",") if number]


def arrays(type_text: str) -> list[Array]:
    """The arrays of an HLO type, those in VMEM (memory space 1) marked."""
    matches = _ARRAY.findall(type_text)
    return [
        Array(dtype, tuple(_integers(dims)), "S(1)" in layout) for dtype, dims, layout in matches
    ]


def _nbytes(type_text: str) -> int:
    return sum(array.nbytes for array in arrays(type_text))


def _hbm_nbytes(type_text: str) -> int:
    return sum(array.nbytes for array in arrays(type_text) if not array.on_chip)


@dataclasses.dataclass
class Instruction:
    """`[ROOT] %name = type opcode(arguments)attributes`."""

    name: str
    opcode: str
    type: str  # of its result
    arguments: str
    attributes: str
    is_root: bool  # its result is the computation's

    def __post_init__(self):
        self.operands = re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion, a call or an asynchronous start runs."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        target = 'custom_call_target="tpu_custom_call"'
        return self.opcode == "custom-call" and target in self.attributes


def _closing_bracket(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError("unbalanced brackets in HLO text")


def _parse_instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    rest = line[head.end() :]

    # A tuple's type holds spaces, but its brackets balance.
    type_end = _closing_bracket(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[type_end:])
    start = type_end + opcode.end() - 1
    end = _closing_bracket(rest, start)

    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        type=rest[:type_end],
        arguments=rest[start + 1 : end],
        attributes=rest[end + 1 :],
        is_root=bool(head.group(1)),
    )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns ({computation: its instructions in order}, the entry computation's name)."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    instructions: list[Instruction] = []  # of the computation that is being read
    pending: list[str] = []  # lines of the instruction that is being read

    for line in text.split("\n"):
        starts_instruction = _INSTRUCTION.match(line)
        if header := _COMPUTATION.match(line):
            instructions = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif starts_instruction or line.startswith("}"):
            if pending:
                instructions.append(_parse_instruction("".join(pending)))
            pending = [line] if starts_instruction else []
        elif pending:
            # Kernel metadata may hold line breaks.
            pending.append(line)
    return computations, entry


def first_group(attributes: str, num_devices: int) -> list[int]:
    """The devices of a collective's first replica group; all of them if it names none."""
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return _integers(explicit.group(1))

    # The iota form: [groups, size] of the ids 0, 1, ... that are reshaped and transposed first.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        num_groups, size, dims, order = iota.groups()
        ids = np.arange(int(num_groups) * int(size)).reshape(_integers(dims))
        ids = ids.transpose(_integers(order) if order else None)
        return ids.reshape(int(num_groups), int(size))[0].tolist()

    return list(range(num_devices))


# FLOPs of matmuls


@dataclasses.dataclass(frozen=True)
class _WindowDim:
    """The window of a convolution along one of its dims."""

    size: int
    stride: int
    padding: int  # before the first element
    lhs_dilation: int
    rhs_dilation: int

    def valid_taps(self, size_in: int, size_out: int) -> int:
        """How many pairs of an output and a tap of the window meet an element of the input."""
        outputs = np.arange(size_out)[:, None]
        taps = np.arange(self.size)[None, :]
        position = outputs * self.stride - self.padding + taps * self.rhs_dilation

        last = (size_in - 1) * self.lhs_dilation
        on_element = position % self.lhs_dilation == 0
        return int(np.sum((position >= 0) & (position <= last) & on_element))


def _window_dims(convolution: Instruction, num_dims: int) -> list[_WindowDim]:
    """Parses an attribute such as window={size=4x1 pad=0_0x3_3 lhs_dilate=1x2}."""
    settings = {key: [default] * num_dims for key, default in _WINDOW_DEFAULTS.items()}
    text = convolution.attribute(r"window=\{([^}]*)\}") or ""
    for part in text.split():
        key, _, value = part.partition("=")
        settings[key] = value.split("x")

    dims = []
    for i in range(num_dims):
        padding_before, _ = settings["pad"][i].split("_")
        dims.append(
            _WindowDim(
                size=int(settings["size"][i]),
                stride=int(settings["stride"][i]),
                padding=int(padding_before),
                lhs_dilation=int(settings["lhs_dilate"][i]),
                rhs_dilation=int(settings["rhs_dilate"][i]),
            )
        )
    return dims


def _dot_flops(dot: Instruction, out: tuple[int, ...], left: tuple[int, ...]) -> float:
    contracting = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    return 2.0 * math.prod(out) * math.prod(left[dim] for dim in _integers(contracting))


def _convolution_flops(
    convolution: Instruction, out: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """FLOPs of a convolution, which is how the TPU compiler writes most matmuls.

    Only taps on an element of the input count: batch dims of a matmul become windows that are
    mostly padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    flops = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")]
    flops *= right[right_labels.index("i")]

    # Batch and feature apart, the dims are labelled 0, 1, ...
    for i, window in enumerate(_window_dims(convolution, len(left_labels) - 2)):
        size_in = left[left_labels.index(str(i))]
        size_out = out[out_labels.index(str(i))]
        flops *= window.valid_taps(size_in, size_out)
    return flops / int(convolution.attribute(r"batch_group_count=(\d+)") or 1)


# Costs


@dataclasses.dataclass
class Collective:
    """A transfer between the devices of a group."""

    opcode: str  # an all-reduce whose result is scattered at once is a reduce-scatter
    axes: tuple[str, ...]  # of the mesh
    interconnect_bytes: float  # that each device sends, as a ring does it
    seconds: float
    asynchronous: bool
    exposed: float = 0.0  # seconds that the compute waits for it
    count: int = 1


class KernelCost(NamedTuple):
    """What a Pallas kernel takes."""

    name: str
    flops: float
    seconds: float


@dataclasses.dataclass
class Cost:
    """What one run of a computation takes on a device."""

    # category -> seconds
    time: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    flops: float = 0.0  # of matmuls
    kernel_flops: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int) -> None:
        """Adds `times` runs of another computation."""
        for category, seconds in other.time.items():
            self.time[category] += times * seconds
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += times * count
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm_bytes += times * other.hbm_bytes

        # Copies: the counts of a loop's body stay those of one iteration.
        for collective in other.collectives:
            self.collectives.append(dataclasses.replace(collective, count=collective.count * times))

    @property
    def seconds(self) -> float:
        return sum(self.time.values())


class HloModule:
    """An optimized HLO module on a mesh.

    Args:
      text: of the module, as the compiler dumps it after code generation.
      coordinates: (slice, x, y, z) of each device, in the mesh's order.
      mesh: axis -> size, in the mesh's order.
    """

    def __init__(
        self,
        text: str,
        chip: Chip,
        coordinates: Sequence[tuple[int, ...]],
        mesh: dict[str, int],
    ):
        self.computations, self.entry = parse(text)
        self.chip = chip
        self.coordinates = np.asarray(coordinates)
        self.mesh = mesh

        # The number of slices, and the sides of a slice's torus.
        self.torus = self.coordinates.max(axis=0) + 1
        self.by_name = {}
        for computation, instructions in self.computations.items():
            self.by_name[computation] = {i.name: i for i in instructions}
        self.notes: set[str] = set()  # what could not be timed as it should

        # A fused computation is asked for its FLOPs and its uses many times.
        self._flops: dict[str, float] = {}
        self._uses: dict[str, dict] = {}

    def cost(self, model: str) -> Cost:
        """The cost of one run of the program.

        Args:
          model: of its times, one of `MODELS`.
        """
        return _Simulator(self, model).run(self.entry)

    def _root(self, computation: str) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.computations[computation] if i.is_root)

    def _operand_types(self, instruction: Instruction, computation: str) -> list[str]:
        """The types of the operands; "" for one that the computation doesn't define."""
        named = self.by_name[computation]
        return [named[name].type if name in named else "" for name in instruction.operands]

    # Loops

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs. Those of jax.lax.scan count from 0 by 1 to a constant."""
        if known := loop.attribute(r"known_trip_count[^\d]*(\d+)"):
            return int(known)

        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        for instruction in self.computations[condition]:
            if instruction.opcode != "compare":
                continue
            operands = [self._constant(condition, name) for name in instruction.operands]
            limits = [operand for operand in operands if operand is not None]
            if len(limits) == 1 and "direction=LT" in instruction.attributes:
                return limits[0]  # counter < limit

        self.notes.add(f"loop {loop.name}: unknown number of trips, taken as 1")
        return 1

    def _constant(self, computation: str, name: str) -> int | None:
        """The integer that a value is, seen through copies; None if it is none."""
        instructions = self.by_name[computation]
        value = instructions.get(name)
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            if not value.operands:
                break
            value = instructions.get(value.operands[0])

        if value is None or value.opcode != "constant":
            return None
        is_integer = re.fullmatch(r"-?\d+", value.arguments.strip())
        return int(value.arguments) if is_integer else None

    # FLOPs

    def flops(self, instruction: Instruction, computation: str) -> float:
        """FLOPs of the matmuls in an instruction; 0 if there are none."""
        if instruction.opcode == "fusion":
            return self._fused_flops(instruction.called)
        if instruction.opcode not in ("convolution", "dot"):
            return 0.0

        left_type, right_type = self._operand_types(instruction, computation)[:2]
        out_shape = arrays(instruction.type)[0].shape
        left_shape = arrays(left_type)[0].shape
        right_shape = arrays(right_type)[0].shape
        if instruction.opcode == "dot":
            return _dot_flops(instruction, out_shape, left_shape)
        return _convolution_flops(instruction, out_shape, left_shape, right_shape)

    def _fused_flops(self, computation: str) -> float:
        if computation not in self._flops:
            instructions = self.computations[computation]
            self._flops[computation] = sum(self.flops(i, computation) for i in instructions)
        return self._flops[computation]

    # Bytes

    def hbm_bytes(self, instruction: Instruction, computation: str) -> float:
        """Bytes that an instruction reads from and writes to HBM.

        What a fusion only slices or updates in part counts by that part.
        """
        operand_types = self._operand_types(instruction, computation)

        # Slices and updates in place read and write no more than the slice.
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * _hbm_nbytes(operand_types[1])
        if instruction.opcode in _SLICES:
            return 2.0 * _hbm_nbytes(instruction.type)
        if instruction.opcode == "fusion":
            return self._fusion_reads(instruction, operand_types) + self._fusion_writes(instruction)
        return _hbm_nbytes(instruction.type) + sum(_hbm_nbytes(t) for t in operand_types)

    def _fusion_reads(self, fusion: Instruction, operand_types: list[str]) -> float:
        """Bytes that a fusion reads from HBM."""
        total = 0.0
        for parameter in self.computations[fusion.called]:
            if parameter.opcode != "parameter":
                continue

            operand_type = operand_types[int(parameter.arguments)]
            if not all(array.on_chip for array in arrays(operand_type)):
                total += self._bytes_read(fusion.called, parameter.name, _nbytes(operand_type))
        return total

    def _fusion_writes(self, fusion: Instruction) -> float:
        """Bytes that a fusion writes to HBM."""
        root = self._root(fusion.called)
        is_tuple = root.opcode == "tuple"
        names = root.operands if is_tuple else [root.name]
        outputs = arrays(fusion.type)

        total = 0.0
        for name, output in zip(names, outputs if is_tuple else outputs[:1]):
            if not output.on_chip:
                total += min(self._bytes_written(fusion.called, name), output.nbytes)
        return total

    def _uses_of(self, computation: str, name: str) -> list[tuple[Instruction, int]]:
        """(instruction, position among its operands) of each use of a value."""
        if computation not in self._uses:
            uses = self._uses[computation] = collections.defaultdict(list)
            for user in self.computations[computation]:
                for position, operand in enumerate(user.operands):
                    uses[operand].append((user, position))
        return self._uses[computation][name]

    def _bytes_read(self, computation: str, name: str, whole: float) -> float:
        """Bytes that a fused computation reads of a value of `whole` bytes."""
        total = 0.0
        for user, position in self._uses_of(computation, name):
            if user.opcode in _SLICES:
                # At other positions it is an index.
                total += _nbytes(user.type) if position == 0 else 0.0
            elif user.opcode in ("bitcast", "reshape"):
                total += self._bytes_read(computation, user.name, whole)
            elif user.opcode == "fusion":
                parameter = self._parameter(user.called, position)
                total += self._bytes_read(user.called, parameter.name, whole)
            elif user.opcode == "tuple":
                continue  # a name only
            elif user.opcode == "dynamic-update-slice" and position == 0:
                continue  # updated in place: nothing of it is read
            else:
                return whole
        return min(total, whole)

    def _parameter(self, computation: str, position: int) -> Instruction:
        for instruction in self.computations[computation]:
            if instruction.opcode == "parameter" and int(instruction.arguments) == position:
                return instruction
        raise ValueError(f"{computation} has no parameter {position} in HLO text")

    def _bytes_written(self, computation: str, name: str) -> float:
        """Bytes that a fused computation writes of one of its results."""
        instruction = self.by_name[computation][name]
        if instruction.opcode in ("bitcast", "reshape"):
            return self._bytes_written(computation, instruction.operands[0])
        if instruction.opcode == "dynamic-update-slice":
            update = self.by_name[computation][instruction.operands[1]]
            return _nbytes(update.type)
        if instruction.opcode == "fusion":
            root = self._root(instruction.called)
            if root.opcode != "tuple":
                return self._bytes_written(instruction.called, root.name)

        # A parameter that is passed through is not written again.
        return 0.0 if instruction.opcode == "parameter" else _nbytes(instruction.type)

    # Collectives

    def collective(
        self, instruction: Instruction, computation: str, opcode: str, asynchronous: bool
    ) -> Collective:
        """The collective of an instruction, to be timed as `opcode`."""
        if opcode == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes)
            group = [int(device) for device in pairs[0]] if pairs else [0]
        else:
            group = first_group(instruction.attributes, len(self.coordinates))

        # The group spans the mesh's axes along which its devices' indices differ.
        indices = np.stack(np.unravel_index(group, tuple(self.mesh.values())))
        axes = tuple(axis for axis, row in zip(self.mesh, indices) if len(set(row)) > 1)

        sent = self._bytes_sent(instruction, computation, opcode, len(group))
        seconds = sent / self._bandwidth(group, opcode)
        return Collective(opcode, axes, sent, seconds, asynchronous)

    def _bytes_sent(
        self, instruction: Instruction, computation: str, opcode: str, group_size: int
    ) -> float:
        """Bytes that each device of a group sends, as a ring does it."""
        inputs = sum(_nbytes(t) for t in self._operand_types(instruction, computation))
        output = _nbytes(instruction.type)
        if instruction.opcode.endswith("-start"):
            # The type of a start holds its inputs beside its output.
            output = max(output - inputs, inputs) if opcode == "all-gather" else inputs

        if opcode == "collective-permute":
            return inputs * 1.0
        if opcode in ("all-gather", "all-to-all"):
            size = output
        elif opcode == "reduce-scatter":
            size = inputs
        else:
            # An all-reduce is a reduce-scatter and an all-gather.
            size = 2 * inputs
        return size * ((group_size - 1) / group_size)

    def _bandwidth(self, group: list[int], opcode: str) -> float:
        """Bytes/s at which a device of a group sends."""
        coordinates = self.coordinates[group]
        spans = [len(set(column)) for column in coordinates.T]
        if spans[0] > 1:
            return DCN_BANDWIDTH
        if opcode == "collective-permute":
            return self.chip.link_bandwidth

        # A ring in each torus dim that the group spans; both ways round where it is closed.
        links = 0
        for span, side in zip(spans[1:], self.torus[1:]):
            if span > 1:
                closed = side % self.chip.ring_multiple == 0 and span == side
                links += 2 if closed else 1
        return self.chip.link_bandwidth * max(links, 1)

    def inner_collectives(self, computation: str) -> list[tuple[str, Instruction, str]]:
        """(opcode, instruction, computation) of each collective in a fused or asynchronous
        computation, nested ones too.
        """
        collectives = []
        for instruction in self.computations.get(computation, ()):
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                collectives.append((opcode, instruction, computation))
            elif instruction.called and instruction.opcode in ("fusion", "call", "async-start"):
                collectives += self.inner_collectives(instruction.called)
        return collectives

    # Kernels

    def kernel(self, instruction: Instruction, computation: str) -> KernelCost:
        """The cost of a Pallas kernel.

        Attention counts the blocks at and below the diagonal. Other kernels (libtpu puts one of its
        own in the place of a small unmasked attention) count what they declare, at the speed of
        attention. Experts' matmuls run at the speed of its backward kernel, which is no more than a
        guess.
        """
        name = re.sub(r"[.\d]+$", "", instruction.name)
        operands = [arrays(t)[0] for t in self._operand_types(instruction, computation) if t]

        # No kernel is faster than its operands and results are moved.
        hbm_bytes = _hbm_nbytes(instruction.type)
        hbm_bytes += sum(array.nbytes for array in operands if not array.on_chip)
        least_seconds = hbm_bytes / self.chip.hbm_bandwidth

        declared = instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
        if "splash" not in name and declared:
            return self._declared_kernel(name, float(declared), least_seconds)

        # The queries are the first operand of [B, N, T, H], or [N, T, H] of a single row.
        heads = [a.shape for a in operands if len(a.shape) in (3, 4) and a.dtype in ("bf16", "f32")]
        if "splash" in name and heads:
            return self._attention_kernel(name, (1, *heads[0])[-4:], least_seconds)

        self.notes.add(f"kernel {name}: unknown, timed by its bytes")
        return KernelCost(name, 0.0, least_seconds)

    def _declared_kernel(self, name: str, flops: float, least_seconds: float) -> KernelCost:
        forward_share, backward_share = self.chip.attention_shares
        share = forward_share
        if name.startswith(GROUPED_MATMULS):
            share = backward_share
            self.notes.add(
                f"experts' matmuls: {share:.0%} of the peak is a guess, for all rows that there is "
                "room for"
            )

        seconds = max(least_seconds, flops / (self.chip.peak_flops * share))
        return KernelCost(name, flops, seconds)

    def _attention_kernel(
        self, name: str, shape_BNTH: tuple[int, ...], least_seconds: float
    ) -> KernelCost:
        batch, num_heads, length, head_dim = shape_BNTH
        forward_share, backward_share = self.chip.attention_shares
        backward = "dkv" in name or "dq" in name
        share = backward_share if backward else forward_share

        # Forward: scores and values. Backward: scores again, and the gradients of queries, keys,
        # values and probabilities.
        matmuls = 5 if backward else 2

        # Of blocks x blocks tiles, those at and below the diagonal are computed.
        blocks = max(length // min(ATTENTION_BLOCK, length), 1)
        flops = 2.0 * batch * num_heads * length * length * head_dim * matmuls
        flops = flops * (blocks + 1) / (2 * blocks)

        # The chip's shares are for heads of 128; smaller ones fill less of the matrix units.
        speed = self.chip.peak_flops * share * min(1.0, head_dim / 128)
        return KernelCost(name, flops, max(least_seconds, flops / speed))


# Time


class _Timeline:
    """The clock of one computation, with the transfers that run beside its compute."""

    def __init__(self):
        self.cost = Cost()
        self.now = 0.0  # seconds since the computation began

        # Transfers of a kind follow each other: the next one starts when the one before has ended.
        self.links_free = 0.0
        self.copies_free = 0.0
        # name or channel of a transfer -> (when it ends, the collective that it is, if any)
        self.in_flight: dict[str, tuple[float, Collective | None]] = {}

    def spend(self, category: str, seconds: float) -> None:
        self.cost.time[category] += seconds
        self.now += seconds

    def add(self, other: Cost, times: int) -> None:
        """Runs another computation `times` times."""
        self.cost.add(other, times)
        self.now += times * other.seconds

    def start_collective(self, key: str, collective: Collective) -> None:
        self.links_free = max(self.now, self.links_free) + collective.seconds
        self.in_flight[key] = self.links_free, collective
        self.cost.collectives.append(collective)

    def start_copy(self, key: str, seconds: float) -> None:
        self.copies_free = max(self.now, self.copies_free) + seconds
        self.in_flight[key] = self.copies_free, None

    def wait(self, key: str, category: str) -> None:
        """Waits for the end of a transfer: `category` says for what, if it is no collective."""
        end, collective = self.in_flight.get(key, (0.0, None))
        if end > self.now:
            if collective:
                collective.exposed += end - self.now
                category = collective.opcode
            self.spend(f"waiting for {category}", end - self.now)

    def run_collective(self, collective: Collective) -> None:
        """Runs a synchronous collective: the compute waits for all of it."""
        collective.exposed = collective.seconds
        self.cost.collectives.append(collective)
        self.spend(f"waiting for {collective.opcode}", collective.seconds)


class _Simulator:
    """Plays the schedules of a module's computations, with times by one of `MODELS`."""

    def __init__(self, module: HloModule, model: str):
        self.module = module
        self.model = model
        self.costs: dict[str, Cost] = {}  # of the computations that were played

    def run(self, computation: str) -> Cost:
        """The cost of one run of a computation."""
        if computation not in self.costs:
            timeline = _Timeline()
            for instruction in self.module.computations[computation]:
                if instruction.opcode not in _FREE:
                    self._play(instruction, computation, timeline)
            self.costs[computation] = timeline.cost
        return self.costs[computation]

    def _play(self, instruction: Instruction, computation: str, timeline: _Timeline) -> None:
        """Plays one instruction."""
        opcode = instruction.opcode
        transfer = opcode.removesuffix("-start").removesuffix("-done")

        if opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            timeline.add(self.run(body), self.module.trips(instruction))
        elif opcode in ("call", "conditional"):
            timeline.add(self._called_cost(instruction), 1)
        elif transfer in COLLECTIVES:
            self._play_collective(instruction, computation, timeline)
        elif transfer in _COPIES and opcode != transfer:
            self._play_copy(instruction, timeline)
        elif opcode in ("async-start", "async-update", "async-done"):
            self._play_async(instruction, timeline)
        elif instruction.is_kernel:
            self._play_kernel(instruction, computation, timeline)
        elif opcode not in _UNTIMED:
            self._play_compute(instruction, computation, timeline)
            if opcode == "fusion":
                self._play_fused_collectives(instruction, timeline)

    def _called_cost(self, instruction: Instruction) -> Cost:
        """The cost of a call, or of the slowest branch of a conditional."""
        if instruction.called:
            names = [instruction.called]
        else:
            branches = instruction.attribute(r"branch_computations=\{([^}]*)\}") or ""
            names = re.findall(r"%([\w.\-]+)", branches)

        costs = [self.run(name) for name in names if name in self.module.computations]
        return max(costs, key=lambda cost: cost.seconds, default=Cost())

    def _play_collective(
        self, instruction: Instruction, computation: str, timeline: _Timeline
    ) -> None:
        opcode = instruction.opcode.removesuffix("-start").removesuffix("-done")
        if instruction.opcode.endswith("-done"):
            timeline.wait(instruction.operands[0], opcode)
            return

        asynchronous = instruction.opcode.endswith("-start")
        collective = self.module.collective(instruction, computation, opcode, asynchronous)
        if asynchronous:
            timeline.start_collective(instruction.name, collective)
        else:
            timeline.run_collective(collective)

    def _play_copy(self, instruction: Instruction, timeline: _Timeline) -> None:
        """The start or the end of an asynchronous copy from one memory to another."""
        if instruction.opcode.endswith("-done"):
            timeline.wait(instruction.operands[0], "memory")
            return

        # A start's type holds source and destination; a slice is the smaller of the two. Scalars
        # are the transfer's own state.
        sizes = [array.nbytes for array in arrays(instruction.type) if array.shape]
        seconds = min(sizes, default=0) / self.module.chip.hbm_bandwidth
        timeline.start_copy(instruction.name, seconds)

    def _play_async(self, instruction: Instruction, timeline: _Timeline) -> None:
        """A computation that runs beside this one, on the SparseCores for instance."""
        if instruction.opcode == "async-done":
            timeline.wait(instruction.operands[0], "asynchronous computation")
        elif instruction.opcode == "async-update":
            # An update is another name for what its start set going.
            start = instruction.operands[0]
            if start in timeline.in_flight:
                timeline.in_flight[instruction.name] = timeline.in_flight[start]
        else:
            inner_collectives = self.module.inner_collectives(instruction.called or "")
            for opcode, inner, computation in inner_collectives:
                collective = self.module.collective(inner, computation, opcode, True)
                timeline.start_collective(instruction.name, collective)

            if not inner_collectives:
                note = "asynchronous computations without a collective: not timed"
                self.module.notes.add(note)

    def _play_kernel(self, instruction: Instruction, computation: str, timeline: _Timeline) -> None:
        kernel = self.module.kernel(instruction, computation)
        timeline.cost.kernels[kernel.name] += 1
        timeline.cost.kernel_flops += kernel.flops

        is_grouped = kernel.name.startswith(GROUPED_MATMULS)
        timeline.spend("experts' matmuls" if is_grouped else "kernels", kernel.seconds)

    def _play_compute(
        self, instruction: Instruction, computation: str, timeline: _Timeline
    ) -> None:
        flops = self.module.flops(instruction, computation)
        hbm_bytes = self.module.hbm_bytes(instruction, computation)
        timeline.cost.flops += flops
        timeline.cost.hbm_bytes += hbm_bytes

        seconds = self._compute_seconds(instruction, flops, hbm_bytes)
        timeline.spend("matmuls" if flops else "other compute", seconds)

    def _compute_seconds(self, instruction: Instruction, flops: float, hbm_bytes: float) -> float:
        chip = self.module.chip
        roofline = max(flops / chip.peak_flops, hbm_bytes / chip.hbm_bandwidth)
        cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
        if cycles is None or self.model == "roofline":
            return roofline

        estimate = max(int(cycles) / chip.clock_hz, roofline)
        if self.model == "compiler":
            return estimate
        if flops:
            return roofline + CALIBRATED_EXCESS * (estimate - roofline)
        return min(estimate, roofline / CALIBRATED_BANDWIDTH)

    def _play_fused_collectives(self, fusion: Instruction, timeline: _Timeline) -> None:
        """Collectives inside a fusion: the start or the end of an asynchronous one, or one that the
        fusion does itself.
        """
        module = self.module

        # A custom call beside the collective marks it as a start or an end; its channel says which
        # start and which end belong together.
        custom_calls = [i for i in module.computations[fusion.called] if i.opcode == "custom-call"]
        marks = " ".join(call.attributes for call in custom_calls)

        for opcode, inner, computation in module.inner_collectives(fusion.called):
            channel = inner.attribute(r"channel_id=(\d+)") or inner.name
            if "AsyncCollectiveStart" in marks:
                collective = module.collective(inner, computation, opcode, True)
                timeline.start_collective(channel, collective)
            elif "AsyncCollectiveDone" in marks:
                timeline.wait(channel, opcode)
            elif channel not in timeline.in_flight:
                # libtpu writes a fused reduce-scatter as an all-reduce, and says so in its name.
                scattered = opcode == "all-reduce" and "scatter" in f"{fusion.name} {fusion.called}"
                opcode = "reduce-scatter" if scattered else opcode
                timeline.run_collective(module.collective(inner, computation, opcode, False))
