"""Learn a stream: the increments of one model, task after task, each through the six stages.

contract + files -> validate -> prepare -> train -> evaluate -> gate -> register -> next task
"""

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from data_contracts.errors import UserError
from pipeline.backbones.load import load_config, load_tokenizer, pinned_digest
from pipeline.config import StoreConfig, StreamConfig, build_method
from pipeline.data.batching import check_batch_sizes
from pipeline.data.tokens import PreparedTask, open_shards
from pipeline.evaluation.text_states import check_router
from pipeline.experts.bank import Bank
from pipeline.files import canonical_json, storage_error, write_atomic, writing
from pipeline.hosts.alike import check_alike, check_prepared_alike
from pipeline.hosts.meeting import Hosts, meet, refused_together
from pipeline.hosts.storage import Storage, copies_removed, find_storage
from pipeline.increments import check_same_model, check_sampling, inputs_key, measurable, next_increment, standing
from pipeline.lock import WorkLock, user_name
from pipeline.placement.distributed import World, start_world
from pipeline.placement.learner import build_learner, check_before_loading, check_world
from pipeline.report import final_report, print_start
from pipeline.spans import record as spans
from pipeline.stages.evaluate import evaluate
from pipeline.stages.gate import gate
from pipeline.stages.job import Job, leaving_no_garbage
from pipeline.stages.prepare import prepare
from pipeline.stages.register import Context, register
from pipeline.stages.route import learn_router, with_router
from pipeline.stages.train import train
from pipeline.stages.validate import check_task_names, validate
from pipeline.startup import StartClock
from pipeline.store.reconcile import open_in_step
from pipeline.tracking import system_metrics
from pipeline.tracking.chain import clean_left_overs, load_chain
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.mlflow_log import Tracker, read_inputs_key
from pipeline.training.adapter_folder import check_start_from, check_started_tasks
from pipeline.training.inflight import remove_published
from pipeline.training.loop import StepLog
from pipeline.training.stop import StopFlag, StoppedOnRequest
from pipeline.watch import rank as watch

EXIT_DONE, EXIT_REJECTED = 0, 3
FINISHED, STOPPED = "finished.json", "stopped.json"


def run_stream(config: StreamConfig, until: str | None, stop: StopFlag, break_lock: bool = False) -> int:
    """Learn every task of the stream that is not learned yet, up to `until`, as the work_dir's one writer. Returns the
    exit code: 0, or 3 where the gate rejected an increment.

    Raises UserError for what the user can mend, StoppedOnRequest (state saved) when asked to stop.
    """
    watch.set_limits(**config.watch.model_dump())
    with WorkLock(config.work_path()) as lock, copies_removed():  # rank 0 takes it, as soon as it knows its rank
        stop.release = lock.release
        return learn_stream(config, until, stop, lambda: lock.acquire(break_lock))


def learn_stream(config: StreamConfig, until: str | None, stop: StopFlag, lock: Callable[[], Any]) -> int:
    """`run_stream`; `lock` makes rank 0 the one writer."""
    clock = StartClock()
    clock.passed("imports")
    with refused_together():
        method = build_method(config)
        check_before_loading(config, method.plan)
        check_sampling(config, method)
        check_start_from(config, method)
        check_router(config.router, load_config(config.backbone))
        tokenizer = load_tokenizer(config.backbone)
    clock.passed("checks")
    world = start_world()
    hosts = meet(world)
    clock.passed("process group")
    check_world(config, world)
    check_batch_sizes(config.training.batch_size, config.training.micro_batch_size, world.size)
    work_dir = config.work_path()
    history = world.on_main(lambda: open_work_dir(work_dir, lock, config.store))
    if world.is_main:
        stop.marker = lambda message: mark(work_dir, STOPPED, {"message": message})
    backbone = world.on_main(lambda: backbone_record(config))
    check_same_model(config, backbone, history)
    world.on_main(lambda: drop_published_state(work_dir, history))
    files = check_alike(config, hosts)
    storage = find_storage(hosts, work_dir)
    clock.passed("chain and digests")
    prepared = prepare_tasks(config, tokenizer, hosts, storage, files, history, until, stop)
    clock.passed("prepare")
    watch.report("loading the model")
    learner = build_learner(config, method.plan, world, train=True, passed=clock.passed)
    job = Job(config, world, work_dir, method, tokenizer, learner, Bank(work_dir / "bank"), {}, clock, storage=storage)
    tracker = open_tracker(config, world, history)
    clock.passed("tracking")
    if world.is_main:
        print_start(config, world, learner, prepared, history)
    code = EXIT_DONE
    try:
        for task in prepared.values():
            state = standing(task, history, job.learning_digest)
            if state == "learned":
                say(world, f"{task.task}: learned already with this contract and data")
                continue
            if state == "rejected":
                say(world, f"{task.task}: rejected before with these very inputs, not trained again")
            else:
                with leaving_no_garbage(), spans.recording(config.spans, work_dir, world):
                    manifest = learn(job, task, prepared, history, backbone, tracker, stop)
                history.add(manifest)
                state = manifest.verdict
            if state == "rejected":
                code = EXIT_REJECTED
                if config.gate.on_reject == "stop":
                    break
        if world.is_main:
            tracker.close()
            final_report(config, history, tracker.uri)
            stop.marker = None
            mark(work_dir, FINISHED, {"exit_code": code, "head": history.head_sha256})
    except BaseException as error:
        if isinstance(error, StoppedOnRequest):
            if world.is_main:
                mark(work_dir, STOPPED, {"message": str(error)})
            world.barrier()  # the launcher ends the other ranks as soon as one has left
        if world.is_main:
            tracker.close(ok=False)
        raise
    world.barrier()
    return code


