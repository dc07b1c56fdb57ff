"""The method that the README adds in one file is one."""

import re
import textwrap
from pathlib import Path
from types import ModuleType

import torch

from pipeline.methods.protocol import Increment
from pipeline.placement.state import Whole
from tests.helpers import light_learner, tiny_llama

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readmes_method_starts_from_the_latest_expert_and_stays_near_it():
    section = README.read_text(encoding="utf-8").partition("## Add a method")[2].partition("\n## ")[0]
    code = textwrap.dedent("\n".join(re.findall(r"^(?: {4}.*)?$", section, flags=re.MULTILINE)))
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    module = ModuleType("anchored")
    exec(compile(code, "anchored.py", "exec"), module.__dict__)
    method = module.build(module.Options(weight=0.5))
    learner = light_learner(tiny_llama(40, num_layers=1), method.plan)
    where = Increment(2, "b", 17, {"a": {"adapter": "x"}}, {}, ("a",))
    assert method.start(where) == {"adapter": "x"} and method.rehearses(where) == () and method.learned(None) == {}
    start = {name: torch.randn(p.shape) for name, p in learner.parameters.items()}
    penalties = method.penalties(learner, Whole(start))
    assert penalties.keys() == start.keys()
    for name, penalty in penalties.items():
        assert float(penalty(start[name])) == 0
        assert abs(float(penalty(start[name] + 2)) - 0.5 * 4 * start[name].numel()) < 1e-2
