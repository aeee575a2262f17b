"""README and docs: what they show is what there is."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"\b((?:cli|csrc|models|quant|tests|docs)/[\w./-]+\.(?:py|c|h|md|csv|json|sha256))\b")
LONGEST_README = 200
CITED = re.compile(r"\bSPEC (appendix [A-Z]|\d+(?:\.\d+)?)((?:,| and| to) \d+\.\d+)*")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_links_between_the_papers_lead_somewhere():
    papers = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "models" / "demo" / "README.md"]
    links = [(paper, link) for paper in papers for link in LINK.findall(paper.read_text(encoding="utf-8"))]
    assert len(links) > 10
    assert not [(paper.name, link) for paper, link in links if not (paper.parent / link).exists()]


def test_files_that_the_papers_name_are_there():
    papers = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    named = {name for paper in papers for name in NAMED.findall(paper.read_text(encoding="utf-8"))}
    assert len(named) > 40
    assert not {name for name in named if not (ROOT / name).exists()}
    table = re.findall(r"^\| (.*?) \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    c_files = {name for row in table for name in re.findall(r"`(?:cpu/|cuda/)?(\w+\.[ch])`", row)}
    there = {path.name for folder in ("", "cpu", "cuda") for path in (ROOT / "csrc" / folder).glob("*.[ch]")}
    assert len(c_files) > 20 and not c_files - there
    assert not there - c_files - {"clock.h", "numbers.h"} - {name.replace(".c", ".h") for name in c_files}


def test_the_tables_of_speed_are_those_of_its_csv_files():
    plot = runpy.run_path(str(DOCS / "speed" / "plot.py"))
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    assert plot["page"](page) == page
    shown = {name for _, name, _, _ in plot["MARK"].findall(page)}
    assert shown == {path.name for path in (DOCS / "speed").glob("*.csv")}


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out == "tenalp"


def test_every_number_of_the_spec_that_a_source_cites_is_a_heading():
    headings = re.findall(r"^#+ (Appendix [A-Z]|\d+(?:\.\d+)?)", (DOCS / "spec.md").read_text(encoding="utf-8"), re.M)
    there = {heading.lower() for heading in headings}
    sources = [p for folder in ("cli", "csrc", "models", "quant", "tests") for p in (ROOT / folder).rglob("*")]
    cited = {}
    for path in sources:
        if path.suffix in (".py", ".c", ".h") and path.name != Path(__file__).name:
            for citation in CITED.finditer(path.read_text(encoding="utf-8")):
                for number in re.findall(r"appendix [A-Z]|\d+(?:\.\d+)?", citation[0]):
                    cited.setdefault(number.lower(), path.name)
    assert len(cited) > 10
    assert not {number: name for number, name in cited.items() if number not in there}
