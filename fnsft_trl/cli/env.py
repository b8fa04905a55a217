"""fnsft env: versions, devices and settings, as a report of a fault needs them. Asks the Hub nothing."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..cache import cache_dir
from ..errors import FNSFTError
from ..export.gguf import find_converter
from ..hub.credentials import find_token
from .options.arguments import read_arguments
from .options.schema import Option


ABOUT = "Show what a bug report should hold: versions, devices and settings. No token is shown."

_PACKAGES = (
    *(
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "huggingface_hub",
        "tokenizers",
        "safetensors",
    ),
    *("numpy", "scipy", "scikit-learn", "bitsandbytes", "deepspeed", "matplotlib"),
)


def options() -> list[Option]:
    """The options of the verb: none but `--config`."""
    return []


def main(argv: list[str]) -> None:
    read_arguments(argv, options())
    lines = {"fnsft-trl": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    lines |= {package: _version(package) for package in _PACKAGES}
    lines |= _device()
    token = find_token()
    lines["GGUF converter"] = _converter()
    lines["cache"] = _short(str(cache_dir()))
    lines["token of the Hub"] = "none" if token is None else f"from {_short(token.source)}"
    for name, value in lines.items():
        print(f"- {name}: {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> dict[str, str]:
    """What is computed on, and in which precision."""
    import torch

    from .precision import Precision, check_quantization

    devices = "none"
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices = f"{torch.accelerator.device_count()} of type {kind}"
        if kind == "cuda":
            names = (torch.cuda.get_device_name(number) for number in range(torch.accelerator.device_count()))
            devices += f" ({', '.join(names)}; CUDA {torch.version.cuda}, ROCm {torch.version.hip})"
    precision = Precision.choose()
    quantization = f"bitsandbytes, on {precision.device}"
    try:
        check_quantization("4 and 8 bits", precision.device)
    except FNSFTError as error:
        quantization = f"none ({error})"
    return {
        "accelerators": devices,
        "device of training": precision.device,
        "mixed precision": precision.mixed,
        "quantised weights": quantization,
    }


def _converter() -> str:
    try:
        return _short(find_converter())
    except FNSFTError:
        return "not found"


def _short(text: str) -> str:
    """Without the name of the user's directory."""
    return text.replace(str(Path.home()), "~")
