"""What the verbs that push to the Hub share: their options, checked before anything is loaded."""

import argparse
import os
from typing import Any

from ..errors import FNSFTError
from ..hub.account import check_upload
from ..hub.files import is_hub_id


_OPTIONS = ("private", "hub_revision", "create_pr", "hub_token")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--push_to_hub` and the options that go with it."""
    with_it = "with --push_to_hub:"
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="also push the result to this repository")
    parser.add_argument("--private", action="store_true", help=f"{with_it} make the repository private")
    parser.add_argument("--hub_revision", metavar="BRANCH", help=f"{with_it} the branch to push to")
    parser.add_argument("--create_pr", action="store_true", help=f"{with_it} open a pull request")
    parser.add_argument("--hub_token", help=f"{with_it} instead of HF_TOKEN or the token of `hf auth login`")


def push_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of a push; `None` where none was asked for.

    Raises:
        FNSFTError: options without `--push_to_hub`, no repository, or no token that may write to it.
    """
    if args.push_to_hub is None:
        if any(getattr(args, name) for name in _OPTIONS):
            flags = ", ".join(f"--{name}" for name in _OPTIONS)
            raise FNSFTError(f"{flags} go with --push_to_hub; give it or drop them")
        return None
    if not is_hub_id(args.push_to_hub):
        raise FNSFTError(f"--push_to_hub is {args.push_to_hub!r}; it must be a repository, org/name")
    if os.environ.get("RANK", "0") == "0":  # one of several processes asks, and pushes
        is_proposal = args.create_pr or (args.hub_revision or "").startswith("refs/pr/")
        check_upload(args.hub_token, None if is_proposal else args.push_to_hub)
    return {
        "repo_id": args.push_to_hub,
        "private": args.private or None,
        "branch": args.hub_revision,
        "create_pr": args.create_pr,
        "token": args.hub_token,
    }
