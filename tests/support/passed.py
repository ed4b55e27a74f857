"""The record of slow tests that have passed: they run again when a file has changed that they depend on.

`pytest --record-passed` runs those that are out of date, and no other tests, and writes tests/build/passed.jsonl.
"""

import fcntl
import hashlib
import json

import pytest
from tree import ROOT

RECORD = ROOT / "tests" / "build" / "passed.jsonl"


def key_of(patterns):
    """A hash of the names and contents of the files below the repository's root that match the patterns."""
    unmatched = [pattern for pattern in patterns if not any(ROOT.glob(pattern))]
    assert not unmatched, f"no file matches {unmatched}"
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"}
    contents = "".join(f"{path.relative_to(ROOT)}\0{path.read_text()}\0" for path in sorted(found))
    return hashlib.sha256(contents.encode()).hexdigest()[:32]


def recorded():
    """The rows of the record, by test and part."""
    rows = map(json.loads, RECORD.read_text().splitlines() if RECORD.exists() else ())
    return {(row["test"], row["part"]): row for row in rows}


def record(rows):
    """Adds rows, or replaces those of the same test and part."""
    with open(__file__) as lock:  # against the other workers of pytest-xdist
        fcntl.flock(lock, fcntl.LOCK_EX)
        every = recorded() | {(row["test"], row["part"]): row for row in rows}
        partial = RECORD.with_suffix(".partial")
        partial.write_text("".join(f"{json.dumps(every[name])}\n" for name in sorted(every)))
        partial.replace(RECORD)  # they read it without a lock


@pytest.fixture
def if_changed(request):
    """if_changed(run, parts, versions="") calls run(changed) unless the test has passed with the same files.

    parts: patterns of the files that each part of the test depends on, by name; `changed` are the names of those that
    are not recorded with these files. Where the record has other files, this is an error that names the command, but
    for `--record-passed`. What the record lacks, or has with other versions, e.g. of Triton, runs.
    """

    def check(run, parts, versions=""):
        test, known = request.node.nodeid, recorded()
        rows = {name: {"test": test, "part": name, "versions": versions} for name in parts}
        rows = {name: row | {"key": key_of(parts[name])} for name, row in rows.items()}
        changed = [name for name, row in rows.items() if known.get((test, name)) != row]
        if not changed:
            return
        renews = request.config.getoption("record_passed")
        stale = [name for name in changed if known.get((test, name), {}).get("versions") == versions]
        if stale and not renews:
            text = f"{RECORD.name} is out of date, as files of {stale} have changed: pytest --record-passed"
            pytest.fail(text, pytrace=False)
        run(changed)
        if renews:
            record([rows[name] for name in changed])

    return check
