import pytest

from kogia.tasks.countdown import Countdown
from kogia.tasks.task import Task, load_task

MODULE = """
class Sudoku:
    name = "sudoku"
    def __init__(self, size, seed: int = 0): self.size = size
    def problems(self, split): return []
    def verify(self, problem, response): return None

class Incomplete:
    name = "incomplete"

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A user's module in the current directory, under a name of its own for each test."""
    name = f"user_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("name", ["countdown", "arithmetic"])
def test_built_in_tasks_load_by_name(name):
    task = load_task(name, {"seed": 3})
    assert isinstance(task, Task)
    assert (task.name, task.seed) == (name, 3)


def test_options_are_constructor_arguments():
    assert load_task("countdown", {"numbers": 4, "reward_wrong": -1}) == Countdown(numbers=4, reward_wrong=-1)


def test_a_users_task_loads_by_module_and_class(module):
    assert load_task(f"{module}:Sudoku", {"size": 9}).size == 9


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("countdwn", {}, "did you mean 'countdown'"),
        ("chess", {}, "not one of countdown, arithmetic, knights, strings, mazes, gsm8k"),
        ("no_such_module:Task", {}, "no_such_module"),
        ("kogia.tasks.countdown:Countdwn", {}, "Countdwn"),
        ("countdown", {"max_numbr": 9}, "unknown option 'max_numbr'; did you mean 'max_number'"),
        ("countdown", {"zzz": 9}, "unknown option 'zzz'; known options: "),
        ("countdown", {"numbers": "3"}, "option numbers='3' must be of type int"),
        ("countdown", {"numbers": True}, "option numbers=True must be of type int"),
        ("countdown", {"reward_wrong": "low"}, "must be of type float"),
        ("countdown", {"numbers": 7}, "numbers=7: countdown is played with 2, 3 or 4"),
        ("gsm8k", {}, "path='' does not exist; download"),
    ],
)
def test_a_bad_name_or_option_is_one_clear_error(spec, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(spec, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Sudoku", {}, "option 'size' is required"),
        ("Sudoku", {"size": 9, "sed": 1}, "did you mean 'seed'"),
        ("Incomplete", {}, "lacks problems, verify"),
        ("number", {}, "is a int, must be a class"),
        ("Missing", {}, "Missing"),
    ],
)
def test_a_users_mistakes_are_named(module, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(f"{module}:{name}", options)


def test_a_module_that_fails_while_importing_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_user_task.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="a_package_that_is_not_there"):
        load_task("broken_user_task:Task")
