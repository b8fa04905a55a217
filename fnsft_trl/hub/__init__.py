"""The Hub: tokens, accounts, files at one commit, names, and the cards of trained models. Free of torch."""

from .files import MissingFileError, fetch_file, hub_errors, is_hub_id, push_directory


__all__ = ["MissingFileError", "fetch_file", "hub_errors", "is_hub_id", "push_directory"]
