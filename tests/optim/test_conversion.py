"""State dicts between memopt, torch, bitsandbytes and torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import memopt.optim as room
from memopt.optim import AdamW, AdamW8bit, convert
from tests.optim.every_rule import made
from tests.optim.training import (
    assert_same_state,
    copies,
    gradients,
    largest_difference,
    parameters,
    run,
    state_tensors,
    through_file,
)

SHAPES = [(64, 300), (97, 101), (10,)]


def _follow(optimizer: Any, state_dict: dict[str, Any]) -> None:
    optimizer.load_state_dict(state_dict)
    run(optimizer, [5])


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "4bit"])
def test_to_torch_is_what_was_stored(state: str) -> None:
    params = parameters(SHAPES)
    ours = AdamW(params, lr=3e-3, state=state)
    run(ours, 4)
    converted = through_file(convert(ours.state_dict(), "memopt", "torch"))
    theirs = torch.optim.AdamW(copies(params))
    theirs.load_state_dict(converted)
    assert theirs.param_groups[0]["lr"] == 3e-3
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        slot = ours.slot(0, ours.param_groups[0], p, ours.state[p])
        for spec in slot.specs:
            assert torch.equal(theirs.state[q][spec.name], slot.decode(spec))
        assert float(theirs.state[q]["step"]) == 4
    gradients(theirs.param_groups[0]["params"], 5)
    theirs.step()


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "4bit"])
def test_torch_and_back_changes_nothing(state: str) -> None:
    """A second encoding of decoded states gives the same codes, and scales but for the roundings of a fourth power."""
    params = parameters(SHAPES)
    ours = AdamW(params, state=state)
    run(ours, 4)
    twin = AdamW(copies(params), state=state)
    twin.load_state_dict(convert(convert(ours.state_dict(), "memopt", "torch"), "torch", twin))
    for (number, name, x), (_, _, y) in zip(state_tensors(ours), state_tensors(twin), strict=True):
        if name.endswith("_scales"):
            assert torch.allclose(x, y, rtol=2.0**-20, atol=0), (number, name)
        else:
            assert torch.equal(x, y), (number, name)


def test_between_memopts_formats() -> None:
    params = parameters(SHAPES)
    wide = AdamW(params, state="fp32", lr=0.5)
    run(wide, 4)
    narrow = AdamW8bit(copies(params))
    narrow.load_state_dict(convert(wide.state_dict(), "memopt", "memopt", bits=8))
    assert narrow.param_groups[0]["lr"] == 0.5
    assert narrow.state[narrow.param_groups[0]["params"][0]]["exp_avg_codes"].dtype == torch.uint8
    direct = AdamW8bit(copies(params))
    direct.load_state_dict(convert(wide.state_dict(), "memopt", direct))
    for optimizer in (narrow, direct):
        run(optimizer, [5])
    assert largest_difference(narrow.param_groups[0]["params"], direct.param_groups[0]["params"]) == 0


def _bitsandbytes_state(nested: bool) -> tuple[dict[str, Any], torch.Tensor]:
    """A state dict in bitsandbytes' layout with a map of our own, and the first moment it stands for."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (64, 90), generator=generator, dtype=torch.uint8)
    qmap, absmax = torch.linspace(-1, 1, 256), torch.rand(23, generator=generator)
    fields = {"state1": codes, "state2": codes, "absmax1": absmax, "absmax2": absmax, "qmap1": qmap, "qmap2": qmap**2}
    stored = {"step": 7, **({"__bnb_optimizer_quant_state__": fields} if nested else fields)}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "alpha": 0.0, "t_alpha": None}
    expected = torch.stack([qmap[int(c)] * absmax[i // 256] for i, c in enumerate(codes.flatten())]).reshape(64, 90)
    return {"state": {0: stored}, "param_groups": [{**group, "params": [0]}]}, expected


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_codes_are_read_exactly(nested: bool) -> None:
    saved, expected = _bitsandbytes_state(nested)
    plain = convert(saved, "bitsandbytes", "torch")
    assert torch.equal(plain["state"][0]["exp_avg"], expected)
    assert float(plain["state"][0]["step"]) == 7
    for state in ("fp32", "8bit"):
        optimizer = AdamW(parameters([(64, 90)]), state=state)
        _follow(optimizer, convert(saved, "bitsandbytes", optimizer))
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
        assert "t_alpha" not in optimizer.param_groups[0]


@pytest.mark.parametrize("rule", ["AdamW", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS", "AdEMAMix"])
def test_bitsandbytes_and_back_in_32_bits(rule: str) -> None:
    params = parameters(SHAPES)
    ours = made(rule, params, state="fp32")
    run(ours, 3)
    there = convert(ours.state_dict(), "memopt", "bitsandbytes", bits=32)
    assert "state1" in there["state"][0]
    twin = made(rule, copies(params), state="fp32")
    twin.load_state_dict(convert(there, "bitsandbytes", twin))
    run(ours, [5])
    run(twin, [5])
    assert largest_difference(params, twin.param_groups[0]["params"]) == 0


def test_torchaos_subclasses_are_read() -> None:
    class State8bit(torch.Tensor):
        """Stands for torchao's subclass: it only has to decode itself."""

        def dequantize(self) -> torch.Tensor:  # type: ignore[override]
            return torch.full((3, 4), 0.25)

    stored = {"step": torch.tensor(2.0), "exp_avg": torch.empty(3, 4).as_subclass(State8bit)}
    saved = {
        "state": {0: {**stored, "exp_avg_sq": torch.ones(3, 4)}},
        "param_groups": [{"params": [0], "lr": torch.tensor(0.5)}],
    }
    plain = convert(saved, "torchao", "torch")
    assert torch.equal(plain["state"][0]["exp_avg"], torch.full((3, 4), 0.25))
    assert plain["param_groups"][0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jax", "torch"), "source is 'jax'; the choices are bitsandbytes, memopt, torch, torchao"),
        (("torch", "jax"), "target is 'jax'"),
        (("memopt", "torch"), "not one of memopt's 'adamw': its groups say"),
        (("bitsandbytes", "torch"), "parameter 0 of the state dict cannot be read"),
    ],
)
def test_what_cannot_be_converted_is_named(arguments: tuple[str, str], message: str) -> None:
    theirs = torch.optim.AdamW(parameters(SHAPES))
    run(theirs, 1)
    with pytest.raises(ValueError, match=message):
        convert(theirs.state_dict(), *arguments)
    with pytest.raises(ValueError, match="rule is 'adamx'"):
        convert(theirs.state_dict(), "torch", rule="adamx")
    with pytest.raises(ValueError, match="has no 'param_groups'"):
        convert({"state": {}}, "torch")


if importlib.util.find_spec("bitsandbytes"):

    @pytest.mark.filterwarnings("ignore")
    def test_the_real_bitsandbytes_both_ways() -> None:
        import bitsandbytes

        params = parameters(SHAPES)
        theirs = bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
        run(theirs, 3)
        ours = AdamW(copies(params), lr=1e-3, state="fp32")
        ours.load_state_dict(convert(theirs.state_dict(), "bitsandbytes", ours))
        back = bitsandbytes.optim.AdamW8bit(copies(params), lr=1e-3)
        back.load_state_dict(convert(ours.state_dict(), "memopt", "bitsandbytes"))
        assert back.state[back.param_groups[0]["params"][0]]["state1"].dtype == torch.uint8
        for optimizer in (theirs, ours, back):
            run(optimizer, [5])
        # One step from the same state: the step itself is the same up to its own rounding, lr 1e-3.
        for optimizer in (ours, back):
            assert largest_difference(params, optimizer.param_groups[0]["params"]) <= 2e-4

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("rule", ["AdamW", "AdEMAMix", "Lion"])
    def test_bitsandbytes_codes_pass_through_as_they_are(rule: str) -> None:
        """Rows of whole blocks, flat ones and one dimension; of other rows the values pass, rounded once."""
        import bitsandbytes

        shapes = [(18, 512), (97, 101), (33, 5, 3, 3), (5001,), (31, 300)]
        params = parameters(shapes)
        theirs = getattr(bitsandbytes.optim, f"{rule}8bit")(params, lr=1e-3)
        run(theirs, 3)
        saved = theirs.state_dict()
        ours = getattr(room, rule)(copies(params), lr=1e-3, state="8bit-dynamic")
        ours.load_state_dict(through_file(convert(saved, "bitsandbytes", ours)))
        back = convert(ours.state_dict(), "memopt", "bitsandbytes")
        for number, shape in enumerate(shapes):
            first, again = saved["state"][number]["__bnb_optimizer_quant_state__"], back["state"][number]
            exact = [key for key in first if key in again and torch.equal(first[key], again[key])]
            assert (sorted(exact) == sorted(again.keys() - {"step"})) == (shape != (31, 300)), shape


if importlib.util.find_spec("torchao"):

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("bits", [8, 4])
    def test_the_real_torchao_both_ways(bits: int) -> None:
        from torchao.optim import AdamW4bit as Theirs4bit
        from torchao.optim import AdamW8bit as Theirs8bit

        params = parameters([(64, 256), (97, 101)])
        ours = AdamW(params, state="fp32")
        run(ours, 3)
        there = convert(ours.state_dict(), "memopt", "torchao", bits=bits)
        theirs = (Theirs8bit if bits == 8 else Theirs4bit)(copies(params))
        theirs.load_state_dict(there)
        first = theirs.state[theirs.param_groups[0]["params"][0]]["exp_avg"]
        assert type(first).__name__ == f"OptimState{bits}bit"
        back = convert(theirs.state_dict(), "torchao", "torch")
        assert torch.equal(back["state"][0]["exp_avg"], first.dequantize())
        assert torch.equal(back["state"][1]["exp_avg"], ours.state[params[1]]["exp_avg"])

    @pytest.mark.filterwarnings("ignore")
    def test_torchaos_codes_pass_through_as_they_are() -> None:
        params = parameters([(16, 512), (64, 4, 4, 4)])
        ours = AdamW(params, state="8bit-dynamic")
        run(ours, 3)
        there = convert(ours.state_dict(), "memopt", "torchao")
        twin = AdamW(copies(params), state="8bit-dynamic")
        twin.load_state_dict(convert(there, "torchao", twin))
        assert_same_state(ours, twin)
