"""The pictures of README are drawn from the record of a run."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import pictures
from benchmarks.pictures import PICTURES, THEMES, best_step, draw_recording, draw_tree, lines_of

STEP = {"nodes": ["a", " b", "\n", " d", "</s>"], "parents": [-1, 0, 0, 2, 2], "path": [0, 2, 4]}
CHAIN = {"nodes": ["a", " b"], "parents": [-1, 0], "path": [0, 1]}
CHUNKS = [(0.0, "One two"), (0.25, " three\n\nfo"), (0.5, "ur")]


def texts(picture):
    """The text elements of a picture, each with its attributes and its whole text."""
    namespace = "{http://www.w3.org/2000/svg}"
    found = ElementTree.fromstring(picture).iter(f"{namespace}text")
    return [(element.attrib, "".join(element.itertext())) for element in found]


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_a_tree_has_its_tokens_and_accents_the_accepted_ones(theme):
    drawn = texts(draw_tree(STEP, theme))
    assert [text for _, text in drawn] == ["a", "b", "↵", "d", "</s>"]
    accepted = [text for attributes, text in drawn if attributes["fill"] == theme.text]
    assert accepted == ["a", "↵", "</s>"]


def test_children_of_a_node_have_rows_of_their_own():
    assert pictures.places(STEP["parents"]) == [0, 0, 1, 1, 2]
    assert pictures.depths_of(STEP["parents"]) == [0, 1, 1, 2, 2]


def test_the_tree_that_shows_most_turns():
    assert best_step([CHAIN, STEP, CHAIN]) is STEP


def test_lines_break_between_words_and_keep_the_times():
    assert [*lines_of(CHUNKS, 8)] == [
        [(0.0, "One two")],
        [(0.25, "three")],
        [],
        [(0.25, "fo"), (0.5, "ur")],
    ]
    assert [*lines_of([(0.0, "abcdefgh")], 3)] == [[(0.0, "abc")], [(0.0, "def")], [(0.0, "gh")]]


def test_a_recording_shows_each_part_at_its_time():
    run = {method: {"chunks": CHUNKS, "tokens": 5} for method in ("ar", "treeflash")}
    picture = draw_recording(run, THEMES[0])
    shown = [text for _, text in texts(picture)]
    assert shown.count("One two three") == shown.count("four") == 2
    assert shown.count("0.5 s, 10 tokens/s") == 2
    assert "translateY(-" not in picture, "there is room for all lines"
    # The loop lasts three seconds longer than the text.
    assert ".t250{animation:t250 3.50s linear infinite}" in picture
    assert "@keyframes t250{0%,7.14%{opacity:0}7.15%,100%{opacity:1}}" in picture


def test_a_long_text_moves_up_as_its_lines_begin():
    """The last of two visible lines is the one that began last; several may begin at once."""
    lines = [*lines_of([(0.0, "a\n"), (1.0, "b\n"), (2.0, "c\n\nd\n"), (3.0, "e")], 8)]
    moves = pictures.motion("column0", lines, rows=2, duration=4.0)
    steps = "0.00%{transform:translateY(0px)}50.00%{transform:translateY(-54px)}"
    end = "75.00%{transform:translateY(-72px)}100%{transform:translateY(-72px)}"
    assert moves.startswith(f"@keyframes column0{{{steps}{end}}}")
    short = pictures.motion("column0", lines[:2], rows=2, duration=4.0)
    assert "0.00%{transform:translateY(0px)}100%{transform:translateY(0px)}" in short


def test_a_recording_shows_nothing_too_early():
    assert [pictures.frame_of(x) for x in (0.0, 0.01, 0.05, 0.06)] == [0.0, 0.05, 0.05, 0.1]


def test_a_run_is_recorded_and_drawn(pair_options, tmp_path):
    pytest.importorskip("matplotlib")
    run, folder = tmp_path / "run.json", tmp_path / "pictures"
    options = ["--output", str(folder), "--max-tokens", "12"]
    assert pictures.main([str(run), "--record", *pair_options, *options]) == 0
    run_record = json.loads(run.read_text())
    recorded = run_record["texts"]
    plain, drafted = (
        "".join(text for _, text in recorded[method]["chunks"]) for method in ("ar", "treeflash")
    )
    assert plain == drafted
    assert run_record["steps"]
    drawn = {file.name: file.read_text() for file in folder.iterdir()}
    assert drawn.keys() == {file.name for file in PICTURES.glob("*.svg")}
    assert pictures.main([str(run), *options]) == 0
    assert drawn == {file.name: file.read_text() for file in folder.iterdir()}
