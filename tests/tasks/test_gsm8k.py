import gzip
import json
from pathlib import Path

import pytest

from kogia.tasks.gsm8k import Gsm8k, gold_answer
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Response, load_task

DATA = Path(__file__).parents[3] / "shared/data/math"
ROWS = [
    {"question": "How many?", "answer": "She has 3*4=<<3*4=12>>12.\n#### 1,012"},
    {"question": " Half of one? ", "answer": "0.5"},
]


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def task(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "gsm8k_test.jsonl.gz", ROWS[:1])
    return Gsm8k(path=str(tmp_path))


def test_problems_are_read_from_a_folder(task):
    train = task.problems("train")
    assert [item.data["answer"] for item in train] == ["1012", "0.5"]
    assert train[1].messages[0].content == "Half of one?\nPut the final number in \\boxed{}."
    assert [item.id for item in train] == ["gsm8k/train/0", "gsm8k/train/1"]
    assert len(task.problems("test")) == 1


def test_a_single_file_serves_the_split_its_lines_name(tmp_path):
    path = write(tmp_path / "mine.jsonl", [row | {"split": "test"} for row in ROWS])
    task = Gsm8k(path=str(path), instruction="")
    assert [item.messages[0].content for item in task.problems("test")] == ["How many?", "Half of one?"]
    with pytest.raises(ValueError, match="holds no train problems"):
        task.problems("train")


@pytest.mark.parametrize(
    ("answer", "status", "reward", "extracted"),
    [
        ("It is \\boxed{1012}.", "ok", 1.0, "1012"),
        ("#### 1,012", "ok", 1.0, "1,012"),
        ("so 1012.0 apples", "ok", 1.0, "1012.0"),
        ("\\boxed{1012\\text{ apples}}", "ok", 1.0, "1012\\text{ apples}"),
        ("\\boxed{1011} is near 1012", "wrong", 0.0, "1011"),
        ("many", "parse_fail", 0.0, None),
        ("give up", "give_up", 0.0, "give up"),
    ],
)
def test_answers_are_judged(task, answer, status, reward, extracted):
    problem = Problem("p", (), {"answer": "1012"})
    found = task.verify(problem, Response(f"thought 7</think>{answer}", 9, False))
    assert (found.status, found.reward, found.extracted) == (status, reward, extracted)


def test_a_number_inside_an_open_thought_is_no_answer(task):
    problem = Problem("p", (), {"answer": "1012"})
    assert task.verify(problem, Response("it is \\boxed{1012}", 9, False)).status == "parse_fail"
    assert task.verify(problem, Response("it is \\boxed{1012}", 9, True)).status == "truncated"


def test_the_pool_judges_it_in_processes(task):
    problem = Problem("p", (), {"answer": "1012"})
    answers = ["\\boxed{1012}", "\\boxed{2024/2}", "\\boxed{x}", "\\boxed{9^{9^{9^{9}}}}"]
    pairs = [(problem, Response(f"</think>{answer}", 9, False)) for answer in answers]
    with VerifyPool("gsm8k", {"path": task.path}, workers=1, timeout=2.0) as pool:
        verdicts = pool.verify_all(pairs)
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("#### 1,234,567", "1234567"),
        ("-$1,000.50", "-$1000.50"),
        ("0,1", "0,1"),
        ("[0,100)", "[0,100)"),
        ("\\{1,234\\}", "\\{1,234\\}"),
        ("1, 2", "1, 2"),
    ],
)
def test_only_thousands_marks_are_taken_out_of_a_gold_answer(answer, gold):
    assert gold_answer(answer) == gold


@pytest.mark.parametrize("path", ["", "no/such/folder"])
def test_a_missing_path_says_how_to_get_the_data(path):
    with pytest.raises(ValueError, match="does not exist; download train.jsonl"):
        load_task("gsm8k", {"path": path})


def test_a_folder_without_the_files_names_them(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of gsm8k_train.jsonl.gz.*download"):
        Gsm8k(path=str(tmp_path)).problems("train")


@pytest.mark.parametrize("content", ["{", "[1]\n", '{"question": "q"}\n', '{"question": "q", "answer": 3}\n'])
def test_a_broken_file_is_named_with_the_line(tmp_path, content):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"train.jsonl:"):
        Gsm8k(path=str(tmp_path)).problems("train")


def test_a_truncated_archive_is_named(tmp_path):
    path = write(tmp_path / "train.jsonl.gz", ROWS * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train.jsonl.gz: after line"):
        Gsm8k(path=str(tmp_path)).problems("train")


@pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl.gz").exists(), reason=f"needs gsm8k_*.jsonl.gz in {DATA}")
def test_the_published_solutions_are_right():
    task = Gsm8k(path=str(DATA))
    assert (len(task.problems("train")), len(task.problems("test"))) == (7473, 1319)
    with gzip.open(DATA / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row, problem in zip(rows, task.problems("test"), strict=True):
        assert gold_answer(row["solution"]) == problem.data["answer"]
        assert task.verify(problem, Response(f"</think>{row['solution']}", 99, False)).correct
