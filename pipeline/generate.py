"""Continue a text with a compressed folder, writing tokens as they come."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer

from pipeline.packed import load_packed
from pipeline.quiet import quiet_transformers


def stream_text(folder: Path, prompt: str, *, max_new_tokens: int, chat: bool, device: str) -> None:
    """Print the continuation of `prompt`, greedily decoded, on standard output.

    Args:
        chat: send the prompt as a user's message through the tokenizer's chat template.
    Raises:
        CheckpointError: `folder` is not a sound compressed checkpoint.
    """
    network = load_packed(folder, device)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with torch.inference_mode(), quiet_transformers():
        network.generate(
            **inputs.to(network.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
