"""Runs tools/train.py again and again without importing the toolboxes again.

Imports once, then reads a line of JSON for each run from stdin (``argv``, ``cwd``, ``log``), forks
a process that runs mmlavit.engine.launch.main with these arguments in a group of its own, and says
its process id on a line and, when it has ended, its exit status on another. With a ``file_limit``,
in bytes, no file can grow beyond it.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import torch

from mmlavit.compat import repair_torchvision
from mmlavit.engine import launch


def spare_what_takes_longer_than_training() -> None:
    """Configs are not made pretty; the toolboxes' list of configs and the machine are read once."""
    import mmengine.config.utils
    import mmengine.runner.runner
    import yapf.yapflib.yapf_api
    from mmengine.config import Config

    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, False)
    for module, name in (
        (mmengine.config.utils, '_get_cfg_metainfo'),
        (mmengine.runner.runner, 'collect_env'),
    ):
        setattr(module, name, functools.cache(getattr(module, name)))
    mmengine.runner.runner.collect_env()
    Config.fromfile(Path(__file__).parents[2] / 'configs' / 'lavit_n_shapes.py')


def run(order: dict) -> None:
    """What the forked process does; does not return."""
    os.chdir(order['cwd'])
    sink = os.open(order['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.argv = ['train.py', *order['argv']]
    if order['file_limit']:
        # As on a full disk, a write then stops half-way with an OSError.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order['file_limit'], resource.RLIM_INFINITY))
    code = 1
    try:
        launch.main('train.py')
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == '__main__':
    # Packages greet on stdout.
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    # Forked processes cannot use the threads of the one that they come from.
    torch.set_num_threads(1)
    repair_torchvision()
    import mmpretrain.datasets
    import mmpretrain.engine
    import mmpretrain.evaluation
    import mmpretrain.models
    import mmpretrain.visualization  # noqa: F401

    spare_what_takes_longer_than_training()
    for line in sys.stdin:
        pid = os.fork()
        os.setpgid(pid, pid)  # in both processes, whichever is first
        if not pid:
            run(json.loads(line))
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)
