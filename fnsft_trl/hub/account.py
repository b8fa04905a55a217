"""HubAccount: whose token it is and what it may do, asked before work whose result needs it. No torch."""

import sys
from dataclasses import dataclass
from functools import cache

from ..errors import FNSFTError
from .credentials import HubToken, find_token
from .files import LOG_IN, hub_errors
from .names import UNKNOWN


@dataclass(frozen=True)
class HubAccount:
    """Whose token it is, and what it may do.

    Attributes:
        name (`str`): of the user or the organisation.
        kind (`str`): `"user"`, `"org"` or `"app"`.
        organisations (`tuple[str, ...]`): that the user is a member of.
        role (`str`): `"read"`, `"write"`, `"fineGrained"` or another word of the Hub; `"unknown"` where it says none.
        permissions (`dict[str, tuple[str, ...]]`): of a fine-grained token: for what, in words -> names of the
            permissions.
        expires (`str` or `None`): when, where the Hub says it.
    """

    name: str
    kind: str
    organisations: tuple[str, ...]
    role: str
    permissions: dict[str, tuple[str, ...]]
    expires: str | None

    @property
    def may_write(self) -> bool:
        """Whether the token may write to any repository; taken for granted where the Hub does not say."""
        if self.role == "fineGrained":
            return any("repo.write" in permissions for permissions in self.permissions.values())
        return self.role != "read"

    def may_own(self, repo_id: str) -> bool:
        """Whether a repository is the account's own or of its organisations; so taken where the Hub does not say."""
        if self.kind != "user" or self.role == UNKNOWN or "/" not in repo_id:
            return True
        scopes = {whose.partition(" ")[2] for whose in self.permissions}
        return repo_id.partition("/")[0] in {self.name, *self.organisations, *scopes}


def whose_token(token: HubToken, *, again: bool = True) -> HubAccount:
    """Ask the Hub whose token it is.

    Args:
        token: the token.
        again: whether to ask anew where this process has asked before; the Hub answers only so often.

    Raises:
        FNSFTError: the Hub does not accept it, or cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    with hub_errors("your account", token=token.value):
        try:
            answer = _api().whoami(token=token.value, cache=not again)
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise FNSFTError(
                f"the Hub does not accept the token from {token.source}: it is wrong, expired or was revoked; make "
                "a new one in the Hub's settings, or log in with `hf auth login`"
            ) from error
    authorisation = answer.get("auth", {})
    access = authorisation.get("accessToken") or {}
    scopes = access.get("fineGrained") or {}
    permissions = {}
    for scope in scopes.get("scoped", []):
        entity = scope.get("entity", {})
        whose = f"{entity.get('type', 'entity')} {entity.get('name', UNKNOWN)}"
        permissions[whose] = tuple(scope.get("permissions", ()))
    if scopes.get("global"):
        permissions["everywhere"] = tuple(scopes["global"])
    if scopes.get("canReadGatedRepos"):
        permissions["gated repositories open to the account"] = ("read",)
    return HubAccount(
        name=answer.get("name", UNKNOWN),
        kind=answer.get("type", "user"),
        organisations=tuple(organisation["name"] for organisation in answer.get("orgs", [])),
        role=access.get("role", UNKNOWN),
        permissions=permissions,
        expires=access.get("expiration") or authorisation.get("expiresAt"),
    )


@cache
def _api():
    """The one that remembers whose a token is."""
    from huggingface_hub import HfApi

    return HfApi(library_name="fnsft_trl")


def check_upload(given: str | None = None, repo_id: str | None = None) -> None:
    """Check, before the work whose result is to be pushed, that there is a token which may write.

    Where there is none and a person sits at the terminal, huggingface_hub's own login asks for one.

    Args:
        given: the token that was given, if any.
        repo_id: where to, unless it is a pull request, which may be opened in any repository.

    Raises:
        FNSFTError: there is no token, the Hub does not accept it, it may only read, or the repository is of others.
    """
    from huggingface_hub import login

    token = find_token(given)
    if token is None and sys.stdin.isatty():
        login()
        token = find_token()
    if token is None:
        raise FNSFTError(f"there is no token to push with; {LOG_IN} write")
    account = whose_token(token, again=False)
    if not account.may_write:
        raise FNSFTError(
            f"the token from {token.source} ({account.name}) may only read, so nothing could be pushed; {LOG_IN} write"
        )
    if repo_id is not None and not account.may_own(repo_id):
        owners = " or ".join((account.name, *account.organisations))
        raise FNSFTError(
            f"the token from {token.source} may write to repositories of {owners}, not to {repo_id}; push to one of "
            "those, or open a pull request"
        )
