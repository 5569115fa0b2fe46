import time

import pytest

from kogia.tasks.format import answer_text, gives_up, language_consistency, think_format


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("thought\n</think>\n7", 1.0),
        ("a thought</think>7", 1.0),
        ("</think>7", 0.0),
        (" \n</think>7", 0.0),
        ("...</think>7", 0.0),
        ("</think>.", 0.0),
        ("a thought</think>.", 0.0),
        ("a thought</think><answer></answer>", 0.0),
        ("我们</think>是", 1.0),
        ("thought\n</think>\n", 0.0),
        ("thought, then 7", 0.0),
        ("a</think>b</think>c", 0.0),
        ("a<think>b</think>c", 0.0),
        ("a</think>b<think>", 0.0),
        ("", 0.0),
    ],
)
def test_the_think_structure_is_all_or_nothing(completion, score):
    assert think_format(completion) == score


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("so the answer is 17", "LATIN", 1.0),
        ("15-4=11, 11+6=17", "LATIN", 1.0),
        ("", "LATIN", 1.0),
        ("déjà vu, naïve", "LATIN", 1.0),
        ("one два three четыре", "LATIN", 0.5),
        ("one два three четыре", "CYRILLIC", 0.5),
        ("hello 我们", "LATIN", 1 / 3),
        ("我们需要 x", "CJK", 0.8),
        ("mixedбук word", "LATIN", 0.5),
        ("我们需要3个apple树", "CJK", 6 / 7),
    ],
)
def test_language_consistency_is_the_share_of_words_in_the_script(text, script, share):
    assert language_consistency(text, script) == pytest.approx(share)


@pytest.mark.parametrize(
    "foreign", ["我们需要计算苹果。", "リンゴを数えます。", "ສະບາຍດີ", "вычислимсуммуяблок", "사과를더합니다"]
)
@pytest.mark.parametrize("joint", ["", " "])
def test_a_foreign_text_weighs_the_same_when_it_is_glued_to_a_word(foreign, joint):
    assert language_consistency("the answer is a" + joint + foreign * 200) < 0.1


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("  1+2 ", "1+2"),
        ("so <answer> 1+2 </answer>.", "1+2"),
        ("<answer>1</answer><answer>\n2\n</answer>", "2"),
        ("<answer>1", "<answer>1"),
        ("<answer></answer>", ""),
        ("</answer> 3 <answer>", "</answer> 3 <answer>"),
        ("<answer>1 <answer>2</answer> </answer>", "2"),
    ],
)
def test_the_answer_is_the_tagged_part_or_everything(answer, text):
    assert answer_text(answer) == text


@pytest.mark.parametrize("tags", ["<answer>", "</answer>", "<answer></answer>", "<answer>1"])
def test_many_tags_cost_no_time(tags):
    started = time.process_time()
    answer_text(tags * 20_000)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("answer", ["give up", " Give up. ", "GIVE UP"])
def test_giving_up_is_recognised(answer):
    assert gives_up(answer)


@pytest.mark.parametrize("answer", ["", "I give up on that, so 3+4", "giveup", "never give up"])
def test_giving_up_is_not_read_into_other_answers(answer):
    assert not gives_up(answer)
