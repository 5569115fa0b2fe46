"""Tokenizers of the DeepSeek, Qwen and Llama kinds against transformers, on the same files."""

import json
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import (
    LLAMA3,
    QWEN3,
    QWEN25,
    R1,
    V3,
    V31,
    write_deepseek,
    write_llama2,
    write_llama3,
    write_qwen,
)
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from kogia.text import stream
from kogia.text.chat import Message, has_thinking_switch, render_prompt, render_text
from kogia.text.stream import IncrementalDecoder, num_tokens_within
from kogia.text.tokenizer import Tokenizer, train_bpe

TEXTS = ["", "The answer to 3 plus 4 is 12345, naïve 漢字 🐋\n\n  x", " leading", "tab\tand </think> tag", "a  b"]
QUESTION = (Message("user", " 1+1 is? 漢\n"),)
DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "1+1?"),
    Message("assistant", "<think>\none and one</think>\n\n2"),
    Message("user", "and 2+2?"),
)
WRITERS = {
    "r1": lambda path: write_deepseek(path, R1),
    "v3": lambda path: write_deepseek(path, V3),
    "v3.1": lambda path: write_deepseek(path, V31),
    "qwen2.5": lambda path: write_qwen(path, QWEN25),
    "qwen3": lambda path: write_qwen(path, QWEN3),
    "llama2": write_llama2,
    "llama2-metaspace": lambda path: write_llama2(path, metaspace=True),
    "llama3": lambda path: write_llama3(path, LLAMA3),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module", params=WRITERS)
def pair(request, directories):
    """Our tokenizer and that of transformers, of the same directory."""
    transformers = pytest.importorskip("transformers")
    path = directories[request.param]
    return Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)


def test_texts_and_ids_are_those_of_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text, add_special_tokens=False)["input_ids"])


def test_a_raw_text_starts_with_bos_exactly_where_transformers_puts_one(pair):
    ours, theirs = pair
    for text in TEXTS:
        assert ours.encode_raw(text) == theirs(text)["input_ids"]
    if ours.bos is not None:
        assert ours.encode_raw(ours.bos + "a").count(ours.bos_id) == 1


@pytest.mark.parametrize("messages", [QUESTION, DIALOGUE])
def test_prompts_are_those_of_transformers(pair, messages):
    ours, theirs = pair
    for thinking in (None, True, False) if has_thinking_switch(ours) else (None,):
        options = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        turns = [{"role": message.role, "content": message.content} for message in messages]
        ids = theirs.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False, **options)
        assert render_prompt(messages, ours, thinking).token_ids == ids
        assert ours.bos is None or ids.count(ours.bos_id) == ours.decode(ids).count(ours.bos)
        assert ids[:2] != [ours.bos_id] * 2


@pytest.mark.parametrize(
    ("name", "thinking", "opened"),
    [
        ("r1", None, True),
        ("v3", None, False),
        ("v3.1", None, False),
        ("v3.1", False, False),
        ("v3.1", True, True),
        ("qwen3", None, False),
        ("qwen3", True, False),
        ("qwen3", False, False),
        ("llama3", None, False),
    ],
)
def test_whether_a_prompt_opens_a_thought(directories, name, thinking, opened):
    tokenizer = Tokenizer.load(directories[name])
    assert render_prompt(DIALOGUE, tokenizer, thinking).opens_thought is opened


def test_r1_prompts_equal_the_built_in_format(directories):
    tokenizer = Tokenizer.load(directories["r1"])
    assert tokenizer.decode(render_prompt(QUESTION, tokenizer).token_ids) == render_text(QUESTION)


@pytest.mark.parametrize("name", ["r1", "llama3"])
def test_a_thinking_switch_that_a_template_lacks_is_refused(directories, name):
    with pytest.raises(ValueError, match="thinking = False: this model's chat template has no such switch"):
        render_prompt(QUESTION, Tokenizer.load(directories[name]), thinking=False)


