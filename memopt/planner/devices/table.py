"""What a device computes, moves and holds per second and per byte: a table of known ones, a file, or this machine.

The table is data: one JSON file a device under ``memopt/presets/hardware``, from the makers' data sheets (dense
rates, no sparsity). Sustained rates are the sheet's times an efficiency factor; ``memopt probe`` writes a file of the
same form with measured rates and factors of 1.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from memopt.files import write_whole
from memopt.planner.naming import unknown
from memopt.planner.strict_json import from_json, read_json

_FOLDER = "hardware"
_LARGEST = 1e30  # of any rate or size: nothing is near it, and what is computed from it stays finite


class HardwareError(ValueError):
    """A device that is not in the table, or a hardware file that cannot be used."""


@dataclass(frozen=True)
class Hardware:
    """One kind of device in its node.

    Attributes:
        name: as the table calls it.
        kind: "cuda", "rocm" or "cpu".
        flops_per_second: peak by dtype ("bfloat16", "float16", "float32", "tf32", "float8"), dense.
        memory_bytes: what the device holds.
        memory_bytes_per_second: peak bandwidth of that memory.
        to_host_bytes_per_second: peak of the link to host memory, one direction; 0 where device memory is host memory.
        from_host_bytes_per_second: the other direction.
        link_shared_by: devices that share that link's path to the host.
        devices_per_node: devices in one machine.
        host_memory_bytes: host memory of one machine.
        disk_write_bytes_per_second: of local storage.
        disk_read_bytes_per_second: of local storage.
        peer_bytes_per_second: between devices of a node, one direction, each device; 0 where there is one device.
        compute_efficiency: share of the peak FLOP/s that large matrix products reach.
        memory_efficiency: share of the peak bandwidth that element-wise operations reach.
        link_efficiency: share of the link's peak that pinned copies reach.
        overlaps: whether copies run beside compute.
        source: where the figures come from.
        matches: parts of a device's name, as the driver gives it, by which "auto" finds this entry.
    """

    name: str
    kind: str
    flops_per_second: dict[str, float]
    memory_bytes: int
    memory_bytes_per_second: float
    to_host_bytes_per_second: float
    from_host_bytes_per_second: float
    link_shared_by: int
    devices_per_node: int
    host_memory_bytes: int
    disk_write_bytes_per_second: float
    disk_read_bytes_per_second: float
    peer_bytes_per_second: float
    compute_efficiency: float
    memory_efficiency: float
    link_efficiency: float
    overlaps: bool
    source: str
    matches: tuple[str, ...] = ()

    def sustained_flops(self, dtype: str) -> float:
        """FLOP/s that matrix products of a dtype reach; float32's where the device has none for it."""
        peak = self.flops_per_second.get(dtype, self.flops_per_second["float32"])
        return peak * self.compute_efficiency

    @property
    def sustained_memory(self) -> float:
        """Bytes per second that element-wise operations move."""
        return self.memory_bytes_per_second * self.memory_efficiency

    @property
    def sustained_to_host(self) -> float:
        """Bytes per second from this device to host memory while its neighbours copy too."""
        return self.to_host_bytes_per_second * self.link_efficiency / self.link_shared_by

    @property
    def sustained_from_host(self) -> float:
        """Bytes per second from host memory to this device while its neighbours copy too."""
        return self.from_host_bytes_per_second * self.link_efficiency / self.link_shared_by

    @property
    def host_bytes_per_device(self) -> int:
        """Host memory that one device may count as its own."""
        return self.host_memory_bytes // self.devices_per_node

    def seconds(self, flops: float, moved_bytes: float, dtype: str) -> float:
        """Roofline: the longer of computing ``flops`` and of moving ``moved_bytes`` through device memory."""
        return max(flops / self.sustained_flops(dtype), moved_bytes / self.sustained_memory)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the description as JSON, whole or not at all, for ``hardware(path)`` and ``--hardware path``."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")


