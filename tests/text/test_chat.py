import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_families import LLAMA3, QWEN3, R1, V3, V31, write_deepseek, write_llama3, write_qwen

from kogia.text.chat import (
    Message,
    Prompt,
    canonical_reply,
    continue_prompt,
    parse_response,
    render_example,
    render_prompt,
    render_text,
)
from kogia.text.thoughts import ThoughtSplitter, num_thought_tokens
from kogia.text.tokenizer import BOS, CHAT_TEMPLATE, END_THINK, EOS, THINK, Tokenizer, train_bpe

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
    assert TOKENIZER.decode(render_prompt(messages, TOKENIZER).token_ids) == text


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
    ids = render_prompt(messages, TOKENIZER).token_ids
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
        assert ids == render_prompt(messages, TOKENIZER).token_ids


def test_an_example_is_masked_to_the_completion_and_its_end():
    messages, completion = CONVERSATIONS[0], "15-4=11,11+6=17 yes\n</think>\n(15-4)+6"
    ids, mask = render_example(messages, completion, TOKENIZER)
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    untrained = [token for token, on in zip(ids, mask, strict=True) if not on]
    assert TOKENIZER.decode(trained) == completion + EOS
    assert untrained == render_prompt(messages, TOKENIZER).token_ids
    assert mask == sorted(mask)  # zeros, then ones


@pytest.mark.parametrize(
    ("write", "template", "completion", "written"),
    [
        (write_deepseek, R1, "one\n</think>\n\n2", "one\n</think>\n\n2"),
        (write_deepseek, V3, "</think>\n\n2", "2"),
        (write_deepseek, V31, "one\n</think>\n\n2", "one\n</think>\n\n2"),  # the template's switch is on
        (write_deepseek, V31, "</think>\n\n2", "2"),
        (write_qwen, QWEN3, "one\n</think>\n\n2", "<think>\none\n</think>\n\n2"),
        (write_qwen, QWEN3, "<think>\none\n</think>\n\n2", "<think>\none\n</think>\n\n2"),
        (write_llama3, LLAMA3, "2", "2"),
    ],
)
def test_an_example_is_what_the_model_itself_writes_after_its_template(tmp_path, write, template, completion, written):
    tokenizer = Tokenizer.load(write(tmp_path, template))
    messages = CONVERSATIONS[0]
    ids, mask = render_example(messages, completion, tokenizer)
    start = mask.index(1)
    assert tokenizer.decode(ids[start:]) == written + tokenizer.eos
    thinks = True if template == V31 and completion.startswith("one") else None
    prompt = render_prompt(messages, tokenizer, thinks)
    assert Prompt.of(ids[:start], tokenizer) == prompt
    assert prompt.parse(written).answer == Prompt([], END_THINK in completion).parse(completion).answer == "2"


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "closed"),
    [
        ("a b no\n</think>\n(1+2)", "a b no", "(1+2)", True),
        ("one</think>two</think>three", "one", "two</think>three", True),
        ("</think>\n7", None, "7", True),
        ("thought\n</think>\n", "thought", "", True),
        ("cut off: the answer is 7", "cut off: the answer is 7", "", False),
        ("", None, "", False),
    ],
)
def test_a_response_splits_at_the_first_end_of_thought(text, thinking, answer, closed):
    parsed = parse_response(text)
    assert (parsed.thinking, parsed.answer, parsed.closed) == (thinking, answer, closed)


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "closed"),
    [
        ("<think>\na b\n</think>\n\n7", "a b", "7", True),
        ("\n<think>a</think>b</think>7", "a", "b</think>7", True),
        ("<think>\n\n</think>\n\n7", None, "7", True),
        ("<think>\ncut off: 7", "cut off: 7", "", False),
        ("<think>", None, "", False),
        (" 7 and <think> 8", None, "7 and <think> 8", True),
        ("no opening tag</think>7", None, "no opening tag</think>7", True),
        ("", None, "", True),
    ],
)
def test_a_response_to_a_prompt_that_opens_no_thought_may_open_one_itself(text, thinking, answer, closed):
    prompt = Prompt([], opens_thought=False)
    parsed = prompt.parse(text)
    assert (parsed.thinking, parsed.answer, parsed.closed) == (thinking, answer, closed)
    assert parse_response(prompt.canonical(text)) == parsed


