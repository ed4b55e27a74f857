"""The site's pages that are kept elsewhere in the repository, and docstrings as mkdocstrings reads them."""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# They appear under their own paths, so that links between them work in the repository and on the site.
OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "assets/app.webp", "bench/*.md", "bench/results/*.svg"]


def on_config(config: MkDocsConfig) -> None:
    """Lists the pages of docs/ops/ in the navigation."""
    (section,) = [entry for entry in config.nav if "Ops" in entry]
    section["Ops"] = sorted(str(path.relative_to(config.docs_dir)) for path in Path(config.docs_dir).glob("ops/*.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures of `OUTSIDE` to the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Links between `OUTSIDE` and docs/, whose pages are one folder higher on the site than in the repository."""
    if page.file.generated_by:
        return markdown.replace("](docs/", "](")
    inside = "](" + "../" * page.file.src_uri.count("/")
    return markdown.replace(inside + "../", inside)


class Docstrings(griffe.Extension):
    """Adapts docstrings: griffe knows "Examples:" only, and Markdown reads "[F; E] [B, C]" as a link."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r"\] \[(?=[A-Z])", r"] \[", value)
