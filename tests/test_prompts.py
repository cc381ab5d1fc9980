"""A prompts file gets a clear error or a stated decision for everything that can be wrong with it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_workbench.collect.prompts import (
    MAX_CHARACTERS,
    PromptRow,
    ingest_prompts,
    parse_prompt,
    prompts_file,
    prompts_hash,
    read_prompts,
    take_evenly,
)
from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.tables import connect

ONE = '{"prompt": "Why?"}\n'
BROKEN = {
    "not-json.jsonl": (ONE + '{"prompt": "Wh\n', "line 2: not JSON"),
    "not-an-object.jsonl": (ONE + '"Why?"\n', "line 2: no prompt in text"),
    "no-prompt.jsonl": ('{"question": "Why?"}\n', "line 1: no prompt in columns question; needs one of prompt"),
    "no-prompt.csv": ("question,topic\nWhy?,a\n", "line 2: no prompt in columns question, topic"),
    "number.jsonl": ('{"prompt": 7}\n', "line 1: 'prompt' must be a list of messages, got a number"),
    "bad-topic.jsonl": ('{"prompt": "Why?", "topic": 7}\n', "line 1: 'topic' must be text, got a number"),
    "bad-role.jsonl": ('{"messages": [{"role": "boss", "content": "Go"}]}\n', "line 1: 'messages'[0] has the role"),
    "ends-wrong.jsonl": (
        '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}\n',
        "line 1: 'messages' ends with a turn of the assistant",
    ),
    "empty.txt": ("", "has no prompts (0 blank)"),
    "blank.txt": ("\n  \n\t\n", "has no prompts (3 blank)"),
    "heading-only.csv": ("prompt\n", "has no prompts"),
    "long.txt": ("Why?\n" + "a" * 1_000_000 + "\n", "line 2: the prompt has 1,000,000 characters; at most 20,000"),
    "long.csv": ("prompt\n" + "a" * 1_000_000 + "\n", "line 2: the prompt has 1,000,000 characters; at most 20,000"),
    "long.jsonl": (json.dumps({"prompt": "a" * 20_001}) + "\n", "line 1: the prompt has 20,001 characters"),
    "nul.jsonl": ('{"prompt": "a\\u0000b"}\n', "line 1: 'prompt' contains a NUL character"),
    "latin.txt": (b"Why?\nCaf\xe9?\n", "line 2: invalid UTF-8 (0xe9 at byte 4"),
    "latin.jsonl": (b'{"prompt": "Caf\xe9"}\n', "line 1: invalid UTF-8 (0xe9 at byte 16"),
    "latin.csv": (b"prompt\nCaf\xe9\n", "line 2: invalid UTF-8 (0xe9 at byte 4"),
    "utf16.txt": ("Why?\n".encode("utf-16"), "line 1: the file is UTF-16; save it as UTF-8"),
    "prompts.docx": ("Why?\n", "or .txt with one prompt a line"),
    "broken.parquet": ("Why?\n", "cannot be read as Parquet"),
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    content, complaint = BROKEN[name]
    path = written(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_broken_file_writes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "latin.txt", b"Why?\nCaf\xe9?\n")
    with connect(":memory:") as store:
        with pytest.raises(InputError):
            ingest_prompts(store, run_id="r", seed=0, path=str(path))
        assert store.counts() == {}


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises((MissingError, InputError)):
            read_prompts(path)


def test_blank_and_double_prompts_are_counted(tmp_path: Path) -> None:
    lines = ["Why?", "", "  Why? ", "What\tnow?", "What  now?", " "]
    text = read_prompts(written(tmp_path, "a.txt", "\r\n".join(lines)))
    rows = [{"prompt": line} for line in lines] + [{"prompt": None}]
    as_json = read_prompts(written(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows)))
    for found, n_blank in ((text, 2), (as_json, 3)):
        assert [row.text for row in found.rows] == ["Why?", "What\tnow?"]
        assert (found.n_blank, found.n_duplicates) == (n_blank, 2)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "a.txt", b"\xef\xbb\xbfWhy?\n")).rows[0].text == "Why?"


def test_a_prompt_of_the_greatest_length_is_taken(tmp_path: Path) -> None:
    assert len(read_prompts(written(tmp_path, "a.txt", "a" * MAX_CHARACTERS)).rows[0].text) == MAX_CHARACTERS


def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": 'Say "no", then\n"yes".', "topic": "writing", "level": "1"}, {"prompt": "Why?", "topic": "b"}]
    rows[1]["level"] = "2"
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    found = [read_prompts(tmp_path / f"a.{kind}").rows for kind in ("jsonl", "json", "csv", "parquet")]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][0] == PromptRow(rows[0]["prompt"], "writing", None, {"level": "1"})


def test_a_conversation_keeps_its_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    frame = pd.DataFrame({"messages": [turns, turns[1:]]})
    frame.to_parquet(tmp_path / "a.parquet")
    first, second = (parse_prompt({"messages": t}) for t in (turns, turns[1:]))
    assert first == PromptRow("Why?", None, turns, {})
    assert second == PromptRow("Why?", None, None, {})
    assert read_prompts(tmp_path / "a.parquet").rows == [first, second]


@given(texts=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=30), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_row_is_kept_or_counted(tmp_path: Path, texts: list[str]) -> None:
    path = written(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    said = [text for text in texts if text.strip()]
    if not said:
        with pytest.raises(InputError, match="has no prompts"):
            read_prompts(path)
        return
    found = read_prompts(path)
    assert len(found.rows) + found.n_blank + found.n_duplicates == len(texts)
    folded = [" ".join(text.split()) for text in said]
    assert [" ".join(row.text.split()) for row in found.rows] == list(dict.fromkeys(folded))


@given(topics=st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), limit=st.integers(1, 45))
def test_a_part_is_even_over_the_topics(topics: list[str], limit: int) -> None:
    rows = [PromptRow(str(i), topic) for i, topic in enumerate(topics)]
    part = take_evenly(rows, limit)
    assert len(part) == min(limit, len(rows))
    assert [int(row.text) for row in part] == sorted(int(row.text) for row in part)
    given_, taken = Counter(topics), Counter(row.topic for row in part)
    for topic in given_:
        for other in given_:
            assert taken[topic] == given_[topic] or taken[topic] >= taken[other] - 1


def test_the_shipped_prompts() -> None:
    found = read_prompts()
    assert Counter(Counter(row.topic for row in found.rows).values()) == {25: 6}
    assert (found.n_blank, found.n_duplicates) == (0, 0)
    assert max(len(row.text) for row in found.rows) < 120


def test_a_built_package_carries_the_prompts(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here, so no package can be built offline")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rlhf_workbench/data/prompts.jsonl").read_bytes() == prompts_file().read_bytes()


def test_ingesting_writes_records_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "mine.jsonl", '{"text": "A?", "topic": "x", "n": 1}\n{"text": "B?"}\n')
    with connect(":memory:") as store:
        figures = ingest_prompts(store, run_id="r", seed=0, path=str(path), data_hash=prompts_hash(path))
        found = store.records(Prompt, run_id="r")
    assert figures == {"prompts": 2, "topics": 2, "blank": 0, "duplicates": 0}
    assert [(p.text, p.topic, p.source, p.metadata) for p in found] == [
        ("A?", "x", "mine.jsonl", {"n": 1}),
        ("B?", None, "mine.jsonl", {}),
    ]


def test_a_file_that_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    path = written(tmp_path, "mine.txt", "A?\n")
    before = prompts_hash(path)
    path.write_text("B?\n")
    with connect(":memory:") as store, pytest.raises(StateError, match="changed in the meantime"):
        ingest_prompts(store, run_id="r", seed=0, path=str(path), data_hash=before)
