#!/usr/bin/env python3
"""Checks the links between the pages of this repository: files, headings, and that the README links below Cargo.toml's `repository` only.

    python3 scripts/check_links.py
"""

import pathlib
import re
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parent.parent
repository = re.search(r'^repository = "(.*)"$', (root / "Cargo.toml").read_text(), re.M).group(1)
raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
blob = repository + "/blob/main/"
files = set(subprocess.check_output(["git", "ls-files"], cwd=root, text=True).split("\n"))
problems = []


def headings(page):
    text = re.sub(r"^```.*?^```", "", (root / page).read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}


for page in sorted(name for name in files if name.endswith(".md")):
    text = re.sub(r"^```.*?^```", "", (root / page).read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link
        if page == "README.md" and not link.startswith("https://"):
            problems.append(f"{page}: {link} is relative, which breaks on docs.rs and crates.io")
        if link.startswith((blob, raw)):
            target, folder = link.removeprefix(blob).removeprefix(raw), root
        elif re.match(r"https://(github|raw\.githubusercontent)\.com/[^/]+/folio\b", link):
            problems.append(f"{page}: {link} is not below {blob}")
            continue
        elif "://" in link:
            continue
        else:
            folder = (root / page).parent
        name, _, heading = target.partition("#")
        path = (folder / name).resolve() if name else root / page
        relative = path.relative_to(root).as_posix()
        if relative not in files and not path.is_dir():
            problems.append(f"{page}: {link} leads nowhere")
        elif heading and heading not in headings(relative):
            problems.append(f"{page}: {link}: no such heading")

print("\n".join(problems) or f"links of {sum(name.endswith('.md') for name in files)} pages: all well")
sys.exit(bool(problems))
