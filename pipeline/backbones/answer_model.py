"""The model as training, scoring and generation see it: tokens in, logits out at the asked positions only."""

import torch
from torch import nn


class AnswerModel(nn.Module):
    """A causal LM whose forward pass applies the LM head only where a logit is needed.

    It is the root module under DeepSpeed: every forward pass, in training and evaluation, goes through it, so that
    ZeRO-3's parameter fetching always sees a whole pass.

    Legend: B batch rows, S sequence, P positions asked for, V vocabulary.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
    ) -> torch.Tensor:
        """Logits at chosen places.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S + past) of 0/1, or (B, 1, S, S) boolean where True lets a query see a key, or None.
            positions: (P,) indices into the flattened (B * S) token states.
            position_ids: (B, S), or None to count from the left.
            past_key_values: a transformers `Cache` that is read and extended, or None.

        Returns:
            (P, V) logits in the backbone's dtype.
        """
        hidden = self.backbone.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state
        # 2-D before the head: a linear over a sliced 3-D tensor would copy the whole weight
        return self.backbone.get_output_embeddings()(hidden.reshape(-1, hidden.shape[-1])[positions])
