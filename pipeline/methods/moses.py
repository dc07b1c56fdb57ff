"""`moses`: sparse sub-experts in a pool that all tasks share; what a task has claimed nobody overwrites.

A reconstruction of MoSEs (arXiv 2511.06237; METHODS section 4 says what is published). The paper's modules, sparsity
and router are not public; these choices are ours:

- The pool: on every adapted weight (of routed experts: on each by itself) `sub_experts` LoRA experts of `lora.rank`.
- The router: one choice a task and weight, not one an input, so that it can be read in the bundle. The pooled prompt
  state e_t is that of the training prompts (experts/prompt_state.py). The task's key on a weight is Q (K, D), and
  sub-expert j matches by Q_j e_t. Since e_t is one vector, all that training can change of Q is Q e_t: these K numbers
  are what is trained and kept. They start at the largest nearness of the prompts to those of an earlier task that chose
  j, or at `novelty` where nobody has (ties are broken by seed), so that related tasks meet in the same sub-experts. The
  `top_k` best speak, weighed by a softmax over them times their number.
- The mask: scores start uniform in [0, 0.01); the top `density` of every chosen sub-expert's A and of its B are used,
  straight through. Parameters in the mask of an earlier task start ahead by `head_start` * 0.01 * the nearness.
- What is claimed is read from the bank, in training too: the parameter in that place gets no gradient and is never
  published, so neither moments nor weight decay can touch it.
- The bank: a task's file holds its masks as bits and the values of what it claimed first (experts/claims.py). A bundle
  names the task's file and those of the tasks whose values it reads. So a task costs bits where it reuses, values
  where it is new; a start reads the files of all tasks.
- When a sub-expert is full, tasks can only choose and mask what is there; `sub_experts` may be raised for later tasks,
  and so may `top_k` and `density` change. Parameters that only a bundle out of service had claimed are free again.

Account of an increment: parameters of the pool, claimed by now, in the mask, of these reused; bytes of its file.
"""

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan, pairs_of
from pipeline.experts.claims import SIDES, Claim, claim_tensors, masked_values, read_claim, tensor_bytes
from pipeline.experts.lora import SCORE_SPREAD, LoraOptions, initial_value
from pipeline.experts.pool import SubExperts
from pipeline.experts.prompt_state import nearness, prompt_state
from pipeline.experts.sub_experts import Claims, choose, keep_mask, taken
from pipeline.methods.protocol import Increment, Packed, PlainLora, RetentionOptions, Study, Tensors, past_of
from pipeline.placement.learner import Learner
from pipeline.placement.state import experts_of, own_value, whole_over_experts
from pipeline.tensor_files import TensorFile


class Options(Section):
    """Options of `moses`."""

    lora: LoraOptions = LoraOptions()  # of each sub-expert
    sub_experts: int = Field(4, ge=1, le=255)  # on every adapted weight
    top_k: int = Field(2, ge=1)  # of them a task chooses
    density: float = Field(0.25, gt=0, le=1)  # share of a chosen sub-expert's parameters that a task uses
    head_start: float = Field(0.5, ge=0)  # of parameters that a task with the same prompts uses, in spreads of scores
    novelty: float = 0.5  # nearness from which a sub-expert of earlier tasks is preferred to an unused one

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k > self.sub_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {self.sub_experts} sub_experts to choose from")
        return self


