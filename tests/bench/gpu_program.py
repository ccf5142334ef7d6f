"""What XLA:GPU makes of a program for an H100, found out without one: calls, bytes moved, temporaries. Nothing is run.

JAX compiles for a described GPU as well as for one that is there; it needs the CUDA plugin (`pip install jax[cuda13]`).
Bytes are those of every launch's operands and results, as often as its loop turns; what only cuts out, looks up or
writes in place counts what it touches. Time is not among them.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

import jaxext
from jaxext.kernels import _platform

# Without a driver the plugin has to be told that there is no card, before JAX looks for one.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# The published figures of an H100 SXM, as XLA describes a device.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 15 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_COMPUTATION = re.compile(r"\n(?=(?:ENTRY )?%[\w.\-]+ \(.*\) -> .* \{\n)")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota", "partition-id"}
_CUTS = {"dynamic-slice", "slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written


def missing():
    """Why nothing can be compiled for a GPU here; None where it can."""
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"):
        return None
    return "JAX's CUDA plugin is not installed (pip install jax[cuda13]); no GPU is needed"


@functools.cache
def device():
    described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    return described.devices[0]


def array(shape, dtype="bfloat16"):
    """The type of an array on the described GPU."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device()))


def on_device(tree):
    """The types of a tree of arrays, or of their types, on the described GPU."""
    return jax.tree.map(lambda x: array(x.shape, x.dtype), tree)


def compiled(fn, *operands, ours, options=None, **settings):
    """`fn` as stock JAX compiles it, or as jaxext does where the program is to run on CUDA.

    options: XLA's, for this program; settings: those of `jaxext.accelerate`.
    """
    if not ours:
        return Program(jax.jit(fn).lower(*operands).compile(options))
    with _platform.assuming("cuda"):
        return Program(jaxext.accelerate(fn, **settings).lower(*operands).compile(options))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel: what it is called, the bytes it moves, and how many times."""

    name: str
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    rest: str

    def called(self, what):
        found = re.search(rf"{what}=%([\w.\-]+)", self.rest)
        return found.group(1) if found else None


class Program:
    """A compiled program, read from the text of its HLO module."""

    def __init__(self, executable):
        self.temporaries = executable.memory_analysis().temp_size_in_bytes
        self.text = executable.as_text()
        self._bodies, entry = {}, None
        for part in _COMPUTATION.split(self.text):
            head, _, lines = part.partition("\n")
            name = re.match(r"(?:ENTRY )?%([\w.\-]+) \(", head)
            if name is None:
                continue
            found = (m.groups() for m in map(_INSTRUCTION.match, lines.split("\n")) if m)
            every = (_Instruction(label, kind, op, _names(given), rest) for label, kind, op, given, rest in found)
            self._bodies[name.group(1)] = {one.name: one for one in every}
            entry = name.group(1) if head.startswith("ENTRY") else entry
        self.launches = tuple(self._launches(entry, 1))

    @property
    def bytes(self):
        return sum(launch.bytes * launch.times for launch in self.launches)

    def calls(self, target):
        """How many times a run calls it."""
        return sum(launch.times for launch in self.launches if launch.name == target)

    def operands(self, kind):
        """The HLO types that the operands of each instruction of this kind have, in fusions too."""
        every = ((one, body) for body in self._bodies.values() for one in body.values() if one.kind == kind)
        return [tuple(body[name].type for name in one.operands) for one, body in every]

    def _launches(self, computation, times):
        body = self._bodies[computation]
        for one in body.values():
            if one.kind == "while":
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest)
                yield from self._launches(one.called("body"), times * int(turns.group(1) if turns else 1))
            elif one.kind == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", one.rest)
                chosen = re.findall(r"%([\w.\-]+)", branches.group(1)) if branches else []
                found = [list(self._launches(name, times)) for name in chosen]
                yield from max(found, key=lambda some: sum(x.bytes for x in some), default=[])
            elif one.kind in ("call", "async-start", "fusion-start") and one.called(
                "calls|to_apply|called_computation"
            ):
                yield from self._launches(one.called("calls|to_apply|called_computation"), times)
            elif one.kind not in _FREE and not one.kind.endswith("-done"):
                yield Launch(self._called(one) or one.name, self._moved(one, body), times)

    def _called(self, one):
        """What a custom call is of, in a fusion that only cuts out its operands too."""
        inner = self._bodies.get(one.called("calls") or "", {}) if one.kind == "fusion" else {}
        for each in (one, *inner.values()):
            target = re.search(r'custom_call_target="([^"]+)"', each.rest)
            if target is not None:
                return target.group(1)
        return None

    def _moved(self, one, body):
        types = [body[name].type if name in body else "" for name in one.operands]
        inner = self._bodies.get(one.called("calls") or "") if one.kind == "fusion" else None
        if inner is None:
            return _touched(one, types) if one.kind in (_CUTS | set(_IN_PLACE)) else sum(map(_size, (*types, one.type)))
        read = [i for i in inner.values() if i.kind == "parameter"]
        return sum(self._read(i, inner) for i in read) + _written(inner)

    def _read(self, parameter, inner):
        users = [i for i in inner.values() if parameter.name in i.operands]
        if users and all(i.kind in _CUTS and i.operands[0] == parameter.name for i in users):
            return sum(_size(i.type) for i in users)
        if users and all(i.kind in _IN_PLACE and i.operands[0] == parameter.name for i in users):
            return 0
        return _size(parameter.type)


def _names(operands):
    return tuple(re.findall(r"%([\w.\-]+)", operands))


def _written(inner):
    last = list(inner.values())[-1]
    roots = [inner[name] for name in last.operands] if last.kind == "tuple" else [last]
    sizes = []
    for root in roots:
        while root.kind in ("bitcast", "copy", "convert") and inner[root.operands[0]].kind in _IN_PLACE:
            root = inner[root.operands[0]]
        written = root.operands[_IN_PLACE[root.kind]] if root.kind in _IN_PLACE else root.name
        sizes.append(_size(inner[written].type))
    return sum(sizes)


def _touched(one, types):
    return 2 * _size(types[_IN_PLACE[one.kind]] if one.kind in _IN_PLACE else one.type)


def _size(text):
    """The bytes of an HLO type."""
    total = 0
    for kind, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", text):
        bits = re.search(r"\d+", kind)
        width = 1 if kind == "pred" or bits is None else max(1, int(bits.group()) // 8)
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total
