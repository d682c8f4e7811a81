"""HTML pages as tests look at them."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that elements are closed in order; collects rows of tables and addresses."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.rows = [], [], set(), {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        if "id" in attributes:
            assert attributes["id"] not in self.ids
            self.ids.add(attributes["id"])
        if tag == "tr":
            self.row = self.rows.setdefault(attributes.get("id", f"row {len(self.rows)}"), [])
        if tag in ("td", "th") and "data-v" in attributes:
            self.row.append(attributes["data-v"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
