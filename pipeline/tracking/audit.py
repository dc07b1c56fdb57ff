"""The audit: is everything published still what it was? Chain, files, bank, champion, MLflow, each against the others.

Nothing stops it: what cannot be read is a finding, and the rest is checked on. It cannot see a change made to the
work_dir and to MLflow together, consistently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.experts.bank import Bank
from pipeline.files import sha256_bytes
from pipeline.store.published import Store
from pipeline.tracking import chain
from pipeline.tracking.audit_mlflow import mlflow_findings
from pipeline.tracking.audit_store import store_findings
from pipeline.tracking.champion import CHAMPION, Champion, read_champion
from pipeline.tracking.finding import Finding
from pipeline.tracking.history import History
from pipeline.tracking.manifest import MANIFEST, Entry, parse_manifest
from pipeline.tracking.outbox import OUTBOX, read_outbox, set_aside
from pipeline.tracking.registry import Registry


@dataclass(frozen=True)
class Link:
    """An increment folder as found: number, sha256 of the manifest's bytes, the manifest if readable, what is wrong."""

    number: int
    folder: Path
    sha256: str | None
    manifest: Entry | None
    problem: str | None

    @property
    def name(self) -> str:
        """How findings call the increment."""
        return f"{chain.INCREMENTS}/{self.folder.name}"


def audit(
    work_dir: Path | str, registry: Registry | None = None, store: Store | None = None, contents: bool = True
) -> list[Finding]:
    """Check everything a work_dir has published, what MLflow was not told yet and, when they are given, MLflow's
    account of the rest and the objects of the store (without `contents`, their sizes alone).

    Raises UserError only when nothing was ever published there (neither champion.json nor an increment).
    """
    work_dir = Path(work_dir)
    links = read_links(work_dir)
    champion, findings = _read_champion(work_dir, links)
    findings += _stray_findings(work_dir, links)
    findings += _chain_findings(links, champion)
    chained = _chained(links, champion)
    history = History.of(chained)
    withdrawn = {name for change in history.changes for name in change.withdrawn_files}
    for link in links:
        findings += _file_findings(link, withdrawn)
    findings += _champion_findings(chained, champion)
    findings += _bank_findings(work_dir, links, champion, history)
    findings += _withdrawal_findings(work_dir, history)
    findings += outbox_findings(work_dir)
    if registry is not None:
        findings += mlflow_findings(registry, chained, _waiting_folders(work_dir))
    if store is not None:
        findings += store_findings(work_dir, chained, champion, store, contents)
    return findings


def outbox_findings(work_dir: Path) -> Iterator[Finding]:
    """What MLflow has not been told yet, and files in the outbox that are no event; nothing where it is empty."""
    events, damaged = read_outbox(work_dir)
    if events:
        published = sorted(_waiting_folders(work_dir))
        detail = f"{len(events)} events not yet delivered to {events[-1].uri}; the next launch delivers them" + (
            f"; among them {', '.join(published)}" if published else ""
        )
        yield Finding("MLflow outbox", False, detail, pending=True)
    for path in damaged + set_aside(work_dir):
        yield Finding(
            f"{OUTBOX}/{path.name}",
            False,
            "was put aside (no whole event, or of a run that MLflow does not know): what it holds was not delivered",
        )


def _waiting_folders(work_dir: Path) -> set[str]:
    """Names of the increments whose publishing MLflow was not told of yet."""
    events, _ = read_outbox(work_dir)
    paths = (event.data.get("manifest") for event in events if event.kind == "published")
    return {Path(path).parent.name for path in paths if isinstance(path, str)}


def read_links(work_dir: Path | str) -> list[Link]:
    """Every increment folder in order, readable or not."""
    return [_read_link(number, folder) for number, folder in chain.increment_folders(work_dir)]


def _read_link(number: int, folder: Path) -> Link:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        return Link(number, folder, None, None, f"{MANIFEST} cannot be read ({error.strerror})")
    try:
        manifest = parse_manifest(data, MANIFEST)
    except UserError as error:
        return Link(number, folder, sha256_bytes(data), None, str(error))
    problem = None if manifest.folder == folder.name else f"the folder holds the manifest of {manifest.folder}"
    return Link(number, folder, sha256_bytes(data), manifest, problem)


def _read_champion(work_dir: Path, links: list[Link]) -> tuple[Champion | None, list[Finding]]:
    try:
        champion = read_champion(work_dir)
    except UserError as error:
        return None, [Finding(CHAMPION, False, str(error))]
    if champion is None and not links:
        raise UserError(
            f"{work_dir}: no champion was published here; name the work_dir of a stream that learned a task"
        )
    if champion is None:
        return None, [Finding(CHAMPION, False, "missing, though increments were published")]
    return champion, []


def _stray_findings(work_dir: Path, links: list[Link]) -> Iterator[Finding]:
    """Whatever stands among the increments and is none."""
    root = work_dir / chain.INCREMENTS
    known = {link.folder.name for link in links}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.name not in known:
            yield Finding(f"{chain.INCREMENTS}/{path.name}", False, "is not an increment's folder")


