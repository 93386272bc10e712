"""Learning rates and weight decay of the parameters of a model with a LaViT."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..models.lavit import LaViT
from .lavits import lavits, required_lavits

# What has no weight decay in a LaViT, beside its norms.
_FREE = {'psi', 'theta', 'layer_scale', 'bias'}

# What paramwise_cfg may hold: MMEngine's own keys, and ours.
_MULTIPLIERS = {
    *('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult'),
    *('flat_decay_mult', 'dcn_offset_lr_mult'),
}
_KEYS = {'layer_decay_rate', 'custom_keys', 'bypass_duplicate', *_MULTIPLIERS}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LaViTOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Weight decay, and learning rates by depth, of the LaViTs in any model.

    In place of MMEngine's DefaultOptimWrapperConstructor, in a config of any toolbox::

        optim_wrapper = dict(
            constructor='LaViTOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay_rate=0.8, custom_keys={'backbone': dict(lr_mult=0.1)}),
        )

    What is outside a LaViT gets what MMEngine gives it. In a LaViT, too, MMEngine's options mean
    what they mean elsewhere, with two additions.

    **No weight decay** on ``Psi``, ``Theta``, LayerScale, norms and biases, unless an option says
    otherwise that is about them: ``norm_decay_mult``, ``bias_decay_mult``, ``dwconv_decay_mult``,
    ``flat_decay_mult``, or a custom key that names them with a ``decay_mult`` of its own, as
    ``{'psi': dict(decay_mult=1)}``. MMEngine lets the longest custom key decide alone. For these
    parameters two kinds of keys are told apart, and the longest of each counts:

    - A key that is found in the name of what is around the parameter (``'backbone'``,
      ``'stages.2'``, ``'attn.'``) is about a module. Its ``lr_mult`` reaches these parameters like
      all others below it. Its ``decay_mult`` scales what decay there is, and here there is none.
    - Any other key names the parameter itself or, for weight and bias of a norm, the norm
      (``'psi'``, ``'attn.theta'``, ``'norm1'``, ``'bias'``). What it sets holds; where it has no
      ``lr_mult``, that of the first kind does.

    **Layer-wise learning rates**, of ELECTRA (https://arxiv.org/abs/2003.10555) and, for images,
    BEiT (https://arxiv.org/abs/2106.08254): ``layer_decay_rate`` multiplies the learning rate that
    a parameter has by all the rest with ``layer_decay_rate ** (layers - 1 - depth)``, as
    :meth:`mmlavit.models.lavit.LaViT.get_layer_depth` counts. The patch embedding learns slowest;
    the output norms, and all that is outside a LaViT, at the full rate.

    Each parameter has a group of its own, in MMEngine's order, so a training that began with
    MMEngine's constructor and any ``paramwise_cfg`` can be resumed with this one. It keeps the
    rates and decays of its checkpoint, as ever in PyTorch.

    FSDP needs ``use_orig_params=True``: parameters that it has flattened are one.

    Args:
        optim_wrapper_cfg: As in MMEngine: the config of the wrapper, with its ``optimizer``.
        paramwise_cfg: As in MMEngine, and ``layer_decay_rate``, above 0 and at most 1. Defaults to
            None, as is ``layer_decay_rate=1.0``.

    Raises:
        TypeError: If ``layer_decay_rate``, a multiplier or a custom key is of the wrong type.
        ValueError: If one is out of its range, or if ``paramwise_cfg`` has a key that means nothing
            here; or if there is a ``layer_decay_rate`` and the optimizer has no ``lr``, or, when it
            is built, the model has another backbone or flattened parameters.
    """

    paramwise_cfg: dict

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.layer_decay_rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        # Where it is empty, MMEngine puts all parameters into one group.
        self.paramwise_cfg = {'layer_decay_rate': 1.0, **self.paramwise_cfg}

    def _validate_cfg(self) -> None:
        if isinstance(self.paramwise_cfg, Mapping):
            self._check_own_cfg()
        super()._validate_cfg()

    def _check_own_cfg(self) -> None:
        cfg = self.paramwise_cfg
        for key in cfg:
            if key not in _KEYS:
                raise ValueError(
                    f'paramwise_cfg: {key!r} means nothing to {type(self).__name__}; it takes '
                    f'{", ".join(sorted(_KEYS))}. What a base config brings goes with '
                    'paramwise_cfg=dict(_delete_=True, ...)'
                )
            if key in _MULTIPLIERS and cfg[key] is not None:
                _check_multiplier(key, cfg[key])
        rate = cfg.get('layer_decay_rate', 1.0)
        if not _is_number(rate):
            raise TypeError(f'layer_decay_rate must be a number, got {rate!r}')
        if not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate must be above 0 and at most 1, got {rate}')
        if rate != 1 and self.base_lr is None:
            raise ValueError(
                f'layer_decay_rate={rate} needs the lr of the optimizer, as in '
                "optimizer=dict(type='AdamW', lr=1e-4)"
            )
        custom = cfg.get('custom_keys', {})
        for key, settings in custom.items() if isinstance(custom, Mapping) else ():
            if not isinstance(settings, Mapping):
                raise TypeError(
                    f'custom_keys[{key!r}] must be a dict, as dict(lr_mult=0.1), got {settings!r}'
                )
            for name in ('lr_mult', 'decay_mult'):
                _check_multiplier(f'custom_keys[{key!r}].{name}', settings.get(name, 1.0))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper.

        Args:
            model: Any model, in DistributedDataParallel or not.

        Returns:
            The wrapper.
        """
        flat = any(name.endswith('_flat_param') for name, _ in model.named_parameters())
        if self.layer_decay_rate != 1:
            asked = f'layer_decay_rate={self.layer_decay_rate}'
            required_lavits(model, asked, 'remove it')
            if flat:
                raise ValueError(f'{asked} needs use_orig_params=True in the model_wrapper of FSDP')
        elif flat and lavits(model):
            print_log(
                'FSDP has flattened parameters, so norms, biases, LayerScale, Psi and Theta have '
                'the weight decay of the others; use_orig_params=True in its model_wrapper keeps '
                'them apart.',
                logger='current',
                level=logging.WARNING,
            )
        return super().__call__(model)

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Add the groups of a module and of all modules in it.

        Args:
            params: The groups so far, to which these are added in place.
            module: The module.
            prefix: Its name in the model.
            is_dcn_module: Whether it is within a deformable convolution.
        """
        if not isinstance(module, LaViT):
            super().add_params(params, module, prefix, is_dcn_module)
            return
        owners = {
            parameter: (owner, path, own)
            for path, owner in module.named_modules()
            for own, parameter in owner.named_parameters(recurse=False)
        }

        def finish(group: dict) -> None:
            owner, path, own = owners[group['params'][0]]
            is_norm = isinstance(owner, nn.LayerNorm)
            if is_norm or own in _FREE:
                full = f'{prefix}.{path}' if prefix else path
                around = full.rpartition('.')[0] if is_norm else full
                self._finish_free(group, owner, own, f'{full}.{own}', f'{around}.')
            if self.layer_decay_rate != 1:
                depth, layers = module.get_layer_depth(f'{path}.{own}')
                factor = self.layer_decay_rate ** (layers - 1 - depth)
                group['lr'] = group.get('lr', self.base_lr) * factor

        groups = _Groups(params, finish)
        super().add_params(groups, module, prefix, is_dcn_module)
        params[:] = groups

    def _finish_free(self, group: dict, owner: nn.Module, own: str, name: str, around: str) -> None:
        """Set right what MMEngine gave to a parameter that by itself has no weight decay.

        Args:
            group: Its group.
            owner: The module that has it.
            own: Its name there.
            name: Its name in the model.
            around: The part of that name which says where it is, and not what it is.
        """
        custom = self.paramwise_cfg.get('custom_keys', {})
        # The longest first, as in MMEngine.
        keys = sorted(sorted(key for key in custom if key in name), key=len, reverse=True)
        above: dict = next((custom[key] for key in keys if key in around), {})
        naming: dict = next((custom[key] for key in keys if key not in around), {})
        settings = {k: v for k, v in above.items() if k not in ('decay_mult', 'weight_decay')}
        settings.update(naming)
        if keys:
            group['lr'] = self.base_lr * settings.get('lr_mult', 1.0)
        decay_mult = naming.get('decay_mult', self._decay_mult(owner, own))
        group.pop('decay_mult', None)
        group['weight_decay'] = (self.base_wd or 0.0) * decay_mult
        # MMEngine hands over whatever else a key sets.
        group.update(settings)

    def _decay_mult(self, owner: nn.Module, own: str) -> float:
        """What MMEngine's rules say of a parameter, and 0 where they say nothing."""
        rules = {
            'norm_decay_mult': isinstance(owner, nn.LayerNorm),
            'bias_decay_mult': own == 'bias',
            'dwconv_decay_mult': isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups,
            'flat_decay_mult': owner.get_parameter(own).ndim == 1,
        }
        said = [self.paramwise_cfg.get(rule) for rule, applies in rules.items() if applies]
        return next((mult for mult in said if mult is not None), 0.0)


class _Groups(list):
    """Groups that are finished as they are appended, before MMEngine writes them into the log."""

    def __init__(self, groups: Iterable[dict], finish: Callable[[dict], None]) -> None:
        super().__init__(groups)
        self._finish = finish

    def append(self, group: dict) -> None:
        self._finish(group)
        super().append(group)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_multiplier(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not 0 <= value < math.inf:
        raise ValueError(f'{name} must be finite and at least 0, got {value}')
