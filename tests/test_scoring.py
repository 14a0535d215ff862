"""`llmray score`: rows of sets and lines of JSON, each with its rewards or named as wrong."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from tiny import build_model, make_model, make_tokenizer

from llmray import cli, scoring
from llmray.arguments.loading import load
from llmray.data.conversation import Conversation, Message
from llmray.errors import ArgumentsError, DataError, LlmrayError, RewardError
from llmray.model import value_head
from llmray.scoring import Options
from llmray.train.score import Scorer

PAIRS = [
    {"instruction": f"Say {i}.", "chosen": f"{i} words", "rejected": "no " * i} for i in range(1, 6)
]
SETS = {
    "pairs": PAIRS,
    "several": [{**PAIRS[0], "rejected": ["no", "never"]}],
    "plain": [{"instruction": "Say a.", "output": "a"}],
    "judged": [{"instruction": "Say a.", "output": "a", "kto_tag": True}],
    "spoilt": [PAIRS[0], {"instruction": 3}, PAIRS[1]],
    "silent": [{"instruction": "Say a.", "output": " "}],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scoring")
    make_tokenizer(root)
    make_model(root, amplify=3.0)
    value_head.write(value_head.create(build_model(), 0), root)
    info = {name: {"file_name": f"{name}.json"} for name in SETS}
    for name in ("pairs", "several", "spoilt"):
        info[name]["ranking"] = True
    info["judged"]["columns"] = {"kto_tag": "kto_tag"}
    for name, rows in {**SETS, "dataset_info": info}.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    return root


def run(root, **keys):
    base = {"model_name_or_path": str(root), "dataset_dir": str(root), "use_cpu": True}
    return load({**base, "stage": "rm", "template": "chatml", **keys}, environ={})


def scores(root, options=None, text="", **keys):
    target = io.StringIO()
    made = run(root, **keys)
    code = scoring.score(made, options or Options(), source=io.StringIO(text), target=target)
    assert code == 0
    return [json.loads(line) for line in target.getvalue().splitlines()]


def expected(root, *pairs):
    talks = [Conversation((Message("user", a), Message("assistant", b))) for a, b in pairs]
    return pytest.approx(Scorer.load(run(root)).score_conversations(talks), abs=1e-5)


def test_pairs_have_two_rewards_in_the_order_of_the_file(root):
    found = scores(root, dataset="pairs")
    assert [row["source"].split("/")[-1] for row in found][:2] == [
        "pairs.json, row 1 (line 1)",
        "pairs.json, row 2 (line 1)",
    ]
    assert [row["chosen"] for row in found] == expected(
        root, *((row["instruction"], row["chosen"]) for row in PAIRS)
    )
    assert [row["rejected"] for row in found] == expected(
        root, *((row["instruction"], row["rejected"]) for row in PAIRS)
    )


def test_every_kind_of_set_is_scored(root):
    found = scores(root, Options("eval"), eval_dataset="several,plain,judged", max_samples=3)
    assert [sorted(row) for row in found] == [
        ["chosen", "rejected_1", "rejected_2", "source"],
        ["score", "source"],
        ["score", "source"],
    ]
    values = [found[0]["chosen"], found[0]["rejected_2"], found[1]["score"], found[2]["score"]]
    assert values == expected(
        root, ("Say 1.", "1 words"), ("Say 1.", "never"), ("Say a.", "a"), ("Say a.", "a")
    )
    assert len(scores(root, dataset="pairs", max_samples=2)) == 2


def test_lines_of_all_forms(root):
    lines = [
        "a whole text",
        {"text": "a whole text"},
        {"prompt": "hi", "response": "ho"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ]
    text = "\n\n".join(map(json.dumps, lines))
    found = scores(root, Options(lines="-"), text)
    assert [row["source"] for row in found] == [
        f"the standard input, line {number}" for number in (1, 3, 5, 7)
    ]
    [whole] = Scorer.load(run(root)).score(["a whole text"])
    [talk] = Scorer.load(run(root)).score_conversations(
        [Conversation((Message("user", "hi"), Message("assistant", "ho")))]
    )
    values = [row["score"] for row in found]
    assert values == pytest.approx([whole, whole, talk, talk], abs=1e-5)
    (root / "lines.jsonl").write_text(text)
    again = scores(root, Options(lines=str(root / "lines.jsonl")))
    assert [row["score"] for row in again] == values


WRONG = {
    "no JSON": ("{", "line 2: it is no JSON"),
    "a number": ("3", "line 2: it is none of the forms of a line"),
    "nothing": ("{}", "line 2: it is none of the forms of a line"),
    "half": ('{"prompt": "a"}', "line 2: it is none of the forms"),
    "half a character": ('"\\ud800"', "line 2: it holds half a character"),
    "an empty text": ('""', "line 2: the text has no token"),
    "an empty answer": ('{"prompt": "a", "response": " "}', "line 2: the response is empty"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: the last message"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named_or_left_out(case, root, caplog):
    line, message = WRONG[case]
    text = f'"one"\n{line}\n"two"\n'
    with pytest.raises(DataError, match=f"the standard input, {message}"):
        scores(root, Options(lines="-"), text)
    with caplog.at_level("INFO", "llmray"):
        found = scores(root, Options(lines="-"), text, bad_rows="skip")
    assert [row["source"][-1] for row in found] == ["1", "3"]
    assert "1 rows are wrong and left out, first the standard input, line 2" in caplog.text
    assert "scored 2 texts" in caplog.text


def test_a_wrong_row_of_a_set_is_named_or_left_out(root):
    with pytest.raises(DataError, match=r"spoilt\.json, row 2"):
        scores(root, dataset="spoilt")
    assert len(scores(root, dataset="spoilt", bad_rows="skip")) == 2
    with pytest.raises(DataError, match=r"silent\.json, row 1.*the response is empty"):
        scores(root, dataset="silent")


def test_a_reward_that_is_no_number_is_named_by_its_row(root, monkeypatch):
    real = Scorer.run
    monkeypatch.setattr(
        Scorer, "run", lambda self, ids: [*real(self, ids)[:-1], math.nan] if ids else []
    )
    with pytest.raises(RewardError, match=r"pairs\.json, row 5 .*the reward \(rejected\) is nan"):
        scores(root, dataset="pairs")


def test_nothing_to_score_is_said(root):
    with pytest.raises(DataError, match=r"no eval_dataset.*--input"):
        scores(root, Options("eval"), dataset="pairs")
    with pytest.raises(DataError, match=r"--input .*none"):
        scores(root, Options(lines=str(root / "none")))
    with pytest.raises(LlmrayError, match="nothing is no set"):
        scores(root, dataset="nothing")


def test_the_command_line(root, capsys, monkeypatch, own_console):
    words = [f"model_name_or_path={root}", "template=chatml", "use_cpu=true", "stage=rm"]
    monkeypatch.setattr("sys.stdin", io.StringIO('"a text"\n'))
    assert cli.main(["score", *words, "--input", "-"]) == 0
    printed = capsys.readouterr()
    [line] = printed.out.splitlines()
    assert list(json.loads(line)) == ["source", "score"]
    assert "texts a second" in printed.err
    assert cli.main(["score", *words, f"dataset_dir={root}", "dataset=pairs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("llmray.serve.find_spec", lambda name: None)
    with pytest.raises(ArgumentsError, match=r"fastapi and uvicorn.*llmray\[serve\]"):
        cli.reward_server(["model_name_or_path=m"])


def test_a_public_address_is_refused_before_anything_is_loaded(capsys, monkeypatch, own_console):
    monkeypatch.delenv("API_KEY", raising=False)
    assert cli.main(["reward-server", "model_name_or_path=m", "--host", "0.0.0.0"]) == 2
    assert "API_KEY or --token-file" in capsys.readouterr().err
