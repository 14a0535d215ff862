"""The curve in plain characters, compared with what a hand would draw."""

from llmray.train.sketch import sketch


def test_a_line_that_falls():
    """Four columns, values 4 and 1 at steps 1 and 4: 3 and 2 lie between them."""
    drawn = sketch([(1, 4.0), (4, 1.0)], "loss", width=4, height=4)
    assert drawn.splitlines() == [
        "4 |*",
        "  | *",
        "  |  *",
        "1 |   *",
        "  +----",
        "   1 loss to step 4",
    ]


def test_a_column_shows_the_mean_of_its_steps():
    """Two columns for steps 1 to 4: the means are (3 + 5) / 2 = 4 and (2 + 0) / 2 = 1."""
    points = [(1, 3.0), (2, 5.0), (3, 2.0), (4, 0.0)]
    drawn = sketch(points, "loss", width=2, height=2)
    assert drawn.splitlines()[:2] == ["4 |*", "1 | *"]


def test_a_flat_line_has_one_row():
    drawn = sketch([(1, 2.0), (9, 2.0)], "loss", width=3, height=3).splitlines()
    assert drawn[0] == "2 |***"


def test_one_step_is_no_curve():
    assert sketch([(1, 2.0)], "loss") == ""
    assert sketch([], "loss") == ""


def test_only_plain_characters():
    assert sketch([(i, 1 / i) for i in range(1, 500)], "loss").isascii()
