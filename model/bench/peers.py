"""Captioners that people use, built at their real sizes with random weights, to be timed beside ours.

Nothing is downloaded: how fast a network runs does not depend on its weights. Their sizes are those of
BLIP-base (Salesforce/blip-image-captioning-base), GIT-base (microsoft/git-base-coco) and ViT-GPT2
(nlpconnect/vit-gpt2-image-captioning). Needs the `bench` extra.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.bench.clock import take_turns

BOS, EOS, PAD = 1, 2, 0  # any will do
PATCH = 16  # pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """Of an image encoder and a text decoder, Transformers both and of one width."""

    image: int  # pixels a side
    text_layers: int
    vocabulary: int
    vision_layers: int = 12
    width: int = 768
    heads: int = 12

    @property
    def feed_forward(self) -> int:
        return 4 * self.width


@dataclass(frozen=True)
class Peer:
    """A kind of captioner, and how to build one with random weights."""

    name: str
    build: Callable[[Sizes], Any]
    sizes: Sizes


class PeersMissingError(RuntimeError):
    """The package that has the peers is not installed."""


def import_transformers() -> Any:
    """The package, held to what is on this machine. Raises `PeersMissingError` where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise PeersMissingError("the peers need transformers: pip install '.[bench]'") from error
    transformers.logging.set_verbosity_error()
    return transformers


def build_blip(sizes: Sizes) -> Any:
    library = import_transformers()
    vision = {**_vision(sizes), "initializer_range": 0.02}  # its own, 1e-10, ends in denormal numbers
    text = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "encoder_hidden_size": sizes.width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.feed_forward,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "sep_token_id": EOS,
        "pad_token_id": PAD,
    }
    return library.BlipForConditionalGeneration(library.BlipConfig(vision_config=vision, text_config=text))


def build_git(sizes: Sizes) -> Any:
    library = import_transformers()
    config = library.GitConfig(
        vision_config=_vision(sizes),
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.feed_forward,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return library.GitForCausalLM(config)


def build_vit_gpt2(sizes: Sizes) -> Any:
    library = import_transformers()
    text = library.GPT2Config(
        vocab_size=sizes.vocabulary,
        n_embd=sizes.width,
        n_layer=sizes.text_layers,
        n_head=sizes.heads,
        is_decoder=True,
        add_cross_attention=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    pair = library.VisionEncoderDecoderConfig.from_encoder_decoder_configs(library.ViTConfig(**_vision(sizes)), text)
    model = library.VisionEncoderDecoderModel(config=pair)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, PAD
    return model


def _vision(sizes: Sizes) -> dict[str, Any]:
    return {
        "image_size": sizes.image,
        "patch_size": PATCH,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.feed_forward,
    }


PEERS = (
    Peer("BLIP-base", build_blip, Sizes(image=384, text_layers=12, vocabulary=30524)),
    Peer("GIT-base", build_git, Sizes(image=224, text_layers=6, vocabulary=30522)),
    Peer("ViT-GPT2", build_vit_gpt2, Sizes(image=224, text_layers=12, vocabulary=50257)),
)


@torch.inference_mode()
def peer_caption(model: Any, pixels: Tensor, words: int) -> list[int]:
    """Exactly `words` tokens, greedy, with a cache of keys and values, for pixels `(1, 3, side, side)`.

    Raises `RuntimeError` where the library gives another number of them.
    """
    tokens = model.generate(
        pixel_values=pixels, min_new_tokens=words, max_new_tokens=words, num_beams=1, do_sample=False, use_cache=True
    )
    emitted: list[int] = tokens[0, 1:].tolist()  # without the one it starts from
    if len(emitted) != words:
        raise RuntimeError(f"{type(model).__name__} gave {len(emitted)} tokens where {words} were asked for")
    return emitted


def measure_peers(
    peers: Sequence[Peer], words: int, repeats: int, device: str, ours: Mapping[str, Callable[[int], object]]
) -> list[dict[str, Any]]:
    """Milliseconds of each peer, from pixels to tokens, in both types, taking turns with `ours`.

    One peer is held at a time. The rows of `ours` do a photo from its file's bytes to its text. All are medians
    over `repeats`, after a warm-up.
    """
    return [_measure(peer, words, repeats, device, ours) for peer in peers]


def _measure(
    peer: Peer, words: int, repeats: int, device: str, ours: Mapping[str, Callable[[int], object]]
) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = peer.build(peer.sizes).requires_grad_(False).eval()
        pixels = torch.randn(1, 3, peer.sizes.image, peer.sizes.image).to(device)
    models = {"bfloat16": copy.deepcopy(built).to(device, torch.bfloat16), "float32": built.to(device)}

    def captioning(name: str) -> Callable[[int], object]:
        return lambda _: peer_caption(models[name], pixels.to(DTYPES[name]), words)

    rows = {name: captioning(name) for name in DTYPES}
    medians = take_turns({**rows, **ours}, 1, repeats, device, peer.name)
    return {
        "name": peer.name,
        "parameters_millions": sum(parameter.numel() for parameter in built.parameters()) / 1e6,
        "image": peer.sizes.image,
        "words": words,
        "ms": {name: float(medians[name][0]) for name in DTYPES},
        "ours_ms": {name: float(medians[name][0]) for name in ours},
        "times_ours": {name: {dtype: float(medians[dtype][0] / medians[name][0]) for dtype in DTYPES} for name in ours},
    }
