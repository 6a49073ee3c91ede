"""recipes/validate.py: on the data set that it unpacks, on other files, and on bad records."""

import json
import os
from collections.abc import Sequence

import pytest
from warm import ENV, ROOT

from llava_fn.data.check import check
from llava_fn.data.records import Record


@pytest.fixture
def validate(warm):
    """Runs the recipe in a folder with these words."""
    return lambda folder, *words: warm.run(["python", ROOT / "recipes/validate.py", *words], folder, ENV)


def test_the_folder_that_is_named_is_unpacked_and_checked(validate, tmp_path):
    done = validate(tmp_path, "--unpack", "elsewhere")
    assert done.returncode == 0, done.stderr
    assert "elsewhere/train.json: 1980 of 1980 records are fine" in done.stdout and "####" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


def test_bad_records_of_other_files_are_named_and_end_with_status_1(validate, emojis, tmp_path):
    rows = json.loads((emojis / "train.json").read_text())
    rows[3]["image"] = "gone.png"
    (tmp_path / "records.json").write_text(json.dumps(rows))
    arguments = ("--source.records", "records.json", "--source.images", emojis, "--json", "a.json", "--html", "a.html")
    done = validate(tmp_path, "--unpack", "None", *arguments, "--tokenizer", emojis / "tokenizer.model")
    assert done.returncode == 1 and f"records.json: {len(rows) - 1} of {len(rows)} records are fine" in done.stdout
    assert "1 bad records" in done.stderr and "gone.png: cannot be read" in done.stderr
    assert len(json.loads((tmp_path / "a.json").read_text())["bad"]) == 1
    assert "gone.png" in (tmp_path / "a.html").read_text()
    done = validate(tmp_path, "--unpack", "None", *arguments)
    assert done.returncode == 2 and "give --source.records" in done.stderr
    assert not (tmp_path / "runs").exists()


class Where(Sequence):
    """Bad records, each named by the process that reads it."""

    def __len__(self):
        return 70

    def __getitem__(self, i):
        return Record(f"{i} {os.getpid()}", None, [])


def test_records_are_parsed_by_the_workers(how):
    figures = sum(check(Where(), how, 1), [])
    assert [int(x.error.split()[0]) for x in figures] == list(range(70))
    assert str(os.getpid()) not in {x.error.split()[1].rstrip(":") for x in figures}