def learn(
    job: Job,
    task: PreparedTask,
    prepared: dict[str, PreparedTask],
    history: History,
    backbone: dict[str, str],
    tracker: Tracker | None,
    stop: StopFlag,
) -> Manifest:
    """One increment, from the champion to a published manifest. Collective; the manifest is the same on every rank.

    `job.seconds` then holds what its parts took.
    """
    world, config = job.world, job.config
    job.seconds.clear()
    increment = next_increment(job, task.task, history)
    spans.in_increment(increment.number)
    key = inputs_key(job, task, history, backbone)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    step_seconds: list[float] = []
    if tracker is not None:
        with job.timed("tracking"):
            open_run(tracker, job, increment.number, task, key)
    system_metrics.follow(config, world, tracker)

    startup: dict[str, Any] = {}

    def log(step: StepLog) -> None:
        step_seconds.append(step.seconds)
        if job.clock.running:
            job.clock.stop(step.seconds)
            startup.update(job.clock.record())
            say(world, job.clock.line())
        if tracker is not None and (step.step % 5 == 0 or step.step == 1):
            tracker.log_metrics(step.step, step_metrics(step))

    title = f"increment {increment.number} {task.task}"
    say(world, f"\n== increment {increment.number}: {task.task}")
    watch.report(f"{title}: opening")
    with job.timed("train"):
        learned = measurable(prepared, task, history, job.learning_digest) if job.method.rehearses(increment) else {}
        trained = train(job, increment, task, key, stop, log, learned)
    if tracker is not None and trained.account:
        tracker.log_metrics(trained.steps, trained.account)
    job.seconds["step"] = statistics.median(step_seconds) if step_seconds else 0.0
    stop.check(world, f"{title}: stopped after training")
    watch.report(f"{title}: evaluating")
    sample = config.evaluation.earlier_tasks, config.seed
    at_hand = measurable(prepared, task, history, job.learning_digest) if config.router else {}
    with job.timed("router"):
        router, trained = with_router(trained, learn_router(job, increment, at_hand))
    with job.timed("evaluate"):
        scored = measurable(prepared, task, history, job.learning_digest, *sample)
        evaluated = evaluate(job, increment, scored, trained, router, at_hand)
    stop.check(world, f"{title}: stopped after evaluation")
    watch.report(f"{title}: publishing")
    verdict = gate(config.gate, task.task, evaluated.row, history.row)
    run_id = tracker.run_id() if tracker is not None else ""
    context = Context(history, backbone, key, run_id, started, user_name(), startup)
    with job.timed("register"):
        manifest = world.on_main(lambda: register(job, increment, task, trained, evaluated, verdict, context))
    if world.is_main:
        shutil.rmtree(job.inflight, ignore_errors=True)
    if tracker is not None:
        with job.timed("tracking"):
            tracker.published(manifest, inputs_key=key)
    system_metrics.rest()
    say(world, f"increment {manifest.increment} {manifest.verdict}: {'; '.join(verdict.reasons) or 'all rules hold'}")
    return manifest


def open_run(tracker: Tracker, job: Job, number: int, task: PreparedTask, key: str) -> None:
    """Open an increment's MLflow run with its parameters and data sets."""
    tracker.increment(number, task.task, key)
    tracker.log_params({**job.config.model_dump(mode="json"), "world_size": job.world.size})
    for split, digest in task.data_digests.items():
        context = {"train": "training", "validation": "validation", "test": "testing"}[split]
        tracker.log_inputs(split, digest, task.counts[split]["kept"], list(task.files), context)


