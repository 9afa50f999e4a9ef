"""Collect the text that the demonstration model is trained on.

The text comes from Debian packages whose licences allow it. Unpack them under one folder, for example::

    apt-get download bible-kjv bible-kjv-text golang-1.19-src dict-jargon debian-handbook \
        debian-reference-en debian-reference-de debian-reference-fr installation-guide-amd64 \
        manpages manpages-dev manpages-de manpages-fr libpython3.11-minimal libpython3.11-stdlib
    for deb in *.deb; do dpkg -x "$deb" root; done
    python scripts/collect_demo_text.py --root root --out text

The result is ``documents.jsonl`` (one document a line, with its domain and its split) and ``sources.json``.
Manual pages are rendered with groff. About 2 % of the documents of every domain are held out, by a hash of
their names.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

FREE = "GPL-2.0-or-later or CC-BY-SA-3.0"
SOURCES: dict[str, list[tuple[str, str]]] = {
    "code": [("CPython 3.11 standard library (libpython3.11-minimal, libpython3.11-stdlib)", "PSF-2.0")],
    "prose": [
        ("King James Bible (bible-kjv-text, printed by bible-kjv)", "public domain"),
        ("Isaac Newton, Opticks, 1730 edition (test data of golang-1.19-src)", "public domain"),
        ("The Jargon File 4.4.7 (dict-jargon)", "public domain"),
    ],
    "handbook": [
        ("The Debian Administrator's Handbook (debian-handbook)", FREE),
        ("Debian Reference (debian-reference-en)", "GPL-2.0-or-later"),
        ("Debian installation guide (installation-guide-amd64)", "GPL-2.0-only"),
    ],
    "manual": [("Linux manual pages (manpages, manpages-dev)", "Linux-man-pages-copyleft, GPL, BSD, MIT")],
}
for _domain, _code, _name in (("german", "de", "German"), ("french", "fr", "French")):
    SOURCES[_domain] = [
        (f"The Debian Administrator's Handbook, {_name} (debian-handbook)", FREE),
        (f"Debian Reference, {_name} (debian-reference-{_code})", "GPL-2.0-or-later"),
        (f"Debian installation guide, {_name} (installation-guide-amd64)", "GPL-2.0-only"),
        (f"Manual pages, {_name} (manpages-{_code})", "GPL-3.0-or-later, originals as above"),
    ]

Document = tuple[str, str]


class _Text(HTMLParser):
    """Plain text of an HTML page; navigation and scripts are left out."""

    LISTS = ("li", "dt", "dd", "ul", "ol", "dl")
    BLOCKS = frozenset(("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "pre", "table", "br", *LISTS))
    SKIPPED = frozenset(("script", "style", "head"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip = 0
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skip += tag in self.SKIPPED
        self.pre += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.skip -= tag in self.SKIPPED and self.skip > 0
        self.pre -= tag == "pre" and self.pre > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(path: Path) -> str:
    parser = _Text()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    text = re.sub(r"- \s+", "- ", "".join(parser.parts))
    return re.sub(r"\A\s*Download the ebook(\s+- [^\n]*)*", "", text)


def html_documents(root: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(root.glob(pattern)):
        yield str(path.relative_to(root)), html_text(path)


def render_manual(path: Path) -> str:
    """Text of one manual page, without justification and hyphenation; empty for a mere reference."""
    source = gzip.decompress(path.read_bytes())
    if source.lstrip().startswith(b".so ") or len(source) < 300:
        return ""
    command = ["groff", "-t", "-mandoc", "-Kutf8", "-Tutf8", "-rHY=0", "-rLL=80n"]
    command += ["-P-c", "-P-b", "-P-u"]  # no bold and no underlining
    done = subprocess.run(command, input=source, capture_output=True, check=False)
    text = done.stdout.decode("utf-8", errors="replace").replace("\u2010", "-").replace("\u2212", "-")
    return re.sub(r"(?<=\S) {2,3}(?=\S)", " ", text)  # undo the justification


def manual_documents(root: Path, pattern: str) -> Iterator[Document]:
    paths = [path for path in sorted(root.glob(pattern)) if not path.is_symlink()]
    with ThreadPoolExecutor(2) as pool:
        for path, text in zip(paths, pool.map(render_manual, paths), strict=True):
            yield str(path.relative_to(root)), text


def parts(name: str, text: str, size: int = 8192) -> Iterator[Document]:
    """Split a book at blank lines into documents of about `size` characters."""
    current = ""
    number = 0
    for paragraph in re.split(r"\n\s*\n", text):
        current += paragraph + "\n\n"
        if len(current) >= size:
            yield f"{name}#{number}", current
            current, number = "", number + 1
    yield f"{name}#{number}", current


def prose(root: Path) -> Iterator[Document]:
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", "gen1:1-rev22:21"]
    bible = subprocess.run(command, capture_output=True, check=True).stdout.decode("latin-1")
    chapters: dict[str, list[str]] = {}
    for line in bible.splitlines():
        if found := re.match(r"(\w+?)(\d+):(\d+) (.*)", line):
            chapters.setdefault(f"{found[1]} {found[2]}", []).append(f"{found[3]} {found[4]}")
    for name, verses in chapters.items():
        yield f"bible {name}", f"{name}\n\n" + "\n".join(verses)
    opticks = (root / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt").read_text(encoding="utf-8")
    yield from parts("opticks", opticks)
    jargon = gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes())
    yield from parts("jargon", jargon.decode("utf-8", errors="replace"))


def handbook(root: Path, locale: str, code: str) -> Iterator[Document]:
    yield from html_documents(root, f"usr/share/doc/debian-handbook/html/{locale}/*.html")
    yield from html_documents(root, f"usr/share/debian-reference/*.{code}.html")
    yield from html_documents(root, f"usr/share/doc/installation-guide-amd64/{code}/*.html")


def code(root: Path) -> Iterator[Document]:
    folder = root / "usr/lib/python3.11"
    for path in sorted(folder.rglob("*.py")):
        if not {"encodings", "pydoc_data", "test", "tests"} & set(path.parts):
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")


def documents(root: Path) -> Iterator[tuple[str, Document]]:
    for domain, found in (
        ("code", code(root)),
        ("prose", prose(root)),
        ("handbook", handbook(root, "en-US", "en")),
        ("manual", manual_documents(root, "usr/share/man/man[1-8]/*.gz")),
        ("german", handbook(root, "de-DE", "de")),
        ("german", manual_documents(root, "usr/share/man/de/man*/*.gz")),
        ("french", handbook(root, "fr-FR", "fr")),
        ("french", manual_documents(root, "usr/share/man/fr/man*/*.gz")),
    ):
        for name, text in found:
            yield domain, (name, text)


def tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\u00a0", " ").replace("\u00ad", ""))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--root", type=Path, required=True, help="folder the packages were unpacked into")
    parser.add_argument("--out", type=Path, required=True, help="folder for documents.jsonl and sources.json")
    parser.add_argument("--domain-megabytes", type=float, default=7.0, help="most text kept for one domain")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept: dict[str, list[tuple[str, str, str]]] = {}
    seen: set[str] = set()
    for domain, (name, raw) in documents(arguments.root.resolve()):
        text = tidy(raw)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if len(text) >= 400 and digest not in seen:
            seen.add(digest)
            kept.setdefault(domain, []).append((hashlib.sha256(name.encode()).hexdigest(), name, text))
    report: dict[str, object] = {}
    with (arguments.out / "documents.jsonl").open("w", encoding="utf-8") as lines:
        for domain, found in kept.items():
            sizes = {"train": 0, "heldout": 0}
            counts = {"train": 0, "heldout": 0}
            for key, name, text in sorted(found):  # by hash: a fixed shuffle
                split = "heldout" if int(key[-8:], 16) % 50 == 0 else "train"
                if sum(sizes.values()) > arguments.domain_megabytes * 1e6:
                    break
                sizes[split] += len(text.encode())
                counts[split] += 1
                lines.write(json.dumps({"domain": domain, "name": name, "split": split, "text": text}) + "\n")
            report[domain] = {"bytes": sizes, "documents": counts, "sources": SOURCES[domain]}
            print(domain, sizes, counts)
    (arguments.out / "sources.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
