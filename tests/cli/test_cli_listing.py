"""Which pictures, masks and outputs a run over a folder takes, where they share folders."""

import os

import pytest
from test_cli_folders import enlarge, fill, folder, holes, noise, pixels, save, tree  # noqa: F401, folder runs in each test


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["photos", "-o", "."], ["a.png", "b.jpg", "c.png"]),
        (["photos/a.png", "photos/b.jpg", "-o", "photos", "--suffix", "_x2"], ["a_x2.png", "b_x2.jpg"]),
        (["photos/*.png", "-o", "photos", "--suffix", "_x2"], ["a_x2.png"]),
    ],
)
def test_the_output_may_hold_the_pictures(words, expected, capsys):
    for there in (0, len(expected)):  # the second run finds the same pictures
        enlarge(*words)
        before = f", {there} skipped" * (there > 0)
        assert f" {len(expected) - there} written{before}\n" in capsys.readouterr().err
    output = words[words.index("-o") + 1]
    assert all(os.path.isfile(os.path.join(output, name)) for name in expected)


def test_an_output_with_subfolders_is_resumed():
    os.rename("photos/sub", "photos/a")
    enlarge("photos/a", "photos/b.jpg", "-o", "large")
    os.makedirs("large/a")
    enlarge("photos", "--recursive", "-o", "large", "--overwrite")
    assert tree("large") == ["a.PNG", "a.png", "a/a.PNG", "b.jpg", "c.png"]


def test_masks_among_the_pictures():
    """One mask for all, or those of another spelling of the folder's name, are no pictures."""
    save("one/p.png", noise(9, 14))
    save("one/mask.png", holes(9, 14))
    fill("one", "--mask", "one/mask.png", "-o", "filled")
    assert tree("filled") == ["p.png"]
    os.rename("one/mask.png", "one/p_mask.png")
    fill("one", "--mask", os.path.abspath("one"), "-o", "again")
    assert tree("again") == ["p.png"]


def test_pictures_with_the_names_of_outputs_are_named(capsys):
    """Whether they are outputs of an earlier run cannot be seen: a line says so, in both cases."""
    save("photos/a_x2.png", noise(3, 4))
    enlarge("photos", "-o", "photos", "--suffix", "_x2")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "inr-kernels: photos/a_x2.png: not read, but kept: by the name it is the output of another picture"
    assert last == "inr-kernels: photos: 2 written, 1 skipped"
    assert pixels("photos/a_x2.png").shape == (3, 4, 3)
    enlarge("photos", "-o", "photos", "--suffix", "_x2", "--overwrite")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("inr-kernels: photos/a_x2.png and 2 more: not read, but replaced: ")
    assert pixels("photos/a_x2.png").shape == (18, 28, 3)


def test_links_that_lead_nowhere_fail(capsys):
    os.symlink("gone.png", "photos/d.png")
    os.symlink(os.path.abspath("photos/a.png"), "photos/e.png")
    os.symlink("gone.txt", "photos/d.txt")
    enlarge("photos", "-o", "large", status=1)
    assert tree("large") == ["a.png", "b.jpg", "c.png", "e.png"]
    assert capsys.readouterr().err.splitlines() == [
        "inr-kernels: photos/d.png: No such file or directory",
        "inr-kernels: large: 4 written, 1 failed",
    ]
    os.symlink("gone.png", "masks/e.png")
    fill("photos/a.png", "photos/e.png", "--mask", "masks", "-o", "filled", status=1)
    assert "photos/e.png: mask masks/e.png: No such file or directory" in capsys.readouterr().err


def test_empty_folders_are_named(capsys):
    os.makedirs("empty/sub")
    save("empty/sub/z.png", noise(5, 6))
    enlarge("photos", "empty", "-o", "large", status=1)
    assert tree("large") == ["a.png", "b.jpg", "c.png"]
    assert capsys.readouterr().err.splitlines() == [
        "inr-kernels: empty: holds no pictures; --recursive searches subfolders",
        "inr-kernels: large: 3 written, 1 failed",
    ]
    enlarge("photos/b.jpg", "empty", "--recursive", "-o", "all")
    assert tree("all") == ["b.jpg", "sub/z.png"]
