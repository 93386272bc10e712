"""Loading: every tensor, other windows, other archs, in every way that weights come in."""

import copy
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import reference
import torch
from mmengine import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint, save_checkpoint
from small import ARCH, images, seeded, sharpen, small_lavit, spreads
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from mmlavit import ARCHS, LaViT
from mmlavit.models.state_dict import resize_window_weight

OTHER_WINDOWS = (4, 4, 4, 4)


@pytest.fixture
def log(request) -> Iterator[list[str]]:
    """What MMEngine's current logger says."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_instance(request.node.name, log_level='INFO')
    logger.handlers = [handler]
    yield lines
    logger.handlers = []


class Framed(BaseModel):
    """A backbone beside a head, where every toolbox keeps it."""

    def __init__(self, backbone: LaViT) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(inputs)


def need(toolbox: str) -> None:
    """Skip where the toolboxes are left out, as by `make test-oldest`."""
    if find_spec(toolbox) is None:
        pytest.skip(f'{toolbox} is not installed')


def classifier(backbone: LaViT) -> BaseModel:
    need('mmpretrain')
    from mmpretrain.models import ImageClassifier

    head = dict(type='LinearClsHead', num_classes=3, in_channels=ARCH['embed_dims'][3])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return ImageClassifier(backbone, dict(type='GlobalAveragePooling'), head)


def detector(backbone: LaViT) -> BaseModel:
    need('mmdet')
    import mmdet.models

    models = Path(mmdet.models.__file__).parents[1] / '.mim/configs/_base_/models'
    cfg = Config.fromfile(models / 'retinanet_r50_fpn.py').model
    cfg.backbone = dict(type='LaViT', arch='nano')
    cfg.neck.update(in_channels=list(ARCH['embed_dims']), out_channels=8)
    cfg.bbox_head.update(in_channels=8, feat_channels=8, num_classes=3)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = mmdet.registry.MODELS.build(cfg)
    model.backbone = backbone
    return model


class HeadFirst(nn.Module):
    """A model of somebody's own, that keeps its backbone elsewhere."""

    def __init__(self, backbone: LaViT) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.trunk = nn.Sequential(backbone)


AROUND = [lambda backbone: backbone, Framed, classifier, detector, HeadFirst]


def inside(model: nn.Module) -> LaViT:
    (backbone,) = (module for module in model.modules() if isinstance(module, LaViT))
    return backbone


def saved(model: nn.Module, folder: Path) -> str:
    """A checkpoint file as MMEngine writes it."""
    path = str(folder / 'checkpoint.pth')
    save_checkpoint(dict(meta=dict(epoch=3), state_dict=model.state_dict()), path)
    return path


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_window_weight(name: str) -> bool:
    return name.endswith(('.psi', '.theta'))


# ---- The same model ------------------------------------------------------------------------------


@pytest.mark.parametrize('prefix', ['backbone.', 'backbone'])
@pytest.mark.parametrize('around', [Framed, classifier, detector])
def test_pretrained_loads_every_tensor(tmp_path, log, around, prefix):
    source = around(small_lavit(seed=1))
    init_cfg = dict(type='Pretrained', checkpoint=saved(source, tmp_path), prefix=prefix)
    model = small_lavit(seed=2, init_cfg=init_cfg)
    assert not same(model.state_dict(), source.backbone.state_dict())
    model.init_weights()
    assert same(model.state_dict(), source.backbone.state_dict())
    assert not any('not match' in line or 'LaViT: ' in line for line in log)


