"""The walls of the house, checked from the import statements and from what a fresh interpreter has really loaded."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
ROOMS = ("annotation", "training", "rewardmodel", "alignment", "demo", "config")
MAY_IMPORT = {
    "annotation": set(),
    "training": set(),
    "rewardmodel": {"annotation", "training"},
    "alignment": {"annotation", "training", "rewardmodel"},
    "demo": {"annotation", "training", "rewardmodel", "alignment"},
    "config": {"annotation", "training", "rewardmodel", "alignment", "demo"},
}
TORCH_FAMILY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate"}
DJANGO_FAMILY = {"django", "rest_framework", "channels", "unfold", "allauth", "csp"}
# In alignment both halves live side by side; a new file says here which half it belongs to.
ALIGNMENT_ML = {
    *("__main__", "fan_out", "options", "methods", "sft", "dpo", "losses"),
    *("loss_kinds", "pair_losses", "transport", "preferences", "preference_metrics", "mismatched", "reference_logps", "kl"),
    *("ppo", "rollout", "answers", "candidates", "selection", "prompts", "generate", "evaluate"),
}
ALIGNMENT_DJANGO = {
    *("models", "services", "selectors", "admin", "apps", "urls", "views", "curves", "tables"),
    *("requests", "child", "worker", "follow", "knowledge", "ledgers", "samples", "waiting", "progress"),
}
FORBIDDEN_NAMES = {"utils", "common", "core", "helpers", "base"}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for room in ROOMS:
        for path in sorted((HOUSE / room).rglob("*.py")):
            parts = path.relative_to(HOUSE).with_suffix("").parts
            if "migrations" not in parts and parts[-1] != "__init__":
                found[".".join(parts)] = path
    return found


def imported_by(path: Path) -> set[str]:
    """Every absolute module name that an import statement of the file names, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the room's name"
            names.add(node.module or "")
    return names


def is_ml(module: str) -> bool:
    room, name = module.split(".")[:2]
    if room == "alignment":
        return name in ALIGNMENT_ML
    return room in {"training", "rewardmodel"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_house_has_its_rooms() -> None:
    for room in ROOMS:
        assert len([name for name in modules() if name.startswith(f"{room}.")]) >= 2, f"{room} is missing or empty"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    for module, path in modules().items():
        if module.startswith(f"{room}."):
            touched = {name.split(".")[0] for name in imported_by(path)} & set(ROOMS)
            assert touched <= MAY_IMPORT[room] | {room}, f"{module} imports {sorted(touched - MAY_IMPORT[room] - {room})}"


def test_each_file_of_alignment_says_which_half_it_belongs_to() -> None:
    names = {module.split(".")[1] for module in modules() if module.startswith("alignment.")} - {"management"}
    assert names <= ALIGNMENT_ML | ALIGNMENT_DJANGO, f"place these: {sorted(names - ALIGNMENT_ML - ALIGNMENT_DJANGO)}"


def test_the_two_halves_do_not_import_each_other_s_libraries() -> None:
    for module, path in modules().items():
        roots = {name.split(".")[0] for name in imported_by(path)}
        forbidden = DJANGO_FAMILY if is_ml(module) else TORCH_FAMILY
        assert not roots & forbidden, f"{module} imports {sorted(roots & forbidden)}"


def test_the_web_starts_without_torch() -> None:
    web = [name for name in modules() if not is_ml(name) and name != "config.settings"]
    loaded = run_python(
        "import os, sys, importlib\n"
        "os.environ['DJANGO_SETTINGS_MODULE'] = 'config.settings'\n"
        "import django; django.setup()\n"
        "import config.urls, config.asgi\n"
        f"[importlib.import_module(name) for name in {web!r}]\n"
        f"print(sorted({TORCH_FAMILY!r} & set(sys.modules)))"
    )
    assert loaded == "[]"


def test_trainers_import_without_django() -> None:
    ml = [name for name in modules() if is_ml(name) and not name.endswith("__main__")]
    loaded = run_python(
        f"import sys, importlib\n[importlib.import_module(name) for name in {ml!r}]\nprint(sorted({DJANGO_FAMILY!r} & set(sys.modules)))"
    )
    assert loaded == "[]"


def test_options_and_run_directories_are_read_without_torch() -> None:
    loaded = run_python(
        "import sys\n"
        "import alignment.options, rewardmodel.options, training.options, training.rundir\n"
        f"print(sorted({TORCH_FAMILY!r} & set(sys.modules)))"
    )
    assert loaded == "[]"


def test_file_names_say_what_the_file_does() -> None:
    vague = [module for module in modules() if module.split(".")[-1] in FORBIDDEN_NAMES]
    assert not vague
    for path in HOUSE.glob("*/**/__init__.py"):
        if not set(path.relative_to(HOUSE).parts) & {".venv", "var"}:
            assert not path.read_text().strip(), f"{path} is not empty"


def test_files_stay_readable() -> None:
    long = {module: len(path.read_text().splitlines()) for module, path in modules().items()}
    assert not {module: lines for module, lines in long.items() if lines > 400}
