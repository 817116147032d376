"""What `make docs` does beyond the pages in docs/: pages from elsewhere, and their links.

The first page is the repository's README, and some other Markdown files become pages too. Links
that hold in the repository are rewritten to hold on the site; a link to a file that is no page
keeps its words and loses its target. A reference page that shows a package shows all of its
modules: those that it names, in its order, and behind them the others. A package that no page shows
is a warning, which ends the build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

#: Files of the repository that become pages, by the page's name.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "training.md": "training/README.md",
    "tour.md": ".work/tour/tour.md",  # as `make docs` executed it
}
#: What such a page is made from, where that is another file: its links are relative to this one.
_MADE_FROM = {"tour.md": "docs/tour.ipynb"}
_NAMES = {_MADE_FROM.get(page, source): page for page, source in PAGES.items()}
# Commands have --help instead.
_FOLDERS = ("runtime", "schemas", "graphs", "calib", "bench", "integrations")
_SHOWN = re.compile(r"^::: (\S+)", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


log = logging.getLogger("mkdocs.hooks.spiffy")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere; miss no package in the reference."""
    root = Path(config.config_file_path).parent
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    pages = (root / "docs/reference").glob("*.md")
    shown = {name for page in pages for name in _SHOWN.findall(page.read_text(encoding="utf-8"))}
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("__init__.py")):
            name = ".".join(("spiffy", *path.parent.relative_to(root).parts))
            if name not in shown:
                log.warning("%s is on no page of docs/reference: add '::: %s'", name, name)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the page's links; on a reference page, show the modules that it does not name."""
    name = page.file.src_uri
    source = PurePosixPath(_MADE_FROM.get(name) or PAGES.get(name, f"docs/{name}"))
    if name.startswith("reference/"):
        markdown += _others(markdown, Path(config.config_file_path).parent)

    def rewritten(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        if not target or ":" in target:
            return link[0]
        file = normpath(source.parent / target)
        page_name = _NAMES.get(file, file.removeprefix("docs/"))
        if file not in _NAMES and not file.startswith("docs/"):
            return text if text.startswith("`") else f"`{text}`"
        return f"{image}[{text}]({relpath(page_name, PurePosixPath(name).parent)}{anchor})"

    return _LINK.sub(rewritten, markdown)


def _others(markdown: str, root: Path) -> str:
    """Directives for the modules of a page's packages that it does not name."""
    shown = _SHOWN.findall(markdown)
    lines = []
    for package in shown:
        folder = root.joinpath(*package.split(".")[1:])
        for path in sorted(folder.glob("[!_]*.py")):
            module = f"{package}.{path.stem}"
            if not any(name == module or name.startswith(f"{module}.") for name in shown):
                lines.append(f"\n::: {module}\n")
    return "".join(lines)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name source files as the repository does, not by the links that they are read through."""
    return output.replace(".work/types/spiffy/", "")
