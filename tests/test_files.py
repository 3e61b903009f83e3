"""Files that are hostile, damaged or odd, and how files are written."""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch
from support import everything, interrupted_at_every_line, make_model, refused, trained
from torch import nn

import aurora
from aurora import core

DATA = Path(__file__).parent / "data"

# ---- Headers that say what they should not --------------------------------------------------


def seal(data: bytes) -> bytes:
    """The file with the digest that belongs to it: what an attacker would do, and damage cannot."""
    at = data.index(b'"sha256":"') + 10
    data = data[:at] + b"0" * 64 + data[at + 64 :]
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]


def forge(path, aurora_json: str, tensors) -> None:
    """Write a file by hand, as the format is described, around the library's own layout."""
    plain = safetensors.save(tensors)
    length = struct.unpack("<Q", plain[:8])[0]
    header = {"__metadata__": {"sha256": "0" * 64, "aurora": aurora_json}}
    header |= json.loads(plain[8 : 8 + length])
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(seal(struct.pack("<Q", len(text)) + text + plain[8 + length :]))


def contents(path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["aurora"]), held


def rewrite(source, target, *, tensors=None, config=None, **changes) -> None:
    """Change the header, all options, or tensors; a change to `...` takes the key away."""
    header, held = contents(source)
    for options in header["configs"]:
        options.update(config or {})
    header = {k: v for k, v in (header | changes).items() if v is not ...}
    forge(target, json.dumps(header), held | (tensors or {}))


