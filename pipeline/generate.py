"""Continue a text with a compressed folder, writing tokens as they come."""

from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from pipeline.errors import CheckpointError
from pipeline.packed import load_tokenizer, load_with_adapter
from pipeline.quiet import quiet_transformers
from pipeline.task import task_of


def stream_text(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool,
    device: str,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print the continuation of `prompt`, greedily decoded, on standard output.

    Args:
        chat: send the prompt as a user's message through the tokenizer's chat template.
        adapter: folder that `finetune` wrote for this model.
        trust_remote_code: run the code that the original brings; see pipeline/own_code.py.
    Raises:
        CheckpointError: `folder` is not a sound compressed checkpoint, or an encoder's, or the adapter is another
            model's.
    """
    network: Any = load_with_adapter(folder, adapter, device, trust_remote_code=trust_remote_code)
    if not task_of(network.config).generates:
        raise CheckpointError(
            f"The model in {folder} is an encoder: it gives features of a text and continues none. Its card "
            "and its report say how to load it."
        )
    tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(network.device)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with torch.inference_mode(), quiet_transformers():
        network.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
