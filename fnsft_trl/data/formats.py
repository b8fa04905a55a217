"""The column formats that are understood, in one table, and how a row in one of them becomes a row of TRL's."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import FNSFTError
from .cells import UnusableRow, is_empty, is_parts, text_of
from .messages import PLAIN, Dialect, read_messages, turns_to_answer


PROMPT_COMPLETION, MESSAGES, TEXT, TOKENS = "prompt, completion", "messages", "text", "input_ids"

SYSTEM_COLUMNS = ("system", "system_prompt")
KEPT_COLUMNS = ("tools", "chat_template_kwargs", "image", "images")  # which TRL reads beside the text

# What makes `text` beside it a question, or one message of several.
_ANSWERS = (
    "attempt",
    "code",
    "solution",
    "canonical_solution",
    "target",
    "targets",
    "summary",
    "translation",
    "reply",
    "chosen",
)
_PLACES = ("role", "from", "speaker", "parent_id", "message_tree_id", "conversation_id")


@dataclass(frozen=True)
class Format:
    """One way to name the columns of a dataset.

    Attributes:
        becomes (`str`): what a row is for TRL: conversational prompt and completion, messages, text or tokens.
        prompt (`tuple[str]`): columns of the user's turn, joined by an empty line in this order; of the other kinds,
            the one column that is read.
        completion (`str`, *optional*): column of the assistant's turn.
        optional (`tuple[str]`): columns of the prompt that may be null or empty in a row.
        labels (`tuple[str]`): columns that go with the format and are not part of the text.
        is_short (`bool`): whether the completion is often the mere result of what a conversation beside it says in
            full, which is then read instead.
    """

    becomes: str
    prompt: tuple[str, ...]
    completion: str | None = None
    optional: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    is_short: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """The columns without which a row cannot be read."""
        names = (*self.prompt, *([self.completion] if self.completion else []))
        return tuple(name for name in names if name not in self.optional)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the format."""
        return (*self.prompt, *([self.completion] if self.completion else []), *self.labels)

    @property
    def name(self) -> str:
        """Its columns without the labels, as messages and the documentation write them."""
        return ", ".join(name for name in self.columns if name not in self.labels)


def _turns(*prompt: str, completion: str, **options) -> Format:
    return Format(PROMPT_COMPLETION, prompt, completion, **options)


# Of several that match, the one with the most columns is taken, and of equally many the first one here. The names are
# compared without regard to case. A column of SYSTEM_COLUMNS beside any of them is the system turn.
FORMATS = (
    _turns("prompt", completion="completion"),
    _turns("instruction", "context", completion="response", optional=("context",)),
    _turns("instruction", "input", completion="output", optional=("input",)),
    _turns("context", "question", completion="answer", optional=("context",)),
    _turns("context", "question", completion="answers"),
    _turns("definition", "inputs", completion="targets", optional=("definition",)),
    _turns("instruction", completion="response"),
    _turns("instruction", completion="output"),
    _turns("question", completion="answer"),
    _turns("question", completion="response"),
    _turns("prompt", completion="response"),
    _turns("query", completion="response"),
    _turns("query", completion="answer"),
    _turns("query", completion="answers"),
    _turns("context", completion="response"),
    _turns("input", completion="output"),
    _turns("input", completion="target"),
    _turns("inputs_pretokenized", completion="targets_pretokenized"),
    _turns("inputs", completion="targets"),
    _turns("problem", completion="solution", is_short=True),
    _turns("user", completion="assistant"),
    _turns("message_1", completion="message_2", labels=("role_1", "topic", "topic;", "sub_topic")),
    Format(MESSAGES, ("messages",)),
    *(Format(MESSAGES, (name,)) for name in ("conversations", "conversation", "dialogue", "dialog", "chat")),
    Format(TEXT, ("text",)),
    Format(TOKENS, ("input_ids",), labels=("labels", "completion_mask", "assistant_masks")),
)


@dataclass(frozen=True)
class Match:
    """A format found in a dataset: `names` has the dataset's spelling of each of the format's columns."""

    format: Format
    names: Mapping[str, str]
    system: str | None = None

    @property
    def used(self) -> set[str]:
        """The dataset's columns whose content is used."""
        names = {name for column, name in self.names.items() if column not in self.format.labels}
        return names | ({self.system} if self.system else set())


def parse_columns(columns: str | Mapping[str, str]) -> dict[str, str]:
    """Read a choice of columns, `prompt=question,completion=answer`, or check one given as a mapping.

    Raises:
        FNSFTError: it names neither prompt and completion, nor text, nor messages; or a target twice.
    """
    if isinstance(columns, str):
        pairs = [item.partition("=") for item in columns.split(",") if item.strip()]
        named = [(target.strip(), name.strip()) for target, _, name in pairs]
    else:
        named = list(columns.items()) if isinstance(columns, Mapping) else []
    chosen = dict(named)
    targets = set(chosen) - {"system"}
    if (
        len(chosen) != len(named)
        or targets not in ({"prompt", "completion"}, {"text"}, {"messages"})
        or ("system" in chosen and targets == {"text"})
        or not all(isinstance(name, str) and name for name in chosen.values())
        or len(set(chosen.values())) < len(chosen)
    ):
        raise FNSFTError(
            f"columns is {columns!r}; write prompt=COLUMN,completion=COLUMN, or messages=COLUMN, or text=COLUMN, each "
            "once, and system=COLUMN beside the first two if there is one"
        )
    return chosen


