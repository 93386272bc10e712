# Mask R-CNN on the shapes data (tools/make_shapes.py), small enough for two CPU cores.
_base_ = './maskrcnn_lavit_s_coco.py'

norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    # These windows divide the maps of a 96 x 96 image, so nothing is spent on padding.
    backbone=dict(arch='nano', window_sizes=(8, 12, 6, 3), drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 160, 320], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[5], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=64, fc_out_channels=512, num_classes=3),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(in_channels=64, conv_out_channels=32, num_classes=3, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)

shapes = dict(
    data_root='data/shapes/coco/', metainfo=dict(classes=('circle', 'square', 'triangle'))
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=(96, 96), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
        **shapes,
    ),
)
val_dataloader = dict(
    batch_size=10,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(96, 96), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
            ),
        ],
        **shapes,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/shapes/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=3, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=3, eta_min=1e-5, convert_to_iter_based=True
    ),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(max_keep_ckpts=2, save_best='coco/segm_mAP'),
)
randomness = dict(seed=0)
