"""BeamLora against a second implementation in loops: forward, gradient, events, export."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from loracompose.models import load_base
from loracompose.training.adapter import train_adapter
from loracompose.training.batches import response_loss
from loracompose.training.beam import BeamLora
from loracompose.training.beam_settings import BeamSettings
from loracompose.training.data import encode_examples, read_examples
from loracompose.training.recipe import Recipe
from tests.tiny import TARGETS, base_model, logits, peft_load, relative_error
from tests.training.interruption import Interrupted, interrupt_at
from tests.training.tiny_base import base_folder

RANK, TAU = 4, 0.05
MODULES = ("first", "second", "third")


class Toy(nn.Module):
    """Three linear layers of unequal shapes, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def toy(rank=RANK, seed=0):
    """A toy in float64 with random factors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            Toy().double(),
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(MODULES)),
            autocast_adapter_dtype=False,
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    return model


def beam_of(model, settings=None, *, steps=20, seed=0):
    return BeamLora(model, settings or BeamSettings(period=4), steps=steps, learning_rate=1e-3, seed=seed)


def factors(model, module):
    layer = getattr(model.base_model.model, module)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def set_scores(beam, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    for scores in beam.parameters.values():
        scores.data = size * torch.randn(scores.shape, generator=generator, dtype=scores.dtype)


def tensors_of(model, beam, optimizer):
    """Everything an event may change, as nested lists: {module: {"A" | "B" | "s": [values, moment, moment]}}."""
    found = {}
    for module in MODULES:
        A, B = factors(model, module)
        found[module] = {}
        for name, parameter in (("A", A), ("B", B), ("s", beam.parameters[f"{module}.scores"])):
            state = optimizer.state[parameter]
            found[module][name] = [t.tolist() for t in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])]
    return found


def run_toy(settings, *, steps=20, seed=0, lr=0.03, call=True):
    """Train on random gradients; yields (step, before, after, event) around every call of `after_step`."""
    model = toy()
    beam = beam_of(model, settings, steps=steps, seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad] + list(beam.parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(7)
    for number in range(1, steps + 1):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        before, events = tensors_of(model, beam, optimizer), len(beam.events)
        if call:
            beam.after_step(number, optimizer)
        event = beam.events[-1] if len(beam.events) > events else None
        yield number, before, tensors_of(model, beam, optimizer), event


def expected_after(before, history, event):
    """What the event must leave, by loops over lists."""
    want = {module: {name: json.loads(json.dumps(v)) for name, v in parts.items()} for module, parts in before.items()}
    for module, pairs in event.replaced.items():
        for pruned, source in pairs:
            for slot in range(3):  # values, first and second moment
                want[module]["A"][slot][pruned] = history[module]["A"][slot][source]
                for row in range(len(before[module]["B"][slot])):
                    want[module]["B"][slot][row][pruned] = history[module]["B"][slot][row][source]
            scores = before[module]["s"][0]
            mean = (scores[pruned] + scores[source]) / 2
            want[module]["s"][0][pruned] = want[module]["s"][0][source] = mean
        want[module]["s"][1:] = [[0.0] * RANK, [0.0] * RANK]
    return want


def naive_choice(before, threshold):
    """The pruned ranks and possible sources of each module, by loops; K is capped at half of the ranks."""
    importances = {}
    for module, parts in before.items():
        exponentials = [math.exp(score / TAU) for score in parts["s"][0]]
        importances[module] = [RANK * value / sum(exponentials) for value in exponentials]
    ordered = sorted(((v, m, i) for m, row in importances.items() for i, v in enumerate(row)), reverse=True)
    total, taken, counts = sum(v for v, _, _ in ordered), 0.0, dict.fromkeys(before, 0)
    for value, module, _ in ordered:
        taken += value
        counts[module] += taken > threshold * total
    choice = {}
    for module, row in importances.items():
        count = min(counts[module], RANK // 2)
        ranks = sorted(range(RANK), key=lambda i: row[i], reverse=True)
        choice[module] = (set(ranks[RANK - count :]), set(ranks[:count]))
    return choice, sum(counts.values()) - sum(len(pruned) for pruned, _ in choice.values())


def test_the_forward_pass_is_the_sum_over_weighted_ranks():
    model = toy()
    beam = beam_of(model)
    set_scores(beam)
    x = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with beam.attached():
        got = model(x)
    value = x.tolist()
    for module in MODULES:
        layer = getattr(model.base_model.model, module).base_layer
        A, B = (factor.tolist() for factor in factors(model, module))
        exponentials = [math.exp(score / TAU) for score in beam.parameters[f"{module}.scores"].tolist()]
        out = []
        for o, (weights, bias) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)):
            total = bias + sum(w * v for w, v in zip(weights, value, strict=True))
            for j in range(RANK):
                imp = RANK * exponentials[j] / sum(exponentials)
                total += 2 * B[o][j] * imp * sum(a * v for a, v in zip(A[j], value, strict=True))  # alpha / r = 2
            out.append(total)
        value = out
    assert got.tolist() == pytest.approx(value, rel=1e-12)


def test_the_gradient_of_the_scores_is_the_closed_form():
    model = toy()
    beam = beam_of(model)
    set_scores(beam)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with beam.attached():
        out = model.base_model.model.third(x)  # (9, 3)
        (out.square().sum() / 2).backward()
    A, B = factors(model, "third")
    imp = beam.importances()["third"].tolist()
    h = (x @ A.detach().T).tolist()
    # dL/d imp_j = Σ_tokens Σ_o y_o · 2 B_oj h_j, and d imp_j / d s_k = imp_j (δ_jk - imp_k / r) / τ
    by_imp = [
        sum(2 * y * B[o][j].item() * h[t][j] for t, row in enumerate(out.tolist()) for o, y in enumerate(row))
        for j in range(RANK)
    ]
    want = [sum(by_imp[j] * imp[j] * ((j == k) - imp[k] / RANK) / TAU for j in range(RANK)) for k in range(RANK)]
    assert beam.parameters["third.scores"].grad.tolist() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("settings", [BeamSettings(threshold=0.6, period=4), BeamSettings(threshold=0.8, period=5)])
def test_events_prune_and_expand_as_a_loop_over_lists_does(settings):
    history, events = {}, []
    for number, before, after, event in run_toy(settings):
        if number % settings.period == settings.period - settings.period // 2:
            history = before
        if event is None:
            assert after == before
            continue
        assert event.step == number
        choice, spared = naive_choice(before, settings.threshold_at(number, 20))
        for module in MODULES:
            pairs = event.replaced.get(module, ())
            assert ({pruned for pruned, _ in pairs}, {source for _, source in pairs}) == choice[module]
        assert event.spared == spared
        assert after == expected_after(before, history, event)
        events.append(event)
    assert [event.step for event in events] == list(settings.event_steps(20))
    assert sum(event.pruned for event in events) >= 3
    assert len({len(event.replaced.get(module, ())) for event in events for module in MODULES}) > 1


def test_a_source_keeps_its_weights_and_the_pruned_rank_gets_older_ones():
    pruning = [(before, after, e) for _, before, after, e in run_toy(BeamSettings(threshold=0.6, period=4)) if e]
    for before, after, event in pruning:
        for module, pairs in event.replaced.items():
            for pruned, source in pairs:
                assert after[module]["A"][0][source] == before[module]["A"][0][source]
                assert after[module]["A"][0][pruned] != before[module]["A"][0][source]  # or the two would stay twins


def test_no_more_than_half_of_a_module_is_pruned():
    model = toy()
    beam = beam_of(model, BeamSettings(threshold=0.5, period=4, end=1.0))
    trained = [p for p in model.parameters() if p.requires_grad] + list(beam.parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for number in range(1, 5):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        # one rank of the first module has all of its importance, so its other three are in the tail
        beam.parameters["first.scores"].data = torch.tensor([0.0, 0.0, 1.0, 0.1], dtype=torch.float64)
        beam.after_step(number, optimizer)
    (event,) = beam.events
    assert [pruned for pruned, _ in event.replaced["first"]] == [0, 1]
    assert {source for _, source in event.replaced["first"]} == {2, 3}
    assert event.spared >= 1


def test_a_threshold_of_1_only_learns_importance():
    for _, before, after, event in run_toy(BeamSettings(threshold=1.0, period=4)):
        assert event is None
        assert after == before


def test_the_mass_of_an_event_is_the_share_of_importance_it_prunes():
    for _, before, _, event in run_toy(BeamSettings(threshold=0.6, period=4)):
        if event is None:
            continue
        total = pruned = 0.0
        every = []
        for module, parts in before.items():
            exponentials = [math.exp(score / TAU) for score in parts["s"][0]]
            row = [RANK * value / sum(exponentials) for value in exponentials]
            every += row
            total += sum(row)
            pruned += sum(row[rank] for rank, _ in event.replaced.get(module, ()))
        assert event.mass == pytest.approx(pruned / total)
        assert (event.lowest, event.highest) == pytest.approx((min(every), max(every)))


def test_the_seed_decides_the_pairs():
    settings = BeamSettings(threshold=0.4, period=4)
    first, again, other = (
        [event.replaced for *_, event in run_toy(settings, seed=seed) if event] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_the_same_outside_the_context(fails):
    model = toy()
    beam = beam_of(model)
    set_scores(beam)
    x = torch.randn(3, 5, dtype=torch.float64)
    bare = model(x)
    try:
        with beam.attached():
            assert not torch.allclose(model(x), bare)
            if fails:
                raise LookupError
    except LookupError:
        pass
    assert torch.equal(model(x), bare)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_folding_changes_no_output_and_stock_peft_loads_the_result(tmp_path, base, dtype, tolerance):
    if base == "llama":
        tolerance = max(tolerance, 1e-6)  # its norms compute in float32
    config = LoraConfig(
        r=RANK, lora_alpha=3, target_modules=TARGETS[base], task_type="CAUSAL_LM", fan_in_fan_out=base == "gpt2"
    )
    model = get_peft_model(base_model(base, dtype=dtype), config, autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    beam = beam_of(model)
    set_scores(beam)
    plain = logits(model, base)
    with beam.attached():
        trained = logits(model, base)
    assert relative_error(trained, plain) > 1e-2
    beam.fold()
    assert relative_error(logits(model, base), trained) < tolerance
    with beam.attached():  # folded once, and only once
        assert relative_error(logits(model, base), trained) < tolerance
    model.save_pretrained(tmp_path / "a")
    assert relative_error(logits(peft_load(tmp_path / "a", base=base, dtype=dtype), base), trained) < tolerance


def test_rounded_to_bfloat16_it_does_not_matter_which_factor_takes_the_importance():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) for shape in ((8, 576), (192, 8)))
    imp = torch.softmax(torch.randn(8, generator=generator), 0) * 8
    exact = (B * imp).double() @ A.double()

    def error(A, B):
        return relative_error(B.bfloat16().double() @ A.bfloat16().double(), exact)

    assert error(A, B * imp) == pytest.approx(error(imp[:, None] * A, B), rel=0.05)


def test_an_adapted_embedding_and_a_rank_of_1_are_refused():
    config = LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"linear layers, and model\.embed_tokens is none"):
        beam_of(get_peft_model(base_model(), config))
    with pytest.raises(ValueError, match="first has rank 1"):
        beam_of(toy(rank=1))


def test_a_module_that_no_step_reaches_is_named():
    model = toy()
    beam = beam_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="no step has reached first"):
        beam.after_step(2, optimizer)


ROWS = [{"prompt": f"say {word} {i}", "response": word} for i in range(12) for word in ("yes", "no", "maybe")]
RECIPE = Recipe(
    rank=4,
    steps=16,
    batch_size=8,
    learning_rate=2e-2,
    warmup=2,
    dropout=0.1,
    seed=5,
    eval_every=5,
    save_every=1,
    beam=BeamSettings(threshold=0.8, period=4),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(base):
    def run(output, recipe=RECIPE, **settings):
        return train_adapter(ROWS, output, base=base, recipe=recipe, device="cpu", progress=False, **settings)

    return run


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7, 8, 13])  # remembered after 2, 6, 10; pruned after 4, 8
def test_a_run_resumed_around_an_event_equals_one_never_interrupted(train, tmp_path, stop):
    whole = train(tmp_path / "whole", dev=ROWS[:9])
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", dev=ROWS[:9], on_step=interrupt_at(stop))
    seen = []
    resumed = train(tmp_path / "cut", dev=ROWS[:9], on_step=lambda step: seen.append(step.number))
    assert seen[0] == stop + 1
    assert (resumed.losses, resumed.dev_losses, resumed.events) == (whole.losses, whole.dev_losses, whole.events)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_report_and_the_record_tell_every_event(train, tmp_path):
    report = train(tmp_path / "a")
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert [event.step for event in report.events] == list(RECIPE.beam.event_steps(16)) == [4, 8]
    assert all(event.pruned > 0 for event in report.events)
    assert record["recipe"]["beam"]["threshold"] == 0.8
    for event, told in zip(report.events, record["events"], strict=True):
        assert (told["step"], told["threshold"], told["spared"]) == (event.step, event.threshold, event.spared)
        assert {module: [tuple(pair) for pair in pairs] for module, pairs in told["replaced"].items()} == {
            module: list(pairs) for module, pairs in event.replaced.items()
        }
        assert all(module.startswith("model.layers.") for module in told["replaced"])


def test_the_first_step_is_that_of_plain_lora_and_later_ones_are_not(train, tmp_path):
    beam = train(tmp_path / "a")
    plain = train(tmp_path / "b", recipe=Recipe(**{**vars(RECIPE), "beam": None}))
    assert beam.losses[0] == plain.losses[0]
    assert beam.losses[2:] != plain.losses[2:]
    assert plain.events == ()


def test_stock_peft_finds_the_loss_that_the_training_measured(train, tmp_path, base):
    report = train(tmp_path / "a", dev=ROWS[:9])
    loaded = load_base(base, device="cpu")
    examples = encode_examples(loaded.tokenizer, read_examples(ROWS[:9]), 512)
    model = PeftModel.from_pretrained(loaded.model, tmp_path / "a").eval()
    assert response_loss(model, examples, 0).item() == pytest.approx(report.dev_loss, rel=1e-2)


def test_it_learns_and_an_encoder_decoder_does_too(train, tmp_path):
    settings = BeamSettings(threshold=0.9, period=4)
    targets = ("v_proj", "o_proj", "down_proj")
    report = train(tmp_path / "a", recipe=Recipe(steps=40, learning_rate=3e-3, beam=settings, target_modules=targets))
    assert report.losses[-1] < 0.5 * report.losses[0]
    other = train_adapter(
        ROWS,
        tmp_path / "b",
        base=base_folder(tmp_path, "t5"),
        recipe=Recipe(steps=20, learning_rate=2e-2, target_modules=("q", "v"), beam=settings),
        device="cpu",
        progress=False,
    )
    assert other.losses[-1] < other.losses[0]
    assert any(event.pruned for event in other.events)
