"""Reward models learn, say what they cost and what they beat, and leave nothing half done."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from polite import add_polite

pytest.importorskip("trl", reason="needs rlhf_workbench[train]")
from scipy.stats import binomtest

from rlhf_workbench.collect.models import tiny_model
from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.messages import question
from rlhf_workbench.core.schema import Comparison, Generation, Model, Prediction, Preference, RunEnd
from rlhf_workbench.store.registry import folder_hash, model_folder, run_once
from rlhf_workbench.store.tables import Store, connect
from rlhf_workbench.train.adapters import write_model
from rlhf_workbench.train.baselines import (
    baseline_accuracies,
    fit_bradley_terry,
    length_differences,
    pairwise_accuracy,
    wilson_interval,
)
from rlhf_workbench.train.data import decided_rows, preference_dataset, read_snapshot, token_ids
from rlhf_workbench.train.frozen import length_batches
from rlhf_workbench.train.reward import LoraReward, load_reward, load_scorer, score_answers, train_reward

pytestmark = pytest.mark.timeout(120)
DATA = Path(__file__).parents[2] / "shared" / "data" / "preferences"
QUICK = {"lora": {"epochs": 4, "learning_rate": 5e-3}, "frozen": {"method": "frozen"}}


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny_model())


@pytest.fixture(params=["lora", "frozen"])
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    return QUICK[request.param]


def train(store: Store, base: str, **params: Any) -> tuple[dict[str, Any], Model]:
    """Train on a new polite snapshot."""
    sizes = {k: params.pop(k) for k in list(params) if k.startswith("n_")}
    snapshot = add_polite(store, **sizes)
    figures = run_once(store, train_reward, seed=3, snapshot_id=snapshot, base=base, **params).figures
    return figures, store.get(Model, figures["model_id"])


def test_it_learns_and_predicts_in_the_comparisons_own_order(base: str, how: dict[str, Any]) -> None:
    with connect(":memory:") as store:
        figures, model = train(store, base, **how)
        assert figures["accuracy"] >= 0.9 > figures["longer_accuracy"]
        assert next(iter(figures)) == "accuracy"
        assert figures["accuracy_interval"][0] < figures["accuracy"] <= figures["accuracy_interval"][1]
        assert figures["train_accuracy"] >= 0.9
        predicted = store.frame(Prediction, model_id=model.id).set_index("comparison_id")
        assert predicted["split"].value_counts().to_dict() == {"test": 16, "calibration": 8}
        pairs = store.frame(Comparison).set_index("id").loc[predicted.index]
        texts = store.frame(Generation).set_index("id")["text"]
        chosen = store.frame(Preference).set_index("comparison_id")["chosen"]
        first_is_better = pairs["first_id"].map(texts) == chosen.loc[predicted.index]
        assert 0 < first_is_better.mean() < 1
        assert ((predicted["p_first"] > 0.5) == first_is_better).mean() >= 0.9


def test_the_model_is_kept_whole_with_its_parents(base: str, how: dict[str, Any]) -> None:
    with connect(":memory:") as store:
        figures, model = train(store, base, **how)
        folder = model_folder(store, model)
        assert folder_hash(folder) == model.content_hash
        (parent,) = [store.get(Model, m) for m in model.parents]
        assert (parent.kind, parent.content_hash) == ("base", folder_hash(base))
        assert model.figures == {k: v for k, v in figures.items() if k != "model_id"} | {
            "input_tokens": model.figures["input_tokens"]
        }
        assert json.dumps(model.config)
        row = read_snapshot(store, str(model.snapshot_id)).iloc[-1]
        scores = score_answers(store, model.id, [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])])
        last = store.frame(Prediction, model_id=model.id)["p_first"].iloc[-1]
        assert 1 / (1 + np.exp(-abs(scores[0] - scores[1]))) == pytest.approx(max(last, 1 - last), abs=1e-4)


def test_the_same_seed_gives_the_same_figures(base: str, how: dict[str, Any]) -> None:
    found = []
    for _ in range(2):
        with connect(":memory:") as store:
            figures, model = train(store, base, max_pairs=30, **how)
            probabilities = store.frame(Prediction, model_id=model.id)["p_first"].tolist()
            found.append((json.dumps({k: v for k, v in figures.items() if k != "model_id"}), probabilities))
    assert found[0] == found[1]


def test_a_base_is_recorded_once(base: str) -> None:
    with connect(":memory:") as store:
        for seed in (0, 1):
            train(store, base, method="frozen", name=f"reward {seed}")
        assert [m.kind for m in store.records(Model)].count("base") == 1


def test_ties_are_left_out_and_counted(base: str) -> None:
    with connect(":memory:") as store:
        figures, model = train(store, base, method="frozen", n_test=12, n_ties=5)
        assert (figures["pairs_tested"], figures["ties_left_out"]) == (12, 5)
        assert len(store.records(Prediction, model_id=model.id, split="test")) == 17, "a tie is predicted all the same"


def test_long_pairs_are_cut_and_not_dropped(base: str, how: dict[str, Any]) -> None:
    with connect(":memory:") as store:
        figures, _ = train(store, base, max_length=20, **how)
        assert figures["pairs_trained"] == 48
        if how.get("method") != "frozen":
            assert figures["steps"] == 4 * 48 / 8


def test_number_formats_may_follow_each_other(base: str) -> None:
    with connect(":memory:") as store:
        for dtype in ("bfloat16", "float32", "bfloat16"):
            figures, model = train(store, base, dtype=dtype, **QUICK["lora"])
            assert figures["accuracy"] >= 0.9
            settings = json.loads((model_folder(store, model) / "reward.json").read_text())["settings"]
            assert settings["dtype"] == dtype


def test_it_is_quiet_off_a_terminal(base: str, how: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with connect(":memory:") as store:
        train(store, base, **how)
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_training_leaves_nothing(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import RewardTrainer

    step, steps = RewardTrainer.training_step, iter(range(1_000_000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 5:  # in the middle, however long the libraries took to load
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    with connect(":memory:") as store:
        snapshot = add_polite(store)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(RewardTrainer, "training_step", interrupted)
            run_once(store, train_reward, seed=0, snapshot_id=snapshot, base=base, epochs=50)
        assert list(store.files("models").iterdir()) == []
        assert store.records(Model) == []
        assert [end.status for end in store.records(RunEnd)] == ["failed"]
        run_once(store, train_reward, seed=0, snapshot_id=snapshot, base=base, epochs=1)
        assert len(list(store.files("models").iterdir())) == 1


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        left = store.files("models") / ".0199.1.part"
        left.mkdir()
        write_model(store, Model(name="m", kind="reward"), lambda folder: (folder / "w").write_text("w"))
        assert not left.exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "magic"}, InputError, "method must be one of lora, frozen"),
        ({"base": "/no/such/model"}, MissingError, "cannot load /no/such/model"),
        ({"snapshot_id": "nothing"}, MissingError, "there is no snapshot nothing"),
        ({"max_pairs": 0}, InputError, "at least 1, got 0"),
        ({"learning_rate": 0.0}, InputError, "learning_rate must be above 0"),
        ({"rank": 0}, InputError, "rank must be at least 1"),
        ({"dtype": "int3"}, InputError, "auto, bfloat16, float32"),
        ({"margin": -1.0}, InputError, "margin must be at least 0"),
    ],
)
def test_what_cannot_be_done_is_said(base: str, change: dict[str, Any], error: type[Exception], words: str) -> None:
    with connect(":memory:") as store:
        params = {"snapshot_id": add_polite(store, 8, 2, 4), "base": base} | change
        with pytest.raises(error, match=words):
            train_reward(store, run_id="r", seed=0, **params)
        assert store.records(Model) == []


@pytest.mark.parametrize("missing", ["n_train", "n_test"])
def test_a_split_without_rows_is_said_before_training(base: str, missing: str) -> None:
    with connect(":memory:") as store, pytest.raises(InputError, match=f"no decided {missing[2:]} rows"):
        train(store, base, **{missing: 0})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no reward\.json"):
        load_reward(tmp_path)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (8, 10), (19, 24), (1316, 1316), (500, 1000)])
def test_wilson_agrees_with_scipy(right: int, n: int) -> None:
    theirs = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / n, n, z=1.959963985) == pytest.approx((theirs.low, theirs.high), abs=1e-8)


def test_soft_labels_are_fitted_as_they_are() -> None:
    rng = np.random.default_rng(0)
    w, x = np.array([1.0, -2.0]), rng.normal(size=(500, 2))
    assert fit_bradley_terry(x, 1 / (1 + np.exp(-x @ w)), strength=1e6) == pytest.approx(w, abs=1e-2)


def test_margins_grow_with_agreement() -> None:
    rows = pd.DataFrame({"prompt": [question("?")] * 3, "chosen": list("abc"), "rejected": list("xyz")})
    rows["p_chosen"] = [0.5, 0.75, 1.0]
    assert preference_dataset(rows, margin=2.0)["margin"] == [0.0, 1.0, 2.0]
    assert "margin" not in preference_dataset(rows).column_names


def test_the_answer_survives_a_long_prompt() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    prompt, reply = question("a long question " * 50), "a long answer " * 50
    for max_length in (2, 9, 64):
        ids, n_prompt = token_ids(tokenizer, prompt, reply, max_length)
        assert len(ids) == max_length
        assert len(ids) - n_prompt >= 1
        assert ids[-1] == tokenizer.eos_token_id, "the closing token stays"
        assert n_prompt >= max_length // 2 - 1
    ids, n_prompt = token_ids(tokenizer, question("hi"), "there", 1000)
    whole = tokenizer.apply_chat_template([*question("hi"), {"role": "assistant", "content": "there"}])["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(whole).rstrip()
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[n_prompt:]).startswith("there")


def test_the_reward_is_read_at_the_closing_token_also_where_it_pads(base: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token  # as SmolLM2 has it
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(base, pad_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path)
    model, tokenizer = load_scorer(str(tmp_path))
    assert tokenizer.pad_token != tokenizer.eos_token
    rows = [token_ids(tokenizer, question("hi"), text, 99)[0] for text in ("there", "a longer answer, this time")]
    with torch.no_grad():
        states = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
        expected = [float(model.score(state)) for state in states]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in rows)
    settings = {"max_length": 99, "dtype": "float32"}
    items = [(question("hi"), text) for text in ("there", "a longer answer, this time")]
    found = LoraReward(str(tmp_path), model, tokenizer, settings).score(items)
    assert found == pytest.approx(expected, abs=1e-5)


def test_batches_hold_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    batches = length_batches(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert max(len(batch) * max(lengths[i] for i in batch) for batch in batches) <= 1000


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_baselines_on_real_arguments() -> None:
    rows = pd.read_parquet(DATA / "ukpconvarg1_strict.parquet")
    assert pairwise_accuracy(length_differences(rows)) == pytest.approx(0.772, abs=0.001), "over all 32 debates"
    rows = rows.assign(p_chosen=1.0)
    found = baseline_accuracies(decided_rows(rows, "train"), decided_rows(rows, "test"))
    assert found["tfidf_accuracy"] == pytest.approx(0.829, abs=0.005)
    assert found["longer_accuracy"] == pytest.approx(0.812, abs=0.001), "over the two test debates"