def prepare_tasks(
    config: StreamConfig,
    tokenizer: PreTrainedTokenizerFast,
    hosts: Hosts,
    storage: Storage,
    files: Mapping[str, dict[str, str]],
    history: History,
    until: str | None,
    stop: StopFlag,
) -> dict[str, PreparedTask]:
    """Validate and prepare the stream's tasks, dealt out over the ranks that share a disk; nobody waits inside a device
    collective. `files` are digests of data files that this rank knows.

    Raises the first task's UserError on every rank, StoppedOnRequest when asked to stop.
    """
    world, done = hosts.world, {}
    for index in storage.share(len(config.tasks)):
        if stop.requested:
            break
        watch.report(f"validating and preparing {config.tasks[index]}")
        try:
            path = config.tasks[index]
            validated = validate(path, config, tokenizer, history, storage.root, files.get(path))
            prepare(validated, tokenizer)
            done[index] = (validated.contract, validated.shards)
        except UserError as error:
            done[index] = error
        except OSError as error:
            done[index] = storage_error(error, storage.root)
    watch.report("waiting until all tasks are prepared")
    stop.check(world, "stopped before all tasks were prepared")
    gathered = world.gather(done)
    for index in range(len(config.tasks)):
        hosts.refuse([str(item) if isinstance(item := part.get(index), UserError) else None for part in gathered])
    merged = {index: item for rank in storage.ranks for index, item in gathered[rank].items()}
    results = [merged[index] for index in range(len(config.tasks))]
    check_task_names([contract for contract, _ in results])
    names = [contract.task for contract, _ in results]
    check_started_tasks(config, names)
    if until is not None and until not in names:
        raise UserError(f"--until {until}: the stream has no such task; it has {', '.join(names)}")
    floors = config.gate.min_metric if isinstance(config.gate.min_metric, dict) else {}
    if unknown := [name for name in floors if name not in names]:
        raise UserError(
            f"gate.min_metric names {unknown[0]!r}, which is no task of the stream; it has {', '.join(names)}"
        )
    last = names.index(until) + 1 if until else len(names)
    opened = {name: open_shards(*result) for name, result in zip(names[:last], results, strict=False)}
    check_prepared_alike(hosts, opened)
    return opened


def prepare_only(config: StreamConfig, stages: Sequence[str], break_lock: bool = False) -> int:
    """The stages that need no device, as a job of their own: `validate`, or `validate,prepare`. Returns the exit
    code.
    """
    tokenizer = load_tokenizer(config.backbone)
    work_dir, contracts = config.work_path(), []
    watch.set_limits(**config.watch.model_dump())
    with WorkLock(work_dir) as lock, writing(work_dir):
        work_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(break_lock)
        history = History.of(load_chain(work_dir))
        for path in config.tasks:
            watch.report(f"validating and preparing {path}")
            validated = validate(path, config, tokenizer, history)
            contracts.append(validated.contract)
            there = f"{validated.contract.task}: prepared already"
            print(validated.clean.verdict.render() if validated.clean else there)
            if "prepare" in stages:
                prepare(validated, tokenizer)
    check_task_names(contracts)
    return EXIT_DONE


def open_work_dir(work_dir: Path, lock: Callable[[], Any] = lambda: None, store: StoreConfig | None = None) -> History:
    """Make the work_dir usable, ours alone and in step with its store, and read its chain. Raises UserError where it
    cannot be written or read.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock()
        for marker in (FINISHED, STOPPED):
            (work_dir / marker).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"work_dir {work_dir}: cannot be written ({error.strerror}); choose another") from error
    clean_left_overs(work_dir)
    for line in open_in_step(work_dir, store.uri if store else None):
        print(line, flush=True)
    return History.of(load_chain(work_dir))


def drop_published_state(work_dir: Path, history: History) -> None:
    """Remove the in-flight state that a job left which died between publishing its increment and removing it."""
    inflight = work_dir / "inflight"
    if inflight.is_dir():
        key = read_inputs_key(work_dir, history.newest) if history.newest else ""
        remove_published(inflight, key)


def open_tracker(config: StreamConfig, world: World, history: History) -> Tracker | None:
    """Rank 0's tracker, which knows of every published increment. Its UserError is raised on every rank."""
    opened: list[Tracker] = []

    def work() -> None:
        opened.append(Tracker(config.work_path(), config.stream, config.tracking))
        opened[0].catch_up(history)

    world.on_main(work)
    return opened[0] if opened else None


def step_metrics(step: StepLog) -> dict[str, float]:
    """What MLflow keeps of a step."""
    return {
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens_per_second": step.tokens / step.seconds,
        **step.terms,
    }


def backbone_record(config: StreamConfig) -> dict[str, str]:
    """Digest, type and dtype of the backbone, for the manifest."""
    model_type = load_config(config.backbone).model_type
    return {"digest": pinned_digest(config.backbone), "model_type": model_type, "dtype": config.backbone.dtype}


def mark(work_dir: Path, name: str, content: dict[str, Any]) -> None:
    """Leave the marker by which success, or a stop on request, is judged."""
    with writing(work_dir / name):
        write_atomic(work_dir / name, canonical_json(content).encode())


def say(world: World, text: str) -> None:
    """Print on rank 0."""
    if world.is_main:
        print(text, flush=True)
