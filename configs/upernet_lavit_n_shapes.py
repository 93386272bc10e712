# UPerNet on the shapes data (tools/make_shapes.py), small enough for two CPU cores.
_base_ = './upernet_lavit_s_ade20k.py'

# SyncBN, which the bases have, does not train on a CPU.
norm_cfg = dict(type='BN', requires_grad=True)
data_preprocessor = dict(size=(96, 96))
# Most pixels are background, which is easy; telling the shapes apart is what takes time.
class_weight = [0.3, 1.0, 1.0, 1.0]
model = dict(
    data_preprocessor=data_preprocessor,
    # These windows divide the maps of a 96 x 96 image, so nothing is spent on padding.
    backbone=dict(arch='nano', window_sizes=(8, 12, 6, 3), drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[32, 64, 160, 320],
        channels=64,
        num_classes=4,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=160,
        channels=32,
        num_classes=4,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)

shapes = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root='data/shapes/ade',
    metainfo=dict(
        classes=('background', 'circle', 'square', 'triangle'),
        palette=[[120, 120, 120], [230, 60, 60], [60, 170, 60], [60, 90, 230]],
    ),
    reduce_zero_label=True,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', reduce_zero_label=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs'),
        ],
        **shapes,
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=2,
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', reduce_zero_label=True),
            dict(type='PackSegInputs'),
        ],
        **shapes,
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=1250, val_interval=250)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, by_epoch=False, begin=100, end=1250),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=250, max_keep_ckpts=2, save_best='mIoU'),
)
randomness = dict(seed=0)
