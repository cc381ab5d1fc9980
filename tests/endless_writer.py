"""A process that writes until it is killed; apart from the test, so that a fork server can import it."""

import os
import random
from pathlib import Path

from rlhf_workbench.core.errors import StateError
from rlhf_workbench.core.schema import Annotation, Prompt
from rlhf_workbench.store.tables import connect


def work(path: Path, acknowledged: Path, seed: int) -> None:
    """Write until killed; note each record only after it was acknowledged."""
    draw = random.Random(seed)
    said = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = connect(path, actor=f"worker {seed}")
    while True:
        if draw.random() < 0.2:
            try:
                with store.transaction():
                    one = store.append(Prompt(text="of two", topic=str(seed)))
                    ids = one + store.append(Annotation(comparison_id=one[0], annotator_id="a", label="tie"))
            except StateError:
                continue  # the owner was killed in the middle: nothing was acknowledged, nothing is there
        else:
            ids = store.append(
                [Prompt(text="x" * draw.randint(1, 2000)) for _ in range(draw.choice([1, 1, 1, 5, 300]))]
            )
        os.write(said, "".join(f"{i}\n" for i in ids).encode())
