"""One rank of the multi-process tests of mixture-of-experts backbones; see tests/distributed/worker.py.

deepspeed --num_accelerators N tests/moe/worker.py plan.json      (or plain python for one rank)
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.backbones.load import load_tokenizer
from pipeline.config import StreamConfig, build_method
from pipeline.evaluation.scoring import score_rows
from pipeline.experts.bank import Bank
from pipeline.placement.distributed import World
from pipeline.placement.learner import build_learner
from pipeline.stages.job import Job
from tests.distributed import worker
from tests.distributed.learning import learn, open_tasks, read_json
from tests.moe.worlds import skewed_tasks


def learn_moe(world: World, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`learn`, on rows made by hand where the case is skewed."""
    return learn(world, case, folder, skewed_tasks() if case["skewed"] else None)


def score(world: World, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Label scores of both tasks' test rows under every recorded bundle: {increment: {task: scores}}."""
    config = StreamConfig.model_validate(case["stream"])
    method, tokenizer = build_method(config), load_tokenizer(config.backbone)
    tasks = open_tasks(config, tokenizer, world)
    learner = build_learner(config, method.plan, world, train=False)
    job = Job(config, world, config.work_path(), method, tokenizer, learner, Bank(case["bank"]), {})
    scores: dict[str, dict[str, Any]] = {}
    for number, record in world.on_main(lambda: read_json(case["records"])).items():
        job.serve(record["bundle"])
        for name, task in tasks.items():
            rows = task.rows("test", None, config.seed)
            prompts, _ = rows.tokens(range(len(rows)))
            found = score_rows(learner, prompts, task.label_ids, task.end_of_answer, batch_tokens=128)
            scores.setdefault(number, {})[name] = found.tolist()
    if learner.engine is not None:
        learner.engine.destroy()
    return {"scores": scores}


if __name__ == "__main__":
    sys.exit(worker.main({"learn": learn_moe, "score": score}))