def test_a_template_that_refuses_a_conversation_says_so(directories):
    turns = (Message("user", "a"), Message("user", "b"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*refuses.*roles must alternate"):
        render_prompt(turns, Tokenizer.load(directories["llama2"]))


def test_a_prompt_of_any_template_must_end_with_a_question(directories):
    with pytest.raises(ValueError, match="must end with a user message"):
        render_prompt(DIALOGUE[:3], Tokenizer.load(directories["qwen3"]))


def test_special_ids_of_each_family(directories):
    found = {name: Tokenizer.load(path) for name, path in directories.items()}
    assert (found["v3"].bos_id, found["v3"].eos_ids) == (0, (1,))
    assert (found["qwen3"].bos_id, found["qwen3"].bos, found["qwen3"].eos_ids) == (None, None, (2, 0))
    assert (found["llama3"].bos_id, found["llama3"].eos_id, found["llama3"].eos_ids) == (0, 3, (3, 1, 2))
    assert (found["llama2"].bos_id, found["llama2"].eos_ids) == (1, (2,))


def test_end_ids_come_from_config_json_where_no_generation_config_names_them(tmp_path):
    write_llama3(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 3]}')
    assert Tokenizer.load(tmp_path).eos_ids == (3, 1, 2)
    (tmp_path / "generation_config.json").write_text("{}")
    assert Tokenizer.load(tmp_path).eos_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id='x'"):
        Tokenizer.load(tmp_path)


def test_missing_names_come_from_the_special_tokens_map_and_the_end_ids(tmp_path):
    write_llama3(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["bos_token"], config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (Tokenizer.load(tmp_path).bos, Tokenizer.load(tmp_path).eos) == (None, "<|end_of_text|>")
    names = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    assert (Tokenizer.load(tmp_path).bos_id, Tokenizer.load(tmp_path).eos_id) == (0, 3)


def test_the_template_file_comes_before_the_one_in_the_configuration(tmp_path):
    write_qwen(tmp_path, QWEN3)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!\r\n", newline="")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(render_prompt(QUESTION, tokenizer).token_ids) == " 1+1 is? 漢\n!"
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_bytes() == b"{{ messages[0].content }}!\r\n"
    assert render_prompt(QUESTION, Tokenizer.load(tmp_path / "again")) == render_prompt(QUESTION, tokenizer)


def test_of_several_templates_the_default_one_is_used(tmp_path):
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": R1}]
    tokenizer = Tokenizer.load(write_deepseek(tmp_path, both))
    assert tokenizer.decode(render_prompt(QUESTION, tokenizer).token_ids) == render_text(QUESTION)
    with pytest.raises(ValueError, match="none named 'default'"):
        render_prompt(QUESTION, Tokenizer.load(write_deepseek(tmp_path, both[:1])))


def test_a_model_without_a_template_is_prompted_in_the_built_in_format_and_that_is_said_once(tmp_path, capsys):
    tokenizer = Tokenizer.load(write_qwen(tmp_path, None))
    for _ in range(2):
        assert tokenizer.decode(render_prompt(QUESTION, tokenizer).token_ids) == render_text(QUESTION, bos="")
    said = capsys.readouterr().err
    size = len(tokenizer.encode("<｜User｜>"))
    assert said.count("no chat template") == 1
    assert f"{tmp_path / 'tokenizer_config.json'}: " in said and f"(<｜User｜> is {size})" in said and size > 1


def test_nothing_is_said_of_models_that_know_the_format_they_are_prompted_in(tmp_path, capsys):
    own = train_bpe(["a b"], 263)
    own.save(tmp_path / "own")
    for path in (write_deepseek(tmp_path / "r1", None), write_qwen(tmp_path / "qwen"), tmp_path / "own"):
        render_prompt(QUESTION, Tokenizer.load(path))
    plain = Tokenizer.load(write_qwen(tmp_path / "bare", None))
    plain.encode_documents(["texts need no chat format"])
    assert capsys.readouterr().err == ""


def test_saved_files_hold_what_was_read(tmp_path, directories):
    for name, path in directories.items():
        Tokenizer.load(path).save(tmp_path / name)
        before, after = (json.loads((p / "tokenizer_config.json").read_text()) for p in (path, tmp_path / name))
        assert after == before
        assert (
            Backend.from_file(str(tmp_path / name / "tokenizer.json")).to_str()
            == Backend.from_file(str(path / "tokenizer.json")).to_str()
        )


def test_saving_over_another_tokenizer_leaves_no_template_of_it(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("stale")
    train_bpe(["a b"], 263).save(tmp_path)
    assert Tokenizer.load(tmp_path).template is None


@pytest.fixture(scope="module")
def decoded(directories):
    return [Tokenizer.load(directories[name]) for name in ("qwen3", "llama2", "llama2-metaspace")]


@settings(max_examples=300)
@given(st.integers(0, 2), st.data(), st.booleans())
def test_streamed_text_equals_the_whole_text_for_any_ids(decoded, which, data, skip_special):
    tokenizer = decoded[which]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2)))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(ids), max_size=len(ids)))
    decoder, pieces, start = IncrementalDecoder(tokenizer, skip_special), [], 0
    for size in sizes:
        pieces.append(decoder.push(ids[start : start + size]))
        start += size
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip_special)


