_base_ = './upernet_lavit_s_ade20k.py'

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 240, 480]),
    auxiliary_head=dict(in_channels=240),
)
