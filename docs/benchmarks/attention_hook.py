"""What a hook that looks at attention costs: iterations with and without it, in one training.

python docs/benchmarks/attention_hook.py configs/lavit_n_shapes.py
python docs/benchmarks/attention_hook.py configs/lavit_n_shapes.py --hook AttentionHealthHook

Trains with the hook due in every fifth iteration and compares the median of these with that of the
others. Needs the data of the config (tools/make_shapes.py).
"""

import argparse
import statistics
import tempfile
import time

from mmlavit.compat import repair_torchvision

repair_torchvision()

from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.registry import HOOKS, init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

# AttentionHealthHook only notes the learning rate where it is due for the first time.
EVERY, WARM_UP = 5, 5
starts: list[float] = []
times: list[float] = []


@HOOKS.register_module()
class StartClock(Hook):
    """Before all other hooks."""

    priority = 'HIGHEST'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict = None) -> None:
        """Note the time."""
        starts.append(time.perf_counter())


@HOOKS.register_module()
class StopClock(Hook):
    """After all other hooks."""

    priority = 'LOWEST'

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Note how long the iteration took."""
        times.append(time.perf_counter() - starts[-1])
        if len(times) == count:
            raise KeyboardInterrupt


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('config')
hooks = ['AttentionVisualizationHook', 'AttentionHealthHook']
parser.add_argument('--hook', choices=hooks, default=hooks[0])
parser.add_argument('--iterations', type=int, default=40)
args = parser.parse_args()
count = args.iterations
cfg = Config.fromfile(args.config)
init_default_scope(cfg.default_scope)
# AttentionHealthHook waits for a tenth of the training and for a learning rate that does not rise.
cfg.train_cfg = dict(by_epoch=False, max_iters=count)
cfg.param_scheduler = None
cfg.custom_hooks = [
    *(hook for hook in cfg.get('custom_hooks', []) if hook['type'] != args.hook),
    dict(type=args.hook, interval=EVERY),
    dict(type='StartClock'),
    dict(type='StopClock'),
]
cfg.visualizer = {
    **cfg.visualizer,
    'vis_backends': [dict(type='TensorboardVisBackend'), dict(type='LocalVisBackend')],
}
cfg.log_level = 'ERROR'
with tempfile.TemporaryDirectory() as cfg.work_dir:
    try:
        Runner.from_cfg(cfg).train()
    except KeyboardInterrupt:
        due = [t for i, t in enumerate(times, 1) if i > WARM_UP and not i % EVERY]
        others = [t for i, t in enumerate(times, 1) if i > WARM_UP and i % EVERY]
        without = statistics.median(others)
        call = statistics.median(due) - without
        share = call / (HOOKS.get(args.hook)().interval * without)
        print(f'iteration {without:.3f} s, call {call:.3f} s: {share:.3%} at the default interval')
