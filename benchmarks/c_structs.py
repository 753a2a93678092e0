"""The structs of include/compact/compact.h as ctypes, read from the header itself: they cannot fall behind it."""

import ctypes
import pathlib
import re

HEADER = pathlib.Path(__file__).resolve().parents[1] / "include" / "compact" / "compact.h"
TYPES = {"int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
         "float": ctypes.c_float}


def structure(name: str) -> type:
    """ctypes.Structure of `typedef struct name {...}`; pointers are c_void_p. struct_size is set."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", text, flags=re.DOTALL)
    if body is None:
        raise KeyError(f"{HEADER} has no struct {name}")
    fields = []
    for declaration in filter(None, (line.strip() for line in body.group(1).split(";"))):
        kind, star, field = re.fullmatch(r"(?:const )?(\w+)\s*(\*?)\s*(\w+)", declaration).groups()
        fields.append((field, ctypes.c_void_p if star else TYPES[kind]))

    def start(self, **values):
        ctypes.Structure.__init__(self, struct_size=ctypes.sizeof(self), **values)

    return type(name, (ctypes.Structure,), {"_fields_": fields, "__init__": start})
