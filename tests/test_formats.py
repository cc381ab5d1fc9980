"""Every format reads and writes without loss, and between formats what would be lost is named."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import ANY_TEXT, HH_TEXT, rows

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.core.formats import (
    FORMATS,
    Example,
    detect_format,
    parse_line,
    render,
    turn_around,
    unpair,
)
from rlhf_workbench.core.messages import answer, answer_text, hh_text, hh_turns, question, split_pair

PAIRS = [name for name, how in FORMATS.items() if not how.is_single]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_row_comes_back_as_it_was(name: str, data: st.DataObject) -> None:
    row = data.draw(rows(name))
    text = json.dumps(row)
    example = parse_line(name, row)
    through_json = replace(example, frame=json.loads(json.dumps(example.frame)))
    assert json.dumps(render(name, through_json)) == text
    assert json.dumps(row) == text, "reading must not change the row"


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_format_is_seen_from_the_columns(name: str, data: st.DataObject) -> None:
    row = data.draw(rows(name))
    assert detect_format(row) == name


@settings(max_examples=100, deadline=None)
@given(asked=HH_TEXT, good=HH_TEXT, bad=HH_TEXT, topic=ANY_TEXT)
def test_a_plain_pair_goes_through_every_format(asked: str, good: str, bad: str, topic: str) -> None:
    pair = Example(messages=question(asked), answers=(answer(good), answer(bad)))
    for first, second in itertools.permutations(PAIRS, 2):
        is_open = FORMATS[first].is_open and FORMATS[second].is_open
        middle = parse_line(first, render(first, replace(pair, frame={"topic": topic} if is_open else {})))
        row = render(second, middle)
        end = parse_line(second, row)
        assert (end.messages, end.answers) == (pair.messages, pair.answers)
        assert not is_open or row["topic"] == topic


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_turning_a_pair_exchanges_its_answers(name: str, data: st.DataObject) -> None:
    example = parse_line(name, data.draw(rows(name)))
    turned = turn_around(example)
    try:
        again = parse_line(name, render(name, turned))
    except InputError:
        return  # two answers whose beginnings agree may part elsewhere when exchanged
    assert again.answers == example.answers[::-1]
    assert again.messages == example.messages


@settings(max_examples=60, deadline=None)
@given(row=rows("trl"))
def test_a_pair_becomes_two_labelled_answers(row: dict[str, Any]) -> None:
    good, bad = (render("kto", part) for part in unpair(parse_line("trl", row)))
    rest = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}
    if {"completion", "label"}.isdisjoint(rest):
        assert good == {"prompt": row["prompt"], "completion": row["chosen"], "label": True} | rest
        assert bad == {"prompt": row["prompt"], "completion": row["rejected"], "label": False} | rest


@given(text=ANY_TEXT, more=st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "\n\nHuman:", "x"])))
def test_hh_text_is_split_and_joined_exactly(text: str, more: list[str]) -> None:
    dialogue = "\n\nHuman: " + text + "".join(more)
    assert hh_text(hh_turns(dialogue)) == dialogue


LOSSES = [
    ("trl", {"messages": [SYSTEM, *question("Hi")]}, "all but one of 2 turns would be lost"),
    ("trl", {"messages": [{"role": "user", "content": "Hi", "name": "ada"}]}, "name of the user turn would be lost"),
    ("trl", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "content that is not text"),
    ("hh-rlhf", {"messages": [SYSTEM, *question("Hi")]}, "the system turn would be lost"),
    ("hh-rlhf", {"frame": {"topic": "x"}}, "hh-rlhf has no place for topic"),
    ("hh-rlhf", {"messages": question("Hi\n\nAssistant: Ho")}, "read back with other turns"),
    ("openai", {"frame": {"topic": "x", "tools": "none"}}, "openai has no place for topic, tools"),
    ("openai", {"scores": (8.0, 2.5)}, "openai has no place for score_chosen, score_rejected"),
    ("trl-implicit", {"answers": (answer("a") + answer("b"), answer("a") + answer("c"))}, "other turns"),
    ("ultrafeedback", {"frame": {"messages": "x"}}, "ultrafeedback has no place for messages"),
    ("kto", {}, "this row is a pair"),
    ("trl", {"answers": (answer("a"),), "is_good": True}, "one answer with a label, not two"),
    ("parquet", {}, "there is no format 'parquet'; choose one of trl, trl-chat"),
]


@pytest.mark.parametrize(("name", "change", "words"), LOSSES, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_what_would_be_lost_is_named(name: str, change: dict[str, Any], words: str) -> None:
    pair = Example(messages=question("Hi"), answers=(answer("Ho"), answer("No")))
    with pytest.raises(InputError, match=words):
        render(name, replace(pair, **change))


def test_columns_may_be_left_out_on_purpose() -> None:
    row = {"prompt": "Hi", "chosen": "Ho", "rejected": "No", "topic": "x"}
    assert render("hh-rlhf", parse_line("trl", row), allow_loss=True) == {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Ho",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No",
    }


def test_tools_and_scores_find_their_places() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = {"prompt": question("Hi"), "chosen": answer("Ho"), "rejected": answer("No"), "tools": tools}
    line = render("openai", parse_line("trl-chat", chat))
    assert line["input"] == {"messages": question("Hi"), "tools": tools, "parallel_tool_calls": True}
    assert render("trl-chat", parse_line("openai", line)) == chat
    scored = {"chosen": question("Hi") + answer("Ho"), "rejected": question("Hi") + answer("No")}
    scored |= {"score_chosen": 8.0, "score_rejected": 2}
    ultra = render("ultrafeedback", parse_line("trl-implicit", scored))
    assert (ultra["prompt"], ultra["score_chosen"], ultra["score_rejected"]) == ("Hi", 8.0, 2)
    good, bad = unpair(parse_line("ultrafeedback", ultra))
    assert [render("kto", part)["score"] for part in (good, bad)] == [8.0, 2]


def test_dialogues_that_part_early_keep_all_their_turns() -> None:
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
    }
    example = parse_line("hh-rlhf", row)
    assert example.messages == question("a")
    assert [answer_text(said) for said in example.answers] == [
        "b\n\nHuman: c\n\nAssistant: d",
        "B\n\nHuman: C\n\nAssistant: D",
    ]
    assert render("hh-rlhf", example) == row


def test_the_shared_beginning_is_the_one_that_trl_finds() -> None:
    extract_prompt = pytest.importorskip("trl.data_utils", reason="needs the train extra").extract_prompt
    asked = [SYSTEM, *question("Hi"), *answer("Ho"), *question("And?")]
    chosen, rejected = asked + answer("Yes."), asked + answer("No.")
    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split_pair(chosen, rejected) == (found["prompt"], (found["chosen"], found["rejected"]))