@pytest.mark.parametrize('wrapped', [True, False], ids=['state_dict', 'plain'])
def test_pretrained_without_prefix(tmp_path, wrapped):
    source = small_lavit(seed=1)
    weights = source.state_dict()
    torch.save(dict(state_dict=weights) if wrapped else weights, tmp_path / 'lavit.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'lavit.pth'))
    model = small_lavit(seed=2, init_cfg=init_cfg)
    model.init_weights()
    assert same(model.state_dict(), weights)
    x = images(1, 3, 20, 28)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_compute_the_same(duplicate):
    model = small_lavit()
    twin = duplicate(model)
    assert same(twin.state_dict(), model.state_dict())
    x = images(1, 3, 20, 28)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert not {id(tensor) for tensor in twin.parameters()} & {id(p) for p in model.parameters()}


def test_state_dict_round_trip(log):
    model = small_lavit(seed=2)
    source = small_lavit(seed=1)
    assert str(model.load_state_dict(source.state_dict())) == '<All keys matched successfully>'
    assert same(model.state_dict(), source.state_dict())
    assert log == []


# ---- Other windows -------------------------------------------------------------------------------


def load_state_dict(model: nn.Module, source: nn.Module, folder: Path) -> None:
    model.load_state_dict(source.state_dict())


def load_state_dict_not_strict(model: nn.Module, source: nn.Module, folder: Path) -> None:
    model.load_state_dict(source.state_dict(), strict=False)


def load_by_assigning(model: nn.Module, source: nn.Module, folder: Path) -> None:
    model.load_state_dict(source.state_dict(), assign=True)


def load_file(model: nn.Module, source: nn.Module, folder: Path) -> None:
    load_checkpoint(model, saved(source, folder), strict=True)


def load_file_not_strict(model: nn.Module, source: nn.Module, folder: Path) -> None:
    load_checkpoint(model, saved(source, folder), strict=False)


def load_pretrained(model: nn.Module, source: nn.Module, folder: Path) -> None:
    """Into the backbone alone, out of whatever is around the other."""
    (name,) = (name for name, module in source.named_modules() if isinstance(module, LaViT))
    backbone = inside(model)
    backbone.init_cfg = dict(type='Pretrained', checkpoint=saved(source, folder))
    if name:
        backbone.init_cfg['prefix'] = f'{name}.'
    backbone.init_weights()


WAYS = [
    load_state_dict,
    load_state_dict_not_strict,
    load_by_assigning,
    load_file,
    load_file_not_strict,
    load_pretrained,
]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('around', AROUND)
def test_loads_into_other_windows(tmp_path, log, around, way):
    source = around(small_lavit(seed=1))
    model = around(small_lavit(seed=2, window_sizes=OTHER_WINDOWS))
    before = snapshot(source)
    way(model, source, tmp_path)
    assert same(source.state_dict(), before), 'the source must stay as it is'

    old, new = inside(source).state_dict(), inside(model).state_dict()
    assert old.keys() == new.keys()
    for name in old:
        if is_window_weight(name):
            expected = resize_window_weight(old[name], 4)
            torch.testing.assert_close(new[name], expected, rtol=0, atol=0)
        else:
            assert torch.equal(old[name], new[name]), name
    told = [line for line in log if line.startswith('LaViT: ')]
    assert len(told) == 1
    assert [f'8 to 4 in stage {m}' in told[0] for m in (1, 2, 3, 4)] == [True] * 4
    assert not any('not match' in line for line in log)
    assert all(map(torch.isfinite, (m.sum() for m in inside(model)(images(1, 3, 20, 28)))))


def test_a_moving_average_loads_into_other_windows(log):
    """As EMAHook does, under names of its own."""
    source = ExponentialMovingAverage(HeadFirst(small_lavit(seed=1)))
    model = ExponentialMovingAverage(HeadFirst(small_lavit(seed=2, window_sizes=OTHER_WINDOWS)))
    model.load_state_dict(source.state_dict())
    psi = 'stages.0.blocks.1.attn.psi'
    expected = resize_window_weight(inside(source).state_dict()[psi], 4)
    assert torch.equal(inside(model).state_dict()[psi], expected)
    assert len(log) == 1


def test_only_stages_with_other_windows_are_resized(log):
    source, model = small_lavit(seed=1), small_lavit(seed=2, window_sizes=(8, 8, 4, 4))
    model.load_state_dict(source.state_dict())
    for name, weight in model.state_dict().items():
        resized = is_window_weight(name) and name.startswith(('stages.2', 'stages.3'))
        assert resized != (weight.shape == source.state_dict()[name].shape), name
        if not resized:
            assert torch.equal(weight, source.state_dict()[name]), name
    assert len(log) == 1
    assert [f'8 to 4 in stage {m}' in log[0] for m in (1, 2, 3, 4)] == [False, False, True, True]


def test_stages_without_less_attention_have_no_windows_to_tell(log):
    arch = {**ARCH, 'vanilla_depths': (2, 1, 2, 2)}
    source = small_lavit(arch=arch, seed=1)
    small_lavit(arch=arch, window_sizes=OTHER_WINDOWS).load_state_dict(source.state_dict())
    assert [f'stage {m}' in log[0] for m in (1, 2, 3, 4)] == [False, True, True, False]


def test_a_fresh_model_stays_one_that_reuses_its_scores():
    source, model = LaViT(ARCH), small_lavit(window_sizes=(14, 14, 14, 7))
    model.load_state_dict(source.state_dict())
    for name, weight in model.state_dict().items():
        if is_window_weight(name):
            eye = torch.eye(len(weight), dtype=weight.dtype)
            torch.testing.assert_close(weight, eye, rtol=0, atol=1e-6)


def test_the_model_keeps_its_dtype(tmp_path):
    source = small_lavit(seed=1).half()
    model = small_lavit(seed=2, window_sizes=OTHER_WINDOWS).half()
    load_file(model, source, tmp_path)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float16}
    wide = small_lavit(seed=2, window_sizes=OTHER_WINDOWS)
    load_file(wide, source, tmp_path)
    assert {weight.dtype for weight in wide.state_dict().values()} == {torch.float64}


