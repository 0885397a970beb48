"""No architecture that transformers has: blocks that mix a token with the mean of those before it."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_drum import DrumConfig


class DrumBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden):
        count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        hidden = hidden + self.mix_proj(self.norm(hidden).cumsum(dim=1) / count)
        return hidden + self.down_proj(nn.functional.gelu(self.up_proj(self.norm(hidden))))


class DrumForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DrumConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DrumBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **rest):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **rest):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)))
