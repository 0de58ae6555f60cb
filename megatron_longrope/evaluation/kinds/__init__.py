"""The kinds of evaluation; those of lm-evaluation-harness share a file, each other has its own."""

from megatron_longrope.evaluation.kinds.needle import NEEDLE
from megatron_longrope.evaluation.kinds.passkey import PASSKEY
from megatron_longrope.evaluation.kinds.ppl import PPL
from megatron_longrope.evaluation.kinds.ruler import RULER
from megatron_longrope.evaluation.kinds.tasks import SHORT, TASKS

KINDS = {kind.name: kind for kind in (PPL, PASSKEY, NEEDLE, RULER, SHORT, TASKS)}
