import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.text.chat import Message, parse_response, render_example, render_prompt, render_text
from kogia.text.tokenizer import BOS, CHAT_TEMPLATE, END_THINK, EOS, train_bpe

TOKENIZER = train_bpe([f"numbers {a} {b} target {a + b} no\n" for a in range(30) for b in range(9)], 500)

CONVERSATIONS = [
    (Message("user", "numbers 4 6 15 target 17"),),
    (Message("system", "Be brief."), Message("user", "1+1?")),
    (Message("system", "A"), Message("system", "B"), Message("user", " hi\n")),
    (
        Message("user", "1+1?"),
        Message("assistant", "2", reasoning="one and one"),
        Message("user", "and 2+2?"),
        Message("assistant", "so\n</think>\n4"),
        Message("user", "<｜User｜> in the text"),
    ),
]


def as_dicts(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


def template():
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(CHAT_TEMPLATE)


def test_a_prompt_is_spelled_as_deepseek_r1_spells_it():
    messages = CONVERSATIONS[3][:3]
    text = (
        "<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>2<｜end▁of▁sentence｜>"
        "<｜User｜>and 2+2?<｜Assistant｜><think>\n"
    )
    assert render_text(messages) == text
    assert TOKENIZER.decode(render_prompt(messages, TOKENIZER)) == text


def test_earlier_turns_keep_only_what_follows_the_thought():
    assert "<｜Assistant｜>\n4<｜end▁of▁sentence｜>" in render_text(CONVERSATIONS[3])


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_chat_template_renders_the_same_text(messages):
    rendered = template().render(messages=as_dicts(messages), bos_token=BOS, eos_token=EOS, add_generation_prompt=True)
    assert rendered == render_text(messages)


TURNS = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20)), max_size=5)


@given(TURNS, st.text(max_size=20))
def test_the_chat_template_renders_the_same_text_for_any_messages(turns, question):
    messages = [*turns, Message("user", question)]
    rendered = template().render(messages=as_dicts(messages), bos_token=BOS, eos_token=EOS, add_generation_prompt=True)
    assert rendered == render_text(messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_prompt_has_one_beginning_of_sentence(messages):
    ids = render_prompt(messages, TOKENIZER)
    assert ids[0] == TOKENIZER.bos_id
    assert ids.count(TOKENIZER.bos_id) == 1


@pytest.mark.parametrize("loader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_reads_the_directory_and_gives_the_same_ids(tmp_path, loader):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = getattr(transformers, loader).from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    for text in [
        "numbers 4 6 15 target 17",
        "15-4=11,11+6=17 yes\n</think>\n(15-4)+6",
        "漢字 🐋 é 12345",
        "  a  \n\n b",
    ]:
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text)) == text
    for messages in CONVERSATIONS:
        ids = theirs.apply_chat_template(
            as_dicts(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids == render_prompt(messages, TOKENIZER)


def test_an_example_is_masked_to_the_completion_and_its_end():
    messages, completion = CONVERSATIONS[0], "15-4=11,11+6=17 yes\n</think>\n(15-4)+6"
    ids, mask = render_example(messages, completion, TOKENIZER)
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    untrained = [token for token, on in zip(ids, mask, strict=True) if not on]
    assert TOKENIZER.decode(trained) == completion + EOS
    assert untrained == render_prompt(messages, TOKENIZER)
    assert mask == sorted(mask)  # zeros, then ones


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "closed"),
    [
        ("a b no\n</think>\n(1+2)", "a b no", "(1+2)", True),
        ("one</think>two</think>three", "one</think>two", "three", True),
        ("</think>\n7", None, "7", True),
        ("thought\n</think>\n", "thought", "", True),
        ("cut off: the answer is 7", "cut off: the answer is 7", "", False),
        ("", None, "", False),
    ],
)
def test_a_response_splits_at_the_last_end_of_thought(text, thinking, answer, closed):
    parsed = parse_response(text)
    assert (parsed.thinking, parsed.answer, parsed.closed) == (thinking, answer, closed)


@given(st.text(), st.text().filter(lambda text: END_THINK not in text))
def test_whatever_was_thought_the_answer_is_read_back(thinking, answer):
    assert parse_response(f"{thinking}{END_THINK}\n{answer}").answer == answer.strip()


@pytest.mark.parametrize("messages", [(), (Message("user", "q"), Message("assistant", "a"))])
def test_a_prompt_must_end_with_a_question(messages):
    with pytest.raises(ValueError, match="must end with a user message"):
        render_prompt(messages, TOKENIZER)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role='tool'.*system, user, assistant"):
        Message("tool", "x")