@given(st.integers(0, 2), st.text())
def test_streamed_text_never_holds_half_a_character(decoded, which, text):
    tokenizer = decoded[which]
    ids, seen = tokenizer.encode(text), ""
    whole = tokenizer.decode(ids)
    decoder = IncrementalDecoder(tokenizer)
    for token_id in ids:
        seen += decoder.push([token_id])
        assert whole.startswith(seen)
    assert seen + decoder.flush() == whole


@settings(max_examples=50)
@given(st.integers(0, 2), st.text(max_size=30), st.integers(0, 40))
def test_tokens_within_a_text_are_those_that_come_before_it_is_longer(decoded, which, text, num_chars):
    tokenizer = decoded[which]
    ids = tokenizer.encode(text) + [0xFF] * (len(text) % 3)
    decoder, length, within = IncrementalDecoder(tokenizer), 0, 0
    for token_id in ids:
        length += len(decoder.push([token_id]))
        within += length <= num_chars
    for stretch in (1, 2, 7, 256):
        with patch.object(stream, "STRETCH", stretch):
            assert num_tokens_within(ids, tokenizer, num_chars) == within


def test_bytes_wait_for_the_end_of_their_run(decoded):
    tokenizer = decoded[1]
    whale = tokenizer.encode("🐋")[1:]
    assert [tokenizer.backend.id_to_token(i) for i in whale] == ["<0xF0>", "<0x9F>", "<0x90>", "<0x8B>"]
    letter = tokenizer.token_id("a")
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push([i]) for i in [*whale, letter, whale[0], letter]] == ["", "", "", "", "🐋a", "", "�a"]


def test_a_decoder_of_another_kind_is_refused(tmp_path):
    write_llama2(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for decoder in (decoders.WordPiece(), decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), None):
        backend.decoder = decoder
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="decoder .* is not supported"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("type", "WordPiece", "not a tokenizer.json of the BPE kind"),
        ("continuing_subword_prefix", "x", "continuing_subword_prefix = 'x' is not supported"),  # would abort python
        ("merges", [["T", "no such token"]], "not a tokenizer.json"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, key, value, message):
    write_qwen(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"][key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_a_file_of_a_megabyte_is_refused(tmp_path, name):
    write_qwen(tmp_path)
    (tmp_path / name).write_text(" " * 1_000_001)
    with pytest.raises(ValueError, match=rf"{name}: larger than 1,000,000 bytes"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_more_than_200_megabytes_is_refused(tmp_path):
    write_qwen(tmp_path)
    with (tmp_path / "tokenizer.json").open("ab") as file:
        file.truncate(200_000_001)
    with pytest.raises(ValueError, match="larger than 200,000,000 bytes"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_out_of_the_directory_is_not_followed(tmp_path, name, there):
    directory = write_qwen(tmp_path / "model")
    (directory / "generation_config.json").unlink()  # so that config.json is asked for the end ids
    if there:
        (tmp_path / "secret").write_text('{"eos_token": "<|im_end|>"}')
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("../secret")
    with pytest.raises(ValueError, match=rf"{name}: a link to .*secret, outside the model directory"):
        Tokenizer.load(directory)


def test_links_inside_a_directory_and_in_the_hub_cache_are_followed(tmp_path):
    plain = write_qwen(tmp_path / "plain")
    (plain / "tokenizer_config.json").rename(plain / "real.json")
    (plain / "tokenizer_config.json").symlink_to("real.json")
    repository = tmp_path / "models--x--y"
    snapshot = write_qwen(repository / "snapshots" / "rev")
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert Tokenizer.load(snapshot).vocab_size == Tokenizer.load(plain).vocab_size


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_byte_order_mark_before_a_file_is_no_part_of_it(tmp_path, name):
    plain = Tokenizer.load(write_qwen(tmp_path))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    marked = Tokenizer.load(tmp_path)
    assert (marked.eos_ids, marked.special_tokens) == (plain.eos_ids, plain.special_tokens)
    assert marked.encode("The answer") == plain.encode("The answer")


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    write_qwen(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(render_prompt(QUESTION, tokenizer).token_ids) == QUESTION[0].content


def token(content, **flags):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return plain | {"content": content} | flags


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"added_tokens_decoder": {"295": token("<|new|>"), "296": token("<|two|>", lstrip=True)}}, 2),
        (
            {
                "added_tokens_decoder": {
                    "430": token("<|new|>"),
                    "423": token("<|two|>", special=False, normalized=True),
                }
            },
            2,
        ),
        ({"added_tokens_decoder": {"293": token("<think>"), "9": {"content": "<|new|>"}}}, 1),
        ({"added_tokens_decoder": {"300": token("<|new|>")}, "additional_special_tokens": ["<|two|>", "<|new|>"]}, 2),
        ({"additional_special_tokens": ["<|two|>", "<|new|>", "<|im_end|>"]}, 2),
        ({"extra_special_tokens": ["<|new|>"]}, 1),
        ({"extra_special_tokens": {"image_token": "<|new|>", "video_token": "<|two|>"}}, 2),
        ({"image_token": "<|new|>", "additional_special_tokens": ["<|two|>"]}, 2),
        ({"pad_token": "<|two|>", "additional_special_tokens": ["<|new|>"]}, 2),
        ({"pad_token": "<|two|>", "mask_token": "answer", "added_tokens_decoder": {"9": token("<|new|>")}}, 3),
        ({"additional_special_tokens": []}, 0),
    ],
)
def test_tokens_that_only_the_configuration_names_are_one_id_as_for_transformers(tmp_path, changes, new):
    transformers = pytest.importorskip("transformers")
    before = Tokenizer.load(write_qwen(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) == before.vocab_size + new
    text = "The answer <|new|> to<|two|> <think>3<|im_end|> 漢"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text), skip_special=True) == theirs.decode(
        ours.encode(text), skip_special_tokens=True
    )
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(text) == ours.encode(text)


