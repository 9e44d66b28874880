"""Artefact folders: all or nothing, and every change noticed."""

from __future__ import annotations

import json
import os
import threading

import pytest

import forgetscale.artifact as artifact
from forgetscale.artifact import (
    ArtifactWriter,
    canonical_json,
    hash_bytes,
    provenance,
    read_manifest,
    verify_artifact,
    write_json,
)
from forgetscale.errors import DataError


def make(folder, *, kind: str = "thing", text: str = "hello", **options):
    with ArtifactWriter(folder, kind, **options) as writer:
        (writer.path / "inner").mkdir()
        (writer.path / "a.txt").write_text(text)
        (writer.path / "inner" / "b.bin").write_bytes(bytes(range(256)))
        writer.payload = {"rows": 3}
        writer.inputs = {"data": "ff"}
    return folder


class TestWriting:
    def test_manifest(self, tmp_path):
        manifest = verify_artifact(make(tmp_path / "x", recipe={"run": {"name": "r"}}), "thing")
        assert sorted(manifest["files"]) == ["a.txt", "inner/b.bin"]
        assert manifest["files"]["inner/b.bin"]["size"] == 256
        assert manifest["payload"] == {"rows": 3} and manifest["inputs"] == {"data": "ff"}
        assert manifest["made_by"]["recipe"] == {"run": {"name": "r"}}
        assert os.listdir(tmp_path) == ["x"]

    def test_an_exception_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyError), ArtifactWriter(tmp_path / "x", "thing") as writer:
            (writer.path / "a.txt").write_text("half")
            raise KeyError("stop")
        assert os.listdir(tmp_path) == []

    def test_a_failing_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def full(path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(artifact, "fsync_path", full)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path / "x")
        assert os.listdir(tmp_path) == []

    def test_an_existing_folder_is_not_touched(self, tmp_path):
        make(tmp_path / "x")
        with pytest.raises(DataError, match="exists already; name another output folder"):
            make(tmp_path / "x", text="other")
        assert (tmp_path / "x" / "a.txt").read_text() == "hello"

    def test_replace(self, tmp_path):
        make(tmp_path / "x")
        make(tmp_path / "x", text="other", replace=True)
        verify_artifact(tmp_path / "x")
        assert (tmp_path / "x" / "a.txt").read_text() == "other"
        assert os.listdir(tmp_path) == ["x"]

    def test_replace_takes_no_foreign_folder(self, tmp_path):
        make(tmp_path / "x", kind="other")
        with pytest.raises(DataError, match="is a other artefact, expected thing"):
            make(tmp_path / "x", replace=True)
        (tmp_path / "y").mkdir()
        (tmp_path / "y" / "thesis.tex").write_text("x")
        with pytest.raises(DataError, match="has no manifest.json"):
            make(tmp_path / "y", replace=True)
        assert (tmp_path / "y" / "thesis.tex").exists()

    @pytest.mark.parametrize("point", ["before", "after"])
    def test_a_crash_while_replacing_leaves_one_of_the_two(self, tmp_path, monkeypatch, point):
        make(tmp_path / "x")
        original = artifact.write_json

        class Crash(BaseException):
            pass

        def crash(path, value):
            if point == "after":
                original(path, value)
            raise Crash

        monkeypatch.setattr(artifact, "write_json", crash)
        with pytest.raises(Crash):
            make(tmp_path / "x", text="other", replace=True)
        verify_artifact(tmp_path / "x")
        assert (tmp_path / "x" / "a.txt").read_text() == "hello"

    def test_links_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="is a symbolic link"):
            with ArtifactWriter(tmp_path / "x", "thing") as writer:
                (writer.path / "link").symlink_to("/etc/hostname")
        assert os.listdir(tmp_path) == []

    def test_two_writers_at_once(self, tmp_path):
        threads = [threading.Thread(target=make, args=(tmp_path / f"x{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(os.listdir(tmp_path)) == ["x0", "x1", "x2", "x3"]
        for i in range(4):
            verify_artifact(tmp_path / f"x{i}")


class TestVerifying:
    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda x: (x / "a.txt").write_text("hellp"), "a.txt has other content than when"),
            (lambda x: (x / "a.txt").write_text("hell"), "a.txt has 4 bytes, expected 5"),
            (lambda x: (x / "inner" / "b.bin").unlink(), "b.bin is missing; make the artefact"),
            (lambda x: (x / "c.txt").write_text(""), "c.txt is not listed in the manifest"),
            (lambda x: (x / "manifest.json").unlink(), "has no manifest.json"),
            (lambda x: (x / "manifest.json").write_text("{"), "is not valid JSON"),
            (lambda x: (x / "manifest.json").write_text("[]"), "has schema list, expected 1"),
            (lambda x: (x / "manifest.json").write_text('{"schema": 2}'), "has schema 2"),
        ],
    )
    def test_damage(self, tmp_path, damage, sentence: str):
        folder = make(tmp_path / "x")
        damage(folder)
        with pytest.raises(DataError) as caught:
            verify_artifact(folder)
        assert sentence in str(caught.value) and "\n" not in str(caught.value)

    def test_an_edited_manifest(self, tmp_path):
        folder = make(tmp_path / "x")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["payload"]["rows"] = 4
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="was changed after it was written"):
            read_manifest(folder)

    def test_kind(self, tmp_path):
        folder = make(tmp_path / "x")
        with pytest.raises(DataError, match="is a thing artefact, expected plan"):
            verify_artifact(folder, "plan")
        with pytest.raises(DataError, match="does not exist; expected a plan artefact"):
            read_manifest(tmp_path / "none", "plan")

    def test_part_of_the_files(self, tmp_path):
        folder = make(tmp_path / "x")
        (folder / "a.txt").write_text("other")
        verify_artifact(folder, only=["inner/b.bin"])
        with pytest.raises(DataError):
            verify_artifact(folder, only=["a.txt"])


class TestSmallThings:
    def test_canonical_json(self):
        assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
        assert hash_bytes(b"") == hash_bytes(canonical_json("")[1:-1])

    def test_write_json_replaces_at_once(self, tmp_path):
        path = tmp_path / "x.json"
        write_json(path, {"a": 1})
        with pytest.raises(TypeError):
            write_json(path, {"a": object()})
        assert json.loads(path.read_text()) == {"a": 1}
        assert os.listdir(tmp_path) == ["x.json"]

    def test_provenance(self):
        found = provenance({"a": 1})
        assert found["recipe"] == {"a": 1}
        assert {"python", "torch", "deepspeed", "transformers"} <= set(found["versions"])
        assert not found["command"][0].startswith("/"), "no paths of the machine"
