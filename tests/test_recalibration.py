"""Recalibration: every method keeps what it promises, the choice does no harm in cross-validation, bad files are named in one line."""

import gzip
import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.cli import main
from rlhf_workbench.core.contracts import check_plugin
from rlhf_workbench.core.errors import InputError
from rlhf_workbench.monitor import prediction_files
from rlhf_workbench.monitor.binary_calibration import BinaryMethod, apply_binary, fit_binary
from rlhf_workbench.monitor.calibration import (
    debiased_ece,
    debiased_rms,
    ece,
    nll,
    pair_probabilities,
    reliability_diagram,
    reliability_table,
)
from rlhf_workbench.monitor.calibration_intervals import distance_interval, ece_interval, mce_interval
from rlhf_workbench.monitor.choice import choose_method, cross_validate, learn_calibration, recalibrate
from rlhf_workbench.monitor.recalibration import Method, apply_calibration, fit_calibration, reductions
from rlhf_workbench.serve.components import PairCalibration

settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")

DATA = Path(__file__).parent.parent.parent / "shared/data/calibration"
FILES = ("cifar10_lenet5", "cifar100_wideresnet16x4_first5000")
rows = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=4, max_size=60)
Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def too_sure(n: int, k: int, sharpness: float, seed: int) -> Arrays:
    """Rows of a model whose logits are `sharpness` times what they should be."""
    rng = np.random.default_rng(seed)
    truth = np.maximum(rng.dirichlet(np.full(k, 0.7), size=n), 1e-9)
    labels = np.minimum((truth.cumsum(axis=1) < rng.uniform(size=(n, 1))).sum(axis=1), k - 1)
    said = truth**sharpness
    return said / said.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("method", get_args(BinaryMethod))
@given(rows)
def test_pairs_are_symmetric(method: BinaryMethod, rows: list[tuple[float, bool]]) -> None:
    p, better = np.array([p for p, _ in rows]), np.array([float(b) for _, b in rows])
    learnt = json.loads(json.dumps(fit_binary(p, better, method, symmetric=True)))
    grid = np.concatenate([p, np.linspace(0, 1, 41)])
    found = apply_binary(grid, learnt)
    assert ((found >= 0) & (found <= 1)).all()
    assert found + apply_binary(1 - grid, learnt) == pytest.approx(1, abs=1e-9)
    assert apply_binary([0.5], learnt)[0] == 0.5


@pytest.mark.parametrize("method", get_args(BinaryMethod))
@given(rows, st.randoms(use_true_random=False))
def test_each_pair_may_be_exchanged_by_itself(
    method: BinaryMethod, rows: list[tuple[float, bool]], random: Any
) -> None:
    rows = [(round(p, 3), b) for p, b in rows]  # 1 - (1 - p) is p but for the last bit, which may divide level rows
    other = [(1 - p, not b) if random.random() < 0.5 else (p, b) for p, b in rows]
    grid = np.linspace(0.013, 0.987, 40)
    one, two = (
        apply_binary(grid, fit_binary([p for p, _ in part], [float(b) for _, b in part], method, symmetric=True))
        for part in (rows, other)
    )
    assert one == pytest.approx(two, abs=2e-3)


@pytest.mark.parametrize("method", get_args(BinaryMethod))
def test_plugins_keep_their_contract(method: BinaryMethod) -> None:
    check_plugin(PairCalibration(method))


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("k", [2, 3, 12])
def test_every_method_gives_probabilities_and_mends(method: Method, k: int) -> None:
    probs, labels = too_sure(3000, k, 1.8, seed=k)
    for way in reductions(method, 1500, k):
        learnt = json.loads(json.dumps(fit_calibration(probs[::2], labels[::2], method, reduction=way)))
        found = apply_calibration(probs[1::2], learnt)
        assert found.sum(axis=1) == pytest.approx(1)
        assert (found >= 0).all()
        if method == "none":
            assert (found == probs[1::2]).all()
        else:
            assert ece(found, labels[1::2]) < 0.6 * ece(probs[1::2], labels[1::2])
        if way == "top class" or method == "temperature":
            assert (found.argmax(axis=1) == probs[1::2].argmax(axis=1)).all()


def test_a_class_that_never_happened_and_certain_rows() -> None:
    probs, labels = too_sure(400, 4, 1.5, seed=0)
    labels = np.where(labels == 3, 0, labels)
    probs[:20], labels[:20] = np.eye(4)[0], 1
    for method in get_args(Method):
        for way in reductions(method, 400, 4):
            found = apply_calibration(probs, fit_calibration(probs, labels, method, reduction=way))
            assert np.isfinite(found).all()
            assert found.sum(axis=1) == pytest.approx(1)


