"""Learn a stream: the increments of one model, task after task, each through the six stages.

contract + files -> validate -> prepare -> train -> evaluate -> gate -> register -> next task
"""

import getpass
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from data_contracts.errors import UserError
from pipeline.backbones.load import backbone_digest, load_config, load_tokenizer
from pipeline.config import StreamConfig, build_method
from pipeline.data.batching import check_batch_sizes
from pipeline.data.tokens import PreparedTask, open_shards
from pipeline.evaluation.review_cost import REVIEW
from pipeline.evaluation.text_states import check_router
from pipeline.experts.bank import Bank
from pipeline.files import canonical_json, write_atomic
from pipeline.increments import champion_row, check_same_model, inputs_key, measurable, next_increment, standing
from pipeline.placement.distributed import World, start_world
from pipeline.placement.learner import build_learner, check_before_loading, check_world
from pipeline.report import final_report, print_start
from pipeline.stages.evaluate import evaluate
from pipeline.stages.gate import gate
from pipeline.stages.job import Job
from pipeline.stages.prepare import prepare
from pipeline.stages.register import Context, register
from pipeline.stages.route import learn_router, with_router
from pipeline.stages.train import train
from pipeline.stages.validate import check_task_names, validate
from pipeline.tracking.chain import clean_left_overs, load_chain
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.mlflow_log import Tracker
from pipeline.training.loop import StepLog
from pipeline.training.stop import StopFlag, StoppedOnRequest

EXIT_DONE, EXIT_REJECTED = 0, 3
FINISHED, STOPPED = "finished.json", "stopped.json"


def run_stream(config: StreamConfig, until: str | None, stop: StopFlag) -> int:
    """Learn every task of the stream that is not learned yet, up to `until`. Returns the exit code (DESIGN section 8).

    Raises UserError for what the user can mend, StoppedOnRequest (state saved) when asked to stop.
    """
    method = build_method(config)
    check_before_loading(config, method.plan)
    check_router(config.router, load_config(config.backbone))
    tokenizer = load_tokenizer(config.backbone)
    world = start_world()
    check_world(config, world)
    check_batch_sizes(config.training.batch_size, config.training.micro_batch_size, world.size)
    work_dir = config.work_path()
    chain = world.on_main(lambda: open_work_dir(work_dir))
    backbone = world.on_main(lambda: backbone_record(config))
    check_same_model(config, backbone, chain)
    prepared = prepare_tasks(config, tokenizer, world, chain, until)
    learner = build_learner(config, method.plan, world, train=True)
    job = Job(config, world, work_dir, method, tokenizer, learner, Bank(work_dir / "bank"), {})
    tracker = open_tracker(config, world, chain)
    if world.is_main:
        print_start(config, world, learner, prepared, chain)
    code = EXIT_DONE
    try:
        for task in prepared.values():
            state = standing(task, chain, job.learning_digest)
            if state == "learned":
                say(world, f"{task.task}: learned already with this contract and data")
                continue
            if state == "rejected":
                say(world, f"{task.task}: rejected before with these very inputs, not trained again")
            else:
                manifest = learn(job, task, prepared, chain, backbone, tracker, stop)
                chain = [manifest, *chain]
                state = manifest.verdict
            if state == "rejected":
                code = EXIT_REJECTED
                if config.gate.on_reject == "stop":
                    break
        if world.is_main:
            final_report(config, chain, tracker.uri)
            tracker.close()
            mark(work_dir, FINISHED, {"exit_code": code, "head": chain[0].sha256 if chain else None})
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
    chain: list[Manifest],
    backbone: dict[str, str],
    tracker: Tracker | None,
    stop: StopFlag,
) -> Manifest:
    """One increment, from the champion to a published manifest. Collective; the manifest is the same on every rank."""
    world = job.world
    increment = next_increment(job, task.task, chain)
    key = inputs_key(job, task, chain, backbone)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run_id = ""
    if tracker is not None:
        run_id = tracker.increment(increment.number, task.task, key).info.run_id
        tracker.log_params({**job.config.model_dump(mode="json"), "world_size": world.size})
        for split, digest in task.data_digests.items():
            context = {"train": "training", "validation": "validation", "test": "testing"}[split]
            tracker.log_inputs(split, digest, len(task.splits[split]), list(task.files), context)

    def log(step: StepLog) -> None:
        if tracker is not None and (step.step % 5 == 0 or step.step == 1):
            tracker.log_metrics(step.step, step_metrics(step))

    say(world, f"\n== increment {increment.number}: {task.task}")
    trained = train(job, increment, task, key, stop, log)
    stop.check(world, f"increment {increment.number} {task.task}: stopped after training")
    scored = measurable(prepared, task, chain, job.learning_digest)
    router, trained = with_router(trained, learn_router(job, increment, scored))
    evaluated = evaluate(job, increment, scored, trained, router)
    stop.check(world, f"increment {increment.number} {task.task}: stopped after evaluation")
    verdict = gate(job.config.gate, task.task, evaluated.row, champion_row(chain))
    context = Context(chain, backbone, key, run_id, started, getpass.getuser())
    manifest = world.on_main(lambda: register(job, increment, task, trained, evaluated, verdict, context))
    if tracker is not None:
        shutil.rmtree(job.inflight, ignore_errors=True)
        record(tracker, job.work_dir, manifest)
    say(world, f"increment {manifest.increment} {manifest.verdict}: {'; '.join(verdict.reasons) or 'all rules hold'}")
    return manifest