def find_formats(
    columns: Iterable[str], *, chosen: str | Mapping[str, str] | None = None, text_field: str = "text"
) -> list[Match]:
    """The formats whose columns a dataset has, longest first.

    Args:
        columns: the dataset's column names.
        chosen: the columns to read instead, as [`parse_columns`] takes them.
        text_field: name of the column that TRL reads text from.

    Raises:
        FNSFTError: no format matches, or a chosen column does not exist; the message names the columns found.
    """
    found = list(columns)
    if chosen is not None:
        return [_chosen(parse_columns(chosen), found, text_field)]
    if text_field != "text" and text_field in found:  # it was named, so it comes before all others
        return [Match(Format(TEXT, (text_field,)), {text_field: text_field})]
    if TOKENS in found:  # TRL takes the tokens, whatever stands beside them
        return [Match(FORMATS[-1], {name: name for name in FORMATS[-1].columns if name in found})]
    spelt = {_plain(name): name for name in reversed(found)} | {name: name for name in found if name == _plain(name)}
    system = next((spelt[name] for name in SYSTEM_COLUMNS if name in spelt), None)
    matches = []
    for form in FORMATS:
        if not {*form.required, *form.optional} <= set(spelt):
            continue
        if form.becomes == TEXT:
            matches.append(Match(Format(TEXT, (text_field,)), {text_field: spelt["text"]}))
        else:
            names = {column: spelt[column] for column in form.columns if column in spelt}
            matches.append(Match(form, names, None if form.becomes == TOKENS else system))
    if not matches:
        raise FNSFTError(
            f"has the columns {', '.join(map(repr, found)) or 'none'}, which are no known format; the nearest are "
            f"{_nearest(found)}; rename the columns, or choose them with columns ({_choice(spelt)})"
        )
    matches.sort(key=lambda match: -len(match.names))
    if matches[0].format.becomes == TEXT:
        _check_text_is_all(spelt)
    return matches


def _plain(name: str) -> str:
    """A column's name without its case, and without the mark of byte order that a file may begin with."""
    return name.strip("\ufeff ").lower()


def _choice(spelt: Mapping[str, str]) -> str:
    """How columns that are no known format can be chosen."""
    if "chosen" in spelt:  # of preferences, the better answer
        whole, prompt = f"--columns messages={spelt['chosen']}", spelt.get("prompt")
        beside = f", or prompt={prompt},completion={spelt['chosen']} where the prompt is not part of it"
        return whole + (beside if prompt else "")
    questions = {form.prompt[-1] for form in FORMATS if form.completion} - {"response"}
    asked = [name for plain, name in spelt.items() if plain in questions]
    answered = [name for plain, name in spelt.items() if plain in _ANSWERS]
    if len(asked) == len(answered) == 1:
        return f"--columns prompt={asked[0]},completion={answered[0]}, or text=COLUMN or messages=COLUMN"
    return "--columns prompt=COLUMN,completion=COLUMN, text=COLUMN or messages=COLUMN"


def _check_text_is_all(spelt: Mapping[str, str]) -> None:
    """See that `text` is not a question or a message, whose rest is in columns that are no known format."""
    answers = {*_ANSWERS, *(form.completion for form in FORMATS if form.completion)}
    text = spelt["text"]
    if answer := next((spelt[name] for name in spelt if name.lower() in answers), None):
        raise FNSFTError(
            f"has the column {text!r} beside {answer!r}, which looks like the answer to it; say what is trained with "
            f"columns (--columns): prompt={text},completion={answer}, or text={text} for that column alone"
        )
    if place := next((spelt[name] for name in spelt if name.lower() in _PLACES), None):
        raise FNSFTError(
            f"has the column {text!r} beside {place!r}: each row looks like one message of a conversation; put them "
            f"together into messages (role and content), or set columns (--columns) to text={text} to train each "
            "message by itself"
        )


def _chosen(chosen: dict[str, str], found: list[str], text_field: str) -> Match:
    for name in chosen.values():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FNSFTError(f"has no column {name!r}{hint} (it has {', '.join(map(repr, found))})")
    system = chosen.pop("system", None)
    if "text" in chosen:
        return Match(Format(TEXT, (text_field,)), {text_field: chosen["text"]})
    form = _turns("prompt", completion="completion") if "prompt" in chosen else Format(MESSAGES, ("messages",))
    return Match(form, chosen, system)