class MoSEs(PlainLora):
    """Claims of the bank's files under masks of the task at hand."""

    packs = True

    def __init__(self, options: Options) -> None:
        pool = SubExperts(options.sub_experts, options.top_k, options.density)
        plan = ExpertPlan(options.lora, ("adapter",), sub_experts=pool)
        super().__init__(plan, RetentionOptions(policy="pin"))
        self.options = options
        self._seed = ""
        self._claimed = 0  # parameters that earlier tasks claimed

    def start(self, increment: Increment) -> dict[str, str | None]:
        return dict.fromkeys(self.roles)

    def states_needed(self, increment: Increment) -> tuple[str, ...]:
        return tuple(task for task in increment.order if increment.states.get(task))

    def past(self, increment: Increment, study: Study) -> list[tuple[str, float]]:
        """Every file that a bundle of the champion reads, with how near its task's prompts are to the new ones."""
        self._seed = f"{increment.seed}/{increment.number}"
        found: dict[str, float] = {}
        for task in increment.order:
            found |= {digest: found.get(digest, 0.0) for digest in past_of(increment.bundles[task])}
            found.setdefault(increment.bundles[task]["adapter"], 0.0)
        if not found:
            return []
        own = prompt_state(study.prompt_vectors())
        for task, state in increment.state_tensors.items():
            found[increment.bundles[task]["adapter"]] = nearness(state, own)
        return list(found.items())

    def learned(self, study: Study) -> Tensors:
        return prompt_state(study.prompt_vectors())

    def learn_beside(self, learner: Learner, past: Sequence[tuple[TensorFile, float]]) -> None:
        """Mark what earlier files claim, and give what similar tasks used a head start."""
        self._claimed = 0
        device = learner.world.device
        for path, pair in pairs_of(learner.experts)["adapter"].items():
            experts, claims = experts_of(pair.lora_A), []
            for side, shape in zip(SIDES, pair.shapes, strict=True):
                read = [(read_claim(file, path, side, pair, experts), near) for file, near in past]
                claims.append(self._claims(shape, read).to(device, pair.lora_A.dtype))
            pair.served, pair.claims = None, tuple(claims)
            noise = initial_value(f"{path}.score_match", (*shape[:-1], 1), self._seed, experts[0] if experts else 0)
            pair.prior = (self._prior(read, shape) + noise).to(device)

    def _claims(self, shape: torch.Size, past: Sequence[tuple[Claim, float]]) -> Claims:
        """What the files claim of the blocks (..., K, N) of one factor."""
        owner = torch.full(shape, -1, dtype=torch.int16)
        value, head = torch.zeros(shape), torch.zeros(shape)
        for number, (claim, near) in enumerate(past):
            owner[claim.new] = number
            value[claim.new] = claim.values
            head = torch.maximum(head, claim.mask * near)
            self._claimed += claim.claimed
        return Claims(owner, value, head * (self.options.head_start * SCORE_SPREAD))

    def _prior(self, past: Sequence[tuple[Claim, float]], shape: torch.Size) -> torch.Tensor:
        """What the matches of the sub-experts start from, (..., K, 1); a mask holds some of every chosen one."""
        best = torch.full((*shape[:-1], 1), -torch.inf)
        for claim, near in past:
            chosen = claim.mask.any(dim=-1, keepdim=True)
            best = torch.where(chosen, best.clamp(min=near), best)
        return torch.where(best.isinf(), self.options.novelty, best)

    @torch.no_grad()
    def pack(self, learner: Learner) -> Packed:
        """The task's masks, and the values that it claims. Collective."""
        tensors: Tensors = {}
        used: set[int] = set()
        capacity = masked = new_ones = 0
        for path, pair in sorted(pairs_of(learner.experts)["adapter"].items()):
            dtype = pair.lora_A.dtype  # scores and matches are compared as the forward pass compares them
            match = own_value(pair.match).to(dtype) + pair.prior
            chosen, weights = choose(match, self.options.top_k)
            for name, value in (("chosen", chosen.to(torch.uint8)), ("weights", weights)):
                tensors[f"{path}.{name}"] = whole_over_experts(pair.match, value).cpu()
            blocks = pair.blocks(own_value(pair.lora_A), own_value(pair.lora_B))
            for side, (letter, values, scores) in enumerate(
                zip(SIDES, blocks, (pair.score_A, pair.score_B), strict=True)
            ):
                _, ranking, owner = pair.standing(side, values, own_value(scores).to(dtype), chosen)
                mask = keep_mask(ranking, self.options.density)
                owner = torch.full_like(mask, -1, dtype=torch.int16) if owner is None else owner
                used |= set(owner[mask & (owner >= 0)].unique().tolist())
                parts = (mask.to(torch.uint8), (mask & (owner < 0)).to(torch.uint8), taken(values, chosen))
                mask, new, values = (whole_over_experts(scores, part).cpu() for part in parts)
                tensors |= claim_tensors(path, letter, mask.bool(), new.bool(), values)
                masked += int(mask.sum())
                new_ones += int(new.sum())
                capacity += values.numel() // self.options.top_k * self.options.sub_experts
        account = {
            "pool_parameters": capacity,
            "pool_claimed": self._claimed + new_ones,
            "mask_parameters": masked,
            "mask_reused": masked - new_ones,
            "stored_bytes": tensor_bytes(tensors),
        }
        everyone = learner.world.gather(used)
        return Packed(tensors, sorted(set().union(*everyone)), account)

    def unpack(self, learner: Learner, own: TensorFile, past: Sequence[TensorFile]) -> None:
        """Serve a task: its masked sub-experts alone, with the values of the files that claimed them."""
        for path, pair in pairs_of(learner.experts)["adapter"].items():
            experts = experts_of(pair.lora_A)
            chosen, weights = (own.read(f"{path}.{name}", experts) for name in ("chosen", "weights"))
            used = []
            for side in SIDES:
                claim, *earlier = (read_claim(file, path, side, pair, experts) for file in (own, *past))
                used.append(taken(masked_values(claim, earlier), chosen.long()))
            factors = pair.joined(*used, weights)
            pair.served = tuple(t.to(learner.world.device, pair.lora_A.dtype).contiguous() for t in factors)


def build(options: Options) -> MoSEs:
    return MoSEs(options)
