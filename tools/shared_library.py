"""The dynamic section and the symbols of a shared library, for the gates of check_wheel.py."""

from __future__ import annotations

import io
from typing import NamedTuple

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection


class Symbol(NamedTuple):
    name: str
    version: str  # such as GLIBC_2.34 of the library that provides it; empty without one
    weak: bool


class Library:
    """A shared library, read from the bytes of a file."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.size = name, len(data)
        elf = ELFFile(io.BytesIO(data))
        self.sections = [section.name for section in elf.iter_sections()]
        needed = [section for section in elf.iter_sections() if isinstance(section, GNUVerNeedSection)]
        self.versions = {
            auxiliary["vna_other"]: auxiliary.name
            for section in needed
            for _, auxiliaries in section.iter_versions()
            for auxiliary in auxiliaries
        }
        dynamic = [tag for s in elf.iter_sections() if isinstance(s, DynamicSection) for tag in s.iter_tags()]
        self.needed = [tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"]
        self.search_paths = [
            getattr(tag, tag.entry.d_tag[3:].lower())
            for tag in dynamic
            if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")
        ]
        self.undefined: list[Symbol] = []
        self.exported: list[str] = []
        table = elf.get_section_by_name(".dynsym")
        indices = next((s for s in elf.iter_sections() if isinstance(s, GNUVerSymSection)), None)
        for number, symbol in enumerate(table.iter_symbols() if isinstance(table, SymbolTableSection) else []):
            binding, place = symbol["st_info"]["bind"], symbol["st_shndx"]
            if not symbol.name or binding == "STB_LOCAL":
                continue
            if place == "SHN_UNDEF":
                index = indices.get_symbol(number)["ndx"] if indices else None
                version = self.versions.get(index, "")
                self.undefined.append(Symbol(symbol.name, version, binding == "STB_WEAK"))
            elif symbol["st_other"]["visibility"] in ("STV_DEFAULT", "STV_PROTECTED"):
                self.exported.append(symbol.name)
