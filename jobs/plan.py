"""What a run on a cluster holds and sends, rank by rank: from a config.json alone, no weights, no device.

python jobs/plan.py --backbone hunyuan-a13b --nodes 4 --gpus-per-node 8 --expert-parallel 8
python jobs/plan.py --backbone path/to/config.json --zero-stage 2 --method sequential --json plan.json

Exit 0 also where it does not fit: the verdict says so. docs/PLAN.md says what is counted.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from data_contracts.errors import UserError
from pipeline.placement.architecture import load_architecture
from pipeline.placement.cluster import ELEMENT_BYTES, Placement, Workload
from pipeline.placement.plan import plan, smallest_world
from pipeline.placement.plan_report import as_json, as_table
from pipeline.placement.trainable import ROLES, MethodChoice, SubExperts, trainable_of

PLACEMENT, METHOD, WORKLOAD = Placement(), MethodChoice(), Workload()


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; returns 0, or 2 after a message on what to mend."""
    options = parser().parse_args(arguments)
    placement = Placement(
        nodes=options.nodes,
        devices_per_node=options.gpus_per_node,
        zero_stage=options.zero_stage,
        expert_parallel=options.expert_parallel,
        device_memory=options.device_memory * 1e9,
        bandwidth=options.bandwidth * 1e9,
        persistence_threshold=options.persistence_threshold,
    )
    workload = Workload(
        tokens=options.tokens,
        sequences=options.sequences,
        answer_tokens=options.answer_tokens,
        micro_batches=options.micro_batches,
        dtype=options.dtype,
        activation_checkpointing=options.activation_checkpointing,
    )
    try:
        architecture = load_architecture(options.backbone)
        pool = SubExperts(options.sub_experts, options.choose, options.density)
        method = MethodChoice(options.method, options.rank, tuple(options.targets), options.discriminator_outputs, pool)
        trainable = trainable_of(architecture, method)
        found = plan(architecture, trainable, placement, workload)
        smallest = smallest_world(architecture, trainable, placement, workload)
        text = json.dumps(as_json(found, method, placement, workload, smallest), indent=2)
        if options.json != "-":
            print(as_table(found, architecture, method, placement, workload, smallest))
        if options.json == "-":
            print(text)
        elif options.json:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--json {options.json} cannot be written ({error.strerror}); name another file", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options; defaults are those of the stream and of DeepSpeed."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--backbone", required=True, metavar="B", help="preset, model folder or config.json, here or behind a URI")
    add("--nodes", type=int, default=PLACEMENT.nodes, metavar="N")
    add("--gpus-per-node", type=int, default=PLACEMENT.devices_per_node, metavar="G")
    add("--zero-stage", type=int, default=PLACEMENT.zero_stage, help="2 or 3")
    add("--expert-parallel", type=int, default=PLACEMENT.expert_parallel, help="ranks that share out the experts")
    add("--method", default=METHOD.name, help=", ".join(ROLES))
    add("--rank", type=int, default=METHOD.rank, help="of the LoRA experts")
    add("--targets", nargs="+", default=METHOD.targets, help="as in method.lora.targets: names or path patterns")
    add("--discriminator-outputs", type=int, default=METHOD.discriminator_outputs, help="0: no adversary")
    add("--sub-experts", type=int, default=METHOD.sub_experts.number, help="of moses, on every weight")
    add("--choose", type=int, default=METHOD.sub_experts.top_k, help="sub-experts that a task chooses")
    add("--density", type=float, default=METHOD.sub_experts.density, help="share of a sub-expert that a task uses")
    add("--tokens", type=int, default=WORKLOAD.tokens, help="of a rank's micro-batch, padding included")
    add("--sequences", type=int, default=WORKLOAD.sequences, help="of a rank's micro-batch")
    add("--answer-tokens", type=int, default=WORKLOAD.answer_tokens, help="of a micro-batch: those that get logits")
    add("--micro-batches", type=int, default=WORKLOAD.micro_batches, help="of one optimizer step")
    add("--dtype", default=WORKLOAD.dtype, help=" or ".join(ELEMENT_BYTES))
    add("--activation-checkpointing", action="store_true", help="count as if layers were computed again in backward")
    add("--device-memory", type=float, default=PLACEMENT.device_memory / 1e9, help="GB (10^9 bytes)")
    add("--bandwidth", type=float, default=PLACEMENT.bandwidth / 1e9, help="GB/s of one device, between nodes")
    add("--persistence-threshold", type=int, default=PLACEMENT.persistence_threshold, help="elements")
    add("--json", metavar="F", help="write the plan there too; - prints it instead of the table")
    return made


if __name__ == "__main__":
    sys.exit(main())