HOSTILE = {
    "version 3": ({"version": 3}, "format version 3, this release reads versions 1 to 2"),
    "version 0": ({"version": 0}, "format version 0"),
    "version true": ({"version": True}, "format version True"),
    "version as text": ({"version": "2"}, "format version '2'"),
    "version 2.0": ({"version": 2.0}, r"format version 2\.0"),
    "version 1 with what it lacked": ({"version": 1}, "not those of version 1"),
    "no version": ({"version": ...}, "format version None"),
    "no train": ({"train": ...}, "lacks a key"),
    "another key": ({"code": "import os"}, "one too many"),
    "no layers": ({"layers": {}}, "names no layer"),
    "layers as a list": ({"layers": [1]}, "names no layer"),
    "huge rank": ({"config": {"rank": 10**15}}, r"0\.A: shape"),
    "huge grid": ({"config": {"grid_size": 10**15}}, "grid_size must be an int from 1 to 10,000"),
    "unknown option": ({"config": {"code": "import os"}}, "see 'code'"),
    "alpha beyond floats": ({"config": {"alpha": 10**400}}, "alpha must be None or a float32"),
    "alpha infinite": ({"config": {"alpha": float("inf")}}, "Infinity is not JSON"),
    "alpha NaN": ({"config": {"alpha": float("nan")}}, "NaN is not JSON"),
    "alpha null": ({"config": {"alpha": None}}, "every option must be given.*see 'alpha'"),
    "alpha true": ({"config": {"alpha": True}}, "alpha must be"),
    "alpha as text": ({"config": {"alpha": "4"}}, "alpha must be"),
    "rank true": ({"config": {"rank": True}}, "rank must be"),
    "unhashable option": ({"config": {"fixed": []}}, "fixed must be"),
    "grid of one end": ({"config": {"grid_range": [1]}}, "grid_range must be"),
    "no options": ({"configs": [3]}, "every option must be given"),
    "index": ({"layers": {"0": [12, 8, 5]}}, "sizes cannot be"),
    "negative index": ({"layers": {"0": [12, 8, -1]}}, "sizes cannot be"),
    "index true": ({"layers": {"0": [12, 8, True]}}, "sizes cannot be read"),
    "negative size": ({"layers": {"0": [-12, 8, 0]}}, "sizes cannot be"),
    "not a list": ({"configs": 3}, "no lists"),
    "train as text": ({"train": "3.bias"}, "no lists"),
    "train of numbers": ({"train": [3]}, "not names, or repeat"),
    "train repeats": ({"train": ["3.bias", "3.bias"]}, "not names, or repeat"),
    "another layer": (
        {"layers": {"0": [12, 8, 0], "2": [8, 8, 0], "9": [1, 1, 0]}},
        "9: missing in the model",
    ),
    "regex in a name": ({"layers": {".*": [12, 8, 0]}}, "missing in the model"),
    "unnamed tensors": ({"train": []}, r"3\.bias: shape \(3,\), expected no such tensor"),
    "adapter as head": ({"train": ["0.A"]}, r"0\.A: trained in the file, missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    aurora.save(trained(), tmp_path / "a.safetensors")
    changes, match = HOSTILE[case]
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **changes)
    refused(make_model(), tmp_path / "b.safetensors", match)


@pytest.mark.parametrize(("text", "end"), [("swish", "got 'swish'"), ("s" * 5000, r"s{99}\.{3}")])
def test_a_reason_is_told_in_full_unless_it_is_long(tmp_path, text, end):
    aurora.save(trained(), tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", config={"activation": text})
    refused(make_model(), tmp_path / "b.safetensors", rf"\A.{{,2300}}{end}\Z")


def test_headers_that_are_no_tables(tmp_path):
    path = tmp_path / "b.safetensors"
    forge(path, "[1]", {})
    refused(make_model(), path, "its description is no table")
    for header in (b"[1]     ", b'{"__metadata__": {"a": 1}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        refused(make_model(), path, "its header is no table")


def test_a_big_endian_machine_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(ValueError, match="little-endian, this machine is not"):
        aurora.save(trained(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


OPTIONS = [field.name for field in dataclasses.fields(aurora.AuroraConfig)]


@pytest.mark.parametrize(("version", "key"), [(2, key) for key in OPTIONS] + [(1, "alpha")])
def test_no_option_is_filled_in_by_a_default(tmp_path, version, key):
    aurora.save(trained(), tmp_path / "a.safetensors")
    header, tensors = contents(DATA / "adapter-0.1.0.safetensors")
    if version == 2:
        header, tensors = contents(tmp_path / "a.safetensors")
    for options in header["configs"]:
        del options[key]
    forge(tmp_path / "b.safetensors", json.dumps(header), tensors)
    match = f"every option must be given, and no other; see '{key}'"
    refused(make_model(), tmp_path / "b.safetensors", match)


def test_a_key_that_stands_twice_and_a_deep_header_are_refused(tmp_path):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    aurora.save(trained(), path)
    header, tensors = contents(path)
    text = json.dumps(header)
    forge(bad, text, tensors)
    aurora.load(make_model(), bad)  # the forgery as such is good
    for key in ("version", "alpha", "0"):
        twice = re.sub(rf'("{key}": (\[[^]]*\]|[^,}}]*))', r"\1, \1", text, count=1)
        assert len(twice) > len(text)
        forge(bad, twice, tensors)
        refused(make_model(), bad, "stands there twice")
    for deep in ("[" * 100_000, '{"version": ' + "[" * 50_000 + "]" * 50_000 + "}"):
        forge(bad, deep, tensors)
        refused(make_model(), bad, "nested too deeply")
        bad.write_bytes(struct.pack("<Q", len(deep)) + deep.encode())
        refused(make_model(), bad, "nested too deeply")
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    outer = whole[8 : 8 + length].rstrip().removesuffix(b"}")
    outer += b',"0.A":' + re.search(rb'"0\.A":({[^}]*})', outer)[1] + b"}"
    bad.write_bytes(seal(struct.pack("<Q", len(outer)) + outer + whole[8 + length :]))
    refused(make_model(), bad, "stands there twice")


# ---- Tensors that are not what they should be -----------------------------------------------


def test_hostile_tensors_and_bytes(tmp_path):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    aurora.save(trained(), path)
    rewrite(path, bad, tensors={"extra": torch.zeros(1)})
    refused(make_model(), bad, "extra: shape .1,., expected no such tensor")
    rewrite(path, bad, tensors={"0.A": torch.zeros(3, 12)})
    refused(make_model(), bad, r"0\.A: shape \(3, 12\), expected \(2, 12\)")
    data = path.read_bytes()
    for size in (0, 4, 60, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        refused(make_model(), bad, "not a safetensors file, or a damaged one")
    bad.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    refused(make_model(), bad, "damaged")
    safetensors.save_file({"x": torch.zeros(1)}, bad)
    refused(make_model(), bad, "aurora.save did not write it")
    header, tensors = contents(path)
    safetensors.save_file(tensors, bad, {"aurora": json.dumps(header)})
    refused(make_model(), bad, "digest is missing")


ENTRIES = {
    "negative offset": {"data_offsets": [-48, 0]},
    "overlap": {"data_offsets": [8, 104]},
    "backwards": {"data_offsets": [96, 0]},
    "huge": {"data_offsets": [0, 2**62], "shape": [2**60]},
    "offsets true": {"data_offsets": [False, True]},
    "three offsets": {"data_offsets": [0, 96, 96]},
    "shape of a float": {"shape": [24.0]},
    "shape negative": {"shape": [-2, -12]},
    "shape too large": {"shape": [25]},
    "shape of a thousand": {"shape": [1] * 1_000},
    "many dimensions": {"shape": [2, 12] + [1] * 100},
    "dtype": {"dtype": "F16"},
    "dtype unknown": {"dtype": "F4"},
    "dtype as a list": {"dtype": ["F32"]},
    "another key": {"code": 1},
}


@pytest.mark.parametrize("case", ENTRIES)
def test_hostile_places(tmp_path, case):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(), path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert header["0.A"]["shape"] == [2, 12]
    header["0.A"].update(ENTRIES[case])
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(seal(struct.pack("<Q", len(text)) + text + data[8 + length :]))
    refused(make_model(), path, "damaged|unknown type")


def test_a_shape_that_no_tensor_can_have(tmp_path):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(), path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    for shape in ([0, 2**62, 2**62], [2**62, 0]):
        header["x"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        path.write_bytes(seal(struct.pack("<Q", len(text)) + text + data[8 + length :]))
        refused(make_model(), path, "no tensor can have|expected no such tensor")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32, torch.float8_e4m3fn])
def test_numbers_that_are_no_ordinary_floats_are_refused(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(), path)
    rewrite(path, path, tensors={"0.anl.H": torch.ones(2, 2).to(dtype)})
    for model in (make_model(), trained(seed=1)):
        refused(model, path, "0.anl.H: torch.* cannot become torch.float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.A", "0.anl.spline_weight", "3.weight"])
def test_values_that_are_not_finite_are_refused(tmp_path, name, value):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    source = trained()
    aurora.save(source, path)
    tensor = aurora.adapter_state_dict(source)[name].clone()
    tensor[-1].fill_(value)
    rewrite(path, bad, tensors={name: tensor})
    for model in (make_model(), trained(seed=1)):
        refused(model, bad, re.escape(name) + ": NaN or infinity")
    before = path.read_bytes()
    aurora.adapter_state_dict(source)[name][-1].fill_(value)
    with pytest.raises(ValueError, match="NaN or infinity, nothing was saved"):
        aurora.save(source, path)
    assert path.read_bytes() == before


def test_values_beyond_the_models_dtype_are_refused(tmp_path):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    aurora.save(trained(), path)
    rewrite(path, bad, tensors={"3.weight": torch.full((3, 8), 1e5)})
    refused(make_model().half(), bad, "3.weight: too large for the model's torch.float16")
    aurora.load(make_model(), bad)
    rewrite(path, bad, tensors={"0.A": torch.full((2, 12), 1e39, dtype=torch.float64)})
    for model in (make_model(), trained(seed=1)):
        refused(model, bad, "0.A: too large for the model's torch.float32")
    wide = make_model().double()
    aurora.load(wide, bad)
    assert (wide[0].A == 1e39).all()
    with pytest.raises(ValueError, match="too large"):
        aurora.load_adapter_state_dict(trained().half(), aurora.adapter_state_dict(wide))


class Masked(nn.Linear):
    """A head with a mask of its own, and a buffer that no state dict holds."""

    def __init__(self):
        super().__init__(8, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def test_buffers_persist_and_may_be_infinite_where_the_models_are(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), Masked())

    path, source = tmp_path / "a.safetensors", build()
    aurora.inject(source, "^0$", train=r"^1\.")
    aurora.save(source, path)
    assert "1.mask" in contents(path)[1]
    assert "1.scratch" not in contents(path)[1]
    assert aurora.load(build(), path).train == ("1.weight", "1.bias", "1.mask")
    rewrite(path, path, tensors={"1.mask": torch.full((3,), -torch.inf)})
    refused(build(), path, "1.mask: NaN or infinity")


# ---- Names ----------------------------------------------------------------------------------


def test_messages_escape_names_and_count_what_they_do_not_list(tmp_path):
    path = tmp_path / "a.safetensors"
    evil = ["\x1b[2J\x1b]0;owned\x07", "a\nINFO all is well", "nul\x00", "\u202eright", "e" * 5_000]
    names = {name: [12, 8, 0] for name in evil} | {f"m{i}": [12, 8, 0] for i in range(5_000)}
    aurora.save(trained(), path)
    rewrite(path, path, layers=names)
    with pytest.raises(ValueError, match="missing in the model") as error:
        aurora.load(make_model(), path)
    lines = str(error.value).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(str(error.value)) < 5_000
    assert len(lines) == 22
    assert re.fullmatch(r"  and \d+ more", lines[-1])
    assert r"\x1b[2J" in lines[1]
    assert r"a\nINFO" in lines[2]
    assert r"nul\x00" in lines[3]
    for text in ('{"version": "' + r"\u001b" * 9_999 + '"}', r'{"version": 2, "\u001b[2J": 1}'):
        forge(path, text, {"x": torch.zeros(1)})
        with pytest.raises(ValueError, match="cannot be read as an adapter") as error:
            aurora.load(make_model(), path)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 2_500
    many = {f"x{i}": torch.zeros(1) for i in range(100)}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        aurora.load_adapter_state_dict(trained(), many)
    assert len(str(error.value).split("\n")) == 22


@pytest.mark.parametrize("chosen", ["fc", "fc\n", "a(b", "a+b", "f*", "[fc]"])
def test_names_are_exact(tmp_path, chosen):
    """Neither what a regex would read in a name nor `$` before a last newline finds another."""

    def build():
        torch.manual_seed(0)
        names = ["fc", "fc\n", "xfc", "a(b", "a+b", "aab", "f*", "ff", "[fc]", "f"]
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    path, source, fresh = tmp_path / "a.safetensors", build(), build()
    aurora.inject(source, lambda name, _: name == chosen)
    aurora.save(source, path)
    assert aurora.load(fresh, path).layers == tuple(core.layers(fresh)) == (chosen,)
    source, fresh = build(), build()
    exact = rf"\A{re.escape(chosen)}\.bias\Z"
    aurora.inject(source, lambda name, _: name == "xfc", train=exact)
    aurora.save(source, path)
    assert aurora.load(fresh, path).train == (f"{chosen}.bias",)
    trains = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert {name for name in trains if not name.startswith("xfc")} == {f"{chosen}.bias"}


def test_names_of_parameters_are_exact(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Module()})
        for name in ("scale", "scale\n", "xscale", "scale2"):
            model["head"].register_parameter(name, nn.Parameter(torch.ones(1)))
        return model

    source, fresh = build(), build()
    aurora.inject(source, "^fc$", train=r"\.scale\Z")
    aurora.save(source, tmp_path / "a.safetensors")
    assert aurora.load(fresh, tmp_path / "a.safetensors").train == ("head.scale",)
    assert [n for n, p in fresh["head"].named_parameters() if p.requires_grad] == ["scale"]


# ---- Damage ---------------------------------------------------------------------------------


def damages(good: bytes, other: bytes, rng: random.Random, count: int):
    """Different damaged copies of a file, some with pieces of another."""
    seen = {good, other}
    length = 8 + struct.unpack("<Q", good[:8])[0]
    while len(seen) < count + 2:
        data, kind = bytearray(good), rng.randrange(8)
        # Half of them in the header, whatever its share of the file is.
        at = rng.randrange(length if rng.random() < 0.5 else len(good))
        size = rng.choice((1, 4, 48, 300))
        if kind < 3:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[at] = rng.choice(b'0123456789.eE+-[]{}",: nulltrue\x00\x1b')
        elif kind == 4:
            del data[at : len(data) if rng.random() < 0.3 else at + size]
        elif kind == 5:
            data[at:at] = rng.randbytes(size)
        elif kind == 6:
            data[at : at + size] = other[at : at + size]
        else:
            start = rng.randrange(len(good))
            data[at : at + size] = data[start : start + size]
        if bytes(data) not in seen:
            seen.add(bytes(data))
            yield bytes(data)


def test_no_damaged_file_loads(tmp_path):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    aurora.save(trained(train=r"3\.bias"), path)
    aurora.save(trained(seed=1, alpha=5.0, train=r"3\.bias"), bad)
    good, other = path.read_bytes(), bad.read_bytes()
    models = [make_model(), trained(seed=2, train=r"3\.bias")]
    before = [everything(model) for model in models]
    tried = 0
    for damaged in damages(good, other, random.Random(0), 4_000):
        bad.write_bytes(damaged)
        tried += 1
        with pytest.raises(ValueError, match=r"damaged|cannot be read|does not fit"):
            aurora.load(models[tried % 2], bad)
    assert tried == 4_000
    assert [everything(model) for model in models] == before
    for model in models:  # the file as it was does load
        bad.write_bytes(good)
        aurora.load(model, bad)


def test_a_flipped_bit_of_a_weight_and_a_digit_of_alpha_are_noticed(tmp_path):
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    aurora.save(trained(alpha=4.0), path)
    good = path.read_bytes()
    for at, new in ((len(good) - 1, good[-1] ^ 1), (good.index(b"4.0"), ord("5"))):
        data = bytearray(good)
        data[at] = new
        bad.write_bytes(data)
        refused(make_model(), bad, "its digest is another")
        bad.write_bytes(seal(bytes(data)))  # but for the digest it would load
        aurora.load(make_model(), bad)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    refused(make_model(), tmp_path / "bomb", "not a safetensors file")
    for name in ("pytorch_model.bin", "model.pt", "__0_0.distcp"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        refused(make_model(), folder, "only pickles, which are never executed")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((tmp_path / "bomb").read_bytes())  # the bomb is live
    assert (tmp_path / "exploded").exists()


# ---- On the disk ----------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="files as POSIX has them")


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    aurora.save(trained(0), path)
    old = path.read_bytes()

    def crash(*_):
        raise OSError("the disk is gone")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, crash)
            with pytest.raises(OSError, match="the disk is gone"):
                aurora.save(trained(1), path)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    aurora.save(trained(1), path)
    assert path.read_bytes() != old
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_interrupt_at_any_line_of_save_leaves_the_old_file_or_the_new(tmp_path):
    path, models = tmp_path / "a.safetensors", [trained(0), trained(1)]
    aurora.save(models[1], path)
    new = path.read_bytes()
    aurora.save(models[0], path)
    old = path.read_bytes()

    def check(_, finished):
        assert path.read_bytes() in ([new] if finished else [old, new])
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    planted = interrupted_at_every_line(
        lambda: path.write_bytes(old), lambda _: aurora.save(models[1], path), check
    )
    assert planted > 100


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_saver_leaves_the_old_file_or_the_new(tmp_path):
    path, models, rng = tmp_path / "a.safetensors", [trained(0), trained(1)], random.Random(0)
    whole = []
    for model in models:
        aurora.save(model, path)
        whole.append(path.read_bytes())
    left = 0
    for _ in range(40):
        saver = os.fork()
        if saver == 0:  # saves one and the other until it is killed
            try:
                while True:
                    for model in models:
                        aurora.save(model, path)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.05))
        os.kill(saver, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(saver, 0)[1])
        assert path.read_bytes() in whole
        others = [p for p in tmp_path.iterdir() if p != path]
        assert all(p.name.startswith(".aurora-saving-") for p in others)
        left = max(left, len(others))
    assert left > 0  # some were killed in the middle
    for p in others:
        os.utime(p, (0, 0))  # as if it was long ago
    (tmp_path / ".aurora-saving-now").touch()
    aurora.save(models[0], path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"a.safetensors", ".aurora-saving-now"}


@posix
def test_mode_and_group_are_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    for mode in (0o600, 0o640, 0o664):
        path.touch()
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 12_345, 23_456)
        before = path.stat()
        aurora.save(trained(), path)
        after = path.stat()
        assert stat.S_IMODE(after.st_mode) == mode
        assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
        assert after.st_size > 1_000


