"""The way in which the authors' released code decodes, on our network: nothing is kept from one word to the next.

For every word the encoder runs again, and the whole caption so far through each layer, exit tests after it where
asked for (github.com/feizc/DeeCap, `test.py` and `models/deecap.py`; the code here is our own).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.search import emission_logits
from model.deecap import DeeCap, entropy
from model.vocabulary import BOS, EOS


@torch.inference_mode()
def authors_search(
    model: DeeCap, image: tuple[Tensor, Tensor, Tensor], tau: float, tested: Sequence[int]
) -> list[tuple[int, int]]:
    """Greedy: the word and the exit layer of every step, EOS included, of one image.

    `image`: features `(1, R, F)`, boxes `(1, R, 4)` and mask `(1, R)`. A word leaves at the first of the `tested`
    layers with an entropy below `tau`, in nats.
    """
    tokens, steps = [BOS], list[tuple[int, int]]()
    while len(steps) < model.config.max_words and tokens[-1] != EOS:
        features, boxes, mask = image
        memory = model.encode(features, boxes, mask)
        x = model.embed(torch.tensor([tokens], device=memory.device))
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=x.device).tril()
        newest: list[Tensor] = []  # h_1 .. h_m of the newest word, each (1, d)
        for m, layer in enumerate(model.decoder_layers, start=1):
            regions = layer.regions.keys_values(memory)
            x = layer(x, layer.word_keys_values(x), causal, regions, mask[:, None, None, :])
            newest.append(x[:, -1])
            if m == model.layers or m in tested:
                logits = emission_logits(model, model.exit_state(newest, m))
                if m == model.layers or float(entropy(logits)) < tau:
                    break
        tokens.append(int(logits.argmax(-1)))
        steps.append((tokens[-1], m))
    return steps
