"""What a device computes, moves and holds: the table of known ones, this machine measured, and the rates of one."""

from memopt.planner.devices.probing import probe
from memopt.planner.devices.rates import HardwareLike, Rates, rates_of
from memopt.planner.devices.table import Hardware, HardwareError, hardware, hardware_names

__all__ = ["Hardware", "HardwareError", "HardwareLike", "Rates", "hardware", "hardware_names", "probe", "rates_of"]
