"""Which code made an increment: library versions and a digest of our own sources, for the manifest."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.files import canonical_json, sha256_file, sha256_text

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "safetensors", "perennial")


def library_versions() -> dict[str, str]:
    """Version by package, Python included; 'uninstalled' for a missing one (perennial when run from a checkout)."""
    return {"python": platform.python_version()} | {package: package_version(package) for package in PACKAGES}


def code_digest() -> str:
    """Hex sha256 over the names and contents of all .py files of `pipeline` and `data_contracts`, in sorted order."""
    root = Path(__file__).resolve().parents[2]
    sources = sorted(path for package in ("data_contracts", "pipeline") for path in (root / package).rglob("*.py"))
    return sha256_text(canonical_json({path.relative_to(root).as_posix(): sha256_file(path) for path in sources}))


def package_version(package: str) -> str:
    """Of a distribution that may be missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"
