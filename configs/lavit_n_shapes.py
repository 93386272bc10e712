# Classification by the largest shape in the image (tools/make_shapes.py), small enough for a CPU.
_base_ = './lavit_s_imagenet.py'

model = dict(
    # These windows divide the maps of a 96 x 96 image, so nothing is spent on padding.
    backbone=dict(arch='nano', window_sizes=(8, 12, 6, 3), drop_path_rate=0.0),
    head=dict(num_classes=3, in_channels=320, topk=(1,)),
    train_cfg=dict(_delete_=True),
)
data_preprocessor = dict(num_classes=3)

shapes = dict(_delete_=True, type='CustomDataset', data_root='data/shapes/imagenet')
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(
        data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=96, padding=4, padding_mode='reflect'),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            # Colours tell nothing of a shape.
            dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
            dict(type='PackInputs'),
        ],
        **shapes,
    ),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=2,
    dataset=dict(
        data_prefix='val',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        **shapes,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_epochs=20, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=20, eta_min=1e-5, convert_to_iter_based=True
    ),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(max_keep_ckpts=2, save_best='accuracy/top1'),
)
randomness = dict(seed=0)
