"""Stage 2: clean rows become token shards, once for the same inputs."""

from transformers import PreTrainedTokenizerFast

from pipeline.data.tokens import PreparedTask, open_shards, write_shards
from pipeline.stages.validate import ValidatedTask


def prepare(validated: ValidatedTask, tokenizer: PreTrainedTokenizerFast) -> PreparedTask:
    """Write the shards if they are not there, and memory-map them."""
    if validated.clean is not None:
        validated.shards.parent.mkdir(parents=True, exist_ok=True)
        write_shards(validated.clean, tokenizer, validated.shards)
    return open_shards(validated.contract, validated.shards)
