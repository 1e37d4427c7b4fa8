"""Writes weights files that ask for far more memory or time than their size is worth."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import torch

_PROTO = b"\x80\x02"
_TUPLE_KEY = b"K\x01" + b"2\x86" * 60


def _long_key(factor: int) -> bytes:
    value = (2**61 - 1) * factor
    data = value.to_bytes(12, "little")
    return b"\x8a" + bytes([len(data)]) + data + b"K\x01"


# What each makes of a pickle, of the protocols that both Python and torch read.
PICKLES = {
    "index of the memo": b"}r\xff\xff\xff\x3f.",
    "index of the memo in text": b"}p999999999\n.",
    "text of 4 GB": b"X\xff\xff\xff\xff.",
    "text of 2^62": b"\x8d" + struct.pack("<Q", 2**62) + b".",
    "bytes of 8 GB": b"\x8e" + struct.pack("<Q", 2**33) + b".",
    "bytearray of 8 GB": b"\x96" + struct.pack("<Q", 2**33) + b".",
    "frame of 2^40": b"\x95" + struct.pack("<Q", 2**40) + b"N.",
    "string of 2 GB": b"T\xff\xff\xff\x7f.",
    "integer of 2 GB": b"\x8b\xff\xff\xff\x7f.",
    "integer without end": b"I" + b"9" * 2_000_000 + b"\n.",
    "key of nested tuples": b"}" + _TUPLE_KEY + b"Ns.",
    "key of nested tuples through the memo": b"}K\x01" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "key of nested tuples in a dict": b"(" + _TUPLE_KEY + b"Nd.",
    "item of a set": b"\x8f(" + _TUPLE_KEY + b"\x90.",
    "item of a frozenset": b"(" + _TUPLE_KEY + b"\x91.",
    "item of a set that is called": b"c__builtin__\nset\n](" + _TUPLE_KEY + b"e\x85R.",
    "item of a set that is filled late": b"c__builtin__\nset\n]q\x00\x85h\x00(" + _TUPLE_KEY + b"e0R.",
    "item of a counter": b"ccollections\nCounter\n](" + _TUPLE_KEY + b"e\x85R.",
    "keys of one hash": b"}(" + b"".join(_long_key(factor) for factor in range(1, 60_000)) + b"u.",
    "lists a million deep": b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "tuples a million deep": b"}N" + b"\x85" * 1_000_000 + b"Ns.",
    "marks without end": b"(" * 1_000_000 + b".",
    "values without end": b"N" * 1_000_000 + b".",
    "a value that is not there": b"}h\x07.",
    "an empty stack": b"ss.",
}


def write_hostile_files(folder: Path) -> list[str]:
    """Writes the files and returns their names."""
    for name, program in PICKLES.items():
        (folder / f"{name}.pkl").write_bytes(_PROTO + program)
        _write_archive(folder / f"{name}.pth", {"w/data.pkl": _PROTO + program, "w/version": b"3\n"})
        (folder / f"{name}, legacy.pth").write_bytes(_LEGACY + _PROTO + program)
    _write_tensors(folder)
    _write_archives(folder)
    _write_of_safetensors(folder)
    _write_no_files(folder)
    return sorted(os.listdir(folder))


_LEGACY = b"".join(
    pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {}})
)


def _write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _write_tensors(folder: Path) -> None:
    one = torch.ones(1)
    tensors = {
        "stride 0": one.as_strided((1, 10**9, 192), (0, 0, 0)),
        "rows that overlap": torch.ones(50_000).as_strided((25_000, 25_000), (1, 1)),
        "sparse": torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.int64), one, (10**6, 10**6), check_invariants=False
        ),
        "without data": torch.empty(10**9, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    for name, tensor in tensors.items():
        for zipped in (True, False):
            try:
                torch.save(
                    {"model": {"pos_embed": tensor}},
                    folder / f"{name}{'' if zipped else ', legacy'}.pth",
                    _use_new_zipfile_serialization=zipped,
                )
            except NotImplementedError:
                continue
    for zipped, size in ((True, b"J\x00\x00\x00\x40"), (False, b"\x8a\x06\x00\x00\x00\x00\x00\x01")):
        path = folder / f"a storage that lies{'' if zipped else ', legacy'}.pth"
        torch.save({"model": {"a": torch.ones(77)}}, path, _use_new_zipfile_serialization=zipped)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            program = next(name for name in entries if name.endswith("data.pkl"))
            entries[program] = entries[program].replace(b"KM", size)
            _write_archive(path, entries)
        else:
            path.write_bytes(path.read_bytes().replace(b"KM", size))


def _write_archives(folder: Path) -> None:
    zeros = bytes(2**27)
    for name, entries in (
        ("a bomb of a pickle", {"w/data.pkl": zeros}),
        ("a bomb of a storage", {"w/data.pkl": b"\x80\x02}.", "w/data/0": zeros, "w/data/1": zeros}),
    ):
        _write_archive(folder / f"{name}.pth", entries, zipfile.ZIP_DEFLATED)
    path = folder / "sizes that lie.pth"
    _write_archive(path, {"w/data.pkl": b"\x80\x02}.", "w/version": b"3\n"})
    content = bytearray(path.read_bytes())
    for place, at in ((content.find(b"PK\x03\x04"), 18), (content.find(b"PK\x01\x02"), 20)):
        struct.pack_into("<II", content, place + at, 2**32 - 2, 2**32 - 2)
    path.write_bytes(content)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2**30, 0, 0)
    (folder / "a directory of a gigabyte.pth").write_bytes(b"PK\x03\x04" + bytes(100) + end)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    (folder / "tar.pth").write_bytes(tar.getvalue())


def _write_of_safetensors(folder: Path) -> None:
    for name, size in (("of 2^63", 2**63 - 1), ("of 2 GB", 2**31)):
        (folder / f"header {name}.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    for name, header in (
        ("deep", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        ("deep metadata", json.dumps({"__metadata__": {"token_grids": "[" * 200_000}}).encode()),
        (
            "offsets that lie",
            json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode(),
        ),
    ):
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def _write_no_files(folder: Path) -> None:
    for suffix in (".pkl", ".pth", ".safetensors"):
        os.mkfifo(folder / f"pipe{suffix}")
        (folder / f"folder{suffix}").mkdir()
        (folder / f"device{suffix}").symlink_to("/dev/zero")
        (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
        for letter in "I\0":
            with open(folder / f"a terabyte of holes after {letter!r}{suffix}", "wb") as file:
                file.write(letter.encode())
                file.truncate(2**40)