# ---- What resizing does --------------------------------------------------------------------------

SIZES = [(4, 8), (8, 4), (7, 14), (14, 8), (6, 10), (8, 2), (1, 4)]


def hat_filter(source: int, target: int) -> Tensor:
    """Interpolation along one axis (target, source): a hat at the place of each new token.

    As wide as one old token, or as one new token where those are larger; half-token centres.
    """
    scale = source / target
    width = max(scale, 1)
    rows = []
    for i in range(target):
        centre = (i + 0.5) * scale
        hats = [max(0, 1 - abs(j + 0.5 - centre) / width) for j in range(source)]
        rows.append([hat / sum(hats) for hat in hats])
    return torch.tensor(rows, dtype=torch.float64)


def smooth_map(side: int, phase: float = 0.0) -> Tensor:
    """Half a wave over the window, at the centres of its tokens (side**2)."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(place, place, indexing='ij')
    return (torch.cos(math.pi * (y + phase)) + torch.sin(math.pi * (x - phase)) * y).flatten()


def smooth_weight(side: int) -> Tensor:
    """The identity, and an operator whose columns and rows are smooth over the window."""
    rank_one = torch.outer(smooth_map(side), smooth_map(side, 0.3))
    return torch.eye(side**2, dtype=torch.float64) + rank_one / side**2


def resized_by_formula(weight: Tensor, old: int, new: int) -> Tensor:
    to_old, to_new = (torch.kron(hat, hat) for hat in (hat_filter(new, old), hat_filter(old, new)))
    eye_old, eye_new = (torch.eye(side**2, dtype=torch.float64) for side in (old, new))
    return eye_new + to_new @ (weight - eye_old) @ to_old


@pytest.mark.parametrize('old, new', SIZES)
def test_resizing_is_the_formula(old, new):
    weight = torch.randn(old**2, old**2, generator=seeded(0), dtype=torch.float64)
    expected = resized_by_formula(weight, old, new)
    torch.testing.assert_close(resize_window_weight(weight, new), expected)


@torch.no_grad()
@pytest.mark.parametrize('windows', [(4, 4, 4, 4), (14, 14, 14, 7), (8, 8, 4, 4)])
def test_attention_in_other_windows_is_the_references(windows):
    """With Psi and Theta by the formula, and scores far from even in either windows."""
    x = images(2, 3, 70, 90)
    source = sharpen(small_lavit(seed=1), x)
    model = small_lavit(seed=2, window_sizes=windows)
    model.load_state_dict(source.state_dict())
    assert min(spreads(model, x)) > 1
    weights = source.state_dict()
    for name in filter(is_window_weight, weights):
        weights[name] = resized_by_formula(weights[name], 8, windows[int(name.split('.')[1])])
    expected = reference.lavit(x, weights, ARCH['num_heads'], windows)
    for found, right in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize('old, new', SIZES)
def test_the_identity_stays(old, new):
    resized = resize_window_weight(torch.eye(old**2), new)
    assert torch.equal(resized, torch.eye(new**2))


@pytest.mark.parametrize('old, new', SIZES)
def test_what_is_beyond_the_identity_is_resized_linearly(old, new):
    generator = seeded(0)
    eye = torch.eye(old**2, dtype=torch.float64)
    a, b = torch.randn(2, old**2, old**2, generator=generator, dtype=torch.float64)

    def resized(beyond: Tensor) -> Tensor:
        return resize_window_weight(eye + beyond, new) - torch.eye(new**2, dtype=torch.float64)

    torch.testing.assert_close(resized(2 * a - 3 * b), 2 * resized(a) - 3 * resized(b))


@pytest.mark.parametrize('old, new', SIZES)
def test_a_flat_map_is_scaled_alike(old, new):
    """Row sums: what an operator does to the map of ones."""
    weight = torch.rand(old**2, old**2, generator=seeded(0), dtype=torch.float64)
    weight = 1.7 * weight / weight.sum(dim=1, keepdim=True)
    expected = torch.full((new**2,), 1.7, dtype=torch.float64)
    torch.testing.assert_close(resize_window_weight(weight, new).sum(dim=1), expected)


@pytest.mark.parametrize('old, new', [(8, 14), (14, 8), (7, 14), (8, 16), (16, 8)])
def test_a_smooth_map_is_treated_alike(old, new):
    """The same picture at both sizes, through the operator of each, is the same picture."""
    small, large = smooth_weight(old), resize_window_weight(smooth_weight(old), new)
    picture_old, picture_new = smooth_map(old, 0.1), smooth_map(new, 0.1)
    # What the operator adds is one pattern, known in closed form at either size.
    gain = smooth_map(old, 0.3) @ picture_old / old**2
    torch.testing.assert_close(small @ picture_old, picture_old + gain * smooth_map(old))
    assert abs(gain) > 0.1
    added = large @ picture_new - picture_new
    expected = gain * smooth_map(new)
    # Half a wave in eight tokens, to the second order inside and the first at the border.
    assert (added - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize('old, new', [(7, 14), (8, 16), (8, 14)])
def test_up_and_down_again_restores_a_smooth_operator(old, new):
    weight = smooth_weight(old)
    back = resize_window_weight(resize_window_weight(weight, new), old)
    beyond = weight - torch.eye(old**2, dtype=torch.float64)
    assert (back - weight).norm() < 0.15 * beyond.norm()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_resizing_keeps_the_dtype(dtype):
    assert resize_window_weight(torch.eye(16).to(dtype), 2).dtype == dtype


# ---- Other archs ---------------------------------------------------------------------------------

OTHERS = {
    'embed_dims': (16, 32, 48, 80),
    'num_heads': (1, 2, 3, 8),
    'depths': (2, 2, 4, 2),
    'vanilla_depths': (1, 1, 1, 1),
    'mlp_ratios': (2, 2, 2, 3),
}


def assert_refuses(load: Callable[[], object], model: nn.Module, *words: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        load()
    for word in words:
        assert word in str(error.value)
    assert same(model.state_dict(), before), 'a refused checkpoint must change nothing'


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('around', [lambda backbone: backbone, classifier])
def test_refuses_the_weights_of_another_arch(tmp_path, around, way):
    arch = {**ARCH, 'depths': OTHERS['depths']}
    source, model = around(small_lavit(arch=arch, seed=1)), around(small_lavit(seed=2))
    words = ("'custom'", 'depths=(2, 2, 4, 2)', 'depths=(2, 2, 3, 2)')
    assert_refuses(lambda: way(model, source, tmp_path), model, *words)


@pytest.mark.parametrize('field', OTHERS)
@pytest.mark.parametrize('swapped', [False, True])
def test_every_field_of_the_arch_counts(field, swapped):
    archs = [ARCH, {**ARCH, field: OTHERS[field]}]
    source, model = (small_lavit(arch=arch) for arch in (archs[swapped], archs[not swapped]))
    kind = float if field == 'mlp_ratios' else int
    words = [f'{field}={tuple(map(kind, arch[field]))}' for arch in archs]
    assert_refuses(lambda: model.load_state_dict(source.state_dict()), model, *words)


@pytest.mark.parametrize('ours, theirs', [('nano', 'tiny'), ('tiny', 'nano')])
def test_names_the_family(ours, theirs):
    model = LaViT(ours)
    message = f"the checkpoint is a LaViT '{theirs}'", f"the model is a LaViT '{ours}'"
    assert_refuses(lambda: model.load_state_dict(LaViT(theirs).state_dict()), model, *message)


def test_names_the_family_and_what_is_none_of_it():
    model = small_lavit()
    message = "the checkpoint is a LaViT 'nano'", "the model is a LaViT 'custom'"
    assert_refuses(lambda: model.load_state_dict(LaViT('nano').state_dict()), model, *message)


def test_knows_small_from_base_by_a_single_stage():
    model = LaViT('small', out_indices=(0,))
    weights = LaViT('base', out_indices=(0,)).state_dict()
    assert ARCHS['small'].embed_dims == ARCHS['base'].embed_dims
    assert_refuses(lambda: model.load_state_dict(weights), model, "'small'", "'base'")


def test_knows_the_heads_of_a_single_stage():
    """One stage's weights do not show them; the model and the whole checkpoint do."""
    model = small_lavit(out_indices=(0,))
    weights = small_lavit(arch={**ARCH, 'num_heads': (2, 2, 3, 4)}, seed=1).state_dict()
    assert_refuses(
        lambda: model.load_state_dict(weights, strict=False), model, '(1,', '(2, 2, 3, 4)'
    )