def _nearest(found: Sequence[str]) -> str:
    lowered = [name.lower() for name in found]

    def distance(form: Format) -> tuple[float, float]:
        near = [difflib.get_close_matches(name, lowered, n=1, cutoff=0.6) for name in form.required]
        return sum(map(bool, near)) / len(near), len(near) if any(near) else 0

    ranked = sorted((form for form in FORMATS if form.becomes != TOKENS), key=distance, reverse=True)
    return "; ".join(form.name for form in ranked[:3])


def choose(row: Mapping, matches: Sequence[Match]) -> Match:
    """The format of one row: the longest whose required columns are all filled in it.

    A longer format may be filled in part. A shorter one then takes the row over only if it reads everything that is
    filled in that part. So rows of several formats in one dataset are each read in their own, and a row with an
    instruction and an empty answer is not read as something else. A conversation with an answer may always take a row
    over. It does so even from a format that is filled, if it goes further.

    Raises:
        UnusableRow: there is none; a required column of the nearest is null or empty.
    """
    chosen: Match | None = None
    partial: Match | None = None
    for match in matches:
        required = [match.names[column] for column in match.format.required]
        filled = {name for name in required if not is_empty(row.get(name))}
        if filled and len(filled) < len(required):
            partial = partial or match
        if len(filled) < len(required):
            continue
        is_conversation = match.format.becomes == MESSAGES
        if chosen is not None:
            if is_conversation and chosen.format.becomes != TEXT and _goes_further(row, match, chosen):
                chosen = match
        elif partial is None or _filled(row, partial) <= match.used or (is_conversation and _reach(row, match)):
            chosen = match
    if chosen is not None:
        return chosen
    match = partial or matches[0]
    column = next(n for c in match.format.required if is_empty(row.get(n := match.names[c])))
    raise UnusableRow(f"{column!r} is empty")


def _filled(row: Mapping, match: Match) -> set[str]:
    return {name for column in match.format.required if not is_empty(row.get(name := match.names[column]))}


def _goes_further(row: Mapping, conversation: Match, pair: Match) -> bool:
    return _reach(row, conversation) >= _reach(row, pair) + (not pair.format.is_short)


def _reach(row: Mapping, match: Match) -> int:
    """How many turns a row has in this format up to its last answer."""
    if match.format.becomes == MESSAGES:
        return turns_to_answer(row[match.names[match.format.prompt[0]]])
    prompt, answer = (row.get(match.names[column]) for column in (match.format.prompt[0], match.format.completion))
    before = len(prompt) if isinstance(prompt, list) else 1
    return before + (turns_to_answer(answer) if isinstance(answer, list) else 1)


def convert_row(row: Mapping, matches: Sequence[Match], dialect: Dialect = PLAIN) -> dict:
    """One row of a dataset as TRL reads it.

    Returns:
        `prompt` and `completion` as lists of messages, `messages`, the text under the name of its column, or `{}` for
        a row of token ids, which stays as it is.

    Raises:
        UnusableRow: a required text is missing, a message cannot be read, or a cell holds something else than text or
            messages.
    """
    match = choose(row, matches)
    form, names = match.format, match.names
    if form.becomes == TOKENS:
        return {}
    if form.becomes == TEXT:
        (column,) = form.prompt
        return {column: text_of(row[names[column]], repr(names[column]))}
    system = [] if match.system is None else _turn("system", row.get(match.system), match.system)
    if form.becomes == MESSAGES:
        column = names[form.prompt[0]]
        if system and isinstance(row[column], str):
            system[0]["content"] = system[0]["content"].removeprefix("SYSTEM:").strip()  # as the turns of a transcript
        messages = read_messages(row[column], column, dialect)
        _check_answered(messages, column)
        return {"messages": _with_system(system, messages)}
    cells = [(row.get(names[column]), names[column]) for column in form.prompt if column in names]
    answer, answer_name = row[names[form.completion]], names[form.completion]
    if len(cells) == 1 and _holds_messages(cells[0][0]):
        prompt = read_messages(*cells[0], dialect)
    else:
        parts = [text for text in (text_of(value, repr(name)) for value, name in cells) if text.strip()]
        prompt = _turn("user", "\n\n".join(parts), "prompt")
    if not prompt:
        raise UnusableRow(f"{cells[0][1]!r} is empty")
    if _holds_messages(answer):
        completion = read_messages(answer, answer_name, dialect)
        _check_answered(completion, answer_name)
    else:
        completion = _turn("assistant", answer, answer_name)
    return {"prompt": _with_system(system, prompt), "completion": completion}


def _holds_messages(value) -> bool:
    return isinstance(value, list) and not is_parts(value) and (not value or isinstance(value[0], Mapping))


def _with_system(system: list[dict], messages: list[dict]) -> list[dict]:
    return messages if messages[0]["role"] in ("system", "developer") else [*system, *messages]


def _turn(role: str, value, name: str) -> list[dict]:
    return [] if is_empty(value) else [{"role": role, "content": text_of(value, repr(name))}]


def _check_answered(messages: list[dict], name: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableRow(f"{name!r} has no answer")
