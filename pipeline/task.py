"""What a model is asked for a window of tokens, and what of its answer counts: by the kind of the model.

    decoder            each token of the window is predicted from those before it
    encoder-decoder    the encoder reads the first half of the window, the decoder predicts the second half
    encoder            the features of every token, taken as the mean of a normal distribution whose variance is the
                       mean square of the window's features; no head is asked

Of two answers to a window, the divergence is KL in nats a token: of the predictions, or of the normal distributions,
|before - after|^2 / (2 variance) summed over a token's features, which is half of the width times the relative error.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from pipeline.own_code import brings_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LARGEST_CHANGE = 80.0  # nats, of whose exponential float32 holds thousands
GENERATING_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)
ENCODER_CLASSES: tuple[Any, ...] = (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
    AutoModel,
    AutoModelForTextEncoding,  # the encoder of an encoder-decoder, alone
)


class Task(ABC):
    """How windows [windows, seq_len] become a forward pass, and the answer [windows, scored, n] that is taken from it.

    Attributes:
        generates: can the model write text?
    """

    generates: ClassVar[bool] = True

    @abstractmethod
    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """What the network is called with."""

    def probe_inputs(self, tokens: Tensor) -> dict[str, Any]:
        """The same on the meta device, where nothing can depend on values."""
        return self.inputs(tokens)

    def num_scored(self, seq_len: int) -> int:
        """Over how many tokens of a window errors are spread: those that the loss is summed over, and the first."""
        return seq_len

    @abstractmethod
    def answer_bytes(self, config: "PretrainedConfig") -> int:
        """What an answer to one token takes on disk (base_logits.py)."""

    @abstractmethod
    def answer_width(self, config: "PretrainedConfig") -> int:
        """n."""

    @abstractmethod
    def answer(self, network: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Run the network."""

    @abstractmethod
    def loss(self, answer: Tensor, window: Tensor, seed: int, labels_are_drawn: bool) -> Tensor:
        """The loss of one window's `answer` [scored, n] in nats, summed over its tokens.

        Args:
            seed: of labels that are drawn; each window has its own.
            labels_are_drawn: from the answer itself; else they are the text's own, where it has any.
        """

    @abstractmethod
    def divergences(self, before: Tensor, after: Tensor) -> Tensor:
        """float64 [scored]: KL of two float32 answers [scored, n] to a window, exact also where they hardly differ."""

    def ends(self, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int] | None:
        """Ids that stand before and after the text of every window."""
        return None


class Predictions(Task):
    """The answer is logits over the vocabulary."""

    @abstractmethod
    def scored(self, tensor: Tensor) -> Tensor:
        """Of a tensor [windows, positions, ...], what stands at the positions that predict."""

    @abstractmethod
    def targets(self, tokens: Tensor) -> Tensor:
        """Of [windows, seq_len], the tokens that are predicted."""

    def answer_bytes(self, config: "PretrainedConfig") -> int:
        """See Task: float16."""
        return 2 * self.answer_width(config)

    def answer_width(self, config: "PretrainedConfig") -> int:
        """See Task."""
        return int(config.get_text_config().vocab_size)

    def answer(self, network: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """See Task."""
        return self.scored(network(**inputs).logits)

    def loss(self, answer: Tensor, window: Tensor, seed: int, labels_are_drawn: bool) -> Tensor:
        """See Task."""
        labels = drawn_labels(answer.detach(), seed) if labels_are_drawn else self.targets(window[None])[0]
        return nn.functional.cross_entropy(answer, labels, reduction="sum")

    def divergences(self, before: Tensor, after: Tensor) -> Tensor:
        """See Task. With d = after - before less its mean under the first prediction p, log(1 + sum of p (e^d - 1))."""
        p, change = before.softmax(dim=-1), after - before
        change -= (p * change).sum(dim=-1, keepdim=True, dtype=torch.float64).float()
        if float(change.max()) > LARGEST_CHANGE:
            log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (before, after))
            return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        return (p * change.expm1_()).sum(dim=-1, dtype=torch.float64).log1p()


class NextToken(Predictions):
    """See the module: a decoder."""

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """See Task."""
        return {"input_ids": tokens, "use_cache": False}

    def probe_inputs(self, tokens: Tensor) -> dict[str, Any]:
        """See Task: without a mask, transformers looks for packed texts."""
        return self.inputs(tokens) | {"attention_mask": torch.ones_like(tokens)}

    def scored(self, tensor: Tensor) -> Tensor:
        """See Predictions: nothing predicts the first token, and the last predicts none."""
        return tensor[:, :-1]

    def targets(self, tokens: Tensor) -> Tensor:
        """See Predictions."""
        return tokens[:, 1:]


