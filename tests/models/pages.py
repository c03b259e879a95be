"""Pages, as tests read them."""

from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """Sees that every element is closed, and collects tags, sources of images and passages of text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen = Counter[str]()
        self.sources: list[str] = []
        self.passages: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.sources += [value or "" for name, value in attrs if name == "src"]
        if tag == "pre":
            self.passages.append("")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.passages[-1] += data
