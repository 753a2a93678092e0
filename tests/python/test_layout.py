"""Who may include whom: each folder sees those to its left, nothing points back."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORDER = ["core", "ptx", "kv", "select", "unite", "attention", "step", "capi"]
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)


def includes(folder: str):
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in {".h", ".cc", ".cuh", ".cu"}:
            for match in INCLUDE.finditer(path.read_text()):
                yield path.relative_to(ROOT), match.group(1)


def test_library_folders_see_only_those_to_their_left():
    offending = []
    for path, name in includes("src"):
        parts = name.split("/")
        if parts[0] == "engine":
            offending.append((str(path), name))
        if parts[0] == "src" and ORDER.index(parts[1]) > ORDER.index(path.parts[1]):
            offending.append((str(path), name))
    assert not offending


def test_instructions_see_only_the_host_device_macro_and_are_seen_by_device_code():
    offending = []
    for path, name in includes("src"):
        if path.parts[1] == "ptx" and name.startswith("src/") and not name.startswith("src/ptx/"):
            if name != "src/core/host_device.h":
                offending.append((str(path), name))
        if path.parts[1] != "ptx" and name.startswith("src/ptx/") and path.suffix not in {".cuh", ".cu"}:
            offending.append((str(path), name))
    assert not offending


def test_the_promise_needs_nothing_but_itself():
    offending = [(str(path), name) for path, name in includes("include") if "/" in name and not name.startswith("compact/")]
    assert not offending


def test_the_engine_lives_in_the_promise_its_kernels_see_instructions():
    offending = [(str(path), name) for path, name in includes("engine")
                 if name.startswith("src/") and not (path.suffix in {".cu", ".cuh"} and name.startswith("src/ptx/"))]
    assert not offending


def test_backends_do_not_include_each_other():
    backends = {"reference", "cpu", "sm80", "sm90"}
    offending = []
    for path, name in includes("src/attention"):
        other = set(name.split("/")[2:-1]) & backends
        if other and name.startswith("src/attention/") and path.parts[2] in backends and path.parts[2] not in other:
            offending.append((str(path), name))
    assert not offending
