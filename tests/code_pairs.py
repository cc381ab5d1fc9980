"""Judged pairs about three topics, some with a code block, and models that are wrong there as often as they are told."""

import numpy as np

from rlhf_workbench.core.schema import Comparison, Consensus, Generation, Model, Prediction, Prompt, Record
from rlhf_workbench.store.tables import Store

TOPICS = {
    "food": "soup oven salt butter pan onion",
    "travel": "train hotel city flight map",
    "money": "bank loan tax debt",
}
SMALL = ["the", "is", "and", "with", "for", "more", "some", "then", "also"]


def one_pair(rng: np.random.Generator, has_code: bool) -> tuple[str, str, str]:
    """A question and two answers."""
    words = TOPICS[str(rng.choice(list(TOPICS)))].split()
    texts = [" ".join(rng.choice([*words, *SMALL], rng.integers(8, 20))) for _ in range(2)]
    if has_code:
        name = rng.choice(words)
        texts[rng.integers(2)] += f" ```def {name}(x): return x```"
    return f"How about {' and '.join(rng.choice(words, 2))}?", texts[0], texts[1]


def add_pairs(
    store: Store,
    n: int,
    seed: int,
    rates: dict[str, tuple[float, float]],  # model → share of mistakes on pairs with code, and on others
    share_code: float = 0.25,
    judged: bool = True,
) -> tuple[dict[str, Model], list[str]]:
    """Write pairs, opinions and predictions; the models, and the ids of the comparisons with code."""
    rng = np.random.default_rng(seed)
    models = {name: Model(name=name, kind="reward") for name in rates}
    records: list[Record] = list(models.values())
    with_code = []
    for _ in range(n):
        has_code = bool(rng.random() < share_code)
        question, one, other = one_pair(rng, has_code)
        asked = Prompt(text=question)
        answers = [Generation(prompt_id=asked.id, text=text) for text in (one, other)]
        pair = Comparison(prompt_id=asked.id, first_id=answers[0].id, second_id=answers[1].id)
        records += [asked, *answers, pair]
        with_code += [pair.id] * has_code
        better = float(rng.integers(2))
        if judged:
            label = "first" if better else "second"
            said = {"method": "majority", "label": label, "n_votes": 5}
            records.append(Consensus(comparison_id=pair.id, p_first=better, p_second=1 - better, **said))  # type: ignore[arg-type]
        for name, (on_code, elsewhere) in rates.items():
            is_wrong = rng.random() < (on_code if has_code else elsewhere)
            p_first = 0.2 + 0.6 * (1 - better if is_wrong else better)
            records.append(Prediction(model_id=models[name].id, comparison_id=pair.id, p_first=p_first))
    store.append(records)
    return models, with_code
