"""A file of rules: what is right is read, what is wrong is told with its line and field."""

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.govern.quantities import QUANTITIES
from rlhf_workbench.govern.rule_files import parse_rules, read_rules
from rlhf_workbench.govern.rules import rule_tables

GOOD = {"name": "a", "watch": "open_alerts", "at_least": "3", "do": "alert"}


def text(**changes: str | None) -> str:
    """One rule; None leaves a key out. The first key stands in line 3."""
    keys = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return "rules:\n  -\n" + "".join(f"    {name}: {value}\n" for name, value in keys.items())


WRONG = [
    ({"nmae": "x"}, 7, "nmae", "did you mean 'name'"),
    ({"watch": "open_alert"}, 4, "watch", "did you mean 'open_alerts'"),
    ({"at_least": "many"}, 5, "at_least", "must be a number, got 'many'"),
    ({"at_least": "true"}, 5, "at_least", "must be a number, got True"),
    ({"at_least": ".nan"}, 5, "at_least", "must be a number"),
    ({"do": "celebrate"}, 6, "do", "there are alert, pause_queue"),
    ({"window": "5"}, 7, "window", "a time with its unit"),
    ({"window": "0d"}, 7, "window", "a time with its unit"),
    ({"confirm": "3 of 2"}, 7, "confirm", "like `2 of 3`"),
    ({"below": "1"}, 7, "below", "exactly one of"),
    ({"rearm": "4"}, 7, "rearm", "quiet side"),
    ({"at_least": None}, 3, "", "exactly one of"),
    ({"name": None}, 3, "", "has no `name`"),
    ({"sql": "SELECT 1"}, 4, "watch", "either `watch` or `sql`"),
    ({"last": "0"}, 7, "last", "at least 1"),
    ({"budget": "{firings: 2}"}, 7, "budget", "needs `per`"),
    ({"budget": "{per: 1d, firing: 2}"}, 7, "budget", "did you mean 'firings'"),
    ({"with": "{severity: loud}"}, 7, "with", "info, warning or critical"),
    ({"with": "{sevrity: info}"}, 7, "with", "did you mean 'severity'"),
    ({"do": "retrain"}, 3, "with", "needs the option 'queue'"),
    ({"do": "pause_queue"}, 6, "do", "needs to know which queue"),
    ({"figure": "ece"}, 7, "figure", "watch: calibration"),
    ({"watch": None, "sql": "DROP TABLE prompt"}, 6, "sql", "one SELECT"),
    ({"watch": None, "sql": "SELECT count(*) FROM token"}, 6, "sql", "may not be read"),
    ({"watch": None, "sql": "SELECT count(*) FROM alert WHERE recorded_at > now()"}, 6, "sql", "write $now"),
    ({"watch": None, "sql": "SELECT 1", "window": "1d"}, 7, "window", "goes with `watch`"),
]


@pytest.mark.parametrize(("changes", "line", "field", "said"), WRONG, ids=[f"{i}-{w[2]}" for i, w in enumerate(WRONG)])
def test_each_mistake_is_told_with_its_line_and_field(
    changes: dict[str, str], line: int, field: str, said: str
) -> None:
    found = parse_rules(text(**changes))
    assert [(p.line, p.field) for p in found.problems] == [(line, field)]
    assert said in found.problems[0].text
    assert found.rules == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("rules: 3", "must be a list of rules"),
        ("rules:\n  - 3", "must be a mapping"),
        ("a: [", "is no YAML"),
        ("rule: []", "did you mean 'rules'"),
        ("channels: [telegraph]", "no channel 'telegraph'"),
        ("channels: log", "must be a list of names"),
        (text() + text()[7:], "two rules"),
        (text(name="a\n    name: b"), "given twice"),
        ("rules: &x [*x]", ""),
        ("!!python/object/apply:os.system ['true']", ""),
    ],
)
def test_what_is_no_file_of_rules_is_told(content: str, said: str) -> None:
    found = parse_rules(content)
    assert found.problems
    assert said in " ".join(map(str, found.problems))


def test_all_mistakes_are_told_at_once_and_read_refuses(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text(window="5", nmae="x"), encoding="utf-8")
    with pytest.raises(InputError, match=r"line 7.*line 8"):
        read_rules(tmp_path / "r.yaml")
    with pytest.raises(InputError, match="cannot read"):
        read_rules(tmp_path / "none.yaml")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | st.sampled_from(["- ", "? :", "rules:\n - {}", "rules: [[]]", "rules: [{name: [1]}]"]))
def test_no_text_breaks_the_reader(content: str) -> None:
    found = parse_rules(content)
    assert found.problems or not found.rules


@pytest.mark.parametrize("watch", QUANTITIES)
def test_every_quantity_can_be_watched(watch: str) -> None:
    (rule,) = parse_rules(text(watch=watch)).rules
    assert rule.measure == QUANTITIES[watch].measure
    assert rule_tables(rule) >= set(QUANTITIES[watch].tables)


def test_the_hash_is_of_what_is_said_not_of_how() -> None:
    (one,) = parse_rules(text(window="1d", needs="2")).rules
    (two,) = parse_rules("# a comment\n" + text(needs="2", window="1d")).rules
    (other,) = parse_rules(text(window="2d", needs="2")).rules
    assert one.hash == two.hash != other.hash
    assert one.window == timedelta(days=1)
