"""Any dataset, any prompt format: what TRL's SFT trainer reads, from what users have.

A dataset is found ([`~fnsft_trl.data.sources`]), its columns are recognised ([`~fnsft_trl.data.formats`]) and its rows
become TRL's ([`~fnsft_trl.data.conversion`]); the tokenizer gets the chat template that renders them
([`~fnsft_trl.data.prompts`]), and what TRL makes of both is kept on disk ([`~fnsft_trl.data.tokenized`]).
"""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "DataConfig": "config",
        "load_data": "sources",
        "load_texts": "sources",
        "to_trl_format": "conversion",
        "token_sequences": "sequences",
    },
)