@posix
def test_the_groups_rights_are_not_given_to_another_group(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.touch()
    path.chmod(0o660)

    def refuse(*_):
        raise PermissionError("not your group")

    monkeypatch.setattr(os, "chown", refuse)
    aurora.save(trained(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "latest", tmp_path / "real" / "a.safetensors"
    link.symlink_to("real/a.safetensors")
    for seed in (0, 1):  # dangling at first
        aurora.save(trained(seed), link)
        assert link.is_symlink()
        assert target.is_file()
        assert not target.is_symlink()
        aurora.load(fresh := make_model(), link)
        assert torch.equal(fresh[0].A, trained(seed)[0].A)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="round"):
        aurora.save(trained(), tmp_path / "round")


@posix
def test_what_is_no_regular_file_is_left_alone(tmp_path):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link, Path("/dev/null")):
        before = os.stat(path)
        with pytest.raises(ValueError, match="not a regular file"):
            aurora.save(trained(), path)
        assert os.stat(path).st_ino == before.st_ino
        assert not stat.S_ISREG(os.stat(path).st_mode)
        with pytest.raises(FileNotFoundError, match="no adapter file"):  # rather than wait for it
            aurora.load(make_model(), path)


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.touch(0o444)
    monkeypatch.setattr(os, "access", lambda file, mode: False)  # what root is never told
    with pytest.raises(PermissionError, match="write-protected"):
        aurora.save(trained(), path)
    assert path.stat().st_size == 0


def test_long_names_and_folders_that_are_not_there(tmp_path):
    path = tmp_path / ("n" * 251 + ".tmp")
    aurora.save(trained(), path)
    aurora.load(make_model(), path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        aurora.save(trained(), tmp_path / "absent" / "a.safetensors")


def test_saving_needs_nothing_but_torch(tmp_path):
    """In a fresh environment: without NumPy, which PyTorch does not bring, and safetensors."""
    code = f"""
        import sys
        sys.modules["numpy"] = sys.modules["safetensors"] = None
        import torch, aurora
        models = [torch.nn.Sequential(torch.nn.Linear(3, 2)) for _ in range(2)]
        aurora.inject(models[0], "0", train="bias")
        torch.nn.init.normal_(models[0][0].B)
        aurora.save(models[0], {str(tmp_path / "a.safetensors")!r})
        models[1].load_state_dict(models[0].state_dict(), strict=False)
        print(aurora.load(models[1], {str(tmp_path / "a.safetensors")!r}))
        assert torch.equal(*(model(torch.ones(3)) for model in models))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(aurora.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loaded 1 adapted layers and 1 other tensors")


def test_the_format_is_that_of_the_safetensors_library(tmp_path):
    """Both ways, over every dtype that we write, and shapes without elements or dimensions."""
    model = make_model()
    aurora.inject(model, "^0$", train=r"^3\.")
    model[3].register_buffer("count", torch.tensor(7))
    model[3].register_buffer("flags", torch.tensor([True, False, True]))
    model[3].register_buffer("none", torch.zeros(0, 3, dtype=torch.float16))
    model[3].register_buffer("wide", torch.arange(3.0).double())
    model[3].register_buffer("narrow", torch.arange(5.0).bfloat16()[::2])
    path = tmp_path / "a.safetensors"
    aurora.save(model, path)
    own, (_, theirs) = aurora.adapter_state_dict(model), contents(path)
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.dtype == theirs[name].dtype
    rewrite(path, tmp_path / "b.safetensors")  # now in the library's layout
    aurora.load(model, tmp_path / "b.safetensors")
