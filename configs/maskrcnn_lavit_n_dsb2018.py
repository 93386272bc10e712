# Mask R-CNN on nuclei, of the 2018 Data Science Bowl (tools/dataset_converters/dsb2018.py), small
# enough for two CPU cores. Nuclei are from 5 to 70 pixels wide, most of them small in small images:
# images are brought to a short side of 512 in testing, and near it in training.
_base_ = './maskrcnn_lavit_n_shapes.py'

model = dict(
    backbone=dict(window_sizes=(8, 8, 8, 8), drop_path_rate=0.05),
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=256)),
        rpn_proposal=dict(nms_pre=1000, max_per_img=500),
        rcnn=dict(sampler=dict(num=128)),
    ),
    # There are up to 375 nuclei in one image.
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=1500), rcnn=dict(max_per_img=500)),
)

nuclei = dict(data_root='data/dsb2018/', metainfo=dict(classes=('nucleus',)))
train_dataloader = dict(
    dataset=dict(
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/train/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='RandomResize', scale=(1024, 512), ratio_range=(0.67, 1.33), keep_ratio=True),
            dict(type='RandomCrop', crop_size=(256, 256), recompute_bbox=True),
            # Of nuclei whose box, but no pixel, is in the crop: their box is empty, their loss NaN.
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
            dict(
                type='RandomFlip',
                prob=[0.25, 0.25, 0.25],
                direction=['horizontal', 'vertical', 'diagonal'],
            ),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs'),
        ],
        **nuclei,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        ann_file='annotations/test.json',
        data_prefix=dict(img='images/test/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(1024, 512), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
            ),
        ],
        **nuclei,
    ),
)
test_dataloader = val_dataloader
ann_file = 'data/dsb2018/annotations/test.json'
val_evaluator = [
    # COCO's mAP counts the first 100 of an image; nucleus_precision, the AP of masks, all of them.
    dict(
        type='CocoMetric',
        ann_file=ann_file,
        metric=['bbox', 'segm'],
        metric_items=['mAP_50', 'mAP_75'],
        classwise=True,
    ),
    dict(type='DSB2018Metric', ann_file=ann_file, score_thr=0.7),
]
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=24, val_interval=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=24, eta_min=1e-5, convert_to_iter_based=True
    ),
]
# The contest has no images to choose a checkpoint by: the last one counts.
default_hooks = dict(checkpoint=dict(save_best=None))
