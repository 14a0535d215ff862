import importlib
import pkgutil
import subprocess
import sys

import pytest

import llmray

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(llmray.__path__, "llmray.")
    if module.name != "llmray.__main__"
)

HEAVY = ("torch", "transformers", "peft", "ray", "datasets", "accelerate", "numpy", "pyarrow")


def loaded_after(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize(
    "statement",
    [
        "import llmray.cli",
        "from llmray.cli import main; main(['--help'])",
        "import llmray.arguments.loading",
        "import llmray.arguments.reference",
        "import llmray.arguments.paths",
        "import llmray.launch",
        "from llmray.cli import main; main(['check', 'learning_rte=1', 'stage=sft'])",
        "from llmray.cli import main; main(['check', '--explain', 'lora_rank', 'stage=sft'])",
        "from llmray.cli import main; main(['completion', 'bash'])",
    ],
)
def test_the_command_line_and_arguments_stay_light(statement: str) -> None:
    assert loaded_after(statement) == set()


def test_the_core_does_not_load_ray() -> None:
    assert "ray" not in loaded_after("import llmray.local")


def test_orchestration_is_what_loads_ray() -> None:
    assert "ray" in loaded_after("import llmray.orchestration.train_job")
