"""YAML, JSON and command-line words are read as people mean them."""

import pytest

from llmray.arguments import reading
from llmray.errors import ArgumentsError


def read(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text)
    return reading.read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-6", 5e-6),
        ("1E5", 1e5),
        ("3", 3),
        ("-1", -1),
        ("1_000", 1000),
        ("0.5", 0.5),
        (".5", 0.5),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("a,b", "a,b"),
        ("'1e-4'", "1e-4"),
        ("{GPU: 1}", {"GPU": 1}),
    ],
)
def test_yaml_scalars(tmp_path, text, value):
    content, problems = read(tmp_path, f"key: {text}\n")
    assert content == {"key": value}
    assert type(content["key"]) is type(value)
    assert problems == []


def test_json(tmp_path):
    assert read(tmp_path, '{"a": 1e-4, "b": [1]}', "run.json") == ({"a": 1e-4, "b": [1]}, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "a: 1\nb: 2\na: 1\n"),
        ("run.json", '{"a": 1, "b": 2, "a": 1}'),
        ("run.yaml", "b: {a: 1, a: 2}\n"),
    ],
)
def test_a_key_that_stands_twice_is_a_problem(tmp_path, name, text):
    _, problems = read(tmp_path, text, name)
    assert [problem.text for problem in problems] == [
        "a stands in the file twice. Keep one of them."
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.yaml", "a: 1\nb: [\n", "line 3 is no YAML"),
        ("run.yaml", "a: 1\n b: 2\n", "line 2 is no YAML"),
        ("run.yaml", "a: !!python/object/apply:os.getcwd []\n", "line 1 is no YAML"),
        ("run.yaml", "- a\n- b\n", "holds a list"),
        ("run.yaml", "words\n", "holds only the text 'words'"),
        ("run.json", "{", "line 1 is no JSON"),
    ],
)
def test_a_file_that_holds_no_keys_and_values(tmp_path, name, text, said):
    with pytest.raises(ArgumentsError, match=said):
        read(tmp_path, text, name)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ArgumentsError, match="There is no run file"):
        reading.read(tmp_path / "none.yaml")
    with pytest.raises(ArgumentsError, match="is a folder"):
        reading.read(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ArgumentsError, match="no UTF-8 text"):
        reading.read(tmp_path / "bytes.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read(tmp_path, "\ufeffa: 1\n") == ({"a": 1}, [])
    assert read(tmp_path, '\ufeff{"a": 1}', "run.json") == ({"a": 1}, [])


def test_an_empty_file_gives_nothing(tmp_path):
    assert read(tmp_path, "# only a comment\n") == ({}, [])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a=1"], {"a": 1}),
        (["--a=1"], {"a": 1}),
        (["--a", "1"], {"a": 1}),
        (["--a", "-1"], {"a": -1}),
        (["--flag"], {"flag": True}),
        (["--flag", "false"], {"flag": False}),
        (["--flag", "a=1"], {"flag": True, "a": 1}),
        (["--flag", "--a", "1"], {"flag": True, "a": 1}),
        (["--no_flag"], {"flag": False}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["a=1", "a=2"], {"a": 2}),
        (["a="], {"a": None}),
        (["a=null"], {"a": None}),
        (["a=none"], {"a": "none"}),
        (["a=You are: kind"], {"a": "You are: kind"}),
        (["a=#1"], {"a": "#1"}),
        (["a=x=y"], {"a": "x=y"}),
        (["a='1'"], {"a": "1"}),
        (["a=[b, c]"], {"a": ["b", "c"]}),
        (['a={"GPU": 1}'], {"a": {"GPU": 1}}),
        (["a={broken"], {"a": "{broken"}),
    ],
)
def test_words(words, found):
    assert reading.read_words(words, lambda key: key == "flag") == (found, [])


@pytest.mark.parametrize("words", [["a"], ["=1"], ["--a"], ["--a", "--flag"], ["-a", "1"]])
def test_words_that_say_nothing_are_problems(words):
    _, problems = reading.read_words(words, lambda key: key == "flag")
    assert problems
