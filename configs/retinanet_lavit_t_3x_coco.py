_base_ = './retinanet_lavit_s_3x_coco.py'

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[96, 240, 480]),
)