def test_vector_scaling_sees_a_bias_that_a_temperature_cannot() -> None:
    probs, labels = too_sure(4000, 5, 1.0, seed=1)
    shifted = probs * np.array([3.0, 1, 1, 1, 1])
    shifted /= shifted.sum(axis=1, keepdims=True)
    vector = fit_calibration(shifted[::2], labels[::2], "vector")
    constants = np.array(vector["constants"]) - np.mean(vector["constants"][1:])
    assert constants[0] == pytest.approx(-np.log(3), abs=0.2)
    by = {
        m: nll(apply_calibration(shifted[1::2], fit_calibration(shifted[::2], labels[::2], m)), labels[1::2])
        for m in ("vector", "temperature")
    }
    assert by["vector"] < by["temperature"] - 0.05


@pytest.mark.parametrize("k", [2, 4])
def test_the_choice_does_no_harm_to_a_calibrated_model(k: int) -> None:
    worse = 0
    for seed in range(12):
        probs, labels = too_sure(800, k, 1.0, seed=seed)
        learnt = learn_calibration(probs[:400], labels[:400])
        worse += nll(apply_calibration(probs[400:], learnt), labels[400:]) > nll(probs[400:], labels[400:])
    assert worse <= 1


@settings(max_examples=15)
@given(
    n=st.integers(20, 120),
    k=st.sampled_from([2, 3]),
    sharpness=st.floats(0.3, 4),
    least=st.floats(0, 5),
    seed=st.integers(0, 10_000),
)
def test_what_is_chosen_is_never_worse_than_nothing_in_cross_validation(
    n: int, k: int, sharpness: float, least: float, seed: int
) -> None:
    """This much is certain; of rows that nobody has seen nothing is."""
    probs, labels = too_sure(n, k, sharpness, seed)
    judged = cross_validate(probs, labels, pairs=k == 2, seed=seed)
    method, way = choose_method(judged, least=least)
    losses = {(row.method, row.reduction): row.nll for row in judged.itertuples()}
    assert losses[method, way] <= losses["none", None]
    assert method == "none" or losses[method, way] == min(losses.values())


def test_the_choice_is_the_best_by_cross_validation_and_looks_at_nothing_else() -> None:
    probs, labels = too_sure(1000, 3, 2.0, seed=0)
    judged = cross_validate(probs, labels)
    assert judged["nll"].is_monotonic_increasing
    assert choose_method(judged)[0] == judged.loc[0, "method"] != "none"
    facts = recalibrate(probs, labels)
    changed = labels.copy()
    changed[1::2] = (changed[1::2] + 1) % 3  # only rows that are reported on
    other = recalibrate(probs, changed)
    assert other["parameters"] == facts["parameters"]
    assert other["nll"] != facts["nll"]


def test_published_networks_are_mended_on_rows_that_nobody_saw() -> None:
    """The aims of the issue: 0.02 and 0.04 after, and a mean reduction of at least 60 %."""
    if not DATA.is_dir():
        pytest.skip(f"needs the shared data at {DATA}")
    reductions, after = [], []
    for name in FILES:
        with np.load(DATA / f"{name}.npz") as file:
            facts = recalibrate(file["probs"], file["labels"], "auto", "even")
        assert facts["nll_after"] < facts["nll"]
        assert facts["brier_after"] < facts["brier"]
        reductions.append(1 - facts["ece_after"] / facts["ece"])
        after.append(facts["ece_after"])
    assert after[0] <= 0.02
    assert after[1] <= 0.04
    assert np.mean(reductions) >= 0.6


@pytest.mark.parametrize("fit", ["odd", "0.5"])
@pytest.mark.parametrize("name", FILES)
def test_other_halves_do_as_well(name: str, fit: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"needs the shared data at {DATA}")
    with np.load(DATA / f"{name}.npz") as file:
        facts = recalibrate(file["probs"], file["labels"], "auto", fit)
    assert facts["ece_after"] < 0.65 * facts["ece"]
    assert facts["nll_after"] < facts["nll"]


def test_debiased_measures_are_unbiased_where_the_plain_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    squares, plain, debiased = [], [], []
    for _ in range(200):
        p = rng.uniform(0.5, 1, size=200)
        sample = pair_probabilities(p, rng.uniform(size=200) < p - 0.1)
        squares.append(debiased_rms(*sample) ** 2)
        plain.append(ece(*sample))
        debiased.append(debiased_ece(*sample))
    error = np.std(squares) / np.sqrt(200)
    assert np.mean(squares) == pytest.approx(0.01, abs=4 * error)  # every confidence is 0.1 too high
    assert abs(np.mean(debiased) - 0.1) < abs(np.mean(plain) - 0.1)


