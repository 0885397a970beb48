"""Continue a text with a compressed folder, writing tokens as they come."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from pipeline.calibration import rendered
from pipeline.errors import CheckpointError, RecipeError
from pipeline.packed import load_tokenizer, load_with_adapter
from pipeline.plain_console import shown
from pipeline.quiet import quiet_transformers
from pipeline.structure import num_positions
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
        CalibrationError: the chat template refuses the prompt.
        CheckpointError: `folder` is not a sound compressed checkpoint, or an encoder's, or the adapter is another
            model's; or it has no chat template.
        RecipeError: the prompt is no text, or with what is asked for longer than the model's positions.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(f"The prompt is not UTF-8 ({error}). Give it as UTF-8 text.") from error
    network: Any = load_with_adapter(folder, adapter, device, trust_remote_code=trust_remote_code)
    if not task_of(network.config).generates:
        raise CheckpointError(
            f"The model in {folder} is an encoder: it gives features of a text and continues none. Its card "
            "and its report say how to load it."
        )
    tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat and tokenizer.chat_template is None:
        raise CheckpointError(
            f"The model in {folder} has no chat template. Leave --chat out, to go on with the prompt."
        )
    if chat:
        prompt = rendered([{"role": "user", "content": prompt}], tokenizer, asks=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(network.device)
    _check_length(network, inputs["input_ids"].shape[1], max_new_tokens)
    streamer = (_ShownStreamer if sys.stdout.isatty() else TextStreamer)(
        tokenizer, skip_prompt=chat, skip_special_tokens=True
    )
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


class _ShownStreamer(TextStreamer):
    """Tokens come from a file that may be a stranger's: none may steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(shown(text), stream_end)


def _check_length(network: PreTrainedModel, num_read: int, max_new_tokens: int) -> None:
    if num_read == 0:
        raise RecipeError("The prompt has no token to go on from. Give a few words.")
    positions = num_positions(network)
    has_two = network.config.is_encoder_decoder  # a row of positions for what is read, and one for what is written
    needed = max(num_read, 1 + max_new_tokens) if has_two else num_read + max_new_tokens
    if positions is not None and needed > positions:
        most = positions - 1 if has_two else positions - num_read
        raise RecipeError(
            f"The prompt has {num_read} tokens, which with --max-new-tokens {max_new_tokens} is more than the "
            f"{positions} positions of this model. Give --max-new-tokens {max(0, most)} or less, or a shorter prompt."
        )
