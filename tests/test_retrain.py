"""The retraining job, as a rule and as a person start it: refused without approval, idempotent, and it crowns nobody."""

from pathlib import Path

import pytest

from rlhf_workbench.collect.queue import add_items
from rlhf_workbench.core.errors import DeniedError
from rlhf_workbench.core.schema import (
    Annotation,
    Comparison,
    DriftEvent,
    Firing,
    Generation,
    Job,
    Model,
    Prediction,
    Prompt,
    Proposal,
    Record,
    Run,
    Snapshot,
    Stage,
    Trial,
)
from rlhf_workbench.govern.actions import start_approved
from rlhf_workbench.govern.approval import decide
from rlhf_workbench.govern.retraining import retrain_order
from rlhf_workbench.govern.rule_files import parse_rules
from rlhf_workbench.govern.stages import promote, propose_promotion
from rlhf_workbench.govern.watching import look_once
from rlhf_workbench.serve.jobs import find_job, run_job
from rlhf_workbench.store.tables import Store, connect

pytestmark = pytest.mark.slow
RULES = """
rules:
  - name: drifted
    watch: drift_events
    at_least: 1
    do: retrain
    with: {queue: q, needs_approval: NEEDS, params: {model: tiny, method: frozen, max_length: 32}}
"""


def fill(store: Store, n: int = 90, queue: str = "q") -> None:
    """Comparisons of a long and a short answer; three people prefer the long one, now and then not."""
    rows: list[Record] = []
    votes: list[Record] = []
    for i in range(n):
        prompt = Prompt(text=f"What is {i}?", topic="sums" if i % 2 else "words")
        long, short = (
            Generation(prompt_id=prompt.id, text=f"It is {i} " * 6),
            Generation(prompt_id=prompt.id, text=str(i)),
        )
        pair = Comparison(
            prompt_id=prompt.id, first_id=(long if i % 3 else short).id, second_id=(short if i % 3 else long).id
        )
        rows += [prompt, long, short, pair]
        for who in range(3):
            is_first = bool(i % 3) != ((i + who) % 11 == 0)
            label = "first" if is_first else "second"
            votes.append(Annotation(comparison_id=pair.id, annotator_id=f"a{who}", label=label, queue=queue))
    store.append(rows)
    add_items(store, queue, [row.id for row in rows if isinstance(row, Comparison)], overlap=3)
    store.append(votes)


def ask(store: Store, needs_approval: str = "true") -> Firing:
    """A confirmed drift, and the firing of the rule."""
    store.append(DriftEvent(stream="eve", detector="DDM", index=1, is_confirmed=True))
    (firing,) = look_once(store, parse_rules(RULES.replace("NEEDS", needs_approval)))
    return firing


def test_without_approval_where_the_rule_says_so(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        fill(store, 12)
        firing = ask(store, "false")
        (job,) = store.records(Job)
        assert job.params == {"firing_id": firing.id}
        plan, params = retrain_order(store, **job.params)
        assert (plan.labels, params["method"]) == (36, "frozen")


def test_from_drift_to_a_champion_with_people_in_between(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        fill(store)
        champion = Model(name="reward", kind="reward", content_hash="old")
        store.append(champion)
        promote(store, champion.id, reason="the first", needs_approval=False)
        firing = ask(store)
        (proposal,) = store.records(Proposal)
        assert firing.result["proposal_id"] == proposal.id
        assert start_approved(store) == []
        with pytest.raises(DeniedError, match="demands an approval"):
            retrain_order(store, firing_id=firing.id)
        with pytest.raises(DeniedError, match="is waiting"):
            retrain_order(store, proposal_id=proposal.id)
        decide(store, proposal.id, "approved", reason="fine", actor="ben")
        pairs = [pair.id for pair in store.records(Comparison)]
        store.append(Annotation(comparison_id=pairs[0], annotator_id="late", label="first", queue="q"))
        (job,) = start_approved(store)
        assert start_approved(store) == [], "one job a proposal"
        assert (job.notebook, job.params) == ("retrain", {"proposal_id": proposal.id})
        # the old champion has no weights here: what it would say is given
        store.append([Prediction(model_id=champion.id, comparison_id=c, p_first=0.4) for c in pairs])
    run_job(find_job("retrain"), {"store_path": str(path), **job.params}, out=tmp_path / "runs")
    with connect(path) as store:
        assert store.records(Snapshot)[0].n_rows == 90
        (consensus,) = store.records(Run, kind="build_consensus")
        assert consensus.params["upto"] == proposal.params["upto"], "the late label was not approved"
        (trial,) = store.records(Trial)
        made = store.get(Model, trial.challenger_id)
        assert (trial.champion_id, made.config["max_length"]) == (champion.id, 32)
        stages = {stage.model_id: stage.stage for stage in store.records(Stage)}
        assert stages == {champion.id: "champion", made.id: "challenger"}, "it crowns nobody"
        _promote_these_weights_only(store, made)


def _promote_these_weights_only(store: Store, made: Model) -> None:
    asked = propose_promotion(store, made.id, "it was trained on what is known now")
    decide(store, asked.id, "approved", reason="good", actor="ada")
    approved = {"reason": "approved", "proposal_id": asked.id, "needs_trial": False}
    weights = next(p for p in (store.files("models") / made.path).rglob("*") if p.is_file())
    kept = weights.read_bytes()
    weights.write_bytes(kept + b" ")
    with pytest.raises(DeniedError, match="are not those that were approved"):
        promote(store, made.id, **approved)
    weights.write_bytes(kept)
    assert promote(store, made.id, **approved).stage == "champion"
