"""Whatever bytes an upload holds, reading it ends in an adapter or in ValueError or LookupError, nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loracompose import Adapter, load_adapter
from loracompose.adapters.header import MAX_HEADER_BYTES, TensorEntry, parse_header, read_raw_header
from loracompose.adapters.inspection import inspect_folder
from loracompose.adapters.patterns import check_pattern
from loracompose.adapters.peft_config import LoraSettings, read_settings
from tests.tiny import base_model, edited, peft_adapter

FAST = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def read_header(path: Path) -> Mapping[str, TensorEntry]:
    return parse_header(read_raw_header(path), path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return peft_adapter(tmp_path_factory.mktemp("plain"), r=1)[0]


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "upload"))


def outcome(folder: Path) -> Adapter | None:
    """The adapter, or None if it was refused with one of the two promised errors; inspection must never raise."""
    found = inspect_folder(folder)
    try:
        adapter = load_adapter(folder)
    except (ValueError, LookupError):
        return None
    assert found.ok, found.problems
    return adapter


def split(folder: Path) -> tuple[dict, bytes]:
    raw = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def assemble(folder: Path, header: object, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return folder


@FAST
@given(raw=st.binary(max_size=200))
def test_random_bytes_as_weights_are_refused(folder, raw):
    (folder / "adapter_model.safetensors").write_bytes(raw)
    assert outcome(folder) is None


@FAST
@given(raw=st.binary(max_size=200))
def test_random_bytes_as_configuration_are_refused(folder, raw):
    (folder / "adapter_config.json").write_bytes(raw)
    assert outcome(folder) is None


@FAST
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), whole=st.booleans())
def test_flipped_bytes_load_or_are_refused(folder, plain, edits, whole):
    raw = bytearray((plain / "adapter_model.safetensors").read_bytes())
    reach = len(raw) if whole else 8 + int.from_bytes(raw[:8], "little")
    for place, value in edits:
        raw[int(place * (reach - 1))] = value
    (folder / "adapter_model.safetensors").write_bytes(raw)
    outcome(folder)


@FAST
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(folder, plain, cut):
    raw = (plain / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(raw[: int(cut * len(raw))])
    assert outcome(folder) is None
    assert not inspect_folder(folder).ok


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FAST
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_of_the_header_loads_or_is_refused(folder, plain, data, value):
    header, tensors = split(plain)
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]))
    if field is None:
        header[name] = value
    else:
        header[name][field] = value
    outcome(assemble(folder, header, tensors))


@FAST
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_of_the_configuration_loads_or_is_refused(folder, plain, data, value):
    config = json.loads((plain / "adapter_config.json").read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    outcome(folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def with_entry(**fields):
    return lambda header: {**header, A: {**header[A], **fields}}


HEADERS = {
    "overlap": (with_entry(data_offsets=[4, 132]), "begins at byte"),
    "gap at the end": (lambda h: {k: v for k, v in h.items() if k != A}, "begins at byte|tensors take"),
    "past the end": (with_entry(shape=[1, 2**40], data_offsets=[0, 2**42]), "begins at byte|truncated"),
    "shape and bytes disagree": (with_entry(shape=[1, 31]), "cannot fill"),
    "product overflows 64 bits": (with_entry(shape=[2**40, 2**40]), "cannot fill"),
    "negative size": (with_entry(shape=[-1, -32]), "expected positive integers"),
    "empty dimension": (with_entry(shape=[0, 32], data_offsets=[0, 0]), "expected positive integers"),
    "true for a size": (with_entry(shape=[True, 32]), "expected positive integers"),
    "reversed offsets": (with_entry(data_offsets=[128, 0]), "cannot fill"),
    "integer dtype": (with_entry(dtype="I64"), "has dtype 'I64'"),
    "eight-bit float": (with_entry(dtype="F8_E4M3"), "has dtype 'F8_E4M3'"),
    "list for a dtype": (with_entry(dtype=["F32"]), "has dtype"),
    "an unknown field": (with_entry(extra=1), "must hold dtype, shape and data_offsets"),
    "an unprintable name": (lambda h: {**h, "a\0b": h[A]}, "not printable"),
    "a surrogate in a name": (lambda h: {**h, "\ud800": h[A]}, "not printable"),
    "an endless name": (lambda h: {**h, "a" * 5000: h[A]}, "too long"),
    "a list": (lambda h: [h], "must hold a JSON object"),
    "nested deeply": (lambda h: b"[" * 200_000, "nested too deeply|not valid JSON"),
    "a name twice": (lambda h: b'{"a":1,' * 1 + b'"a":2}', "'a' occurs twice"),
    "no number": (lambda h: b'{"a": NaN}', "NaN is not JSON"),
    "a giant number": (lambda h: b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "broken text": (lambda h: b'{"a": "\xff"}', "not valid JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_refused_for_its_reason(folder, plain, case):
    change, message = HEADERS[case]
    header, data = split(plain)
    with pytest.raises(ValueError, match=message):
        read_header(assemble(folder, change(header), data) / "adapter_model.safetensors")
    assert outcome(folder) is None
    assert not inspect_folder(folder).ok


def test_bytes_that_no_tensor_owns_are_refused(folder, plain):
    header, data = split(plain)
    with pytest.raises(ValueError, match="truncated or padded"):
        read_header(assemble(folder, header, data + b"\0") / "adapter_model.safetensors")


def test_a_header_longer_than_the_limit_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    with file.open("wb") as out:  # a sparse file: the bytes are never written
        out.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        out.truncate(MAX_HEADER_BYTES + 1000)
    with pytest.raises(ValueError, match="at most 100000000 are read"):
        read_header(file)


def test_a_file_larger_than_the_limit_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    with file.open("wb") as out:
        out.truncate(2**37)
    with pytest.raises(ValueError, match="an adapter may have"):
        read_header(file)


def test_a_configuration_larger_than_the_limit_is_refused_before_it_is_read(folder):
    with (folder / "adapter_config.json").open("r+b") as out:
        out.truncate(2**30)
    with pytest.raises(ValueError, match="at most 16000000 are read"):
        load_adapter(folder)


def filled(folder: Path, copy: Path, a: float, b: float, *, dtype: torch.dtype = torch.float32) -> Path:
    """A copy whose A and B hold one value everywhere; its scaling is 8."""
    values = {"lora_A": a, "lora_B": b}
    return edited(
        folder,
        copy,
        tensors=lambda t: {k: torch.full_like(v, values[k.split(".")[-2]], dtype=dtype) for k, v in t.items()},
    )


MODULE = r"model\.layers\.\d\.self_attn\.[qv]_proj"


@pytest.mark.parametrize(
    ("a", "b"), [(3e38, 1e30), (3e38, 0.0), (3e38, 1e-30), (0.0, 3e37), (1e20, 1e20)], ids=lambda x: f"{x:g}"
)
def test_finite_values_whose_update_overflows_are_refused_by_module(plain, tmp_path, a, b):
    folder = filled(plain, tmp_path / "absurd", a, b)
    message = rf"absurd: {MODULE} has a rank .*float32 ends at 3.4e\+38.*another checkpoint"
    with pytest.raises(ValueError, match=message):
        load_adapter(folder)


def test_an_update_too_large_for_the_dtype_asked_for_is_refused_and_fits_a_wider_one(plain, tmp_path):
    folder = filled(plain, tmp_path / "loud", 1e3, 1e2)  # both fit float16, their product does not
    with pytest.raises(ValueError, match=rf"loud: {MODULE} has a rank .*float16 ends at 6.55e\+04.*wider dtype"):
        load_adapter(folder, dtype=torch.float16)
    assert load_adapter(folder, dtype=torch.bfloat16).fingerprint == load_adapter(folder).fingerprint
    double = filled(plain, tmp_path / "double", 1e30, 1e30, dtype=torch.float64)
    assert load_adapter(double).factors["model.layers.0.self_attn.q_proj"].A.dtype == torch.float64
    with pytest.raises(ValueError, match="float32 ends at"):
        load_adapter(double, dtype=torch.float32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_block(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="not a regular file"):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_in_place_of_a_file_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        load_adapter(folder)


def test_a_valid_file_is_described_by_its_header(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, file, metadata={"k": "v"})
    entries = read_header(file)
    assert {name: (e.dtype, e.shape, e.end - e.begin) for name, e in entries.items()} == {
        "a": (torch.float32, (2, 3), 24),
        "b": (torch.bfloat16, (4,), 8),
    }


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a+)+b", r"(.*)*q", r"((x|y)+)*", r"(\w{1,40}){1,40}z", r"(aa|a)+b", r"(a?a)*b", r"((.?){10}){3}Z"),
        *(
            ".?" * 30 + "Z",
            "(ab|a)" * 30 + "b",
            ".*" * 7,
            "(.?){10}" * 3,
            "(x|" + ".?" * 30 + ")y",
            "(?!.?)" * 13,
            "(?i:" + "(ab|AC|Ab)" * 30 + ")",
        ),
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_match_forever_is_refused(folder, field, pattern):
    config = json.loads((folder / "adapter_config.json").read_text())
    config[field] = {pattern: 2} if field.endswith("pattern") else pattern
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="can match for ever"):
        load_adapter(folder)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_valid_alone_but_not_where_peft_puts_it_is_refused_by_name(folder, field):
    config = json.loads((folder / "adapter_config.json").read_text())
    config[field] = {"(?i)q_proj": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{field}.*global flags not at the start"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r".*\.(q|v)_proj", r"(.*\.)?layers\.\d+\.q", r"(?:.*?(?:a|bc).*?(?:q|kv).*?)|x", ""),
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))",
        "|".join(f"model.layers.{i}.self_attn.(q|k|v)_proj" for i in range(32)),
        r"^(?!.*(vision_tower|multi_modal)).*layers\.(1?\d|2[0-7])\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$",
    ],
)
def test_an_ordinary_pattern_is_allowed(pattern):
    check_pattern(pattern)


def configured(folder: Path, **fields) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("depth", [100, 200, 4000])
def test_a_pattern_nested_too_deeply_is_refused_by_name(folder, field, depth):
    pattern = "(" * depth + "q_proj" + ")" * depth
    with pytest.raises(ValueError, match=rf"{field} must be .*it is nested too deeply"):
        load_adapter(configured(folder, **{field: {pattern: 2} if field.endswith("pattern") else pattern}))
    assert not inspect_folder(folder).ok


@pytest.mark.parametrize(
    "pattern", ["(?i)layers", "(?P<idx>x)", "layers)(", "(layers", "(a+)+b", "(" * 200 + ")" * 200]
)
def test_a_pattern_of_layers_that_peft_cannot_run_is_refused_by_name(folder, pattern):
    configured(folder, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], layers_pattern=pattern)
    with pytest.raises(ValueError, match="layers_pattern must be a safe and valid regular expression"):
        load_adapter(folder)
    assert not inspect_folder(folder).ok


@pytest.mark.parametrize("pattern", ["layers", ["blocks", "layers"], r"(h|lay.*s)", ""])
def test_a_pattern_of_layers_is_run_as_peft_runs_it(folder, pattern):
    configured(folder, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], layers_pattern=pattern)
    assert load_adapter(folder).factors


SLOW = ".*a" * 4 + ".*b"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_long_names_would_keep_busy_for_hours_is_refused_before_it_is_run(
    folder, plain, monkeypatch, field
):
    for way in ("targets", "rank", "scaling"):  # instead of hanging where it is run after all
        monkeypatch.setattr(LoraSettings, way, lambda *_: pytest.fail("the pattern was run"))
    header, data = split(plain)
    long = {key.replace("q_proj", "a" * 900): entry for key, entry in header.items()}
    configured(assemble(folder, long, data), **{field: {SLOW: 2} if field.endswith("pattern") else SLOW})
    with pytest.raises(ValueError, match=rf"upload: {field} may take hours .*list the modules instead"):
        load_adapter(folder)
    assert not inspect_folder(folder).ok


def test_patterns_are_held_against_the_modules_of_the_base_before_they_are_run(folder, monkeypatch):
    pattern = "(.*" * 5 + ".*" + ")?" * 5 + ".?" * 4
    configured(folder, target_modules=pattern)
    model = base_model()
    load_adapter(folder)  # its own few short names are matched at once
    for number in range(400):
        model.add_module(f"{'many' * 12}{number}", torch.nn.Identity())
    targets = LoraSettings.targets
    own = {module for module, _ in model.named_modules() if module.endswith(("q_proj", "v_proj"))}
    monkeypatch.setattr(
        LoraSettings, "targets", lambda self, name: targets(self, name) if name in own else pytest.fail("it was run")
    )
    with pytest.raises(ValueError, match=r"target_modules may take hours"):
        load_adapter(folder, base=model)


def test_ordinary_patterns_may_be_held_against_very_many_modules():
    inside = "model.language_model.layers"  # of a model that also sees: long names, in which the pattern's words stand
    experts = [f"{inside}.{i}.mlp.experts.{j}.gate_proj" for i in range(58) for j in range(768)]
    words = ("vision|image|visual|patch|language|text", "self_attn|attention|attn|mlp|feed_forward|ffn|dense")
    pattern = rf"(?:.*?(?:{words[0]}).*?(?:{words[1]}).*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj).*?)|x"
    config = {"peft_type": "LORA", "target_modules": pattern, "rank_pattern": {"q_proj": 2, r"layers\.1\d\..*": 4}}
    read_settings(config, "x").check_work("x", experts)
