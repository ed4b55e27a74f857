"""Which pictures, masks and outputs a run over a folder takes, where they share folders."""

import os

import pytest
from test_cli_folders import enlarge, fill, folder, holes, noise, save, tree  # noqa: F401, folder runs in each test


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
