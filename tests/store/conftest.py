"""One local S3 server for the tests of this folder, a bucket for each, and the chains made by hand."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.tracking.conftest import by_hand  # noqa: F401

SERVER = Path(__file__).with_name("s3_server.py")


@pytest.fixture(scope="session")
def s3_server():
    """The address of a moto server, and the environment that leads s3fs there; it ends with the session."""
    pytest.importorskip("moto", reason="the S3 server of the tests is not installed: pip install 'perennial[test]'")
    pytest.importorskip("s3fs", reason="what s3:// needs is not installed: pip install 'perennial[s3]'")
    process = subprocess.Popen([sys.executable, SERVER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    port = process.stdout.readline().strip()
    assert port.isdigit(), "the S3 server did not start"
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The file system of the server, as users reach it: address and credentials by environment alone."""
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)  # the one that stores below s3:// use too


@pytest.fixture
def bucket(s3):
    """The URI of a new bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3.mkdir(name)
    return f"s3://{name}"


def environment(address: str) -> dict[str, str]:
    """What a user sets for a server of their own."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
