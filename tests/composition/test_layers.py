from __future__ import annotations

import random

import pytest

from loracompose.composition.layers import layer_of, part_of, reads_encoder, running_order
from tests import laws


@pytest.mark.parametrize("on", laws.BASES)
def test_modules_are_ordered_as_the_model_runs_them_at_the_head_of_every_group(on):
    ran, model = [], laws.base(on)
    linear = [path for path, (kind, _, _) in laws.shapes(on).items() if kind == "linear"]
    hooks = [model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path)) for path in linear]
    laws.tiny.logits(model, on, batch=1, seq=3)
    for hook in hooks:
        hook.remove()
    shuffled = random.Random(0).sample(linear, len(linear))
    for key in (lambda p: "", layer_of, lambda p: (layer_of(p), part_of(p))):
        for group in {key(path) for path in linear}:
            mine = sorted((p for p in shuffled if key(p) == group), key=running_order)
            assert mine[0] == next(path for path in ran if key(path) == group)


def test_layers_are_counted_not_spelled():
    paths = [f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 10)]
    assert sorted(reversed(paths), key=running_order) == paths
    assert sorted(["lm_head", *paths], key=running_order)[-1] == "lm_head"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("model.layers.0.self_attn.o_proj", "attention"),
        ("model.layers.0.mlp.gate_proj", "feed_forward"),
        ("transformer.h.1.attn.c_proj", "attention"),
        ("decoder.block.0.layer.1.EncDecAttention.v", "attention"),
        ("decoder.block.0.layer.2.DenseReluDense.wi", "feed_forward"),
        ("gpt_neox.layers.3.attention.query_key_value", "attention"),
    ],
)
def test_attention_is_known_by_its_name_and_the_rest_is_feed_forward(path, part):
    assert part_of(path) == part


def test_keys_and_values_of_cross_attention_read_the_encoder():
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert [reads_encoder(f"{cross}.{name}") for name in "qkvo"] == [False, True, True, False]
    assert reads_encoder("model.decoder.layers.0.encoder_attn.v_proj")
    assert not reads_encoder("model.layers.0.self_attn.v_proj")