def test_the_special_tokens_map_counts_where_the_configuration_has_no_table(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_qwen(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|new|>"]}')
    path, text = tmp_path / "tokenizer_config.json", "a<|new|>b"
    config = json.loads(path.read_text())
    for table in ({}, {"added_tokens_decoder": {"295": token("<|two|>")}}):
        path.write_text(json.dumps(config | table))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert Tokenizer.load(tmp_path).encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("listed", "changes"),
    [
        ({"<|new|>": 295, "<|two|>": 296}, {}),
        ({"<|two|>": 295, "<|new|>": 296}, {"additional_special_tokens": ["<|new|>"]}),
        ({"<think>": 7, "<|new|>": 500}, {}),
        ({"<|new|>": 295}, {"added_tokens_decoder": {"296": token("<|two|>")}}),
    ],
)
def test_the_list_of_added_tokens_counts_where_the_configuration_has_no_table(tmp_path, listed, changes):
    transformers = pytest.importorskip("transformers")
    write_qwen(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(listed))
    path, text = tmp_path / "tokenizer_config.json", "The answer <|new|> to<|two|> <think>3<|im_end|> 漢"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(text) == ids


@pytest.mark.parametrize("listed", [{"<|new|>": "295"}, {"<|new|>": True}, {"": 295}])
def test_a_list_of_added_tokens_that_is_none_is_named(tmp_path, listed):
    write_qwen(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"added_tokens\.json: .*must be a table of ids by token"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens_decoder": ["x"]}, r"added_tokens_decoder=\['x'\]: must be a table"),
        ({"added_tokens_decoder": {"x": token("a")}}, "must be a table of tokens by id"),
        ({"added_tokens_decoder": {"9": "a"}}, "'a': must be a table of content and flags"),
        ({"added_tokens_decoder": {"9": token("a", special=1)}}, "must be a table of content and flags"),
        ({"added_tokens_decoder": {"9": token("")}}, "must be a token's text"),
        ({"additional_special_tokens": "abc"}, "additional_special_tokens='abc': must be a list"),
        ({"additional_special_tokens": [5]}, "additional_special_tokens: 5: must be a token's text"),
    ],
)
def test_added_tokens_that_are_none_are_named_with_the_file(tmp_path, changes, message):
    write_qwen(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: .*{message}"):
        Tokenizer.load(tmp_path)
