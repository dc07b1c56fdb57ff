"""Versions and code digest of the manifest."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

from pipeline.tracking import versions


def test_versions_are_those_of_the_installed_packages():
    found = versions.library_versions()
    assert set(found) == {
        "python", "torch", "deepspeed", "transformers", "datasets", "pyarrow", "safetensors", "perennial",
    }  # fmt: skip
    assert found["python"] == platform.python_version()
    for package in ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "safetensors"):
        assert found[package] == version(package)


def test_the_code_digest_covers_every_source_of_both_packages_and_nothing_else():
    root = Path(versions.__file__).resolve().parents[2]
    sources = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for package in ("pipeline", "data_contracts")
        for path in (root / package).glob("**/*.py")
    }
    assert "pipeline/tracking/versions.py" in sources
    text = json.dumps(sources, sort_keys=True, separators=(",", ":"))
    assert versions.code_digest() == hashlib.sha256(text.encode()).hexdigest()