@pytest.mark.parametrize('around', [lambda backbone: backbone, Framed, classifier])
def test_knows_another_arch_without_its_patch_embedding(around):
    arch = {**ARCH, 'embed_dims': (16, 32, 48, 80)}
    source, model = around(small_lavit(arch=arch, seed=1)), around(small_lavit(seed=2))
    weights = {k: v for k, v in source.state_dict().items() if 'patch_embed' not in k}
    message = '48, 80)', '48, 64)'
    assert_refuses(lambda: model.load_state_dict(weights, strict=False), model, *message)


@pytest.mark.parametrize('way', WAYS)
def test_refuses_a_checkpoint_with_fewer_stages(tmp_path, way):
    source, model = small_lavit(out_indices=(0, 1)), small_lavit(seed=2)
    message = '2 stage(s)', 'the model has 4', 'out_indices'
    assert_refuses(lambda: way(model, source, tmp_path), model, *message)


@pytest.mark.parametrize('way', [load_state_dict_not_strict, load_file_not_strict, load_pretrained])
def test_a_checkpoint_may_have_more_stages(tmp_path, way):
    source = small_lavit(seed=1)
    model = small_lavit(seed=2, out_indices=(0, 1), window_sizes=(8, 8, 4, 4))
    way(model, source, tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name]), name


