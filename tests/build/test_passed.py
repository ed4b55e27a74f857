"""The record of slow tests that have passed."""

import passed
import pytest


def test_what_runs_again(if_changed, request, tmp_path, monkeypatch):
    monkeypatch.setattr(passed, "ROOT", tmp_path)
    monkeypatch.setattr(passed, "RECORD", tmp_path / "passed.jsonl")
    parts, runs = {"a": ["a.txt"], "b": ["*/b.txt"]}, []
    (tmp_path / "folder").mkdir()
    files = tmp_path / "a.txt", tmp_path / "folder" / "b.txt"
    for file in files:
        file.write_text("1")

    def call(renews=False, versions="", run=runs.append):
        monkeypatch.setattr(request.config.option, "record_passed", renews)
        if_changed(run, parts, versions)

    def is_out_of_date():
        with pytest.raises(pytest.fail.Exception, match=r"out of date.*: pytest --record-passed"):
            call()

    call()  # never recorded
    with pytest.raises(ZeroDivisionError):  # a test that fails
        call(renews=True, run=lambda changed: 1 / 0)
    call()
    assert runs == [["a", "b"]] * 2
    runs.clear()
    call(renews=True)
    call()
    assert runs == [["a", "b"]]
    files[1].write_text("2")
    is_out_of_date()
    call(renews=True)
    call()
    assert runs == [["a", "b"], ["b"]]
    call(versions="3.6")
    assert runs[2:] == [["a", "b"]]
    files[1].unlink()
    with pytest.raises(AssertionError, match="no file matches"):
        call()
