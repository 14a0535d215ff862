from llmray.data import template_docs
from llmray.data.template_table import DIFFERENCES, TEMPLATES


def test_the_committed_document_is_current() -> None:
    written = template_docs.DOCS.read_text(encoding="utf-8")
    assert written == template_docs.markdown(), "Run python -m llmray.data.template_docs."


def test_every_name_has_its_row() -> None:
    text = template_docs.markdown()
    assert all(f"\n| `{name}` |" in text for name in TEMPLATES)
    assert all(f"`{name}`" in text.split("## Where")[1] for name in DIFFERENCES)
