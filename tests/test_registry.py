"""What importing mmlavit needs and registers, each case in an interpreter of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

import mmlavit

ROOT = str(Path(mmlavit.__file__).parents[1])

# As if they were not installed. MMEngine itself cannot go without OpenCV (its visualizer).
BLOCK = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name.split('.')[0])
sys.meta_path.insert(0, Block())
"""

# torchvision repaired by compat.py as a file, so that mmlavit itself stays to be imported.
REPAIR = f"""
import importlib.util
spec = importlib.util.spec_from_file_location('compat', {mmlavit.compat.__file__!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
compat.repair_torchvision()
assert 'mmlavit' not in sys.modules
"""

CONFIG = """
default_scope = {toolbox!r}
custom_imports = dict(imports=['mmlavit'])
model = dict(type='LaViT', arch='nano', out_indices=(1, 3))
custom_hooks = [dict(type='DiagonalityLossHook', loss_weight=0.5)]
"""


def passes(code: str, cwd: Path | None = None) -> None:
    code = f'import sys\nsys.path.insert(0, {ROOT!r})\n{code}'
    ran = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=cwd, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_needs_torch_numpy_and_mmengine_alone():
    """Trains a step with the hook, too: no toolbox is imported on the way."""
    passes(
        "blocked = {'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision', 'timm', 'einops'}"
        + BLOCK
        + """
import torch
import mmlavit

for name in mmlavit.__all__:
    assert getattr(mmlavit, name) is not None
model = mmlavit.LaViT('nano')
maps = model(torch.randn(1, 3, 50, 70))
assert [tuple(m.shape) for m in maps] == [
    (1, 32, 13, 18), (1, 64, 7, 9), (1, 160, 4, 5), (1, 320, 2, 3)
]
sum(m.square().sum() for m in maps).backward()
assert model.stages[0].blocks[1].attn.psi.grad.count_nonzero()
with torch.no_grad():
    model.eval()(torch.randn(2, 3, 33, 1))
mmlavit.diagonality_preserving_loss(torch.randn(1, 1, 4, 4))
assert not blocked & {name.split('.')[0] for name in sys.modules}
"""
    )


def test_without_fsdp():
    """MMEngine swallows whatever goes wrong when it imports FSDP, and does without; so do we.

    A torch without torch.distributed cannot be tried: MMEngine itself does not import there
    (open-mmlab/mmengine#1507).
    """
    passes("""
sys.modules['mmengine._strategy.fsdp'] = None
from mmlavit import *
import mmlavit
from mmengine.registry import FUNCTIONS, STRATEGIES

assert 'LaViT' in globals()
for registry, name in (STRATEGIES, 'ResumableFSDPStrategy'), (FUNCTIONS, 'wrap_lavit_blocks'):
    assert not hasattr(mmlavit, name) and registry.get(name) is None
""")


@pytest.mark.parametrize('blocked', ['mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision'])
def test_the_block_blocks(blocked):
    """Or the test above would prove nothing."""
    passes(
        f'blocked = {{{blocked!r}}}{BLOCK}'
        f'try:\n    import {blocked}\nexcept ModuleNotFoundError as error:\n'
        f'    assert error.name == {blocked!r}\nelse:\n    raise SystemExit(1)\n'
    )


