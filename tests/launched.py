"""`owl-deploy` in fp32 on every CPU, so that sums of several processes can be compared; for `torchrun`.

It saves after every step, and dies before step INTERRUPT_AT if that is set.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from owl_deploy.cli import main
from owl_deploy.recovery import helper, run, training
from owl_deploy.recovery.train import Trainer

step = Trainer.step


def interrupted(self, ids):
    if len(self.log) + 1 == int(os.environ.get("INTERRUPT_AT", "0")):
        os._exit(3)
    return step(self, ids)


run.fast_dtype = helper.fast_dtype = lambda _: torch.float32
training._SAVED_EVERY_S = 0
Trainer.step = interrupted
main()
