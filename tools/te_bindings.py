"""Print the names and enums of Transformer Engine's compiled part, read from the source of its bindings.

pip download --no-deps --no-build-isolation --no-binary :all: transformer-engine-torch==2.20.2 && tar xzf transformer_engine_torch-*.tar.gz
python tools/te_bindings.py transformer_engine_torch-2.20.2 > megatron_r1z/rehearse/bindings.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def read_bindings(sdist: Path) -> dict[str, object]:
    """Enums with their values, functions and classes that the module has."""
    headers = [*sdist.glob("common_headers/common/include/transformer_engine/*.h"), sdist / "csrc" / "common.h"]
    numbers = _values("\n".join(path.read_text() for path in headers))
    sources = (sdist / "common_headers/common/util/pybind_helper.h", sdist / "csrc/extensions/pybind.cpp")
    text = "".join(path.read_text() for path in sources).replace("\\\n", "\n")
    enums = {}
    pattern = r'enum_<[^>]*>\s*\(\s*m,\s*"(\w+)".*?\)\s*((?:\.value\(\s*"\w+",\s*[\w:]+\)\s*)+)'
    for name, values in re.findall(pattern, text, re.DOTALL):
        members = re.findall(r'\.value\(\s*"(\w+)"', values)
        enums[name] = {member: numbers.get(member, place) for place, member in enumerate(members)}
    return {
        "version": sdist.name.rsplit("-", 1)[1],
        "enums": enums,
        "functions": sorted(set(re.findall(r'm\.def\(\s*"(\w+)"', text))),
        "classes": sorted(set(re.findall(r'class_<[^;]*?>\s*\(\s*m,\s*"(\w+)"', text, re.DOTALL))),
    }


def _values(headers: str) -> dict[str, int]:
    found = {}
    for body in re.findall(r"enum (?:class )?\w+ \{(.*?)\};", headers, re.DOTALL):
        value = -1
        for item in re.sub(r"/\*.*?\*/|//[^\n]*", "", body, flags=re.DOTALL).split(","):
            match = re.match(r"\s*(\w+)\s*(?:=\s*(-?\d+))?\s*$", item)
            if match:
                value = int(match[2]) if match[2] else value + 1
                found[match[1]] = value
    return found


if __name__ == "__main__":
    json.dump(read_bindings(Path(sys.argv[1])), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
