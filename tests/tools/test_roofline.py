"""The counter against counts by hand, autocast against CUDA's, and the page against the command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmlavit import LaViT
from mmlavit.models.windows import WindowGrid
from mmlavit.ops.fused_attention import fused_less_attention
from mmlavit.ops.plain_less_attention import plain_less_attention

if not hasattr(torch.library, 'custom_op'):
    pytest.skip(
        'the operators and counts that it needs came with torch 2.4', allow_module_level=True
    )

from repository.benchmark.workload import Task
from repository.roofline import forecast
from repository.roofline.counter import Launch, OperatorCounter
from repository.roofline.forecast import GPU, GPUS, LAUNCH, count, fill_in, row, tables
from repository.roofline.gpu import (
    cuda_rules,
    less_attention_backward_flops,
    less_attention_flops,
    without_values,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs' / 'gpu_forecast.md').read_text(encoding='utf-8')
SMALL = Task('inference', (2, 3, 40, 72))


def counted(function, *args: object) -> list[tuple[str, int, int, int]]:
    """Name, numbers read, numbers written and operations of each launch, all in float32."""
    with OperatorCounter() as counter, torch.no_grad():
        function(*args)
    return [
        (x.name.partition('.')[2], x.read // 4, x.written // 4, x.flops) for x in counter.launches
    ]


class TestCounter:
    def test_linear(self):
        x, weight, bias = torch.ones(5, 8), torch.ones(3, 8), torch.ones(3)
        assert counted(F.linear, x, weight, bias) == [
            ('addmm', 5 * 8 + 3 * 8 + 3, 5 * 3, 2 * 5 * 3 * 8)
        ]

    def test_layer_norm(self):
        """Mean and deviation of each token are written, too."""
        x, weight, bias = torch.ones(6, 16), torch.ones(16), torch.ones(16)
        assert counted(F.layer_norm, x, (16,), weight, bias) == [
            ('native_layer_norm', 6 * 16 + 2 * 16, 6 * 16 + 2 * 6, 0)
        ]

    def test_views_are_free(self):
        x = torch.ones(4, 6)

        def look() -> None:
            x.view(6, 4).t().unsqueeze(0).expand(5, 4, 6)
            x[1:, ::2].detach().unbind(1)
            x.split(2)
            x.reshape(24).contiguous()
            torch.ops.aten._unsafe_view(x, [24])
            torch.empty(7)
            torch.empty_like(x)

        assert counted(look) == []

    def test_questions_are_free(self):
        x = torch.ones(4, 6)
        assert counted(lambda: (x.device, x[0, 0].item())) == []

    def test_in_place(self):
        x, y = torch.ones(4, 6), torch.ones(6)
        assert counted(x.add_, y) == [('add_', 4 * 6 + 6, 4 * 6, 0)]
        assert counted(x[1:, :2].mul_, 2) == [('mul_', 3 * 2, 3 * 2, 0)]

    def test_what_is_overwritten_is_not_read(self):
        x, y = torch.ones(4, 6), torch.ones(6)
        assert counted(x.copy_, y) == [('copy_', 6, 4 * 6, 0)]
        assert counted(x.zero_) == [('zero_', 0, 4 * 6, 0)]
        assert counted(torch.zeros_like, x) == [('zeros_like', 0, 4 * 6, 0)]

    def test_what_is_repeated_is_read_once(self):
        x, y = torch.ones(4, 6), torch.ones(6).expand(4, 6)
        assert counted(torch.add, x, y) == [('add', 4 * 6 + 6, 4 * 6, 0)]
        assert counted(torch.mul, x, x) == [('mul', 4 * 6, 4 * 6, 0)]

    def test_a_copy_is_one(self):
        x = torch.ones(4, 6)
        assert counted(lambda: x.t().contiguous()) == [('clone', 24, 24, 0)]
        assert counted(lambda: x.float()) == []

    @pytest.mark.parametrize('groups', [1, 6])
    def test_convolution_and_its_gradients(self, groups):
        """Each gradient takes as many operations as the convolution."""
        x = torch.ones(2, 6, 5, 5, requires_grad=True)
        conv = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False)
        with OperatorCounter() as counter:
            conv(x).sum().backward()
        once = 2 * (2 * 6 * 5 * 5) * (6 // groups * 3 * 3)
        flops = {x.name: x.flops for x in counter.launches if x.flops}
        assert flops == {'aten.convolution': once, 'aten.convolution_backward': 2 * once}

    def test_bytes_depend_on_the_type(self):
        with OperatorCounter() as counter:
            torch.ones(4, 6).half()
        assert counter.launches[-1] == Launch('aten._to_copy', 4 * 4 * 6, 2 * 4 * 6)


class Pieces(nn.Module):
    """What autocast has rules for, as the models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        attn = torch.baddbmm(x.new_zeros(()), x, x.transpose(1, 2), beta=0).softmax(-1)
        attn = attn.masked_fill(attn > 0, 1.0) + attn
        return x + self.out(F.gelu(self.fc(torch.bmm(attn, x)) * 2)).relu()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_that_of_cuda(dtype):
    """PyTorch runs its own rules on tensors that say they are on a GPU, without gradients."""
    with FakeTensorMode(), torch.no_grad():
        model = Pieces().eval()
        for module in model.modules():
            for name, p in [*module._parameters.items()]:
                if p is not None:
                    gpu = torch.empty(p.shape, device='cuda')
                    module._parameters[name] = nn.Parameter(gpu, requires_grad=False)
        was = torch.get_autocast_dtype('cuda')
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', dtype)
        try:
            with OperatorCounter() as expected:
                model(torch.empty(2, 3, 16, 16, device='cuda'))
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.set_autocast_dtype('cuda', was)
            torch.clear_autocast_cache()
    model = Pieces().eval()
    with cuda_rules(), without_values(model), torch.no_grad(), torch.autocast('cpu', dtype):
        images = torch.empty(2, 3, 16, 16)
        with OperatorCounter() as found:
            model(images)
    assert len(expected.launches) > 15
    assert found.launches == expected.launches


