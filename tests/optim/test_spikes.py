"""SPAM's options of AdamW: spikes are clipped against the second moment, moments start anew."""

from __future__ import annotations

import math

import pytest
import torch

from memopt.optim import AdamW
from tests.optim.training import assert_resumes_bitwise, copies, gradients, largest_difference, parameters, run

SHAPE = (64, 300)


def test_options_that_never_bite_change_nothing() -> None:
    ours, plain = parameters([SHAPE]), parameters([SHAPE])
    run(AdamW(ours, state="fp32", spike_threshold=1e30, reset_every=100), 5)
    run(AdamW(plain, state="fp32"), 5)
    assert largest_difference(ours, plain) == 0


def test_a_spike_counts_as_the_largest_gradient_allowed() -> None:
    (param,) = parameters([SHAPE])
    (limited,) = copies([param])
    optimizer = AdamW([param], state="fp32")
    reference = AdamW([limited], state="fp32")
    run(optimizer, 3)
    run(reference, 3)
    optimizer.param_groups[0]["spike_threshold"] = 50.0
    moment = reference.state[limited]["exp_avg_sq"] / (1 - 0.999**3)
    gradients([param], 3)
    param.grad[3, 4] = -1e6
    limited.grad = param.grad.clone()
    limit = (50.0 * moment).sqrt()
    limited.grad = torch.where(limited.grad.abs() > limit, limited.grad.sign() * limit, limited.grad)
    assert float(limited.grad[3, 4]) > -1e3
    optimizer.step()
    reference.step()
    assert largest_difference([param], [limited]) <= 2.0**-21
    assert (
        largest_difference(list(optimizer.state[param].values())[:2], list(reference.state[limited].values())[:2])
        < 1e-6
    )


def test_after_a_reset_it_is_a_new_optimizer_with_a_smaller_step() -> None:
    (param,) = parameters([SHAPE])
    optimizer = AdamW([param], lr=0.01, weight_decay=0.0, state="fp32", reset_every=3, reset_warmup=4)
    run(optimizer, 3)
    (fresh,) = copies([param])
    for step, share in ((3, 1 / 4), (4, 2 / 4), (5, 3 / 4)):
        lr = 0.01 * 0.5 * (1 - math.cos(math.pi * share))
        if step == 3:
            new = AdamW([fresh], lr=lr, weight_decay=0.0, state="fp32")
        new.param_groups[0]["lr"] = lr
        run(optimizer, [step])
        run(new, [step])
        assert largest_difference([param], [fresh]) <= (step - 2) * 2.0**-22


@pytest.mark.parametrize("state", ["8bit", "4bit"])
def test_resumes_bitwise_across_a_reset(state: str) -> None:
    options = {"state": state, "spike_threshold": 5.0, "reset_every": 4, "reset_warmup": 2}
    assert_resumes_bitwise(lambda params: AdamW(params, **options), parameters([SHAPE, (8,)]))


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"spike_threshold": 0.0}, "spike_threshold is 0.0"),
        ({"reset_every": 0}, "reset_every is 0"),
        ({"reset_warmup": -1}, "reset_warmup is -1"),
        ({"reset_every": 5, "amsgrad": True}, "choose one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW(parameters([SHAPE]), **options)
