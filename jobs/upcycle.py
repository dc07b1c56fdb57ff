"""Make a mixture-of-experts backbone of a dense one: `python jobs/upcycle.py --from F --to G --experts E --top-k K`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from data_contracts.errors import UserError
from pipeline.backbones.load import backbone_digest, load_config
from pipeline.backbones.upcycle import upcycle
from pipeline.config import BackboneConfig
from pipeline.demo import make_folder


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the folder is made, 2 with one sentence when this backbone or these numbers are refused."""
    parser = argparse.ArgumentParser(
        description="Make a Mixtral-shaped mixture of experts of a dense Llama or Mistral checkpoint. "
        "Without noise it computes the same function."
    )
    parser.add_argument("--from", dest="dense", type=Path, required=True, help="folder of the dense checkpoint")
    parser.add_argument("--to", dest="target", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--experts", type=int, required=True, help="routed experts a layer")
    parser.add_argument("--top-k", type=int, required=True, help="experts a token goes to")
    parser.add_argument("--noise", type=float, default=0.0, help="relative size of each expert's noise (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of routers and noise (default: 0)")
    chosen = parser.parse_args(arguments)
    options = {"num_experts": chosen.experts, "top_k": chosen.top_k, "noise": chosen.noise, "seed": chosen.seed}
    try:
        if chosen.target.exists():
            raise UserError(f"{chosen.target} exists already: remove it or choose another folder")
        load_config(BackboneConfig(path=str(chosen.dense)))  # a folder that is no backbone is refused before its digest
        recipe = {"dense": backbone_digest(str(chosen.dense)), **options}
        make_folder(chosen.target, recipe, lambda _, result: upcycle(chosen.dense, result, **options))
    except UserError as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