def hardware(name: str | os.PathLike[str] | Hardware = "auto") -> Hardware:
    """Looks up a device.

    Args:
        name: a name from the table (``hardware_names()``), a JSON file, or "auto" for this machine's first GPU, or its
            processors where it has none. A ``Hardware`` is returned as it is.

    Raises:
        HardwareError: no such name or file, or a file with missing, unknown or impossible fields.
    """
    if isinstance(name, Hardware):
        return name
    text = os.fspath(name)
    if text == "auto":
        return _this_machine()
    if text.lower() in hardware_names():
        found = _from_table(text.lower())
        return _with_processors(found) if found.kind == "cpu" else found
    path = Path(text)
    if path.is_file():
        try:
            values = read_json(path, "hardware file")
        except ValueError as error:
            raise HardwareError(str(error)) from error
        return _parse(values, str(path))
    if path.suffix == ".json":
        raise HardwareError(f"hardware file {text!r} does not exist; `memopt probe --out {text}` writes one")
    names = ("auto", *hardware_names())
    raise HardwareError(unknown("hardware", text, names, ", or a JSON file from `memopt probe`"))


def hardware_names() -> tuple[str, ...]:
    """The names in the table, sorted."""
    folder = resources.files("memopt.presets").joinpath(_FOLDER)
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def _from_table(name: str) -> Hardware:
    source = resources.files("memopt.presets").joinpath(_FOLDER).joinpath(f"{name}.json")
    return _parse(json.loads(source.read_text(encoding="utf-8")), name)


def _this_machine() -> Hardware:
    if not torch.cuda.is_available():
        return _with_processors(_from_table("cpu"))
    properties = torch.cuda.get_device_properties(0)
    known = [_from_table(name) for name in hardware_names()]
    scored = [
        (len(part), entry) for entry in known for part in entry.matches if part.lower() in properties.name.lower()
    ]
    if not scored:
        raise HardwareError(
            f"this machine's {properties.name!r} is not in the table; measure it with `memopt probe --out FILE` "
            f"and pass FILE, or choose one of {', '.join(hardware_names())}"
        )
    longest = max(length for length, _ in scored)
    entries = [entry for length, entry in scored if length == longest]
    entry = min(entries, key=lambda one: abs(one.memory_bytes - properties.total_memory))
    return replace(entry, memory_bytes=int(properties.total_memory), host_memory_bytes=physical_memory_bytes())


def _with_processors(entry: Hardware) -> Hardware:
    """The table holds one core's FLOP/s and no memory for "cpu": both are this machine's."""
    memory, cores = physical_memory_bytes(), torch.get_num_threads()
    rates = {dtype: rate * cores for dtype, rate in entry.flops_per_second.items()}
    return replace(entry, memory_bytes=memory, host_memory_bytes=memory, flops_per_second=rates)


def physical_memory_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _parse(values: Any, where: str) -> Hardware:
    whole = f"hardware file {where!r}"
    try:
        found = from_json(Hardware, values, whole)
    except ValueError as error:
        raise HardwareError(str(error)) from error
    for name, value in asdict(found).items():
        if type(value) in (int, float):
            _check_number(name, value, whole)
    for dtype, rate in found.flops_per_second.items():
        _check_number(f"flops_per_second.{dtype}", rate, whole)
    if "float32" not in found.flops_per_second:
        raise HardwareError(f"{whole}.flops_per_second has no float32, which other dtypes fall back on")
    if found.kind not in ("cuda", "rocm", "cpu"):
        raise HardwareError(f"{whole}.kind must be cuda, rocm or cpu, not {found.kind!r}")
    return found


def _check_number(name: str, value: float, whole: str) -> None:
    zero_allowed = name.startswith(("to_host", "from_host", "peer"))
    if not (0 < value <= _LARGEST or (zero_allowed and value == 0)):
        raise HardwareError(f"{whole}.{name} must be a positive number, not {value!r}")
    if name.endswith("_efficiency") and value > 1:
        raise HardwareError(f"{whole}.{name} is a share of the peak, at most 1, not {value!r}")
