"""The worked example, every number of it."""

import doctest

from docs.pages import ROOT, blocks


def test_the_example_says_what_python_does():
    page = ROOT / "docs" / "example.md"
    found = [block for block in blocks(page) if block.language == "pycon"]
    text = "\n\n".join("\n".join(block.lines) for block in found)
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 50
