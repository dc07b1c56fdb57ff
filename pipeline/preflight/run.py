"""All checks in the order in which one could hang on what the one before finds: meeting, connections, software and
digests, then process groups and collectives.
"""

import socket
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from data_contracts.errors import UserError
from pipeline.backbones.families import family_of
from pipeline.backbones.load import load_config
from pipeline.config import StreamConfig, build_method
from pipeline.experts.attach import ExpertPlan
from pipeline.placement.distributed import read_places, start_world
from pipeline.placement.expert_parallel import check_degrees, join
from pipeline.placement.learner import expert_parallel_size
from pipeline.preflight import judge
from pipeline.preflight.collectives import LARGEST, Measured, measure
from pipeline.preflight.findings import Findings
from pipeline.preflight.guard import Guard
from pipeline.preflight.host import Facts, WorkDir, facts_of, hashing_seconds, sees
from pipeline.preflight.network import Echo, call
from pipeline.preflight.rendezvous import NotMet, Place
from pipeline.preflight.report import print_report
from pipeline.preflight.sizes import Sizes, sizes_of
from pipeline.preflight.talk import Talk

CALL_LIMIT = 5.0  # seconds for a connection between two hosts


def run_preflight(config: StreamConfig, limit: float) -> int:
    """Check every host; 0 where nothing is red, else 1, on every rank. Ranks wait `limit` seconds for each other.

    The first rank of each host speaks for it, rank 0 prints the report. Raises UserError where the stream's method
    cannot be built.
    """
    plan = build_method(config).plan
    read_places()
    place = Place.of_environment()
    found = Findings([])

    def overrun(sentence: str) -> None:
        found.red.append(f"{socket.gethostname()} (rank {place.rank}): {sentence}")
        print_report(found)

    guard = Guard(overrun)
    try:
        guard.phase("the ranks' meeting", 3 * limit + 30, "see the messages of the other ranks")
        talk = Talk(place, limit, libraries())
        found.hosts = talk.hosts.names
        connected = connect(talk, found, guard)
        alike, sizes = compare(talk, found, guard, config, plan)
        if connected and alike:
            guard.phase("process groups and collectives", 4 * limit + 30, "see the backend's messages above")
            exercise(talk, found, config, sizes)
        elif talk.is_main:
            found.show("collectives", ["not tried"] * len(found.hosts))
        if talk.is_main:
            print_report(found)
        code = talk.leave(int(bool(found.red)))
    except NotMet as error:
        found.red.append(str(error))
        print_report(found)
        code = 1
    guard.off()
    return code


def libraries() -> list[str]:
    """Who communicates in a run: gloo carries small objects, the accelerator's backend the tensors."""
    return list(dict.fromkeys(("gloo", get_accelerator().communication_backend_name())))


def connect(talk: Talk, found: Findings, guard: Guard) -> bool:
    """MASTER_PORT, addresses, connections between all pairs of hosts, clocks; whether groups can use them."""
    hosts = talk.hosts
    several = len(hosts.names) > 1
    guard.phase("connections between the hosts", 3 * talk.limit + CALL_LIMIT * len(hosts.names), "see which is silent")
    found.show("ranks", [", ".join(map(str, ranks)) for ranks in hosts.ranks])
    if talk.place.size > 1:
        talk.say("port", 1e3 * talk.meeting.reached_after)
        if talk.is_main:
            reached = talk.from_hosts("port")
            cells = [f"{talk.place.address}:{talk.place.port}", *(f"reached in {ms:.1f} ms" for ms in reached[1:])]
            found.show("MASTER_ADDR:PORT", cells)
    good = True
    for library in libraries():
        if talk.is_main:
            good &= judge.judge_addresses(found, hosts.addresses, library)
        if not several:
            continue
        if talk.speaks:
            call_others(talk, library)
        if talk.is_main:
            calls = talk.from_hosts(f"calls {library}", CALL_LIMIT * len(hosts.names))
            good &= judge.judge_calls(found, library, calls)
            if library == "gloo":
                judge.judge_clocks(found, [row[0] and row[0]["offset"] for row in calls])
    if talk.is_main:
        talk.say("connected", good)
    return talk.from_main("connected", talk.limit + CALL_LIMIT * len(hosts.names))


