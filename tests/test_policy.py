"""A policy moves towards the preferred answers, and says from where to where."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from polite import add_polite

pytest.importorskip("trl", reason="needs rlhf_workbench[train]")

from rlhf_workbench.collect.models import tiny_model
from rlhf_workbench.commands.chart import chart
from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.messages import question
from rlhf_workbench.core.schema import Comparison, Model, Observation
from rlhf_workbench.monitor.chart_quantities import quantity_values
from rlhf_workbench.store.registry import folder_hash, model_folder, run_once
from rlhf_workbench.store.tables import Store, connect
from rlhf_workbench.train.data import decided_rows, read_snapshot, token_ids
from rlhf_workbench.train.preference import Policy, fit_dpo, implicit_margins, load_policy, train_policy
from rlhf_workbench.train.reward import train_reward

pytestmark = pytest.mark.timeout(120)
QUICK: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-3, "batch_size": 8, "n_prompts": 3, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny_model())


@pytest.fixture(scope="module")
def toy() -> pd.DataFrame:
    with connect(":memory:") as store:
        return read_snapshot(store, add_polite(store))


@pytest.fixture(scope="module")
def policy(base: str, toy: pd.DataFrame) -> Policy:
    how: dict[str, Any] = {"epochs": 3, "max_steps": None, "batch_size": 8, "learning_rate": 5e-3}
    return fit_dpo(decided_rows(toy, "train"), base, seed=0, **how)[0]


def train(store: Store, base: str, **params: Any) -> tuple[dict[str, Any], Model]:
    snapshot = params.pop("snapshot_id", None) or add_polite(store)
    figures = run_once(store, train_policy, seed=3, snapshot_id=snapshot, base=base, **QUICK | params).figures
    return figures, store.get(Model, figures["model_id"])


def test_the_margin_grows_on_pairs_that_were_not_trained_on(base: str, tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        snapshot = add_polite(store)
        reward = {"method": "frozen", "snapshot_id": snapshot, "base": base}
        judge = run_once(store, train_reward, seed=3, **reward)["model_id"]
        figures, model = train(store, base, snapshot_id=snapshot, reward_model_id=judge)
        assert next(iter(figures)) == "margin"
        low, high = figures["margin_interval"]
        assert figures["margin_before"] == 0 < low < figures["margin"] < high
        assert figures["margin_positive"] >= 0.9
        assert figures["margin"] == pytest.approx(0.1 * (figures["chosen_change"] - figures["rejected_change"]))
        assert figures["loss_last"] < figures["loss_first"] <= np.log(2) + 0.02
        assert figures["train_accuracy"] >= 0.9
        assert (figures["pairs_trained"], figures["pairs_tested"], figures["prompts_tested"]) == (48, 16, 3)
        assert all(example.keys() == {"prompt", "before", "after"} for example in figures["examples"])
        assert len(figures["examples"]) == 2
        assert np.isfinite([figures["reward_before"], figures["reward_after"]]).all()
        assert [store.get(Model, m).kind for m in model.parents] == ["base"]
        assert model.config["judge"] == judge
        assert folder_hash(model_folder(store, model)) == model.content_hash
        check_chart_of_kl(store, figures, path)


def test_the_same_seed_gives_the_same_figures(base: str) -> None:
    found = []
    for _ in range(2):
        with connect(":memory:") as store:
            figures, _ = train(store, base, max_pairs=24)
            found.append(json.dumps({k: v for k, v in figures.items() if k != "model_id"}))
    assert found[0] == found[1]


def test_a_kept_policy_says_the_same(base: str) -> None:
    with connect(":memory:") as store:
        figures, model = train(store, base)
        kept = load_policy(model_folder(store, model))
        for example in figures["examples"]:
            asked = [question(example["prompt"])]
            assert kept.answer(asked, max_new_tokens=6) == [example["after"]]
            assert kept.answer(asked, max_new_tokens=6, with_adapter=False) == [example["before"]]


def test_log_probabilities_are_those_of_the_model(policy: Policy, base: str, toy: pd.DataFrame) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    items = [(p, text) for p, text in zip(toy["prompt"][:5], toy["rejected"][:5], strict=True)]
    plain, expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), []
    for item in items:
        ids, n_prompt = token_ids(policy.tokenizer, *item, 256)
        with torch.no_grad():
            logs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logs[i - 1, ids[i]]) for i in range(n_prompt, len(ids))))
    assert policy.log_probabilities(items, with_adapter=False) == pytest.approx(expected, abs=1e-3)
    assert np.abs(policy.log_probabilities(items) - expected).max() > 0.1, "the adapter makes a difference"


def test_the_divergence_is_that_of_all_next_tokens(policy: Policy, toy: pd.DataFrame) -> None:
    import torch

    items = [(p, text) for p, text in zip(toy["prompt"][:4], toy["rejected"][:4], strict=True)]
    found = policy.compare(items)
    for column, is_on in ((0, True), (1, False)):
        assert found[:, column] == pytest.approx(policy.log_probabilities(items, with_adapter=is_on), abs=1e-3)
    for item, kl in zip(items, found[:, 2], strict=True):
        ids, n_prompt = token_ids(policy.tokenizer, *item, 256)
        with torch.no_grad():
            new = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            with policy.model.disable_adapter():
                old = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = (new.exp() * (new - old)).sum(-1)[n_prompt - 1 : len(ids) - 1]
        assert kl == pytest.approx(float(each.mean()), rel=1e-3)
        assert kl > 0.01


def check_chart_of_kl(store: Store, figures: dict[str, Any], path: Path) -> None:
    """What `rlhfw chart` shows of a policy that was just trained."""
    seen = store.records(Observation, stream="kl")
    assert {o.model_id for o in seen} == {figures["model_id"]}
    assert len(seen) == 2 * figures["pairs_tested"]
    assert {o.comparison_id for o in seen} <= {c.id for c in store.records(Comparison)}
    assert np.mean([o.value for o in seen]) == pytest.approx(figures["kl"])
    store.close()
    done = CliRunner().invoke(chart, ["kl", "--store", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["name"] == "kl"
    with connect(path, read_only=True) as again:
        assert len(quantity_values(again, "kl", figures["model_id"])) == len(seen)


def test_answers_do_not_depend_on_their_neighbours(policy: Policy, toy: pd.DataFrame) -> None:
    prompts = [question("Hi."), *toy["prompt"][:18]]
    together = policy.answer(prompts, max_new_tokens=5)
    assert len(together) == 19
    assert policy.answer(prompts[:1], max_new_tokens=5) == together[:1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_can_keep_the_order_of_rows(base: str, toy: pd.DataFrame, shuffle: bool) -> None:
    how: dict[str, Any] = {"epochs": 1, "max_steps": None, "batch_size": 8, "learning_rate": 5e-3, "shuffle": shuffle}
    rows = decided_rows(toy, "train")
    swapped = rows.iloc[np.arange(48).reshape(6, 8)[:, ::-1].ravel()]  # the same rows in each batch of eight
    first, second = (np.array(fit_dpo(part, base, seed=0, **how)[1]["losses"]) for part in (rows, swapped))
    assert (np.abs(first - second).max() < 2e-4) != shuffle


def test_pairs_without_room_are_left_out_and_said(base: str, toy: pd.DataFrame) -> None:
    how: dict[str, Any] = {"epochs": 1, "max_steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    long = toy[:4].assign(prompt=[question("word " * 300)] * 4)
    _, figures = fit_dpo(pd.concat([toy[:8], long]), base, seed=0, max_length=100, **how)
    assert figures["pairs_trained"] == 8
    with pytest.raises(InputError, match="none of 4 prompts is shorter than max_length = 100"):
        fit_dpo(long, base, seed=0, max_length=100, **how)


def test_it_is_quiet_off_a_terminal(base: str, capfd: pytest.CaptureFixture[str]) -> None:
    with connect(":memory:") as store:
        train(store, base)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"beta": 0.0}, InputError, "beta must be above 0"),
        ({"base": "/no/such/model"}, MissingError, "cannot load /no/such/model"),
        ({"reward_model_id": "nothing"}, MissingError, "there is no model nothing"),
        ({"batch_size": 0}, InputError, "batch_size must be above 0"),
    ],
)
def test_what_cannot_be_done_is_said(base: str, change: dict[str, Any], error: type[Exception], words: str) -> None:
    with connect(":memory:") as store:
        params = QUICK | {"snapshot_id": add_polite(store), "base": base} | change
        with pytest.raises(error, match=words):
            train_policy(store, run_id="r", seed=0, **params)
        assert store.records(Model) == []
        assert list(store.files("models").iterdir()) == []


def test_only_a_reward_model_may_judge(base: str) -> None:
    with connect(":memory:") as store:
        store.append(made := Model(name="b", kind="base"))
        with pytest.raises(InputError, match="is a base model; name a reward model"):
            train(store, base, reward_model_id=made.id)


def test_margins_are_differences_of_gains() -> None:
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 7, 2))
    margins = implicit_margins(policy, reference, beta=0.3)
    gains = 0.3 * (policy - reference)
    assert margins == pytest.approx(gains[:, 0] - gains[:, 1])
    assert implicit_margins(policy[:, ::-1], reference[:, ::-1], 0.3) == pytest.approx(-margins)
