# The first 20 classes of Tiny ImageNet (tools/dataset_converters/tinyimagenet.py), photographs of
# 64 x 64, for two CPU cores: 64 images a step. Mixup and CutMix are those of the ImageNet recipe.
_base_ = './lavit_s_imagenet.py'

model = dict(
    # These windows divide the maps of a 64 x 64 image, so nothing is spent on padding.
    backbone=dict(arch='nano', window_sizes=(8, 8, 4, 2), drop_path_rate=0.05),
    head=dict(num_classes=20, in_channels=320),
)
data_preprocessor = dict(num_classes=20)

photographs = dict(
    _delete_=True,
    type='CustomDataset',
    data_root='data/tinyimagenet',
    classes='data/tinyimagenet/classes.txt',
)
train_dataloader = dict(
    num_workers=2,
    dataset=dict(
        data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=64, padding=6, padding_mode='reflect'),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
        **photographs,
    ),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=2,
    dataset=dict(
        data_prefix='val',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        **photographs,
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=20, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=2),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(max_keep_ckpts=2, save_best='accuracy/top1'),
)
randomness = dict(seed=0)
