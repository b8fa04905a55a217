"""Gauge: seconds and memory of one device, a CPU or an accelerator."""

import os
import platform
import time
from pathlib import Path

import psutil
import torch
import transformers


GIB = 2**30


class Gauge:
    """Reads a device. On a CPU, its memory is that of the process.

    Args:
        device: `"cpu"`, or an accelerator of which torch counts the memory (`"cuda"`, `"xpu"`).
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._module = torch.get_device_module(self.device)

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def clock(self) -> float:
        """Seconds, once all that was asked of the device is done."""
        self._module.synchronize()
        return time.perf_counter()

    def held(self) -> int:
        """Bytes that are held."""
        return psutil.Process().memory_info().rss if self.is_cpu else self._module.memory_allocated(self.device)

    def restart_peak(self) -> None:
        """Let the peak start anew, from what is held."""
        if self.is_cpu:
            Path("/proc/self/clear_refs").write_text("5")
        else:
            self._module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes that were held since."""
        if self.is_cpu:
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return self._module.max_memory_allocated(self.device)

    def release(self) -> None:
        """Give back what nothing holds any more."""
        if not self.is_cpu:
            self._module.empty_cache()

    def about(self) -> dict:
        """What is measured on."""
        found = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if not self.is_cpu:
            found["device"] = self._module.get_device_name(self.device)
            found["device_gib"] = round(self._module.get_device_properties(self.device).total_memory / GIB, 1)
            found["cuda"] = torch.version.cuda
        return found