def test_strict_loading_of_more_stages_is_as_strict_as_ever():
    with pytest.raises(RuntimeError, match=r'Unexpected key.*stages\.2\.downsample'):
        small_lavit(out_indices=(0, 1)).load_state_dict(small_lavit().state_dict())


# ---- Another stem, another downsampling ----------------------------------------------------------


@pytest.mark.parametrize('option', ['conv_stem', 'overlap_downsample', 'mix_ffn'])
@pytest.mark.parametrize('ours', [False, True])
@pytest.mark.parametrize('way', WAYS)
def test_refuses_the_weights_of_another_option_and_names_it(tmp_path, way, ours, option):
    """The way out that the message shows is one."""
    source = Framed(small_lavit(seed=1, **{option: not ours}))
    model = Framed(small_lavit(seed=2, **{option: ours}))
    words = f'saved with {option}={not ours}', f'give the model {option}={not ours}'
    assert_refuses(lambda: way(model, source, tmp_path), model, *words)
    model = Framed(small_lavit(seed=2, **{option: not ours}))
    way(model, source, tmp_path)
    assert same(model.backbone.state_dict(), source.backbone.state_dict())


@pytest.mark.parametrize('stem', [False, True])
def test_weights_of_nano_before_its_options_load_with_what_the_error_names(stem):
    """The oldest have the keys and shapes of a family member without options, later ones a stem."""
    old = LaViT('nano', conv_stem=stem, mix_ffn=False).state_dict()
    assert ('patch_embed.proj.weight' in old) is not stem
    assert not any('dwconv' in name for name in old if '.mlp.' in name)
    new = LaViT('nano')
    if not stem:
        assert_refuses(lambda: new.load_state_dict(old), new, 'conv_stem=False', 'nano')
        new = LaViT('nano', conv_stem=False)
    assert_refuses(lambda: new.load_state_dict(old), new, 'mix_ffn=False', 'nano')
    model = LaViT('nano', conv_stem=stem, mix_ffn=False)
    model.load_state_dict(old)
    assert same(model.state_dict(), old)


