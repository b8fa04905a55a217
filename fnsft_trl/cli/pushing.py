"""What the verbs that push to the Hub share: their options, checked before anything is loaded."""

import os
from typing import Any

from ..errors import FNSFTError
from ..hub.account import check_upload
from ..hub.credentials import TOKEN_HELP
from ..hub.files import hub_errors, is_hub_id
from ..occupied import check_repository
from .options.arguments import Arguments
from .options.schema import row


_GROUP = "pushing to the Hub"
_WITH_IT = "With push_to_hub:"
_REFINEMENTS = (
    row("private", f"{_WITH_IT} make the repository private.", False, group=_GROUP),
    row("hub_revision", f"{_WITH_IT} the branch to push to.", metavar="BRANCH", group=_GROUP),
    row("create_pr", f"{_WITH_IT} open a pull request.", False, group=_GROUP),
    row("hub_token", f"{_WITH_IT} the token. {TOKEN_HELP}", group=_GROUP),
)
PUSH_OPTIONS = (
    row("push_to_hub", "Also push the result to this repository.", metavar="ORG/NAME", group=_GROUP),
    *_REFINEMENTS,
)


def push_arguments(args: Arguments, kind: str) -> dict[str, Any] | None:
    """The arguments of a push; `None` where none was asked for.

    Args:
        args: of the verb.
        kind: what is to be pushed; see [`~fnsft_trl.occupied.check_target`].

    Raises:
        FNSFTError: options without `push_to_hub`, no repository, one that holds something else, or no token that may
            write to it.
    """
    if args.push_to_hub is None:
        if any(vars(args)[option.name] for option in _REFINEMENTS):
            names = ", ".join(option.name for option in _REFINEMENTS)
            raise FNSFTError(f"{names} go with push_to_hub; give it or drop them")
        return None
    if not is_hub_id(args.push_to_hub):
        raise FNSFTError(f"push_to_hub is {args.push_to_hub!r}; it must be a repository, org/name")
    if os.environ.get("RANK", "0") == "0":  # one of several processes asks, and pushes
        is_proposal = args.create_pr or (args.hub_revision or "").startswith("refs/pr/")
        check_upload(args.hub_token, None if is_proposal else args.push_to_hub)
        with hub_errors(args.push_to_hub, args.hub_revision, token=args.hub_token):
            check_repository(
                args.push_to_hub,
                kind,
                branch=args.hub_revision,
                token=args.hub_token,
                subfolder=vars(args).get("hub_subfolder"),
            )
    return {
        "repo_id": args.push_to_hub,
        "private": args.private or None,
        "branch": args.hub_revision,
        "create_pr": args.create_pr,
        "token": args.hub_token,
    }
