# RetinaNet on BCCD, blood cells (tools/dataset_converters/bccd.py), at 480 x 360: small enough for
# two CPU cores. Many red cells have no box, so look at the precision of each class.
_base_ = './retinanet_lavit_n_shapes.py'

model = dict(
    backbone=dict(window_sizes=(8, 8, 8, 8), drop_path_rate=0.05),
    # From 24 to 152 pixels: nine of ten platelets and white cells are in between.
    bbox_head=dict(num_classes=3, anchor_generator=dict(octave_base_scale=3)),
)

cells = dict(
    data_root='data/bccd/',
    data_prefix=dict(img='images/'),
    metainfo=dict(classes=('RBC', 'WBC', 'Platelets')),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        ann_file='annotations/train.json',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='RandomResize', scale=(480, 360), ratio_range=(0.8, 1.25), keep_ratio=True),
            dict(
                type='RandomFlip',
                prob=[0.25, 0.25, 0.25],
                direction=['horizontal', 'vertical', 'diagonal'],
            ),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs'),
        ],
        **cells,
    ),
)
whole = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
val_dataloader = dict(
    batch_size=4, dataset=dict(ann_file='annotations/val.json', pipeline=whole, **cells)
)
test_dataloader = dict(
    batch_size=4, dataset=dict(ann_file='annotations/test.json', pipeline=whole, **cells)
)
val_evaluator = dict(ann_file='data/bccd/annotations/val.json', classwise=True)
test_evaluator = dict(ann_file='data/bccd/annotations/test.json', classwise=True)

# AP50 in validation after a quarter of the schedule: 82.5, and 68.1 at 0.001.
optim_wrapper = dict(optimizer=dict(lr=0.0005))
train_cfg = dict(max_epochs=30, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=30, eta_min=1e-5, convert_to_iter_based=True
    ),
]
