"""The words behind `llmray tune`: files, changes of the section, resume."""

import pytest
import yaml

from llmray.arguments.loading import load
from llmray.arguments.paths import absolute
from llmray.arguments.sweep_file import load_sweep, refuse_section
from llmray.arguments.tune import sweep_of
from llmray.errors import ArgumentsError

RUN = {
    "model_name_or_path": "m",
    "dataset": "a",
    "do_train": True,
    "output_dir": "o",
    "finetuning_type": "lora",
    "val_size": 0.1,
    "eval_strategy": "steps",
}
SECTION = {"search": {"learning_rate": {"loguniform": [1e-5, 1e-3]}}, "num_samples": 3}


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        (tmp_path / name).write_text(yaml.safe_dump(content))
        return str(tmp_path / name)

    return write_file


def read(*words):
    return load_sweep(words, environ={})


def test_the_section_stands_in_the_run_file_or_in_a_second_one(write):
    one = read(write("one.yaml", RUN | {"tune": SECTION}))
    two = read(write("run.yaml", RUN), write("sweep.yaml", SECTION))
    named = read(write("run.yaml", RUN), write("tune.yaml", {"tune": SECTION}))
    assert one.arguments == two.arguments == named.arguments
    assert sweep_of(one.arguments).num_samples == 3
    assert (one.resumes, one.is_dry) == (False, False)


def test_texts_that_are_searched_stay_as_they_are(write):
    texts = ["joy \U0001f602", "line\u2028separated", "next\x85line", "two\nlines", "\u00e9"]
    section = {"search": {"default_system": {"choice": texts}}}
    found = read(write("run.yaml", RUN | {"tune": section}))
    assert list(sweep_of(found.arguments).space.dimensions[0].distribution.values) == texts
    word = "tune.search.default_system={choice: [joy \U0001f602]}"
    found = read(write("run.yaml", RUN | {"tune": section}), word)
    assert sweep_of(found.arguments).space.dimensions[0].distribution.values == (texts[0],)


def test_words_change_the_run_and_the_section(write):
    found = read(
        write("run.yaml", RUN | {"tune": SECTION}),
        "lora_rank=4",
        "tune.num_samples=5",
        "--tune.scheduler={asha: {grace_period: 2}}",
        "tune.search.learning_rate={uniform: [0.1, 0.2]}",
        "resume=true",
        "--dry-run",
    )
    sweep = sweep_of(found.arguments)
    assert found.arguments.finetuning.lora_rank == 4
    assert (sweep.num_samples, sweep.scheduler.settings["grace_period"]) == (5, 2)
    assert sweep.space.dimensions[0].distribution.high == 0.2
    assert (found.resumes, found.is_dry) == (True, True)


def test_a_sweep_may_be_words_alone():
    found = read(
        "--model_name_or_path",
        "m",
        *(f"{key}={value}" for key, value in RUN.items() if key != "model_name_or_path"),
        "tune.search.lora_rank={grid: [4, 8]}",
    )
    assert sweep_of(found.arguments).searcher == "grid"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.yaml"], "has no section tune"),
        ([], "the command line has no section tune"),
        (["tuned.yaml", "sweep.yaml"], "Keep one of them"),
        (["run.yaml", "sweep.yaml", "third.yaml"], "is a third file"),
        (["run.yaml", "mixed.yaml"], "has lora_rank beside tune"),
        (["run.yaml", "text.yaml"], "a mapping is required"),
        (["run.yaml", "nothing.yaml"], "There is no run file nothing.yaml"),
        (["tuned.yaml", "resume=maybe"], "true or false is required"),
        (["tuned.yaml", "tune.num_sample=3"], "Did you mean num_samples?"),
    ],
)
def test_what_is_no_sweep_is_refused(words, said, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("run.yaml", RUN)
    write("tuned.yaml", RUN | {"tune": SECTION})
    write("sweep.yaml", SECTION)
    write("third.yaml", SECTION)
    write("mixed.yaml", {"tune": SECTION, "lora_rank": 4})
    write("text.yaml", {"tune": "search"})
    with pytest.raises(ArgumentsError) as error:
        read(*words)
    assert said in str(error.value)


def test_errors_name_the_run_file(write):
    path = write("run.yaml", RUN | {"tune": SECTION, "lora_rnk": 3})
    with pytest.raises(ArgumentsError, match=f"^{path}: "):
        read(path)


def test_a_run_that_trains_once_has_no_section():
    refuse_section(load(RUN, environ={}))
    with pytest.raises(ArgumentsError, match="Sweep with `llmray tune`"):
        refuse_section(load(RUN | {"tune": SECTION}, environ={}))


def test_places_that_are_searched_become_absolute(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a").mkdir()
    section = {
        "search": {"model_name_or_path": {"choice": ["models/a", "org/b"]}, **SECTION["search"]},
        "variants": [{"dataset_dir": "data"}, {"dataset_dir": "/elsewhere", "lora_rank": 4}],
    }
    arguments = load(RUN | {"tune": section}, environ={})
    found = absolute(arguments, tmp_path).tune.tune
    assert found["search"]["model_name_or_path"]["choice"] == [f"{tmp_path}/models/a", "org/b"]
    assert found["search"]["learning_rate"] == SECTION["search"]["learning_rate"]
    assert found["variants"] == [
        {"dataset_dir": f"{tmp_path}/data"},
        {"dataset_dir": "/elsewhere", "lora_rank": 4},
    ]


def test_conditions_name_places_as_they_are_searched(tmp_path):
    search = {
        "model_name_or_path": {"choice": ["./m/a", "./m/b"]},
        "lora_rank": {"choice": [4, 8], "when": {"model_name_or_path": "./m/a"}},
        "lora_alpha": {"choice": [4, 8], "when": {"model_name_or_path": ["./m/a", "./m/b"]}},
    }
    arguments = absolute(load(RUN | {"tune": {"search": search}}, environ={}), tmp_path)
    found = [d.when.get("model_name_or_path") for d in sweep_of(arguments).space.dimensions]
    one, two = f"{tmp_path}/m/a", f"{tmp_path}/m/b"
    assert found == [None, (one,), (one, two)]