def gaps(sure: npt.NDArray[np.float64], gap: float, above: float) -> npt.NDArray[np.float64]:
    """The same gap at every confidence above this."""
    return np.where(sure > above, gap, 0)


@pytest.mark.parametrize(
    ("n", "gap", "above", "truth"),
    [
        (400, 0.0, 0.0, 0.0),
        (400, 0.05, 0.0, 0.05),
        (400, 0.1, 0.0, 0.1),
        (400, -0.05, 0.0, 0.05),
        (400, 0.21, 13 / 15, 0.05),  # in two bins of six: chance adds most to a gap of few bins
        (2000, 0.05, 0.0, 0.05),
        (60, 0.1, 0.0, 0.1),
    ],
)
def test_intervals_of_all_distances_hold_the_truth_as_often_as_they_say(
    n: int, gap: float, above: float, truth: float
) -> None:
    """95 % is promised; 100 runs of which 90 hold it are 2.3 standard errors from that."""
    held, widths = dict.fromkeys(("ece", "ace", "debiased_ece", "mce"), 0), list[float]()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sure = rng.uniform(0.6, 0.95, n)
        probs, labels = np.column_stack([sure, 1 - sure]), (rng.random(n) > sure - gaps(sure, gap, above)).astype(int)
        low, high = mce_interval(probs, labels)
        held["mce"] += low <= abs(gap) <= high
        for name in ("ece", "ace", "debiased_ece"):
            low, high = distance_interval(name, probs, labels, seed=seed, draws=100)
            held[name] += low <= truth <= high
            widths.append(high - low)
    assert min(held.values()) >= 90, held
    assert np.mean(widths) < 2.4 / np.sqrt(n)
    with pytest.raises(InputError, match="measure must be one of ece, ace, debiased_ece"):
        distance_interval("mse", probs, labels, seed=0)


def test_intervals_of_many_rows_are_those_of_few() -> None:
    probs, labels = too_sure(60_000, 2, 1.3, seed=0)
    many, few = ece_interval(probs, labels, seed=0), ece_interval(probs[:50_000], labels[:50_000], seed=0)
    assert many == pytest.approx(few, abs=0.004)


def test_the_diagram_holds_every_bin_with_its_interval() -> None:
    pytest.importorskip("holoviews")
    table = reliability_table(*too_sure(500, 3, 1.5, seed=0))
    overlay = reliability_diagram(table, table)
    names = [type(part).__name__ for part in overlay]
    assert names == ["Rectangles", "Curve", "ErrorBars", "Scatter", "ErrorBars", "Scatter"]
    assert (
        overlay.Scatter.As_found.dframe()[["accuracy", "accuracy_lo"]].to_numpy()
        == table[["accuracy", "accuracy_lo"]].to_numpy()
    ).all()
    assert len(reliability_diagram(table)) == 4


# The command


