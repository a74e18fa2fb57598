"""How the pages that this room writes are read."""

import json
import re
from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    """What a page holds: ids, what refers to them, addresses, text, and its data."""

    VOID = {"meta", "link", "img", "input", "br", "rect", "line"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.ids, self.references, self.addresses, self.text = [], [], set(), [], ""
        self.open, self.json = [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        for name in ("aria-labelledby", "for", "aria-describedby"):
            self.references |= set((given.get(name) or "").split())
        if (given.get("href") or "").startswith("#"):
            self.references.add(given["href"][1:])
        else:
            self.addresses += [given[name] for name in ("src", "href", "action", "srcset") if given.get(name)]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.tags[-1:] == [("script", {"type": "application/json", "id": "data"})]:
            self.json += data
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def data(self):
        return json.loads(self.json)


@pytest.fixture(scope="session")
def page():
    """Function that parses a page, after the checks that every page passes."""
    return _page


def _page(path):
    found = Page(path)
    assert all(address.startswith("data:") for address in found.addresses)
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"(url\(|@import|fetch\(|XMLHttpRequest|import\()", source)
    assert "http" not in source.replace("http://www.w3.org/2000/svg", "")
    assert len(found.ids) == len(set(found.ids))
    assert found.references <= set(found.ids), "refers to ids that are not there"
    wanted = set(re.findall(r'getElementById\("(\w+)"\)', source)) - {"plot", "across", "up", "extent"}
    assert wanted <= set(found.ids), "the script looks for ids that are not there"
    return found
