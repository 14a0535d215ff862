import json
from pathlib import Path

import pytest
import yaml

from llmray.arguments.run import load

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    flat = load(path, environ={}).flat()
    assert written.keys() <= flat.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_data_that_is_here(path: Path) -> None:
    data = load(path, environ={}).data
    info = json.loads((ROOT / data.dataset_dir / "dataset_info.json").read_text())
    for name in (*data.dataset, *data.eval_dataset):
        assert (ROOT / data.dataset_dir / info[name]["file_name"]).is_file()


def test_configs_say_in_their_first_line_what_they_are() -> None:
    assert CONFIGS
    assert all(path.read_text().startswith("# ") for path in CONFIGS)


def test_demonstration_data_is_what_its_script_writes() -> None:
    namespace: dict = {"__name__": "make_demo"}
    exec((ROOT / "data" / "make_demo.py").read_text(), namespace)
    written = json.loads((ROOT / "data" / "demo_persona.json").read_text())
    assert written == namespace["persona_rows"]()
    assert all(row["output"].endswith("\n— Raylo") for row in written)
    assert json.loads((ROOT / "data" / "dataset_info.json").read_text()) == namespace["INFO"]