@pytest.mark.parametrize('out_indices', [(0,), (0, 1)])
def test_knows_the_options_of_a_few_stages(out_indices):
    source = small_lavit(seed=1, out_indices=out_indices, conv_stem=True, overlap_downsample=True)
    model = small_lavit(seed=2, out_indices=out_indices, conv_stem=True)
    if out_indices == (0,):
        # Nothing comes down, so nothing differs.
        model.load_state_dict(source.state_dict())
        return
    words = 'overlap_downsample=True', 'overlap_downsample=False'
    assert_refuses(lambda: model.load_state_dict(source.state_dict()), model, *words)


# ---- What is no LaViT ----------------------------------------------------------------------------


@pytest.mark.parametrize('around', [Framed, classifier, HeadFirst])
@pytest.mark.parametrize('way', [load_state_dict_not_strict, load_file_not_strict])
def test_asks_for_a_prefix(tmp_path, around, way):
    model = small_lavit(seed=2)
    source = around(small_lavit(seed=1))
    hint = "init_cfg a prefix such as 'backbone.'"
    assert_refuses(lambda: way(model, source, tmp_path), model, hint)


@pytest.mark.parametrize('strict', [True, False])
def test_says_that_another_kind_of_backbone_is_none(strict):
    """timm's Swin and ViT, too, have a patch_embed.proj.weight."""
    model = small_lavit()
    weights = {
        'patch_embed.proj.weight': torch.zeros(16, 3, 4, 4),
        'patch_embed.proj.bias': torch.zeros(16),
        'layers.0.blocks.0.attn.qkv.weight': torch.zeros(48, 16),
    }
    assert_refuses(lambda: model.load_state_dict(weights, strict=strict), model, 'no LaViT weights')


