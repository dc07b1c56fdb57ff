"""A task's bundle as a folder of its own: for PEFT where one LoRA says it all, else in our exact form.

A plain-LoRA bundle becomes a PEFT adapter folder; a bundle that sums LoRAs of several tasks (`past.1`, ... weighed by
`past_weights`) becomes one LoRA of the summed rank, exactly. A MoE-CL bundle can be no LoRA at all: its gate mixes two
outputs that are not linear in the weights. It is exported as its parts with what is needed to put them together.
"""

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from data_contracts.errors import UserError
from pipeline.backbones.families import FAMILIES
from pipeline.config import method_module
from pipeline.experts.bank import Bank
from pipeline.experts.peft_format import CONFIG_FILE, TENSOR_FILE, Pairs, pairs_in, summed, to_peft
from pipeline.files import canonical_json, fsync_dir, write_atomic
from pipeline.methods.protocol import PAST_WEIGHTS, Bundle, own_of, past_of
from pipeline.tensor_files import METADATA_KEY
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.reading import as_of

BUNDLE = "bundle.json"  # of the native form


@dataclass(frozen=True)
class Published:
    """A task's bundle and where it came from."""

    task: str
    bundle: Bundle
    manifest: Manifest  # of the increment it is served as of
    bank: Bank
    base_model: str  # the backbone's folder, as the increment's run named it

    @property
    def lora(self) -> dict[str, Any]:
        """Rank, alpha, dropout and targets of the LoRA experts."""
        return self.manifest.learning["method"]["lora"]

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.lora["alpha"] / self.lora["rank"]

    @property
    def own(self) -> Bundle:
        """The components but earlier experts and their weights."""
        return own_of(self.bundle)

    def note(self) -> dict[str, Any]:
        """Where an exported file says that it comes from."""
        return {
            "task": self.task,
            "increment": self.manifest.increment,
            "manifest": self.manifest.sha256,
            "method": self.manifest.method,
            "backbone": self.manifest.backbone.digest,
        }


def find_bundle(work_dir: str, task: str, increment: int | None = None) -> Published:
    """What a task is served with after an increment (default: now). Raises UserError naming what there is."""
    folder = Path(work_dir).expanduser().resolve()
    at = as_of(folder, increment)
    chain, bundle = at.chain, at.bundle(task)
    if not bundle:
        raise UserError(
            f"task '{task}' is served with the bare backbone ({chain[0].method}); there is nothing to export"
        )
    run = folder / "increments" / chain[0].folder / "run.json"
    try:
        base_model = json.loads(run.read_text(encoding="utf-8"))["config"]["backbone"]["path"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run}: cannot be read ({error}); restore it from a backup") from error
    return Published(task, bundle, chain[0], Bank(folder / "bank"), base_model)


def export(found: Published, to: str, form: str, base_model: str | None = None) -> list[str]:
    """Write the folder `to`, whole or not at all; returns the names of its files.

    `base_model` is what PEFT shall call the backbone (default: its folder). Raises UserError where `to` is there
    already, or PEFT cannot hold the bundle.
    """
    target = Path(to).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {to} is there already; name a new folder")
    files = peft_files(found, base_model or found.base_model) if form == "peft" else native_files(found)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        for name, data in files.items():
            write_atomic(beside / name, data)
        if target.exists():
            target.rmdir()
        os.replace(beside, target)
        fsync_dir(target.parent)
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror}); name another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sorted(files)


def peft_files(found: Published, base_model: str) -> dict[str, bytes]:
    """A PEFT adapter folder's files. Raises UserError for a bundle that no single LoRA can express."""
    pairs = one_lora(found)
    if pairs is None and "gate" in found.own:
        raise UserError(
            f"task '{found.task}' is served with a {found.manifest.method} bundle ({', '.join(found.own)}), which no "
            "single LoRA expresses: its gate mixes the outputs of two experts, and neither is linear in the weights; "
            "PEFT has no form for it, export it with --format native"
        )
    if pairs is None:
        raise UserError(not_pairs(found))
    routed = FAMILIES[found.manifest.backbone.model_type].routed is not None
    config, tensors = to_peft(pairs, found.scaling, base_model, routed)
    return {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        TENSOR_FILE: save(tensors, metadata={METADATA_KEY: canonical_json(found.note())}),
    }


def not_pairs(found: Published) -> str:
    """Why a bundle has neither form."""
    return (
        f"task '{found.task}' is served with a {found.manifest.method} bundle, whose files hold more than LoRA pairs; "
        "it can be served here alone, with jobs/predict.py"
    )


def one_lora(found: Published) -> Pairs | None:
    """The whole bundle as one LoRA; None where it is none."""
    own = list(found.own.values())
    pairs = pairs_in(found.bank.get(own[0])) if len(own) == 1 else {}
    if not pairs:
        return None
    past = past_of(found.bundle)
    weights = [1.0] * len(past)
    if PAST_WEIGHTS in found.bundle:
        weights = found.bank.get(found.bundle[PAST_WEIGHTS])["weights"].tolist()
    earlier = [pairs_in(found.bank.get(sha)) for sha in past]
    return summed([*zip(earlier, weights, strict=True), (pairs, 1.0)])


def native_files(found: Published) -> dict[str, bytes]:
    """The bundle's files as they stand in the bank, and bundle.json, which says how to put them together."""
    if any(not pairs_in(found.bank.get(sha)) for component, sha in found.own.items() if component != "gate"):
        raise UserError(not_pairs(found))
    if found.own != found.bundle:
        raise UserError(
            f"task '{found.task}' is served with the sum of several LoRA experts; export it with --format peft, which "
            "makes them one, exactly"
        )
    files = {}
    for component, sha in found.bundle.items():
        found.bank.verify(sha)
        files[f"{component}.safetensors"] = found.bank.path(sha).read_bytes()
    options = dict(found.manifest.learning["method"])
    module = method_module(options.pop("name"))
    plan = module.build(module.Options.model_validate(options)).plan
    record = found.note() | {
        "format": 1,
        "lora": found.lora,
        "roles": list(plan.roles),  # in the order of the gate's outputs
        "files": {f"{component}.safetensors": sha for component, sha in found.bundle.items()},
        "backbone": found.manifest.backbone.model_dump(mode="json"),
    }
    return {BUNDLE: (json.dumps(record, indent=2) + "\n").encode(), **files}