def test_toolboxes_find_what_is_registered_once(tmp_path):
    """From somebody else's configs, in a folder that holds nothing of ours."""
    for toolbox in ('mmdet', 'mmpretrain', 'mmseg'):
        (tmp_path / f'{toolbox}.cfg.py').write_text(CONFIG.format(toolbox=toolbox))
    passes(
        REPAIR
        + """
import mmengine.registry
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope
import mmdet.models, mmpretrain.models, mmseg.models
boxes = dict(mmdet=mmdet.registry, mmpretrain=mmpretrain.registry, mmseg=mmseg.registry)

for box in boxes.values():
    assert box.MODELS is not MODELS and box.MODELS.get('LaViT') is None
    assert box.HOOKS.get('DiagonalityLossHook') is None
cfgs = {name: Config.fromfile(f'{name}.cfg.py') for name in boxes}
mmlavit = sys.modules['mmlavit']

for name, box in boxes.items():
    cfg = cfgs[name]
    assert box.MODELS.get('LaViT') is mmlavit.LaViT
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = box.MODELS.build(cfg.model)
        hook = box.HOOKS.build(cfg.custom_hooks[0])
    assert type(model) is mmlavit.LaViT and model.out_indices == (1, 3)
    assert type(hook) is mmlavit.DiagonalityLossHook and hook.loss_weight == 0.5
assert isinstance(MODELS.build(dict(type='LaViT', arch='nano')), mmlavit.LaViT)

registries = {
    id(registry): registry
    for module in (mmengine.registry, *boxes.values())
    for registry in vars(module).values()
    if isinstance(registry, mmengine.registry.Registry)
}
ours = {
    (registry.name, registry.scope, key): value
    for registry in registries.values()
    for key, value in registry.module_dict.items()
    if getattr(value, '__module__', '').startswith('mmlavit')
}
# FSDP is imported when it is built.
assert callable(ours.pop(('strategy', 'mmengine', 'ResumableFSDPStrategy')))
assert ours == {
    ('model', 'mmengine', 'LaViT'): mmlavit.LaViT,
    ('model', 'mmengine', 'LogitAdjustedLoss'): mmlavit.LogitAdjustedLoss,
    ('hook', 'mmengine', 'DiagonalityLossHook'): mmlavit.DiagonalityLossHook,
    ('hook', 'mmengine', 'AttentionHealthHook'): mmlavit.AttentionHealthHook,
    ('hook', 'mmengine', 'AttentionVisualizationHook'): mmlavit.AttentionVisualizationHook,
    ('hook', 'mmengine', 'SafeCheckpointHook'): mmlavit.SafeCheckpointHook,
    ('hook', 'mmengine', 'StepSeedHook'): mmlavit.StepSeedHook,
    (
        'optimizer wrapper constructor', 'mmengine', 'LaViTOptimWrapperConstructor'
    ): mmlavit.LaViTOptimWrapperConstructor,
    ('optim_wrapper', 'mmengine', 'BFloat16OptimWrapper'): mmlavit.BFloat16OptimWrapper,
    ('function', 'mmengine', 'wrap_lavit_blocks'): mmlavit.wrap_lavit_blocks,
    ('metric', 'mmengine', 'DSB2018Metric'): mmlavit.DSB2018Metric,
}, ours
""",
        cwd=tmp_path,
    )


def test_the_model_alone_without_mmengine():
    """A plain module of PyTorch, which trains."""
    passes("""
missing = 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'cv2', 'yapf', 'addict', 'matplotlib'
sys.modules.update(dict.fromkeys(missing))
from mmlavit.models import LaViT
import torch

model = LaViT('nano', out_indices=(1, 3))
assert model.out_channels == (64, 320) and model.strides == (8, 32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, losses = torch.randn(2, 3, 40, 56), []
for _ in range(8):
    loss = sum(m.square().mean() - m[:, 0].mean() for m in model(images))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
model.init_weights()
LaViT('nano', out_indices=(1, 3)).load_state_dict(model.state_dict())
try:
    LaViT('nano', init_cfg=dict(checkpoint='weights.pth'))
except ImportError as error:
    assert 'MMEngine' in str(error)
import mmlavit
try:
    mmlavit.DiagonalityLossHook
except ImportError as error:
    assert 'onedl-mmengine' in str(error)
assert not any(sys.modules[name] for name in missing)
""")


def test_importing_the_package_leaves_out_what_few_need():
    passes("""
import mmengine.runner
before = set(sys.modules)
import mmlavit

new = set(sys.modules) - before
rooms = 'analysis', 'datasets', 'export', 'engine.launch'
assert not [name for name in new for room in rooms if name.startswith(f'mmlavit.{room}')], new
assert not new & {'mmpretrain', 'mmlavit.engine.fsdp', 'matplotlib', 'bokeh', 'onnx', 'cv2'}
""")
