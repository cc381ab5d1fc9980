"""The machine between a condition and an action, against a definition that keeps everything, with any clock."""

import itertools
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlhf_workbench.govern.conditions import Machine, Point
from rlhf_workbench.govern.rules import Budget, Rule

START = datetime(2026, 1, 1, tzinfo=UTC)
COOL, PER = timedelta(minutes=10), timedelta(minutes=30)
RULE = Rule(
    "r",
    "alert",
    "at_least",
    5,
    rearm=2,
    confirm=(2, 3),
    cool_down=COOL,
    budget=Budget(PER, firings=2),
    min_new_labels=3,
)


class AnyHistory(RuleBasedStateMachine):
    """Values, labels and clocks as they come; the definition looks at the whole history each time."""

    def __init__(self) -> None:
        super().__init__()
        self.machine, self.now, self.labels = Machine(RULE), START, 0
        self.history: list[bool] = []  # since the rule was armed
        self.is_armed, self.fired, self.last = True, [], None  # those that the budget still counts; the last of all

    @rule(value=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 9]), minutes=st.sampled_from([0, 1, 4, 11, 40]))
    def evaluate(self, value: float, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)
        if not self.is_armed and value <= 2:
            self.is_armed, self.history = True, []
        self.history.append(value >= 5)
        self.look(value, True)

    @rule(n=st.integers(1, 4))
    def label(self, n: int) -> None:
        self.labels += n
        self.look(9, False)

    @rule()
    def nothing_to_say(self) -> None:
        self.forget()
        assert self.machine.step("", Point(self.now, math.nan)) is None

    @precondition(lambda self: self.last)
    @rule(hours=st.integers(1, 100))
    def clock_is_set_back(self, hours: int) -> None:
        self.now -= timedelta(hours=hours)
        self.fired, self.last = [min(moment, self.now) for moment in self.fired], min(self.last, self.now)
        self.look(9, False)

    @rule()
    def restart(self) -> None:
        state = json.loads(json.dumps(self.machine.state()))
        self.machine = Machine(RULE)
        self.machine.restore(state)

    def forget(self) -> None:
        """What has left the budget's period does not come back when the clock is set back."""
        self.fired = [moment for moment in self.fired if self.now - moment < PER]

    def look(self, value: float, is_evaluation: bool) -> None:
        """Feed the machine, and compare with the definition."""
        self.forget()
        point = Point(self.now, value, is_evaluation, lambda: float(self.labels))
        outcome = self.machine.step("", point)
        is_confirmed = self.is_armed and self.history and self.history[-1] and sum(self.history[-3:]) >= 2
        is_cool = not self.last or self.now - self.last >= COOL
        expected = bool(is_confirmed and self.labels >= 3 and is_cool and len(self.fired) < 2)
        assert (outcome is not None and outcome.status == "fired") == expected
        if outcome and outcome.status == "held_back":
            assert is_confirmed, "only what would fire is held back"
        if expected:
            self.is_armed, self.history, self.labels = False, [], 0
            self.fired.append(self.now)
            self.last = self.now

    @invariant()
    def never_more_than_the_budget(self) -> None:
        assert len(self.fired) <= 2


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def feed(rule: Rule, values: list[float], minutes: float = 1, **more: Any) -> list[str]:
    machine = Machine(rule)
    found = [machine.step("", Point(START + timedelta(minutes=minutes * i), v, **more)) for i, v in enumerate(values)]
    return [outcome.status if outcome else "" for outcome in found]


def test_a_clock_set_back_a_year_costs_one_cool_down_and_no_more() -> None:
    machine = Machine(Rule("r", "alert", "above", 0, cool_down=timedelta(hours=1)))
    then = START - timedelta(days=365)
    moments = [START, then, then + timedelta(minutes=1), then + timedelta(minutes=62)]
    said = [machine.step("", Point(moment, value)) for moment, value in zip(moments, (1, 0, 1, 1), strict=True)]
    assert [outcome.status if outcome else "" for outcome in said] == ["fired", "", "held_back", "fired"]


def test_what_holds_back_is_told_once_an_episode() -> None:
    rule = Rule("r", "alert", "above", 0, cool_down=timedelta(hours=1))
    said = feed(rule, [1, 0, 1, 1, 0, 1, 1])
    assert said == ["fired", "", "held_back", "", "", "held_back", ""]


def test_the_budget_counts_what_actions_cost() -> None:
    rule = Rule("r", "retrain", "above", 0, budget=Budget(timedelta(days=1), seconds=100))
    assert feed(rule, [1, 0, 1, 0, 1], cost=lambda: (40.0, 0.0)) == ["fired", "", "fired", "", "held_back"]
    rule = Rule("r", "retrain", "above", 0, budget=Budget(timedelta(days=1), tokens=10))
    assert feed(rule, [1], cost=lambda: (0.0, 11.0)) == ["held_back"]


def test_the_budget_is_the_rule_s_and_the_cool_down_the_subject_s() -> None:
    machine = Machine(Rule("r", "alert", "above", 0, cool_down=COOL, budget=Budget(PER, firings=2)))
    said = [machine.step(who, Point(START, 1)) for who in ("ada", "ben", "cleo")]
    assert [outcome and outcome.status for outcome in said] == ["fired", "fired", "held_back"]


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0, 10), max_size=30), limit=st.floats(1, 9), gap=st.floats(0, 1))
def test_hysteresis_never_fires_twice_without_coming_back(values: list[float], limit: float, gap: float) -> None:
    for side, turned in (("at_least", values), ("at_most", [-v for v in values])):
        sign = 1 if side == "at_least" else -1
        rule = Rule("r", "alert", side, sign * limit, rearm=sign * (limit - gap))
        fired = [i for i, word in enumerate(feed(rule, turned)) if word == "fired"]
        for one, two in itertools.pairwise(fired):
            assert any(v <= limit - gap for v in values[one + 1 : two + 1])
