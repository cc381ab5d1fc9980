"""A snapshot in which the polite answer wins, whichever is longer: small enough to learn in a second."""

from rlhf_workbench.core.messages import question
from rlhf_workbench.core.schema import Comparison, Generation, Preference, Prompt, Snapshot
from rlhf_workbench.store.tables import Store

THINGS = ("tea", "river", "stone", "bread", "apple", "chair", "music", "ocean")
KIND = ("Thank you for asking! The {0} is fine.", "Thank you, my friend.")
RUDE = ("Go away.", "Go away with your {0}, I will not say a word about it.")


def add_polite(
    store: Store,
    n_train: int = 48,
    n_calibration: int = 8,
    n_test: int = 16,
    n_ties: int = 0,  # test pairs about which people disagree
) -> str:  # the snapshot's id
    """Append prompts, answers, comparisons and a snapshot of them; in every second pair the better answer is the second."""
    splits = ["train"] * n_train + ["calibration"] * n_calibration + ["test"] * (n_test + n_ties)
    snapshot = Snapshot(name="polite", content_hash="0" * 64, n_rows=len(splits))
    records = [snapshot]
    for i, split in enumerate(splits):
        thing = THINGS[i % len(THINGS)]
        prompt = Prompt(text=f"Tell me about {thing}, part {i}.", topic=thing)
        said = (KIND[i % 2].format(thing), RUDE[i % 2].format(thing))
        first, second = (Generation(prompt_id=prompt.id, text=text) for text in (said if i % 3 else said[::-1]))
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)
        sure = 0.5 if i >= len(splits) - n_ties else 0.9
        row = Preference(
            **{"snapshot_id": snapshot.id, "comparison_id": pair.id, "prompt": question(prompt.text), "topic": thing},
            **{"chosen": said[0], "rejected": said[1], "p_chosen": sure, "split": split},
        )
        records += [prompt, first, second, pair, row]
    store.append(records)
    return snapshot.id
