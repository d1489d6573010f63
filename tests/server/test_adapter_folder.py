"""Adapter folders: what is taken in, what is refused and why, and that nothing half written is ever an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nightschool_server.adapters import folder as adapter_folder
from nightschool_server.adapters.folder import MANIFEST_FILE, PROVENANCE_FILE, AdapterFolder, Source
from nightschool_server.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from nightschool_server.errors import AdapterFormatError
from nightschool_server.home import Home
from safetensors.numpy import save_file

from tests.server.fake_engine import make_adapter, recorded_probe

MAX_BYTES = 10**6


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def import_folder(home: Home, source: Source, sequence: int = 1) -> AdapterFolder:
    staged = adapter_folder.stage(home, source, MAX_BYTES)
    return adapter_folder.publish(home, staged, sequence, {"parent": "base", "created_at": 1.0})


def refusal(home: Home, source: Source, max_bytes: int = MAX_BYTES) -> str:
    with pytest.raises(AdapterFormatError) as caught:
        adapter_folder.stage(home, source, max_bytes)
    assert not list(home.adapters.iterdir()), "nothing is left behind"
    return str(caught.value)


def test_the_name_is_the_sequence_and_the_content(home: Home, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a", effect=0.5)
    first, again = import_folder(home, source, 7), import_folder(home, source, 8)
    other = import_folder(home, make_adapter(tmp_path / "b", effect=0.6), 9)
    assert first.name == f"0007-{first.digest[:8]}"
    assert again.digest == first.digest != other.digest
    assert again.name == f"0008-{first.digest[:8]}"


def test_a_folder_and_the_same_files_as_bytes_are_the_same_adapter(home: Home, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert import_folder(home, files, 1).digest == import_folder(home, source, 2).digest


def test_only_two_files_are_copied_and_they_cannot_be_written(home: Home, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    for extra in ("README.md", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (source / extra).write_bytes(b"x")
    folder = import_folder(home, source)
    assert sorted(path.name for path in folder.path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE]
    assert all(path.stat().st_mode & 0o222 == 0 for path in folder.path.iterdir())


def test_the_manifest_says_what_it_is_and_where_it_comes_from(home: Home, tmp_path: Path) -> None:
    provenance = {"cycle_id": "c1", "data": {"pairs": "d"}, "training": {"steps": 3}, "probe": recorded_probe(0.5)}
    folder = import_folder(home, make_adapter(tmp_path / "a", rank=4, provenance=provenance))
    manifest = json.loads((folder.path / MANIFEST_FILE).read_text())
    assert manifest == folder.manifest
    assert (manifest["rank"], manifest["alpha"], manifest["target_modules"]) == (4, 8.0, ["k_proj", "q_proj"])
    assert (manifest["data"], manifest["training"]) == ({"pairs": "d"}, {"steps": 3})
    assert manifest["probe"] == recorded_probe(0.5)
    assert manifest["parent"] == "base"
    assert adapter_folder.open_folder(home, folder.name) == folder


def test_target_modules_may_be_one_pattern(home: Home, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    config = json.loads((source / CONFIG_FILE).read_text()) | {"target_modules": r".*\.text_model\..*_proj"}
    (source / CONFIG_FILE).write_text(json.dumps(config))
    assert import_folder(home, source).target_modules == (r".*\.text_model\..*_proj",)


def test_a_pickle_is_refused_with_the_reason(home: Home, tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "adapter_model.pt", "weights.pkl"):
        source = make_adapter(tmp_path / name)
        (source / WEIGHTS_FILE).rename(source / name)
        said = refusal(home, source)
        assert name in said
        assert "only safetensors are ever loaded" in said


def test_what_is_missing_is_named(home: Home, tmp_path: Path) -> None:
    assert "not a folder" in refusal(home, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert WEIGHTS_FILE in refusal(home, tmp_path / "empty")
    source = make_adapter(tmp_path / "a")
    (source / CONFIG_FILE).unlink()
    assert f"{CONFIG_FILE} is missing" in refusal(home, source)
    assert f"{WEIGHTS_FILE} is missing" in refusal(home, {CONFIG_FILE: b"{}"})


def with_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config))


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS_FILE, 40), "no whole safetensors file"),
    "a pickle under the right name": (
        lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x80\x04cos\nsystem\n"),
        "safetensors",
    ),
    "empty weights": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "safetensors"),
    "no LoRA tensors": (
        lambda f: save_file({"w": np.ones(1, np.float32)}, f / WEIGHTS_FILE),
        "no lora_A tensor",
    ),
    "not JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "JSON"),
    "a JSON list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "not an object"),
    "another method": (lambda f: with_config(f, peft_type="IA3"), "'IA3'"),
    "no rank": (lambda f: with_config(f, r=None), "r is None"),
    "rank 0": (lambda f: with_config(f, r=0), "r is 0"),
    "rank true": (lambda f: with_config(f, r=True), "r is True"),
    "alpha as text": (lambda f: with_config(f, lora_alpha="16"), "lora_alpha is '16'"),
    "a broken provenance": (lambda f: (f / PROVENANCE_FILE).write_text("nope"), PROVENANCE_FILE),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_not_an_adapter_is_refused_with_file_and_rule(home: Home, tmp_path: Path, spoil: str) -> None:
    act, expected = SPOILS[spoil]
    source = make_adapter(tmp_path / "a")
    act(source)
    assert expected in refusal(home, source)


def test_an_adapter_that_is_too_large_is_refused(home: Home, tmp_path: Path) -> None:
    assert "adapters.max_folder_bytes" in refusal(home, make_adapter(tmp_path / "a"), max_bytes=200)


def test_a_changed_or_lost_file_is_found(home: Home, tmp_path: Path) -> None:
    folder = import_folder(home, make_adapter(tmp_path / "a"))
    folder.verify(folder.digest)
    weights = folder.path / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="changed or damaged"):
        folder.verify(folder.digest)
    weights.unlink()
    with pytest.raises(AdapterFormatError, match="lacks"):
        adapter_folder.open_folder(home, folder.name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 9, "name": "x"}'])
def test_a_damaged_manifest_is_found(home: Home, tmp_path: Path, text: str) -> None:
    folder = import_folder(home, make_adapter(tmp_path / "a"))
    (folder.path / MANIFEST_FILE).chmod(0o600)
    (folder.path / MANIFEST_FILE).write_text(text)
    with pytest.raises(AdapterFormatError, match="manifest"):
        adapter_folder.open_folder(home, folder.name)


def test_what_a_crash_left_half_written_is_swept_and_nothing_else(home: Home, tmp_path: Path) -> None:
    kept = import_folder(home, make_adapter(tmp_path / "a"))
    adapter_folder.stage(home, make_adapter(tmp_path / "b"), MAX_BYTES)
    assert adapter_folder.published_names(home) == [kept.name]
    adapter_folder.sweep(home)
    assert [path.name for path in home.adapters.iterdir()] == [kept.name]
    adapter_folder.delete_folder(home, kept.name)
    adapter_folder.delete_folder(home, kept.name)
    assert not list(home.adapters.iterdir())
