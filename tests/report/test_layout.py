"""The page in a browser, narrow and wide, light and dark: nothing is cut off or printed over something else."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report.pages import full_demo

from kogia.report.build import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="the page is measured in Chromium, which is not here")
WIDTHS = (390, 1280)
THEMES = {"light": 1, "dark": 0}

MEASURE = """
<script>
addEventListener("load", () => {
  const name = element => `${element.tagName}.${element.className.baseVal ?? element.className} ` +
    element.textContent.trim().slice(0, 40);
  const width = document.documentElement.clientWidth;
  const box = element => element.getBoundingClientRect();
  const result = {width, dark: matchMedia("(prefers-color-scheme: dark)").matches};
  result.page = document.documentElement.scrollWidth;
  result.scrolled = [...document.querySelectorAll("*")]
    .filter(element => element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display != "inline")
    .filter(element => !element.closest("svg") && element.clientWidth).map(name);
  const words = [...document.querySelectorAll("h1, h2, h3, p, li, dt, dd, figcaption, summary, pre")];
  result.outside = words.filter(e => box(e).left < -0.5 || box(e).right > width + 0.5).map(name);
  result.clipped = []; result.overprinted = []; result.small = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = box(svg), texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
    for (const text of texts) {
      const own = box(text);
      if (own.left < frame.left - 1 || own.right > frame.right + 1 || own.top < frame.top - 1 ||
          own.bottom > frame.bottom + 1) result.clipped.push(`${svg.ariaLabel}: ${text.textContent}`);
      if (own.height < 9) result.small.push(`${svg.ariaLabel}: ${text.textContent}`);
      for (const other of texts) {
        if (other === text) break;
        const theirs = box(other);
        const across = Math.min(own.right, theirs.right) - Math.max(own.left, theirs.left);
        const down = Math.min(own.bottom, theirs.bottom) - Math.max(own.top, theirs.top);
        if (across > 1 && down > 2) result.overprinted.push(`${text.textContent} / ${other.textContent}`);
      }
    }
  }
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
  };
  result.faint = [...document.querySelectorAll("body *")]
    .filter(element => [...element.childNodes].some(node => node.nodeType == 3 && node.textContent.trim()))
    .filter(element => !["script", "style", "title"].includes(element.tagName.toLowerCase()))
    .filter(element => {
      const style = getComputedStyle(element);
      const own = light(element.closest("svg") ? style.fill : style.color), other = light(behind(element));
      return (Math.max(own, other) + 0.05) / (Math.min(own, other) + 0.05) < 4.5;
    }).map(name);
  parent.postMessage(JSON.stringify(result), "*");
});
</script>
"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<script>addEventListener("message", event => document.body.dataset.found = event.data)</script>
<iframe style="border: 0; width: WIDTHpx; height: 2000px" src="page.html"></iframe>
"""  # a window cannot be as narrow as a telephone


def chromium(page: Path, profile: Path, theme: str) -> str:
    """The page as headless Chromium has it in the end."""
    switches = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
        f"--user-data-dir={profile}", "--window-size=1400,2000",
        f"--blink-settings=preferredColorScheme={THEMES[theme]}",
    ]  # fmt: skip
    command = [str(BROWSER), *switches, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The fullest page there is, which measures itself and tells the page around it."""
    folder = tmp_path_factory.mktemp("pages")
    text = write_report(full_demo(folder / "demo")).read_text(encoding="utf-8")
    (folder / "page.html").write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    for width in WIDTHS:
        (folder / f"{width}.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module", params=[(width, theme) for width in WIDTHS for theme in THEMES], ids=str)
def measured(request, page, tmp_path_factory) -> dict[str, Any]:
    width, theme = request.param
    dom = chromium(page.with_name(f"{width}.html"), tmp_path_factory.mktemp("profile"), theme)
    (found,) = re.findall(r'data-found="(.*?)"', dom)
    result = json.loads(html.unescape(found))
    assert (result["width"], result["dark"]) == (width, theme == "dark")
    return result


def test_the_page_is_as_wide_as_the_window_and_only_tables_of_a_narrow_one_are_scrolled(measured):
    assert measured["page"] == measured["width"]
    scrolled = [name for name in measured["scrolled"] if measured["width"] > 1000 or not name.startswith("DIV.scroll")]
    assert scrolled == []


def test_no_words_but_those_of_a_table_leave_the_window(measured):
    assert measured["outside"] == []


@pytest.mark.parametrize("fault", ["clipped", "overprinted", "small"])
def test_the_labels_of_the_charts_are_whole_apart_and_large_enough(measured, fault):
    assert measured[fault] == []


def test_all_text_stands_out_from_what_is_behind_it(measured):
    assert measured["faint"] == []