def call_others(talk: Talk, library: str) -> None:
    """Listen on this host's address, call those of the other hosts, say what came of it."""
    hosts, own = talk.hosts, talk.place.rank
    address = hosts.addresses[hosts.speakers.index(own)][library]["address"]
    echo = None
    if address:
        with suppress(OSError):  # an address that is not this host's: said to all as having none
            echo = Echo(address)
    talk.say(f"echo {library}", [echo.address, echo.port, echo.secret] if echo else None)
    echoes = talk.from_hosts(f"echo {library}")
    calls: list[dict[str, Any] | None] = []
    for rank, other in zip(hosts.speakers, echoes, strict=True):
        if rank == own:
            calls.append(None)
        elif not echo or not other:
            calls.append({"seconds": None, "offset": None, "problem": "no address that can be used"})
        else:
            calls.append(asdict(call(address, *other, min(CALL_LIMIT, talk.limit))))
    talk.say(f"calls {library}", calls)
    talk.from_hosts(f"calls {library}", CALL_LIMIT * len(hosts.names))  # the others may still be calling
    if echo:
        echo.close()


def compare(
    talk: Talk, found: Findings, guard: Guard, config: StreamConfig, plan: ExpertPlan | None
) -> tuple[bool, Sizes | None]:
    """Software, memory, disk and digests of all hosts; whether they can form groups, and the run's sizes."""
    hosts = talk.hosts
    if talk.speaks:
        talk.say("hashing", hashing_seconds(config))
    longest = max(talk.from_hosts("hashing"))
    guard.phase("digests of backbone and data", 3 * talk.limit + longest, "see whether a host's disk answers")
    work_dir = WorkDir(config.work_path())
    try:
        if talk.is_main:
            talk.say("work_dir", work_dir.facts())
        place = talk.from_main("work_dir")
        if talk.speaks:
            facts = facts_of(config, plan, len(hosts.ranks[hosts.speakers.index(talk.place.rank)]))
            talk.say("facts", facts | {"shares": sees(place["token"])})
        if talk.is_main:
            judged = judge_facts(found, talk.from_hosts("facts", longest), place, hosts.ranks, config, plan)
            talk.say("compared", judged)
        alike, sizes = talk.from_main("compared", talk.limit + longest)
    finally:
        if talk.is_main:
            work_dir.remove()
    return alike, Sizes(**sizes) if sizes else None


def judge_facts(
    found: Findings,
    facts: list[Facts],
    work_dir: Facts,
    ranks: list[list[int]],
    config: StreamConfig,
    plan: ExpertPlan | None,
) -> tuple[bool, dict[str, int] | None]:
    """Rank 0's judgement: whether groups can be formed, and the sizes of the run where they can be told."""
    alike = judge.judge_software(found, facts)
    per_host = [len(own) for own in ranks]
    loadable = all(isinstance(one["backbone"], str) for one in facts)  # else some ranks would be missing in the groups
    sizes = None
    if loadable:
        model_config = load_config(config.backbone)
        try:
            check_degrees(expert_parallel_size(config), sum(per_host), family_of(model_config), model_config)
        except UserError as error:
            alike = False
            found.show("expert-parallel", ["does not fit"] * len(facts), {0: str(error)})
        with suppress(UserError):  # a backbone of which no memory can be planned is no hindrance
            sizes = sizes_of(config, plan, len(ranks), max(per_host))
    judge.judge_memory(found, facts, per_host, sizes)
    judge.judge_disk(found, facts, work_dir, [one["shares"] for one in facts])
    judge.judge_digests(found, facts)
    return alike and loadable, asdict(sizes) if sizes else None


def exercise(talk: Talk, found: Findings, config: StreamConfig, sizes: Sizes | None) -> None:
    """Form the run's groups and use them once. Collective."""
    try:
        world = start_world(int(talk.limit))
        parallel = join(expert_parallel_size(config))
        room = int(get_accelerator().available_memory(talk.place.local_rank)) // (16 * world.size)
        room = int(min(world.gather(room)))
        sizes = sizes or Sizes(0, 0, 0, 0, parallel.size if parallel else 1, 4)
        dtype = getattr(torch, config.backbone.dtype)
        said: Any = [asdict(one) for one in measure(world, parallel, sizes, dtype, min(room, LARGEST))]
    except UserError as error:  # the port was taken meanwhile
        said = {"error": str(error)}
    except (RuntimeError, torch.distributed.DistError) as error:
        said = {"error": " ".join(str(error).split())[:300]}
    talk.say("measured", said)
    if not talk.is_main:
        return
    heard, missing = talk.from_ranks("measured")
    heard |= {rank: {"error": f"no result in {talk.limit:g} s"} for rank in missing}
    measured = [one if isinstance(one, dict) else [Measured(**m) for m in one] for _, one in sorted(heard.items())]
    judge.judge_collectives(found, measured, talk.hosts.of_rank)
