"""What the stages of a job share: configuration, world, model, bank. Built once, handed to every stage."""

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.config import StreamConfig
from pipeline.experts.bank import Bank
from pipeline.files import canonical_json, sha256_text
from pipeline.hosts.storage import Storage
from pipeline.methods.protocol import PAST, PAST_WEIGHTS, Bundle, Method, own_of, past_of
from pipeline.placement.distributed import World, return_freed_memory
from pipeline.placement.learner import Learner
from pipeline.spans.record import span
from pipeline.startup import StartClock
from pipeline.tensor_files import TensorFile

_ALL_IN = 50  # blocks
_blocks = itertools.count(1)


@contextmanager
def leaving_no_garbage() -> Iterator[None]:
    """Collect what a block leaves behind in cycles of objects, walking only what the block made.

    Pictures and logged runs are such cycles. Left to itself, the collector would look at old objects after a quarter
    more have come, and those of torch and DeepSpeed are so many that garbage of dozens of increments piles up. What
    another thread drops between two blocks passes for old: every 50th block all objects are walked.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if next(_blocks) % _ALL_IN == 0:
            gc.collect()
        return_freed_memory()


@dataclass
class Job:
    """The running job on this rank. `loaded` remembers which bank file fills which slots, `seconds` what the parts of
    the running increment took.
    """

    config: StreamConfig
    world: World
    work_dir: Path
    method: Method
    tokenizer: PreTrainedTokenizerFast
    learner: Learner
    bank: Bank
    loaded: dict[str, str]
    clock: StartClock = field(default_factory=StartClock)
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by part
    storage: Storage | None = None  # where the ranks of other hosts find the work_dir's files; None: there

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of a block to a part of the running increment."""
        begin = time.perf_counter()
        try:
            with span({"register": "publish"}.get(part, part), part=True):
                yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

    @property
    def inflight(self) -> Path:
        """Folder of the running increment."""
        return self.work_dir / "inflight"

    @property
    def learning_digest(self) -> str:
        """Digest of everything in the configuration that decides the learned numbers."""
        return sha256_text(canonical_json(self.config.learning()))

    def read_bank(self, digests: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of bank files, verified, on every rank: read by rank 0, then broadcast. Collective."""
        tensors = {}
        for digest in dict.fromkeys(digests):
            # the first call raises a damaged file's UserError on every rank; the tensors travel as tensors
            self.world.on_main(lambda digest=digest: self.bank.verify(digest))
            own = self.bank.get(digest) if self.world.is_main else None
            tensors[digest] = self.world.broadcast_tensors(own)
        return tensors

    def open_bank(self, digest: str) -> TensorFile:
        """A bank file for reading by slices, once rank 0 has verified its bytes. Collective."""
        self.world.on_main(lambda: self.bank.verify(digest))
        if self.storage is None or self.storage.everywhere:
            return self.bank.open(digest)
        return TensorFile(self.storage.read(self.bank.path(digest), immutable=True))

    def read_here(self, path: Path) -> Path:
        """Where this rank reads a file that rank 0 wrote into the work_dir. Collective."""
        return path if self.storage is None else self.storage.read(path)

    def serve(self, bundle: Bundle) -> None:
        """Fill the slots with a bundle and let its LoRA experts speak; an empty bundle is the bare backbone.
        Collective.
        """
        roles = self.method.plan.roles if self.method.plan else ()
        self.learner.set_active(tuple(role for role in roles if role in bundle))
        if self.method.packs:
            self._unpack(bundle)
            return
        own = own_of(bundle)
        missing = {component: digest for component, digest in own.items() if self.loaded.get(component) != digest}
        for component, digest in missing.items():
            self.learner.fill(component, self.open_bank(digest))
        self.loaded.update(missing)
        if own:
            self.add_past(past_of(bundle), bundle.get(PAST_WEIGHTS))

    def add_past(self, digests: list[str], weights: str | None) -> None:
        """Let the experts of earlier tasks speak along with the first role's own, weighed as the bank file `weights`
        says (None: all alike), and no others. Collective.
        """
        role = self.method.plan.roles[0]
        wanted = canonical_json([digests, weights])
        if self.loaded.get(PAST) == wanted:
            return
        each = [1.0] * len(digests) if weights is None else self.read_bank([weights])[weights]["weights"].tolist()
        files = [self.open_bank(digest) for digest in digests]
        self.learner.set_past(role, list(zip(files, each, strict=True)))
        self.loaded[PAST] = wanted

    def _unpack(self, bundle: Bundle) -> None:
        """Fill the slots with a bundle in the method's own form. Collective."""
        wanted = canonical_json(bundle)
        if bundle and self.loaded.get("packed") != wanted:
            own, *past = (self.open_bank(d) for d in (bundle[self.method.plan.roles[0]], *past_of(bundle)))
            self.method.unpack(self.learner, own, past)
            self.loaded["packed"] = wanted
