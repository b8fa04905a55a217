"""Which precision a device is given, when the user names none; and whether it can hold quantised weights."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ..compat.accelerate import parse_flag_from_env
from ..compat.bitsandbytes import supported_devices
from ..errors import FNSFTError


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


@dataclass(frozen=True)
class Precision:
    """What a device computes in.

    Attributes:
        device (`str`): its type: `cuda`, `xpu`, `npu`, `mps`, `cpu` and so on.
        mixed (`str`): mixed precision of the training: `bf16`, `fp16`, or `no` for float32.
    """

    device: str
    mixed: str

    @property
    def training_arguments(self) -> dict[str, bool]:
        """The arguments of `TrainingArguments` that say so."""
        settings = {"bf16": self.mixed == "bf16", "fp16": self.mixed == "fp16"}
        return settings | ({"use_cpu": True} if self.device == "cpu" else {})

    def dtype(self, *, frozen: bool) -> str:
        """Precision to hold the model's weights in: that of the arithmetic if they are frozen.

        Weights that train are held in float32, in which small steps are not rounded away.
        """
        return _DTYPES[self.mixed] if frozen else "float32"

    def default_dtype(self, *, frozen: bool) -> str:
        """The same where nothing is asked for: float32 on CPUs and on Apple's MPS, whatever mixed precision they are
        given."""
        return "float32" if self.device in ("cpu", "mps") else self.dtype(frozen=frozen)

    @classmethod
    def choose(cls, *, use_cpu: bool | None = None, bf16: bool | None = None, fp16: bool | None = None) -> "Precision":
        """Choose for the device of this process, where the arguments of `TrainingArguments` leave it open.

        bfloat16 where the device computes in it, float16 on other accelerators, float32 on Apple's MPS and on CPUs.

        Raises:
            FNSFTError: float16 on a CPU, which has no mixed precision in it.
        """
        device = _device(use_cpu)
        if fp16 and device == "cpu":
            raise FNSFTError("fp16 is not a mixed precision of CPUs; drop it (float32), or use bf16")
        if bf16 or fp16:
            return cls(device, "bf16" if bf16 else "fp16")
        if device in ("cpu", "mps"):
            return cls(device, "no")
        if bf16 is None and _computes_in_bfloat16(device):
            return cls(device, "bf16")
        return cls(device, "no" if bf16 is False or fp16 is False else "fp16")


def _device(use_cpu: bool | None) -> str:
    if use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return "cpu"
    return torch.accelerator.current_accelerator().type


def _computes_in_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    module = torch.get_device_module(device)
    # Not every backend has the question; those that lack it compute in bfloat16 (Gaudi, for one).
    supported = getattr(module, "is_bf16_supported", None)
    return supported is None or supported()


def check_quantization(option: str, device: str) -> None:
    """Check that bitsandbytes can hold weights in 4 or 8 bits on a device.

    Args:
        option: what asks for it, for the message.
        device: type of the device.

    Raises:
        FNSFTError: it is not installed, or does not support the device.
    """
    if find_spec("bitsandbytes") is None:
        raise FNSFTError(f"{option} needs bitsandbytes; run: python -m pip install 'fnsft-trl[quantization]'")

    if device not in supported_devices():
        raise FNSFTError(
            f"{option}: bitsandbytes holds no quantised weights on {device} (it does on "
            f"{', '.join(sorted(supported_devices()))}); drop {option}"
        )
