"""fnsft auth: which token of the Hub is used, where it comes from, as whom, with which rights. It is never printed."""

from ..errors import FNSFTError
from ..hub.account import HubAccount, whose_token
from ..hub.credentials import ENV_FILE, TOKEN_HELP, HubToken, find_token
from .options.arguments import read_arguments
from .options.schema import Option, row


ABOUT = (
    "Show which Hub token loads models and datasets, and which one uploads use. For each it says where it was found, "
    "whose it is and what it may do. The token itself is never shown."
)

_ROLES = {"read": "read", "write": "read and write", "fineGrained": "fine-grained"}


def options() -> list[Option]:
    """The options of the verb."""
    return [row("hub_token", f"The token that an upload would get by this option. {TOKEN_HELP}")]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    loading, upload = find_token(), find_token(args.hub_token)
    if upload is None:
        raise FNSFTError(
            f"there is no token of the Hub: HF_TOKEN is not set, here or in a file {ENV_FILE}, and no login is saved, "
            "so only public repositories can be read; log in with `hf auth login`, or set HF_TOKEN"
        )
    uses = {"loading and upload": upload} if loading == upload else {"loading": loading, "upload": upload}
    accounts = {purpose: whose_token(token) for purpose, token in uses.items() if token is not None}
    for purpose, token in uses.items():
        if token is None:
            print(f"for {purpose}: no token, so only public repositories can be read")
        else:
            _show(purpose, token, accounts[purpose])


def _show(purpose: str, token: HubToken, account: HubAccount) -> None:
    rights = _ROLES.get(account.role, account.role)
    if not account.may_write:
        rights += "; uploads would be refused"
    print(f"for {purpose}: {token.source}")
    print(f"  account  {account.name} ({account.kind})")
    if account.organisations:
        print(f"  member   {', '.join(account.organisations)}")
    print(f"  rights   {rights}")
    for what, permissions in account.permissions.items():
        print(f"           {what}: {', '.join(permissions)}")
    print(f"  expires  {account.expires or 'not said by the Hub'}")