def calibrate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["calibrate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_says_everything_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probs, labels = too_sure(400, 3, 2.0, seed=0)
    np.savez(tmp_path / "a.npz", probs=probs.astype(np.float32), labels=labels.astype(np.int16))
    code, out, err = calibrate(capsys, tmp_path / "a.npz", "--fit", "odd", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    wanted = "n method ece ece_after ace_after mce_after brier brier_after nll nll_after parameters seconds intervals"
    assert set(wanted.split()) <= set(facts)
    assert facts["n"] == 200
    assert facts["ece"] == pytest.approx(ece(probs.astype(np.float32)[::2], labels[::2]))
    for name in ("ece", "ace", "debiased_ece", "mce", "brier", "nll"):
        for when in (name, f"{name}_after"):
            low, high = facts["intervals"][when]
            assert 0 <= low <= facts[when] <= high
            assert low < high


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet", "jsonl"])
def test_tables_of_every_kind_say_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=300)
    table = pd.DataFrame({"note": "x", "p_first": 1 / (1 + np.exp(-2 * logit))})
    table["won"] = (rng.uniform(size=300) < 1 / (1 + np.exp(-logit))).astype(int)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True, double_precision=15)
    else:
        (gzip.open if kind.endswith("gz") else open)(path, "wt").write(table.to_csv(index=False))  # type: ignore[operator]
    code, out, _ = calibrate(capsys, path, "--outcome", "won", "--method", "temperature", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["pairs"] is True, "a column p_first is about pairs"
    assert facts["parameters"]["temperature"] == pytest.approx(recalibrate(*pair_probabilities(table["p_first"], table["won"]), "temperature", pairs=True)["parameters"]["temperature"], rel=1e-6)  # fmt: skip


GOOD = np.tile([[0.7, 0.3], [0.7, 0.3], [0.2, 0.8], [0.2, 0.8]], (20, 1))
SAID = np.tile([0, 0, 1, 1], 20)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"probs": np.where(np.arange(80)[:, None] == 7, np.nan, GOOD), "labels": SAID}, "1 of 80 rows .* not finite"),
        ({"probs": GOOD, "labels": np.where(SAID == 1, 2, 0)}, "labels must be whole numbers from 0 to 1"),
        ({"probs": GOOD, "labels": SAID + 0.5}, "labels must be whole numbers"),
        ({"probs": GOOD, "labels": np.where(SAID == 1, np.nan, 0)}, "labels must be whole numbers"),
        ({"probs": GOOD * 2, "labels": SAID}, "80 of 80 rows .* do not sum to 1"),
        ({"probs": GOOD * [[2, -1]] + [[-0.3, 1.1]], "labels": SAID}, "do not sum|not at least"),
        ({"probs": np.full((80, 2), 0.5), "labels": SAID}, "the same probabilities"),
        ({"probs": GOOD, "labels": np.zeros(80, int)}, "all rows have the label 0"),
        ({"probs": GOOD[:30], "labels": SAID[:30]}, "15 rows to learn from, needs 20"),
        ({"probs": GOOD[:0], "labels": SAID[:0]}, "n > 0"),
        ({"probs": GOOD, "labels": SAID[:50]}, "n labels"),
        ({"probs": GOOD[:, 0], "labels": SAID}, "must be n×k numbers"),
        ({"probs": np.array([{}] * 80), "labels": SAID}, "holds Python objects, which are never opened"),
        ({"probs": GOOD, "labels": np.array(["a", None] * 40, dtype=object)}, "holds Python objects"),
        ({"probs": GOOD.astype(str), "labels": SAID}, "must be n×k numbers"),
        ({"probs": GOOD}, "has no array 'labels', only probs"),
    ],
)
def test_bad_arrays_are_one_line(
    arrays: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    code, out, err = calibrate(capsys, tmp_path / "a.npz", "--json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(says, err), err


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "p,y\n0.5,1\n0.7,\n", "column 'y' .* is empty in 1 rows"),
        ("a.csv", "p,y\n0.5,1\nnan,0\n", "finite and from 0 to 1|must hold numbers|empty"),
        ("a.csv", "p,y\n0.5,1\n1.7,0\n", "finite and from 0 to 1, got .1.7"),
        ("a.csv", "p,y\n0.5,1\n0.7,3\n", "must be 0 or 1, got .3.0"),
        ("a.csv", "p,y\n0.5,yes\n0.7,no\n", "column 'y' .* must hold numbers"),
        ("a.csv", "q,y\n0.5,1\n", "none of the columns probability.*it has q, y; name one with --probability"),
        ("a.csv", "p,z\n0.5,1\n", "for the outcome; it has z"),
        ("a.csv", "", "cannot be read"),
        ("a.jsonl", '{"p": 0.5, "y": 1}\n{"p": 0.5, ', "cannot be read"),
        ("a.parquet", "no", "cannot be read"),
        ("a.npz", "no", "cannot be read as npz"),
        ("a.txt", "no", "ending that is not known; needs .npz"),
    ],
)
def test_bad_tables_are_one_line(
    name: str, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    code, out, err = calibrate(capsys, tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(says, err), err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fit", "1.5"], "fit must be even, odd, or a share"),
        (["--fit", "often"], "fit must be even, odd, or a share"),
        (["--method", "magic"], "'magic' is not one of"),
        (["--pairs", "--method", "vector"], "use temperature or beta"),
        (["--model", "m"], "one of the three"),
        (["--ask", "q"], "--ask needs --model"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", probs=GOOD, labels=SAID)
    code, _, err = calibrate(capsys, tmp_path / "a.npz", *words)
    assert code == 2
    assert says in err


def test_a_hundred_million_rows_are_refused_by_their_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of the size is made here either: the header says what the rest of the file would be."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for name, shape in (("probs", (100_000_000, 2)), ("labels", (100_000_000,))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    code, _, err = calibrate(capsys, tmp_path / "huge.npz")
    assert code == 2
    assert "100,000,000 rows of 2 probabilities; the limit is 10,000,000 rows" in err


def test_a_long_table_is_read_no_further_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("p,y\n" + "0.5,1\n" * 300_000)
    monkeypatch.setattr(prediction_files, "MOST_NUMBERS", 100_000)
    with pytest.raises(InputError, match="the limit is 50,000 rows of 2"):
        prediction_files.read_predictions(tmp_path / "a.csv")