@pytest.mark.parametrize(
    'lost',
    [
        'patch_embed.proj.weight',
        'patch_embed.conv1.proj.weight',
        'patch_embed.conv2.norm.bias',
        'stages.1.blocks.0.norm1.weight',
        'stages.1.downsample.proj.weight',
        'stages.1.attention_residual.pwconv.weight',
    ],
)
@pytest.mark.parametrize('around', [lambda backbone: backbone, HeadFirst])
def test_lost_weights_are_missing_keys(around, lost):
    """As PyTorch and MMEngine name them in any other model."""
    options = dict(conv_stem='conv' in lost.split('.')[1])
    source, model = (around(small_lavit(seed=seed, **options)) for seed in (1, 2))
    weights = {name: v for name, v in source.state_dict().items() if not name.endswith(lost)}
    with pytest.raises(RuntimeError, match=rf'Missing key.*{lost}'):
        model.load_state_dict(weights)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert [name.endswith(lost) for name in missing] == [True] and not unexpected


# ---- Parts, and what others have wrapped ---------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank change beside it (LoRA)."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_a = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def adapt(model: LaViT) -> LaViT:
    for stage in model.stages:
        for block in stage.blocks:
            block.mlp.fc1 = Adapted(block.mlp.fc1)
            name = 'qkv' if hasattr(block.attn, 'qkv') else 'v'
            setattr(block.attn, name, Adapted(getattr(block.attn, name)))
    return model


def normalize(model: LaViT) -> LaViT:
    for stage in model.stages:
        nn.utils.parametrizations.weight_norm(stage.blocks[0].mlp.fc1)
        nn.utils.parametrizations.weight_norm(stage.blocks[-1].attn.proj)
    return model


def prune(model: LaViT) -> LaViT:
    for stage in model.stages:
        pruning.random_unstructured(stage.blocks[0].attn.qkv, 'weight', 0.5)
        pruning.random_unstructured(stage.blocks[-1].mlp.fc1, 'weight', 0.5)
    return model


def compile_a_block(model: LaViT) -> LaViT:
    for stage in model.stages:
        stage.blocks[-1] = torch.compile(stage.blocks[-1])
    return model


@pytest.mark.parametrize('wrap', [adapt, normalize, prune, compile_a_block])
@pytest.mark.parametrize('way', WAYS)
def test_a_wrapped_model_makes_the_round_trip(tmp_path, wrap, way):
    if way is load_pretrained and wrap is compile_a_block:
        pytest.skip('MMEngine initializes before anybody wraps')
    source, model = wrap(small_lavit(seed=1)), wrap(small_lavit(seed=2))
    way(model, source, tmp_path)
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize('wrap', [adapt, normalize, prune, compile_a_block])
def test_a_wrapped_model_of_another_arch_is_refused(wrap):
    other = {**ARCH, 'depths': OTHERS['depths']}
    source, model = wrap(small_lavit(arch=other)), wrap(small_lavit())
    words = 'depths=(2, 2, 4, 2)', 'depths=(2, 2, 3, 2)'
    assert_refuses(lambda: model.load_state_dict(source.state_dict()), model, *words)


PARTS = ['patch_embed', 'stages.1', 'stages.2.blocks.1', 'stages.3.attention_residual', 'norm2']


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('way', [load_state_dict_not_strict, load_file_not_strict])
def test_any_part_loads_alone(tmp_path, part, way):
    source, model = small_lavit(seed=1), small_lavit(seed=2)
    before = snapshot(model)
    weights = {k: v for k, v in source.state_dict().items() if k.startswith(f'{part}.')}

    class Part(nn.Module):
        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
            return dict(weights)

    way(model, Part(), tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights.get(name, before[name])), name


def test_adapters_load_alone():
    source, model = adapt(small_lavit(seed=1)), adapt(small_lavit(seed=2))
    before = snapshot(model)
    adapters = {k: v for k, v in source.state_dict().items() if 'lora_' in k}
    missing, unexpected = model.load_state_dict(adapters, strict=False)
    assert not unexpected and len(missing) == len(before) - len(adapters)
    assert same(model.state_dict(), {**before, **adapters})


def test_a_model_around_may_load_its_head_alone():
    model = HeadFirst(small_lavit())
    before = snapshot(inside(model))
    model.load_state_dict({'head.weight': torch.ones(2, 2)}, strict=False)
    assert model.head.weight.eq(1).all()
    assert same(inside(model).state_dict(), before)
