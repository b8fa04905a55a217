"""The `fnsft` command: one module per verb, imported only when it is called.

A verb is a module with `ABOUT`, what it does; `options()`, the rows of its options; and `main(argv)`.
"""

import difflib
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module

from .. import __version__
from ..errors import FNSFTError
from ..hub.credentials import hide_tokens, use_env_file
from ..writing import disk_errors
from .endings import Ended, ends_in_order
from .logs import hush_libraries
from .options.help import format_help


VERBS = {
    "train": "fine-tune with functional networks (the default when the first argument is an option)",
    "discover": "find the functional networks of a model and save them as a template",
    "inspect": "show what a template holds",
    "compare": "find the networks of one template in another",
    "evaluate": "score models on rows, general text and tasks, and compare them",
    "probe": "silence and scale networks beside controls, and say which of them matter",
    "experiment": "train and score every recipe of a folder over seeds, and compare them",
    "continual": "train one task after another, in several ways, and measure what each stage did to the others",
    "restore": "mend a fine-tune that forgot, without training",
    "export": "write what was trained as a merged, baked or smaller model, a plain LoRA or GGUF, and verify it",
    "recipes": "list the recipes that the package brings, and copy them",
    "env": "show versions, devices and settings, for a bug report",
    "auth": "show which token of the Hub is used, where it comes from and what it may do",
    "demo": "run every step on the embedded model, in minutes",
}
# Which go on where they were interrupted.
_RESUMABLE = ("train", "discover", "probe", "experiment", "continual", "demo")


def _help() -> str:
    lines = "\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())
    return (
        "usage: fnsft VERB [options]\n\nFunctional networks of language models: find them, mask them, fine-tune only "
        f"them.\n\nverbs:\n{lines}\n\n`fnsft VERB --help` shows the options of a verb."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, or 2 after a message of one line about what was asked."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"fnsft-trl {__version__}")
        return 0
    verb, rest = ("train", argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    return run_verb(verb, rest)


def buildtemplates() -> int:
    """`fnsft discover` under the name it has in the original project."""
    return run_verb("discover", sys.argv[1:])


def check_hf_token() -> int:
    """`fnsft auth` under the name it has in the original project."""
    return run_verb("auth", sys.argv[1:])


def convert_gguf() -> int:
    """`fnsft export --to gguf` under the name it has in the original project."""
    return run_verb("export", ["--to", "gguf", *sys.argv[1:]])


def run_verb(verb: str, argv: list[str]) -> int:
    """Run a verb with its arguments; an [`FNSFTError`] becomes one line on standard error and status 2.

    So does what a disk refuses. Interrupted or asked to end, it says in one line what is saved and how to go on, with
    status 130 or 143. A token in the file `.env` of the working directory is used as one in the environment is.
    """
    try:
        with ends_in_order(), disk_errors(), _of_launch():
            return _run_verb(verb, argv)
    except FNSFTError as error:
        message = hide_tokens(" ".join(str(error).split()))
        print(f"fnsft {verb}: error: {message}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Ended) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nfnsft {verb}: {_interrupted(verb, argv)}", file=sys.stderr)  # below a bar
        return 143 if isinstance(error, Ended) else 130


def _of_launch() -> AbstractContextManager:
    """What one of several processes says where another one is gone; alone, nothing is imported for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return nullcontext()
    return import_module("..ranks", __package__).lost_processes()


def _run_verb(verb: str, argv: list[str]) -> int:
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FNSFTError(f"there is no verb {verb!r}{hint} (verbs: {', '.join(VERBS)})")
    if verb not in ("auth", "env"):  # which say whether a token comes from that file
        use_env_file()
    hush_libraries()
    module = import_module(f".{verb}", __package__)
    if {"-h", "--help"} & set(argv):
        print(format_help(verb, module.ABOUT, module.options()))
    else:
        module.main(argv)
    return 0


def _interrupted(verb: str, argv: list[str]) -> str:
    """What is saved of a verb that was interrupted, and the command that goes on from there."""
    told = "interrupted; nothing was left half written"
    if verb in _RESUMABLE:
        with suppress(FNSFTError):  # before its options were read
            told = import_module(f".{verb}", __package__).interrupted(argv)
    return hide_tokens(" ".join(told.split()))