def test_the_rules_are_gone_afterwards():
    def softmax() -> torch.dtype:
        with torch.autocast('cpu', torch.bfloat16):
            return torch.ones(2, 2, dtype=torch.bfloat16).softmax(-1).dtype

    before = softmax()
    with cuda_rules():
        assert softmax() == torch.float32
    assert softmax() == before


class TestTheKernel:
    GRID = WindowGrid(8, 16, 4)

    def given(self) -> list[Tensor]:
        shapes = (3, 8, 16, 10), (3 * 8, 2, 16, 16), (16, 16), (16, 16)
        return [torch.ones(shape, device='meta', requires_grad=True) for shape in shapes]

    def test_forward_and_backward(self):
        given = self.given()
        formulas = {
            'mmlavit.less_attention': less_attention_flops,
            'mmlavit.less_attention_backward': less_attention_backward_flops,
        }
        with OperatorCounter(formulas) as counter:
            out, scores = fused_less_attention(*given, self.GRID)
            # A sum's gradient would be one number, repeated.
            torch.autograd.backward((out, scores), (out.clone(), scores.clone()))
        found = {x.name: x for x in counter.launches if x.name.startswith('mmlavit')}
        assert len(found) == 2
        sizes = [4 * t.numel() for t in given]
        forward, backward = found.values()
        assert (forward.read, forward.written) == (sum(sizes), sum(sizes[:2]))
        assert (backward.read, backward.written) == (sum(sizes) + sum(sizes[:2]), sum(sizes))
        with FlopCounterMode(display=False) as flops:
            plain = plain_less_attention(*self.given(), self.GRID, lambda x: x)
        assert forward.flops == flops.get_total_flops()
        # Two for each product, and the scores once more: their two products.
        with FlopCounterMode(display=False) as flops:
            (plain[0].sum() + plain[1].sum()).backward()
        again = 2 * 2 * given[1].numel() * 16
        assert backward.flops == flops.get_total_flops() + again

    def test_in_a_model_it_saves_kernels_and_bytes_and_no_products(self):
        def build(task: Task) -> LaViT:
            return LaViT('nano')

        for task in (SMALL, Task('training', SMALL.shape)):
            plain, fused = (row(count(build, task, torch.float16, k), 2) for k in (False, True))
            assert fused.kernels < plain.kernels
            assert fused.read < plain.read and fused.written < plain.written
            assert all(a < b for a, b in zip(fused.seconds, plain.seconds, strict=True))
            assert (fused.flops == plain.flops) == (task is SMALL)


def test_the_least_time_of_an_operator():
    gpu = GPU('a', bandwidth=10, flops=100)
    assert gpu.seconds(Launch('copy', 30, 20)) == 5
    assert gpu.seconds(Launch('product', 30, 20, 400, torch.float16)) == 5
    assert gpu.seconds(Launch('product', 30, 20, 800, torch.float16)) == 8
    with pytest.raises(ValueError, match='product is a product of torch.float32'):
        gpu.seconds(Launch('product', 30, 20, 800, torch.float32))


def test_a_row_is_a_sum_over_its_images():
    found = row([Launch('a', 30, 20), Launch('b', 10, 20, 8, torch.float16)], 2)
    assert (found.read, found.written, found.flops, found.kernels) == (20, 20, 4, 1)
    assert found.seconds == tuple(pytest.approx(40 / gpu.bandwidth) for gpu in GPUS)
    assert found.launches == LAUNCH


def test_a_model_without_values_keeps_what_trains():
    model = LaViT('nano', frozen_stages=1)
    trains = [p.requires_grad for p in model.parameters()]
    with without_values(model):
        assert [p.requires_grad for p in model.parameters()] == trains
        assert [m.shape for m in model(torch.empty(1, 3, 32, 32))][0] == (1, 32, 8, 8)


def test_tables_go_between_the_lines():
    page = 'a\n<!-- forecast -->\nold\n<!-- end of forecast -->\nb\n'
    filled = fill_in(page, 'new\n')
    assert filled == 'a\n<!-- forecast -->\n\nnew\n\n<!-- end of forecast -->\nb\n'
    assert fill_in(filled, 'new') == filled
    with pytest.raises(ValueError, match='end of forecast'):
        fill_in('a\n<!-- forecast -->\n', 'new')


@pytest.mark.parametrize('name', ['LaViT-S', 'ResNet-50'])
def test_a_line_of_the_page(name):
    lines = list(tables([Task('inference', (1, 3, 224, 224))], [name]))
    at = PAGE.splitlines().index(lines[0])
    assert all(line in PAGE.splitlines()[at:] for line in lines)


@pytest.mark.slow
def test_the_page_has_what_the_command_prints():
    ran = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'roofline.py'], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert fill_in(PAGE, ran.stdout) == PAGE
    assert all(f'| {name} |' in ran.stdout for name in forecast.MODELS)
