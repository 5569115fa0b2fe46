from models_doc import DOC, written

from kogia.model.presets import PRESETS


def test_the_tables_of_the_models_page_are_those_of_the_presets():
    text = DOC.read_text(encoding="utf-8")
    assert text == written(text), "run python benchmarks/models_doc.py"


def test_the_page_names_every_preset():
    text = DOC.read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in text] == []