@dataclass(frozen=True)
class Continuation(Predictions):
    """See the module: an encoder-decoder, whose decoder begins with the token `start`."""

    start: int

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """See Task."""
        read, predicted = self._halves(tokens)
        begun = torch.cat([torch.full_like(tokens[:, :1], self.start), predicted[:, :-1]], dim=1)
        return {"input_ids": read, "decoder_input_ids": begun, "use_cache": False}

    def num_scored(self, seq_len: int) -> int:
        """See Task: the half that is predicted."""
        return seq_len - seq_len // 2

    def scored(self, tensor: Tensor) -> Tensor:
        """See Predictions."""
        return tensor

    def targets(self, tokens: Tensor) -> Tensor:
        """See Predictions."""
        return self._halves(tokens)[1]

    def _halves(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        half = tensor.shape[1] // 2
        return tensor[:, :half], tensor[:, half:]


class Features(Task):
    """See the module: an encoder."""

    generates = False

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """See Task."""
        return {"input_ids": tokens}

    def answer_bytes(self, config: "PretrainedConfig") -> int:
        """See Task: float32."""
        return 4 * self.answer_width(config)

    def answer_width(self, config: "PretrainedConfig") -> int:
        """See Task."""
        return int(config.hidden_size)

    def answer(self, network: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """See Task."""
        encoder: Any = network.base_model
        return encoder(**inputs).last_hidden_state

    def loss(self, answer: Tensor, window: Tensor, seed: int, labels_are_drawn: bool) -> Tensor:
        """See Task. No text says what features are right, so that labels are always drawn."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(answer.shape, generator=generator).to(answer.device)
        deviation = variance_of(answer.detach()).float().sqrt()
        label = answer.detach() + deviation * noise
        return ((answer - label) / deviation).square().sum() / 2

    def divergences(self, before: Tensor, after: Tensor) -> Tensor:
        """See Task."""
        return (after - before).square().sum(dim=-1, dtype=torch.float64) / (2 * variance_of(before))

    def ends(self, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int] | None:
        """See Task: what an encoder was trained to find around a text, as far as its tokenizer has it."""
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        return (first, last) if isinstance(first, int) and isinstance(last, int) else None


def variance_of(features: Tensor) -> Tensor:
    """float64, no dimensions: the mean square of a window's features."""
    return features.double().square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def drawn_labels(logits: Tensor, seed: int) -> Tensor:
    """A label for each row of logits, drawn from the model's own prediction (on the CPU, alike for every device)."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:])[:, 0].clamp_max(logits.shape[1] - 1)


def task_of(config: "PretrainedConfig") -> Task:
    """The task of a model with this config."""
    named = auto_class(config)
    if named in ENCODER_CLASSES:
        return Features()
    if named is AutoModelForSeq2SeqLM:
        stated = (getattr(config, key, None) for key in ("decoder_start_token_id", "pad_token_id"))
        return Continuation(next((token for token in stated if token is not None), 0))
    return NextToken()


def auto_class(config: "PretrainedConfig") -> Any:
    """transformers' class that builds and loads models of `config`."""
    if brings_code(config) and (own := _own_class(config)) is not None:
        return own
    if (encoder := _encoder_class(config)) is not None:
        return encoder
    if config.is_encoder_decoder and type(config) in AutoModelForSeq2SeqLM._model_mapping:
        return AutoModelForSeq2SeqLM
    is_of_images = type(config) in AutoModelForImageTextToText._model_mapping
    has_text_alone = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if is_of_images and not has_text_alone else AutoModelForCausalLM


def settle_architecture(config: "PretrainedConfig", stored: Collection[str]) -> None:
    """Let `config` name the encoder alone where the files hold no more, and the class with a head where none is named.

    sentence-transformers keep the name of a head that they leave out.

    Args:
        stored: names of the tensors in the files, which begin with the encoder's own name where there is a head.
    """
    if brings_code(config):
        return
    encoder = _encoder_class(config)
    kind = type(config)
    if encoder is None or kind not in AutoModelForMaskedLM._model_mapping or kind not in AutoModel._model_mapping:
        return
    masked: Any = AutoModelForMaskedLM._model_mapping[kind]
    alone: Any = AutoModel._model_mapping[kind]
    has_head = any(name.startswith(f"{masked.base_model_prefix}.") for name in stored)
    if encoder is not AutoModel and not has_head:
        config.architectures = [alone.__name__]
    elif not config.architectures and has_head:
        config.architectures = [masked.__name__]


def _own_class(config: "PretrainedConfig") -> Any:
    """The class for which a model's own code has one: for the named architecture, if that is among them."""
    named = {auto.__name__: auto for auto in (*GENERATING_CLASSES, *ENCODER_CLASSES)}
    own = {auto: str(config.auto_map[auto]).rpartition(".")[2] for auto in named if auto in config.auto_map}
    architecture = next(iter(config.architectures or ()), None)
    if config.is_encoder_decoder:
        own = {auto: own[auto] for auto in sorted(own, key=lambda auto: auto != "AutoModelForSeq2SeqLM")}
    fitting = [auto for auto in own if own[auto] == architecture] or list(own)
    return named[fitting[0]] if fitting else None


def _encoder_class(config: "PretrainedConfig") -> Any:
    """Of an encoder, the class with the heads that its files have; None of other models."""
    kind, named = type(config), next(iter(config.architectures or ()), None)
    is_encoder = kind in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
    found = next((auto for auto in ENCODER_CLASSES if named in _class_names(auto, kind)), None)
    if is_encoder:
        says_decoder = named is None and getattr(config, "is_decoder", False)
        return None if says_decoder or named in _class_names(AutoModelForCausalLM, kind) else found or AutoModel
    return found if found is AutoModelForTextEncoding else None


def _class_names(auto: Any, kind: type) -> set[str]:
    if kind not in auto._model_mapping:
        return set()
    classes = auto._model_mapping[kind]
    return {each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))}
