"""The sequential test keeps its promise whenever one stops; trials and stages keep theirs whoever writes."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import DeniedError, InputError, MissingError, StateError
from rlhf_workbench.core.schema import (
    Alert,
    Comparison,
    Consensus,
    Generation,
    Model,
    Prediction,
    Preference,
    Prompt,
    Record,
    Snapshot,
    Stage,
    Trial,
    TrialLook,
)
from rlhf_workbench.govern.stages import champion_stage, promote, roll_back
from rlhf_workbench.govern.trials import (
    Tally,
    TrialSettings,
    judge,
    log_e_value,
    look,
    open_trial,
    paired_outcomes,
    tally_outcomes,
    trial_power,
    win_rate_bounds,
)
from rlhf_workbench.store.tables import Store, connect


def test_false_promotions_with_a_look_after_every_comparison() -> None:
    """At the line itself each promotion is false; 250 trials of 150 looks each, α = 0.1: at most 0.1 + 3 standard errors."""
    settings_ = TrialSettings(alpha=0.1, min_effect=0.05, most=150)
    found = trial_power(0.55, settings_, seed=1, runs=250, looks_every=1)
    assert found["challenger"] <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 250)
    assert found["champion"] <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 250)


def test_power_is_there_where_it_matters() -> None:
    settings_ = TrialSettings(alpha=0.05, min_effect=0.02, most=400)
    assert trial_power(0.65, settings_, seed=2, runs=100, looks_every=4)["challenger"] >= 0.9
    assert trial_power(0.35, settings_, seed=2, runs=100, looks_every=4)["champion"] >= 0.9


def test_the_expectation_of_the_e_value_is_at_most_one() -> None:
    """Exactly: summed over all sequences of ten comparisons at the line, ties split or not."""
    for line in (0.5, 0.55):
        total = 0.0
        for wins in range(11):
            ways = float(np.prod(range(10 - wins + 1, 11)) / np.prod(range(1, wins + 1))) if wins else 1.0
            total += ways * line**wins * (1 - line) ** (10 - wins) * np.exp(log_e_value(Tally(wins, 10 - wins), line))
        assert total == pytest.approx(1.0, abs=1e-9)
    fair = np.exp(log_e_value(Tally(1, 0), 0.5)) / 4 + np.exp(log_e_value(Tally(0, 1), 0.5)) / 4
    assert fair + np.exp(log_e_value(Tally(0, 0, 1), 0.5)) / 2 == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(wins=st.integers(0, 200), losses=st.integers(0, 200))
def test_bounds_hold_the_rate_and_turn_with_the_sides(wins: int, losses: int) -> None:
    low, high = win_rate_bounds(Tally(wins, losses))
    back = win_rate_bounds(Tally(losses, wins))
    assert low == pytest.approx(1 - back[1])
    assert low <= (wins / (wins + losses) if wins + losses else 0.5) <= high
    verdict, _ = judge(Tally(wins, losses), TrialSettings(min_effect=0.0, most=10_000))
    assert (verdict == "challenger") == (low >= 0.5)


def test_ties_are_dropped_or_split() -> None:
    assert tally_outcomes([1, 0.5, 0, 1]) == Tally(2, 1)
    assert tally_outcomes([1, 0.5, 0, 1], "split") == Tally(2, 1, 1)
    with pytest.raises(InputError, match=r"0\.5"):
        tally_outcomes([0.7])


def world(store: Store, n: int = 40) -> tuple[Model, Model, list[Comparison]]:
    """Two reward models: the new one is right everywhere, the old one on every other pair; the new one learnt ten pairs."""
    snapshot = Snapshot(name="s", content_hash="", n_rows=10)
    old = Model(name="reward", kind="reward", content_hash="a")
    new = Model(name="reward", kind="reward", content_hash="b", snapshot_id=snapshot.id)
    rows: list[Record] = [snapshot, old, new]
    pairs = []
    for i in range(n):
        prompt = Prompt(text=f"{i}")
        one, two = (Generation(prompt_id=prompt.id, text=text) for text in ("yes", "no"))
        pair = Comparison(prompt_id=prompt.id, first_id=one.id, second_id=two.id)
        pairs.append(pair)
        label = "first" if i % 3 else "second"
        agreed = Consensus(comparison_id=pair.id, method="m", p_first=0.5, p_second=0.5, label=label, n_votes=1)
        said = 0.9 if label == "first" else 0.1
        rows += [prompt, one, two, pair, agreed, Prediction(model_id=new.id, comparison_id=pair.id, p_first=said)]
        rows.append(Prediction(model_id=old.id, comparison_id=pair.id, p_first=said if i % 2 else 1 - said))
        if i < 10:
            learnt = {"prompt": [], "chosen": "yes", "rejected": "no", "p_chosen": 0.9, "split": "train"}
            rows.append(Preference(snapshot_id=snapshot.id, comparison_id=pair.id, **learnt))
    store.append(rows)
    return old, new, pairs


def test_what_was_learnt_does_not_count() -> None:
    with connect(":memory:") as store:
        old, new, pairs = world(store)
        found = paired_outcomes(store, old.id, new.id)
        assert sorted(found["comparison_id"]) == sorted(pair.id for pair in pairs[10:])
        assert found["outcome"].tolist().count(1.0) == 15
        assert found["outcome"].tolist().count(0.5) == 15
        turned = paired_outcomes(store, new.id, old.id)
        assert (turned["outcome"] + found["outcome"] == 1).all()


def test_policies_are_compared_by_people() -> None:
    with connect(":memory:") as store:
        old, new = (Model(name="policy", kind="policy") for _ in range(2))
        rows: list[Record] = [old, new]
        for i, label in enumerate(["first", "second", "tie", "first"]):
            prompt = Prompt(text=f"{i}")
            models = (old.id, new.id) if i % 2 else (new.id, old.id)
            one, two = (Generation(prompt_id=prompt.id, text=m, model=m) for m in models)
            pair = Comparison(prompt_id=prompt.id, first_id=one.id, second_id=two.id)
            agreed = Consensus(comparison_id=pair.id, method="m", p_first=0.5, p_second=0.5, label=label, n_votes=1)  # type: ignore[arg-type]
            rows += [prompt, one, two, pair, agreed]
        store.append(rows)
        assert paired_outcomes(store, old.id, new.id)["outcome"].tolist() == [1.0, 1.0, 0.5, 0.0]


def test_a_verdict_stays_and_a_look_at_the_same_is_not_written_twice() -> None:
    with connect(":memory:") as store:
        old, new, pairs = world(store)
        trial = open_trial(store, old.id, new.id, TrialSettings(min_effect=0.0))
        first = look(store, trial.id)
        assert (first.n, first.wins, first.verdict) == (15, 15.0, "challenger")
        turned = [Prediction(model_id=new.id, comparison_id=pair.id, p_first=0.5) for pair in pairs]
        store.append(turned)
        assert look(store, trial.id).id == first.id
        assert len(store.records(TrialLook)) == 1


def test_many_threads_crown_one() -> None:
    with connect(":memory:") as store:
        models = [Model(name="reward", kind="reward", content_hash=str(i)) for i in range(8)]
        store.append(models)

        def crown(model: Model) -> None:
            promote(store, model.id, reason="now", needs_approval=False, needs_trial=False)

        threads = [threading.Thread(target=crown, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        present = {stage.model_id: stage.stage for stage in store.records(Stage)}
        assert list(present.values()).count("champion") == 1
        last = champion_stage(store, "reward", "reward")
        assert last
        back = [roll_back(store, "reward", "reward", reason="bad", of=last.model_id).id for _ in range(3)]
        assert len(set(back)) == 1, "a rollback that was done is found, not done again"
        assert len(store.records(Alert)) == 1


def test_rollbacks_go_back_and_never_to_and_fro() -> None:
    with connect(":memory:") as store:
        models = [Model(name="reward", kind="reward", content_hash=str(i)) for i in range(3)]
        store.append(models)
        for model in models:
            promote(store, model.id, reason="newer", needs_approval=False, needs_trial=False)
        assert roll_back(store, "reward", "reward", reason="bad").model_id == models[1].id
        assert roll_back(store, "reward", "reward", reason="bad too").model_id == models[0].id
        with pytest.raises(StateError, match="first champion"):
            roll_back(store, "reward", "reward", reason="and now")
        audit = store.sql("SELECT reason FROM stage WHERE stage = 'retired' ORDER BY id")["reason"].tolist()
        assert audit[-2:] == ["rolled back: bad", "rolled back: bad too"]
        assert store.verify().is_intact


def test_a_promotion_needs_the_trial_against_the_present_champion() -> None:
    with connect(":memory:") as store:
        old, new, _ = world(store)
        third = Model(name="reward", kind="reward", content_hash="c")
        store.append(third)
        promote(store, old.id, reason="first", needs_approval=False)
        lost = Trial(champion_id=old.id, challenger_id=third.id, settings={})
        won = open_trial(store, old.id, new.id, TrialSettings(min_effect=0.0))
        store.append(lost)
        look(store, won.id)
        with pytest.raises(MissingError, match="verdict is continue"):
            promote(store, third.id, reason="x", needs_approval=False, trial_id=lost.id)
        with pytest.raises(InputError, match="is about"):
            promote(store, third.id, reason="x", needs_approval=False, trial_id=won.id)
        promote(store, new.id, reason="won", needs_approval=False, trial_id=won.id)
        store.append(TrialLook(trial_id=lost.id, n=50, wins=45, e_value=1e6, verdict="challenger"))
        with pytest.raises(StateError, match="is the champion now"):
            promote(store, third.id, reason="x", needs_approval=False, trial_id=lost.id)

        def objecting(store: Store, model_id: str) -> None:
            raise StateError("nobody can tell about `dates`")

        with pytest.raises(DeniedError, match="nobody can tell"):
            promote(store, third.id, reason="x", needs_approval=False, needs_trial=False, gates=[objecting])