@given(st.text().filter(lambda text: END_THINK not in text), st.text())
def test_whatever_was_thought_the_answer_is_read_back(thinking, answer):
    assert parse_response(f"{thinking}{END_THINK}\n{answer}").answer == answer.strip()


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "</thi", "nk>", " ", "\n", "a", "7"]), max_size=12), st.booleans()
)
def test_a_completion_and_a_stream_of_it_have_the_same_thought_and_answer(pieces, opens_thought):
    splitter = ThoughtSplitter(opens_thought)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    thought, answer = ("".join(each).strip() for each in zip(*parts, strict=True))
    parsed = Prompt([], opens_thought).parse("".join(pieces))
    assert (parsed.thinking or "", parsed.answer) == (thought, answer)


@pytest.mark.parametrize("messages", [(), (Message("user", "q"), Message("assistant", "a"))])
def test_a_prompt_must_end_with_a_question(messages):
    with pytest.raises(ValueError, match="must end with a user message"):
        render_prompt(messages, TOKENIZER)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role='wizard'.*system, user, assistant"):
        Message("wizard", "x")


INSIDE, OUTSIDE = Prompt([], opens_thought=True), Prompt([], opens_thought=False)


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("What is 2+2? <think>", True),
        ("What is 2+2? <think>\n \n", True),
        ("<think>", True),
        ("<think>\nIt is", False),
        ("think", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("write", [write_deepseek, write_qwen, write_llama3])
def test_raw_text_opens_a_thought_as_a_rendered_prompt_does(tmp_path, write, text, opens):
    tokenizer = Tokenizer.load(write(tmp_path))
    ids = tokenizer.encode_raw(text)
    assert Prompt.of(ids, tokenizer) == Prompt(ids, opens)
    assert Prompt.of(tuple(ids), tokenizer) == Prompt(ids, opens)


@pytest.mark.parametrize(
    ("content", "reasoning", "inside", "outside", "thought"),
    [
        ("", "", "", "", ""),
        ("", "So 2", "So 2", "<think>\nSo 2", "So 2"),
        ("<think>\nSo 2", None, "So 2", "<think>\nSo 2", "So 2"),
        (" <think>So 2", None, "So 2", "<think>\nSo 2", "So 2"),
        ("<think>\n", None, "", "<think>\n", ""),
        ("It is", None, "\n</think>\n\nIt is", "It is", None),
        ("It is", "So 2", "So 2\n</think>\n\nIt is", "<think>\nSo 2\n</think>\n\nIt is", None),
        ("<think>\nSo 2</think>It is", None, "So 2</think>It is", "<think>\nSo 2</think>It is", None),
        ("What is <think>?", None, "\n</think>\n\nWhat is <think>?", "What is <think>?", None),
    ],
)
def test_an_answer_goes_on_from_its_beginning_or_from_that_of_its_thought(content, reasoning, inside, outside, thought):
    for prompt, text in ((INSIDE, inside), (OUTSIDE, outside)):
        is_given = bool(content or reasoning)
        is_open = thought is not None and (is_given or prompt.opens_thought)
        got = continue_prompt(prompt, content, reasoning, TOKENIZER)
        num_thought = len(TOKENIZER.encode(thought)) if is_open else 0
        assert got == Prompt(TOKENIZER.encode(text), is_open, num_thought, is_given)


@pytest.mark.parametrize("prompt", [INSIDE, OUTSIDE])
@pytest.mark.parametrize("canonical", ["a b\n</think>\n\n7", "</think>\n\n7", "a</think>b</think>7"])
def test_what_a_model_writes_reads_back_as_it_was_meant(prompt, canonical):
    assert prompt.canonical(prompt.own(canonical)) == canonical


def test_thinking_tokens_end_at_the_first_closing_tag():
    end = TOKENIZER.token_id("</think>")
    assert num_thought_tokens([9, 9, end, 9, end, 9], TOKENIZER, True) == 2
    assert num_thought_tokens([9, 9, 9], TOKENIZER, True) == 3
    assert num_thought_tokens([end], TOKENIZER, True) == 0
    assert num_thought_tokens([], TOKENIZER, True) == 0


def test_thinking_tokens_where_the_prompt_opens_no_thought():
    begin, end = TOKENIZER.token_id("<think>"), TOKENIZER.token_id("</think>")
    assert num_thought_tokens([9, 9, 9], TOKENIZER, False) == 0
    assert num_thought_tokens([begin, 9, 9], TOKENIZER, False) == 3
    assert num_thought_tokens([begin, 9, end, 9], TOKENIZER, False) == 2


def test_thinking_tokens_where_the_tag_is_no_token(tmp_path):
    tokenizer = Tokenizer.load(write_llama3(tmp_path))
    thought = tokenizer.encode("The answer")
    ids = [*thought, *tokenizer.encode("</think>"), *tokenizer.encode("7")]
    assert len(ids) > len(thought) + 2
    assert num_thought_tokens(ids, tokenizer, True) == len(thought)


def test_tokens_of_a_thought_that_is_shown_are_those_before_the_tag_that_ends_it():
    begin, end = TOKENIZER.token_id("<think>"), TOKENIZER.token_id("</think>")
    for ids, opened, closed in (([9, end, 9, end, 9], 1, 0), ([begin, 9, end, 9], 2, 2), ([9, 9], 2, 0), ([], 0, 0)):
        assert num_thought_tokens(ids, TOKENIZER, opens_thought=True) == opened
        assert num_thought_tokens(ids, TOKENIZER, opens_thought=False) == closed


THOUGHTFUL, BARE, OPEN = "2+2\n</think>\n\n4", "</think>\n\n4", "<think>\n2+2"


@pytest.mark.parametrize(
    ("text", "reasoning", "canonical"),
    [
        ("<think>\n2+2\n</think>\n\n4", None, THOUGHTFUL),
        (" \n<think>\n2+2\n</think>\n\n4", None, THOUGHTFUL),
        ("<think>\n<think>\n2+2\n</think>\n\n4", None, THOUGHTFUL),
        (THOUGHTFUL, None, THOUGHTFUL),
        ("4", None, BARE),
        (BARE, None, BARE),
        ("", None, "</think>\n\n"),
        (" 4\n", None, "</think>\n\n 4\n"),
        ("<think>\n2+2", None, OPEN),
        (" <think>2+2", None, OPEN),
        ("4", "2+2", THOUGHTFUL),
        ("4", " \n2+2\n", THOUGHTFUL),
        ("4", "<think>\n2+2\n</think>", THOUGHTFUL),
        ("</think>\n\n4", "2+2", THOUGHTFUL),
        ("<think>\n\n</think>\n\n4", "2+2", THOUGHTFUL),
        ("<think>\n2+2\n</think>\n\n4", "2+2", THOUGHTFUL),
        ("4", " ", BARE),
    ],
)
def test_a_thought_is_read_wherever_a_data_set_puts_it(text, reasoning, canonical):
    assert canonical_reply(text, reasoning) == canonical
    assert canonical_reply(canonical) == canonical


def test_two_different_thoughts_of_one_reply_are_refused():
    for text in ("<think>\n3+1\n</think>\n\n4", "3+1</think>4", "<think>3+1"):
        with pytest.raises(ValueError, match=r"two thoughts, '2\+2' beside the reply and '\\?n?3\+1"):
            canonical_reply(text, "2+2")


@pytest.mark.parametrize(
    ("write", "template", "completion", "written"),
    [
        (write_deepseek, R1, "<think>\n2+2\n</think>\n\n4", "2+2\n</think>\n\n4"),
        (write_deepseek, R1, " \n<think>2+2</think>4", "2+2</think>4"),
        (write_deepseek, R1, "4", "</think>\n\n4"),
        (write_deepseek, R1, "<think>\n2+2", "2+2"),
        (write_deepseek, V31, "<think>\n\n</think>\n\n4", "4"),
        (write_deepseek, V31, "<think>\n2+2", "2+2"),
        (write_qwen, QWEN3, " <think>\n2+2\n</think>\n\n4", "<think>\n2+2\n</think>\n\n4"),
        (write_qwen, QWEN3, "2+2\n</think>\n\n4", "<think>\n2+2\n</think>\n\n4"),
        (write_qwen, QWEN3, "<think>2+2", "<think>\n2+2"),
        (write_qwen, QWEN3, "\n\n4", "4"),
    ],
)
def test_however_a_reply_is_written_a_thought_is_opened_once(tmp_path, write, template, completion, written):
    tokenizer = Tokenizer.load(write(tmp_path, template))
    ids, mask = render_example(CONVERSATIONS[0], completion, tokenizer)
    start = mask.index(1)
    assert tokenizer.decode(ids[start:]) == written + tokenizer.eos
    thought = "2+2" in completion
    assert tokenizer.decode(ids).count(THINK) == (thought or template == R1)
