"""The page is self-contained and shows the story's figures; `test_report_page` drives it in a browser."""

import re
from html.parser import HTMLParser

from interp import report


def test_the_page_is_one_file_that_asks_for_nothing(story, tmp_path):
    """Well-formed, no addresses but SVG's namespace, under 2 MB, the same figures."""
    report.write_page(story, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    parser = HTMLParser()
    parser.feed(page)

    assert len(page) < 2_000_000
    assert not re.search(r"<(script|img|link|iframe)[^>]*(src|href)=\"(?!data:)", page)
    assert set(re.findall(r"https?://[^\"'< ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert f"mlp_out, 5: {story.effects['mlp_out'][5]:.4f}" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_has_the_averages(story):
    """With their intervals, to three digits."""
    for site, (mean, low, high) in story.averages.items():
        shown = f"{mean[5].item():z.3f}<td>{low[5].item():z.3f} to {high[5].item():z.3f}"
        assert f"<tr><td>{site}<td>5<td>{shown}</tr>" in report.page(story)