def prepare_tasks(
    config: StreamConfig, tokenizer: PreTrainedTokenizerFast, world: World, chain: list[Manifest], until: str | None
) -> dict[str, PreparedTask]:
    """Validate and prepare the stream's tasks, dealt out over the ranks; nobody waits inside a device collective.

    Raises the first task's UserError on every rank.
    """
    done: dict[int, Any] = {}
    for index in range(world.rank, len(config.tasks), world.size):
        try:
            validated = validate(config.tasks[index], config, tokenizer, chain)
            prepare(validated, tokenizer)
            done[index] = (validated.contract, validated.shards)
        except UserError as error:
            done[index] = error
    merged = {index: item for part in world.gather(done) for index, item in part.items()}
    results = [merged[index] for index in range(len(config.tasks))]
    for result in results:
        if isinstance(result, UserError):
            raise result
    check_task_names([contract for contract, _ in results])
    names = [contract.task for contract, _ in results]
    if until is not None and until not in names:
        raise UserError(f"--until {until}: the stream has no such task; it has {', '.join(names)}")
    floors = config.gate.min_metric if isinstance(config.gate.min_metric, dict) else {}
    if unknown := [name for name in floors if name not in names]:
        raise UserError(
            f"gate.min_metric names {unknown[0]!r}, which is no task of the stream; it has {', '.join(names)}"
        )
    last = names.index(until) + 1 if until else len(names)
    return {name: open_shards(*result) for name, result in zip(names[:last], results, strict=False)}


def prepare_only(config: StreamConfig, stages: Sequence[str]) -> int:
    """The stages that need no device, as a job of their own: `validate`, or `validate,prepare`. Returns the exit
    code.
    """
    tokenizer = load_tokenizer(config.backbone)
    chain = load_chain(config.work_path())
    contracts = []
    for path in config.tasks:
        validated = validate(path, config, tokenizer, chain)
        contracts.append(validated.contract)
        print(validated.clean.verdict.render() if validated.clean else f"{validated.contract.task}: prepared already")
        if "prepare" in stages:
            prepare(validated, tokenizer)
    check_task_names(contracts)
    return EXIT_DONE


def open_work_dir(work_dir: Path) -> list[Manifest]:
    """Make the work_dir usable and read its chain, newest first. Raises UserError where it cannot be written or
    read.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        for marker in (FINISHED, STOPPED):
            (work_dir / marker).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"work_dir {work_dir}: cannot be written ({error.strerror}); choose another") from error
    clean_left_overs(work_dir)
    return load_chain(work_dir)


def open_tracker(config: StreamConfig, world: World, chain: list[Manifest]) -> Tracker | None:
    """Rank 0's tracker, which knows of every published increment. Its UserError is raised on every rank."""
    opened: list[Tracker] = []

    def work() -> None:
        opened.append(Tracker(config.work_path(), config.stream, config.tracking))
        catch_up(opened[0], config.work_path(), chain)

    world.on_main(work)
    return opened[0] if opened else None


def record(tracker: Tracker, work_dir: Path, manifest: Manifest) -> None:
    """Tell MLflow of a published increment: row, heat map, manifest, registered version."""
    folder = work_dir / "increments" / manifest.folder
    tracker.log_row(manifest.row)
    tracker.log_row(manifest.row_inferred, "row_inferred")
    names = ("report.png", "row.json", "manifest.json", *([REVIEW] if REVIEW in manifest.files else []))
    tracker.log_artifacts([folder / name for name in names])
    tracker.register(manifest)
    tracker.finish()


def catch_up(tracker: Tracker, work_dir: Path, chain: list[Manifest]) -> None:
    """Register the newest increment where a launch was killed between its publishing and its registration."""
    if chain and not tracker.registry.is_registered(chain[0]):
        run = json.loads((work_dir / "increments" / chain[0].folder / "run.json").read_text())
        tracker.increment(chain[0].increment, chain[0].task, run["inputs_key"])
        record(tracker, work_dir, chain[0])


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
    return {"digest": backbone_digest(config.backbone.path), "model_type": model_type, "dtype": config.backbone.dtype}


def mark(work_dir: Path, name: str, content: dict[str, Any]) -> None:
    """Leave the marker by which success, or a stop on request, is judged."""
    write_atomic(work_dir / name, canonical_json(content).encode())


def say(world: World, text: str) -> None:
    """Print on rank 0."""
    if world.is_main:
        print(text, flush=True)
