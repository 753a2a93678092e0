"""benchmarks/c_structs.py against a C compiler."""

import ctypes
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import c_structs  # noqa: E402


@pytest.mark.parametrize("name", ["ca_attention", "ca_step"])
def test_fields_lie_where_the_compiler_puts_them(name, tmp_path):
    made = c_structs.structure(name)
    fields = [field for field, _ in made._fields_]
    lines = [f'printf("%zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));' for field in fields]
    (tmp_path / "offsets.c").write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"compact/compact.h\"\n"
        f"int main(void) {{ printf(\"%zu 0\\n\", sizeof({name}));\n" + "\n".join(lines) + "\nreturn 0; }\n")
    subprocess.run(["cc", "-I", ROOT / "include", tmp_path / "offsets.c", "-o", tmp_path / "offsets"], check=True)
    printed = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout
    size, *places = [tuple(map(int, line.split())) for line in printed.splitlines()]
    assert size[0] == ctypes.sizeof(made) == made().struct_size
    assert places == [(getattr(made, field).offset, getattr(made, field).size) for field in fields]


def test_unknown_struct():
    with pytest.raises(KeyError):
        c_structs.structure("ca_nothing")
