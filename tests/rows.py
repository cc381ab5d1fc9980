"""Rows of every format, made up by hypothesis: odd characters, columns of nobody's, several turns."""

import re
from typing import Any

from hypothesis import strategies as st

from rlhf_workbench.core.formats import FORMATS

Row = dict[str, Any]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
ANY_TEXT = st.text(CHARACTERS, max_size=20)
ODD = st.sampled_from(
    ["\u2028", "\u200b x", "\ufeffx", "𝔘🏳️‍🌈", "a\r\nb", "\n\nHuman: x", "\n\nAssistant: ", "é", '"\\', "\x85x", "null"]
)
TEXT = (st.text(CHARACTERS, min_size=1, max_size=30) | ODD).filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
HH_TEXT = TEXT.filter(lambda text: not re.search("\n\n(Human|Assistant): ", text))  # one turn of hh-rlhf
KNOWN = {"prompt", "chosen", "rejected", "completion", "label", "input", "preferred_output", "non_preferred_output"}
KNOWN |= {"messages", "prompt_id", "score_chosen", "score_rejected", "tools", "parallel_tool_calls", "topic", "split"}
COLUMNS = st.dictionaries(ANY_TEXT.filter(lambda name: name not in KNOWN), JSON, max_size=3)
OWN = st.fixed_dictionaries({}, optional={"topic": JSON, "split": st.sampled_from(["train", "test"]) | JSON})


@st.composite
def shuffled(draw: st.DrawFn, row: Row) -> Row:
    """The same columns in any order."""
    return {name: row[name] for name in draw(st.permutations(list(row)))}


@st.composite
def turns(draw: st.DrawFn, role: str) -> Row:
    """One message: plain, with more names, in parts, or a tool call."""
    text = draw(TEXT)
    content = draw(st.sampled_from([text, text, [{"type": "text", "text": text}]]))
    extra = draw(st.dictionaries(st.sampled_from(["name", "weight", "x"]), JSON, max_size=2))
    if role == "assistant" and draw(st.integers(0, 5)) == 0:
        content, extra = None, extra | {"tool_calls": [{"id": "1", "function": {"name": text}}]}
    return draw(shuffled({"role": role, "content": content} | extra))


def conversation(*roles: str) -> st.SearchStrategy[list[Row]]:
    return st.tuples(*(turns(role) for role in roles)).map(list)


QUESTIONS = st.sampled_from(
    [("user",), ("system", "user"), ("developer", "user", "assistant", "tool", "user")]
).flatmap(lambda roles: conversation(*roles))
ANSWERS = st.sampled_from([("assistant",), ("assistant",), ("assistant", "tool", "assistant")]).flatmap(
    lambda roles: conversation(*roles)
)


def _pairs(names: tuple[str, str]) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries({name: ANSWERS for name in names})


@st.composite
def implicit(draw: st.DrawFn) -> Row:
    """Two whole conversations with the same question."""
    asked = draw(QUESTIONS)
    return {"chosen": asked + draw(ANSWERS), "rejected": asked + draw(ANSWERS)}


@st.composite
def ultrafeedback(draw: st.DrawFn) -> Row:
    """As published, or with some columns missing, or with others than expected in them."""
    row = draw(implicit())
    said = row["chosen"][-1]["content"]
    row["prompt"] = draw(TEXT) if not isinstance(said, str) or draw(st.booleans()) else "the same?"
    optional = {"prompt_id": ANY_TEXT, "messages": st.just(row["chosen"]) | QUESTIONS}
    optional |= {name: st.integers() | st.floats(0, 10) for name in ("score_chosen", "score_rejected")}
    return row | draw(st.fixed_dictionaries({}, optional=optional))


@st.composite
def hh(draw: st.DrawFn) -> Row:
    """Dialogues that part at the last turn, or earlier."""
    said = "\n\nHuman: " + "\n\nAssistant: x\n\nHuman: ".join(draw(st.lists(HH_TEXT, min_size=1, max_size=3)))
    ends = [draw(st.lists(HH_TEXT, min_size=1, max_size=2)) for _ in range(2)]
    return dict(
        zip(("chosen", "rejected"), (said + "".join(f"\n\nAssistant: {t}" for t in end) for end in ends), strict=True)
    )


@st.composite
def openai(draw: st.DrawFn) -> Row:
    """With and without tools, and with names that we do not know."""
    tools = st.just([]) | st.just([{"type": "function", "function": {"name": "f"}}])
    asked = {"messages": draw(QUESTIONS)} | draw(
        st.fixed_dictionaries({}, optional={"tools": tools, "parallel_tool_calls": st.booleans()})
    )
    row = {"input": draw(shuffled(asked | draw(COLUMNS)))}
    return row | draw(_pairs(("preferred_output", "non_preferred_output")))


_ROWS: dict[str, st.SearchStrategy[Row]] = {
    "trl": st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), TEXT)),
    "trl-chat": st.fixed_dictionaries({"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": ANSWERS}),
    "trl-implicit": implicit(),
    "kto": st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT, "label": st.booleans()}),
    "kto-chat": st.fixed_dictionaries({"prompt": QUESTIONS, "completion": ANSWERS, "label": st.booleans()}),
    "openai": openai(),
    "ultrafeedback": ultrafeedback(),
    "hh-rlhf": hh(),
}
assert _ROWS.keys() == FORMATS.keys()


@st.composite
def rows(draw: st.DrawFn, format: str) -> Row:
    """One row of a format, with columns of nobody's, in any order."""
    return draw(shuffled(draw(COLUMNS) | draw(OWN) | draw(_ROWS[format])))
