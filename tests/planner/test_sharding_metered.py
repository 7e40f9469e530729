"""What a rank of FSDP2 is predicted to hold, against what one holds."""

from __future__ import annotations

import memopt
from memopt.planner import Degrees, shard
from tests.distributed.ranks import run_ranks
from tests.planner import fsdp_run
from tests.planner.fsdp_run import TOKENS, Setting

SETTINGS = [
    Setting(),  # with a plan
    Setting(vocabulary=2999, tied=True, frozen=1),
    Setting(accumulate=2),
]


def test_the_predicted_peak_of_a_rank_is_the_metered_one() -> None:
    """Exactly as a rule; at times a thread of gloo keeps a small buffer a little longer."""
    predicted, plans = [], []
    for setting in SETTINGS:
        model, optimizer = fsdp_run.build(setting)
        step = memopt.trace(model, (TOKENS, TOKENS), optimizer=optimizer, accumulate=setting.accumulate)
        one_rank = shard(step, Degrees(data=2, zero=3))
        plan = None if predicted else memopt.plan(one_rank, int(0.85 * one_rank.peak_bytes), "cpu")
        predicted.append(plan.peak_bytes if plan else one_rank.peak_bytes)
        plans.append(plan)
    for rank in run_ranks(fsdp_run.peaks, 2, SETTINGS, plans):
        for setting, ours, theirs in zip(SETTINGS, predicted, rank, strict=True):
            assert abs(ours / theirs - 1) < 0.03, (setting, ours, theirs)
