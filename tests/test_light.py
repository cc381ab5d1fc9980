"""The plain install stays light: quick to import, and it says which extra is missing."""

import statistics
import subprocess
import sys

import pytest

MODULES = "core.schema store.tables store.registry store.snapshots collect.queue quality.agreement govern.triggers cli"
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "distilabel",
    "argilla",
    "evidently",
    "frouros",
    "crowdkit",
}
HEAVY |= {"panel", "holoviews", "bokeh", "papermill", "sklearn", "scipy", "matplotlib", "ray"}


def python(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_import_takes_under_0_3_seconds() -> None:
    timed = "import time; t = time.perf_counter(); import rlhf_workbench; print(time.perf_counter() - t)"
    assert statistics.median(float(python(timed)) for _ in range(5)) < 0.3


def test_light_modules_load_nothing_heavy() -> None:
    imports = "; ".join(f"import rlhf_workbench.{name}" for name in MODULES.split())
    loaded = set(python(f"{imports}; import sys; print(*sys.modules)").split())
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        (
            "from rlhf_workbench.serve.jobs import run_job, Job; run_job(Job('j', __import__('pathlib').Path(), '', ()), {})",
            "jobs",
        ),
        ("from rlhf_workbench.collect.models import resolve_model; resolve_model('tiny')", "collect"),
    ],
)
def test_a_missing_library_names_its_extra(call: str, extra: str) -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))"
    code = f"""
{blocked}
from rlhf_workbench.core.errors import MissingError
try:
    {call}
except MissingError as error:
    print(error)
"""
    assert f"rlhf_workbench[{extra}]" in python(code)
