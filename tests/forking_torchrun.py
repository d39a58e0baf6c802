"""torchrun, but its processes are forked from one that has imported what takes the most time: on POSIX systems only.

python forking_torchrun.py --nproc_per_node=2 training.py -batch_size 32
"""

import sys
from pathlib import Path

import torch._dynamo  # noqa: F401  # which the first optimizer of a process imports
from torch.distributed.run import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where Python itself looks for training.py's model.py

if __name__ == "__main__":
    main(["--run-path", "--start-method=fork", *sys.argv[1:]])
