"""Checks a built guide and reference: every public name has its place, every link inside leads somewhere."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import torchgeom_probe as tgp

site = Path(sys.argv[1])
pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
places = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
missing = set(tgp.__all__) - places[site / "torchgeom_probe.html"] - {"analytic"}  # which has pages of its own
assert not missing, f"no place for {missing}"

links, broken = 0, set()
for page, text in pages.items():
    for link in re.findall(r'(?:href|src)="([^"]+)"', text):
        if re.match(r"[a-z]+:|\$", link):  # elsewhere, or in the page's own script
            continue
        links += 1
        path, _, place = unquote(link).partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.is_file() or (place and there in places and place not in places[there]):
            broken.add(f"{page.relative_to(site)}: {link}")
assert not broken, "broken links:\n" + "\n".join(sorted(broken))
print(f"the guide and the reference: {len(pages)} pages, {links} links inside them")