def _chain_findings(links: list[Link], champion: Champion | None) -> Iterator[Finding]:
    """Each manifest against the digest that the next one, or champion.json, names it by."""
    numbered: dict[int, list[Link]] = {}
    for link in links:
        numbered.setdefault(link.number, []).append(link)
    for number in range(1, max(numbered, default=0) + 1):
        if len(numbered.get(number, [])) != 1:
            names = ", ".join(link.folder.name for link in numbered.get(number, [])) or "no folder"
            yield Finding(f"increment {number}", False, f"one folder is expected, there is {names}")
    for link in links:
        if link.problem:
            yield Finding(f"{link.name}/{MANIFEST}", False, link.problem)
    head = next((link for link in links if champion and link.sha256 == champion.head), None)
    for link in links:
        children = [other for other in numbered.get(link.number + 1, []) if other.manifest]
        named = [(child.manifest.parent, child.name) for child in children]
        if champion and link is (head or links[-1]):
            named.append((champion.head, CHAMPION))
        wrong = [(sha, who) for sha, who in named if sha != link.sha256]
        for sha, who in wrong:
            yield Finding(f"{link.name}/{MANIFEST}", False, f"hashes to {link.sha256}, but {who} names {sha}")
        if head is not None and link.number > head.number:
            detail = f"{CHAMPION} ends at increment {head.number}: this folder was left over by a killed publish"
            yield Finding(link.name, False, f"{detail} (the next launch removes it), or {CHAMPION} was set back")
        elif named and not wrong and not link.problem:
            yield Finding(f"{link.name}/{MANIFEST}", True, f"sha256 {link.sha256[:12]} as {named[0][1]} names it")


def _file_findings(link: Link, withdrawn: set[str]) -> Iterator[Finding]:
    """Every file of an increment's folder against its manifest."""
    if link.manifest is None:
        yield Finding(f"{link.name} files", False, "cannot be checked without a readable manifest")
        return
    gone = {name for name in getattr(link.manifest, "files", {}) if f"{link.folder.name}/{name}" in withdrawn}
    problems = chain.folder_problems(link.folder, link.manifest, gone)
    for problem in problems:
        yield Finding(f"{link.name} files", False, problem)
    if not problems:
        number = len(getattr(link.manifest, "files", {})) - len(gone)
        detail = f"{number} files, digests agree" + (f"; {len(gone)} withdrawn" if gone else "")
        yield Finding(f"{link.name} files", True, detail)


def _chained(links: list[Link], champion: Champion | None) -> list[Entry]:
    """The readable manifests up to the head; all of them when the head is not known."""
    readable = [link.manifest for link in links if link.manifest]
    head = next((manifest.increment for manifest in readable if champion and manifest.sha256 == champion.head), None)
    return [manifest for manifest in readable if head is None or manifest.increment <= head]


def _champion_findings(chained: list[Entry], champion: Champion | None) -> Iterator[Finding]:
    """champion.json against the fold of the chain, and its bundles against what increments published."""
    if champion is None:
        return
    if not chained or len(chained) != max(manifest.increment for manifest in chained):
        yield Finding(CHAMPION, False, "cannot be recomputed: a manifest of the chain is missing or unreadable")
    else:
        differences = chain.champion_differences(champion, chain.fold(chained))
        for difference in differences:
            yield Finding(CHAMPION, False, difference)
        if not differences:
            yield Finding(CHAMPION, True, f"is the fold of {len(chained)} increments")
    published = {sha for manifest in chained for sha in getattr(manifest, "bank", {}).values()}
    for task, bundle in sorted(champion.bundles.items()):
        foreign = [f"{role} {sha}" for role, sha in sorted(bundle.items()) if sha not in published]
        for entry in foreign:
            yield Finding(f"bundle of {task}", False, f"{entry} was put into the bank by no increment")
        if not foreign:
            yield Finding(f"bundle of {task}", True, ", ".join(f"{r} {sha[:12]}" for r, sha in sorted(bundle.items())))


def _bank_findings(work_dir: Path, links: list[Link], champion: Champion | None, history: History) -> Iterator[Finding]:
    """Every bank file that is there, and every one that a manifest or champion.json names and no retired task has
    withdrawn.
    """
    bank = Bank(work_dir / "bank")
    named = {sha for link in links if link.manifest for sha in chain.digests_of(link.manifest)}
    if champion:
        named |= {
            sha for table in (champion.bundles, champion.state) for roles in table.values() for sha in roles.values()
        }
    present = set(bank.digests())
    gone = named & history.withdrawn.keys()
    named -= gone
    damaged = 0
    for sha in sorted(named | (present - gone)):
        try:
            bank.verify(sha)
        except UserError as error:
            damaged += 1
            yield Finding(f"bank/{sha}.safetensors", False, str(error))
    if not damaged:
        spare = len(present - named - gone)
        detail = f"{len(named)} files, digests agree" + (f"; {spare} more belong to no increment" if spare else "")
        detail += f"; {len(gone)} withdrawn" if gone else ""
        yield Finding("bank", True, detail)
    known = {bank.path(sha).name for sha in present}
    for path in sorted(bank.root.iterdir()) if bank.root.is_dir() else []:
        if path.name not in known and not path.name.endswith(".tmp"):
            yield Finding(f"bank/{path.name}", False, "not a bank file: it is not named by a digest")


def _withdrawal_findings(work_dir: Path, history: History) -> Iterator[Finding]:
    """Each retired task: what was withdrawn with it must be gone."""
    for change in history.changes:
        if change.task is None:
            continue
        shas = [sha for sha in change.withdrawn if history.withdrawn.get(sha) == change]
        names = [f"bank/{sha}.safetensors" for sha in shas]
        names += [f"{chain.INCREMENTS}/{name}" for name in change.withdrawn_files]
        names += change.withdrawn_data
        left = [name for name in names if (work_dir / name).exists()]
        for name in left:
            detail = f"was withdrawn with task '{change.task}' and is still there; jobs/bank.py gc --delete removes it"
            yield Finding(name, False, detail)
        if not left:
            detail = f"withdrawn by increment {change.increment} with {len(names)} files, all gone"
            yield Finding(f"task {change.task}", True, detail)
